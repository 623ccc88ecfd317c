"""FVAR-d24 at 256 pixels (Table 1), on the token files of config/tokenizer_256.py."""
out_dir = 'out-d24'
tokenizer = 'out-tokenizer_256/tokenizer.pt'
depth = 24
grad_accum_steps = 2                # 47 GiB instead of 69 on each of eight GPUs, at no cost
