"""Photographs at 64 pixels on a small machine: python train_tokenizer.py config/folder64.py --data=DIR, …"""
out_dir = 'out-folder64'

if script == 'train_tokenizer':
    data = 'data/folder'                # has train/<class>/* and val/<class>/*
    image_size = 64
    patch_nums = (1, 2, 3, 4, 6, 8)
    channels, channel_mult, res_blocks = 16, (1, 1, 3, 3), 1    # reduces by 8
    vocab_size, codebook_dim = 1024, 16
    alias_channels = 8
    max_radius = 24.0                   # 6 of 64 pixels: 0.75 sampling steps, like 12 of 256
    steps, warm_start, batch_size, lr = 2000, 800, 16, 3e-3
    eval_every, save_every = 500, 500

if script == 'encode':
    crops = 1                           # more of them take longer, and pay off in longer runs

if script == 'train_fvar':
    depth, embed_dim, num_heads = 4, 256, 4
    teacher_blocks = 1
    steps, batch_size, lr, warmup = 1200, 16, 1e-3, 100
    eval_every, save_every = 300, 600

if script in ('sample', 'evaluate'):
    cfg, top_p = 3.0, 0.8
