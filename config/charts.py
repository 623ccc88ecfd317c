"""The demo: ten classes of optical test charts at 32 pixels. Each stage takes minutes on two CPU cores."""
out_dir = 'out'
data = 'charts:8000'
dtype = 'float32'                       # on a CPU, bfloat16 pays for wide networks only

if script == 'train_tokenizer':
    image_size = 32
    patch_nums = (1, 2, 3, 4, 6, 8)
    channels, channel_mult, res_blocks = 16, (1, 1, 3), 1   # reduces by 4
    vocab_size, codebook_dim = 256, 16
    alias_channels = 8
    max_radius = 32.0                   # 4 of 32 pixels; the paper's 12 would hardly blur anything
    optimizer = 'muon'
    steps, warm_start, batch_size, lr = 560, 180, 16, 4e-3
    eval_every, save_every = 280, 280

if script == 'train_fvar':
    depth, embed_dim, num_heads = 4, 128, 4
    teacher_blocks, distill_warmup = 1, 1350
    lambda_feat = 0.1                   # with the paper's 1 a student learns more slowly at first
    optimizer = 'muon'
    steps, batch_size, lr, warmup = 2100, 16, 3e-3, 100
    eval_every, save_every, eval_pictures = 525, 525, 300

if script in ('sample', 'evaluate', 'refocus'):
    cfg, top_p = 2.0, 0.4               # after so little training the likeliest tokens are best

if script == 'evaluate':
    per_class = 50
