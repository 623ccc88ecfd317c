"""FVAR-d16 at 1024 pixels (Tables 2 and 4), on the token files of config/tokenizer_1024.py."""
out_dir = 'out-d16_1024'
tokenizer = 'out-tokenizer_1024/tokenizer.pt'
depth = 16
grad_checkpoint, fsdp, grad_accum_steps = True, True, 4      # 10,521 tokens a picture
