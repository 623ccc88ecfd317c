"""FVAR-d12 at 256 pixels (Table 1), on the token files of config/tokenizer_256.py."""
out_dir = 'out-d12'
tokenizer = 'out-tokenizer_256/tokenizer.pt'
depth = 12
