"""FVAR-d36 at 512 pixels (Table 2), on the token files of config/tokenizer_512.py."""
out_dir = 'out-d36_512'
tokenizer = 'out-tokenizer_512/tokenizer.pt'
depth = 36
shared_aln = True                   # as VAR's 512-px model: one AdaLN projection instead of 36
grad_checkpoint, fsdp = True, True
