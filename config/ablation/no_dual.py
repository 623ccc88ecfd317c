"""Table 3, "w/o dual tokenizers": one encoder, codebook and decoder for structure and alias.

Give it after another config file.
"""
out_dir, tokenizer = 'out-no_dual', ''
dual = False
