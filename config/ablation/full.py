"""Table 3, "FVAR-d16 (full)": everything. Give it after another config file."""
out_dir, tokenizer = 'out-full', ''
