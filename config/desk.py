"""What all rows of experiments/ablation.py share: 16 pixels, five token maps, minutes of training on a core.

Small, because several seeds say more than one large run. A code stands for 2 × 2 pixels, so a tokenizer soon
reconstructs well enough for differences between students to show. ablation.py sets the number of steps.
"""
out_dir = 'out-desk'
dtype = 'float32'                       # on a CPU, bfloat16 pays for wide networks only

if script == 'train_tokenizer':
    image_size = 16
    patch_nums = (1, 2, 3, 5, 8)        # 103 tokens; with five maps the three schedules differ
    channels, channel_mult, res_blocks = 16, (1, 3), 1      # reduces by 2
    codebook_dim = 16                   # ablation.py sets the number of codes
    alias_vocab_size, alias_channels = 128, 8
    max_radius = 64.0                   # 4 of 16 pixels; with the paper's 12 the last maps have no alias
    optimizer = 'muon'
    batch_size, lr, warmup = 16, 4e-3, 50

if script == 'encode':
    batch_size = 64

if script == 'train_fvar':
    depth, embed_dim, num_heads = 4, 96, 4
    teacher_blocks, drop_path = 1, 0.0  # so short a run needs no regularisation
    lambda_feat = 0.1                   # as in charts.py
    optimizer = 'muon'
    batch_size, lr, warmup = 8, 3e-3, 50

if script == 'evaluate':
    cfg, top_p = 2.0, 0.4               # as in charts.py
    per_class = 50
    distance = 'cnn'
