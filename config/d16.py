"""FVAR-d16 at 256 pixels (Table 1), on the token files of config/tokenizer_256.py."""
out_dir = 'out-d16'
tokenizer = 'out-tokenizer_256/tokenizer.pt'
depth = 16
