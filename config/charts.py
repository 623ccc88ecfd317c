"""The demo: ten classes of optical test charts at 32 pixels, made in code. Every stage in minutes on two CPU cores."""
out_dir = 'out'
data = 'charts'

if script == 'train_tokenizer':
    image_size = 32
    patch_nums = (1, 2, 3, 4, 6, 8)
    channel_mult = (1, 2, 2)            # reduces by 4
    channels, res_blocks = 24, 1
    vocab_size, code_width = 512, 16
    alias_vocab_size, alias_channels = 64, 16
    # the paper's ρ_max = 12 at 256 px is 0.75 of its first sampling step s_1 = 16; here s_1 = 8, so 6 of 32 px
    max_radius = 48.0
    steps, batch_size, lr = 1000, 32, 2e-3

if script == 'train_fvar':
    depth = 4
    steps, batch_size, lr, warmup = 600, 64, 1e-3, 50
    eval_every, save_every = 300, 300
