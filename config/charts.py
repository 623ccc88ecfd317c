"""The demo: ten classes of optical test charts at 32 pixels, made in code. Every stage in minutes on two CPU cores."""
out_dir = 'out'
data = 'charts'

if script == 'train_tokenizer':
    image_size = 32
    patch_nums = (1, 2, 3, 4, 6, 8)
    channels, channel_mult, res_blocks = 16, (1, 1, 3), 1   # reduces by 4
    vocab_size, code_width = 256, 16
    alias_channels = 8
    # the paper's ρ_max = 12 at 256 px is 0.75 of its first sampling step s_1 = 16; here s_1 = 8, so 6 of 32 px
    max_radius = 48.0
    steps, warm_start, batch_size, lr = 1000, 400, 16, 4e-3
    eval_every, save_every = 200, 500

if script == 'train_fvar':
    depth, width, num_heads = 4, 128, 4
    teacher_blocks, distill_warmup = 1, 600
    steps, batch_size, lr, warmup = 900, 32, 3e-3, 30
    eval_every, save_every, eval_pictures = 300, 300, 300
