"""Table 3, "VAR-d16 (baseline)": next-scale prediction, no teacher. Give it after another config file."""
out_dir, tokenizer = 'out-var', ''
pyramid = 'scale'
distill = False
