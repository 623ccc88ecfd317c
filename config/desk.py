"""What all rows of ablation.py have in common: 16 pixels, five token maps, networks that train in minutes on one core.

Small, because seeds say more than size. A code stands for 2 × 2 pixels, so that a tokenizer is soon good enough for what
students do to show: VAR's had an rFD of 5 beside an FD-cnn of 63 after 300 and 500 steps (256 codes, maps 1,2,3,4,6,8; one
seed). With 4 × 4 pixels a code it had 21 beside 33 at 16 pixels (600 and 800 steps), 28 beside 66 at 24 (300 and 400).
ablation.py says how many steps there are.
"""
out_dir = 'out-desk'

if script == 'train_tokenizer':
    image_size = 16
    patch_nums = (1, 2, 3, 5, 8)        # 103 tokens; with five maps the three schedules differ
    channels, channel_mult, res_blocks = 16, (1, 3), 1      # reduces by 2
    codebook_dim = 16                     # ablation.py says how many codes there are
    alias_vocab_size, alias_channels = 128, 8
    max_radius = 64.0                   # 4 of 16 pixels; with the paper's 12 the last maps have no alias for a teacher to see
    batch_size, lr, warmup = 16, 4e-3, 50

if script == 'encode':
    batch_size = 64

if script == 'train_fvar':
    depth, embed_dim, num_heads = 4, 96, 4
    teacher_blocks, drop_path = 1, 0.0  # so short a run has nothing to regularise
    lambda_feat = 0.1                   # as charts.py
    batch_size, lr, warmup = 8, 3e-3, 50

if script == 'evaluate':
    cfg, top_p = 2.0, 0.4               # as charts.py: a young student is surest of its likeliest tokens
    per_class = 50
    distance = 'cnn'
