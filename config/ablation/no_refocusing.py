"""Table 3, "w/o progressive refocusing": no blur, so A = 0 and the teacher sees constant tokens.

Give it after another config file.
"""
out_dir, tokenizer = 'out-no_refocusing', ''
kernel = 'none'
