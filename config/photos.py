"""Photographs at 32 pixels on a small machine: python train_tokenizer.py config/photos.py --data=DIR, …"""
out_dir = 'out-photos'
dtype = 'float32'                       # on a CPU, bfloat16 pays for wide networks only

if script == 'train_tokenizer':
    data = 'data/photos'                # has train/<class>/* and val/<class>/*
    flip = True
    image_size = 32
    patch_nums = (1, 2, 3, 4, 6, 8)
    channels, channel_mult, res_blocks = 16, (1, 1, 3), 1   # reduces by 4
    vocab_size, codebook_dim = 512, 16
    alias_channels = 8
    max_radius = 32.0                   # 4 of 32 pixels
    optimizer = 'muon'
    steps, warm_start, batch_size, lr = 2400, 500, 16, 3e-3
    eval_every, save_every = 600, 600

if script == 'encode':
    crops = 2                           # half of them mirrored

if script == 'train_fvar':
    depth, embed_dim, num_heads = 4, 192, 6
    teacher_blocks, distill_warmup = 1, 1700
    lambda_feat = 0.1                   # as in charts.py
    optimizer = 'muon'
    steps, batch_size, lr, warmup = 2600, 16, 2e-3, 100
    eval_every, save_every = 325, 650

if script in ('sample', 'evaluate', 'refocus'):
    cfg, top_p = 2.0, 0.6

if script == 'evaluate':
    per_class = 50
