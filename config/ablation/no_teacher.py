"""Table 3, "w/o high-frequency teacher": the student alone, on focus tokens.

Give it after another config file. Only stage 2 differs from full.py, so it uses full's tokenizer and tokens.
"""
out_dir, tokenizer = 'out-no_teacher', 'out-full/tokenizer.pt'
distill = False
