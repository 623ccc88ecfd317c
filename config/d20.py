"""FVAR-d20 at 256 pixels (Table 1), on the token files of config/tokenizer_256.py."""
out_dir = 'out-d20'
tokenizer = 'out-tokenizer_256/tokenizer.pt'
depth = 20
