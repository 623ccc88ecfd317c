"""Both tokenizers at 1024 pixels. The paper gives no token maps for this size; these are ours."""
out_dir = 'out-tokenizer_1024'
data = 'data/imagenet'
workers = 8

if script == 'train_tokenizer':
    image_size, patch_nums = 1024, (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
    lambda_lpips, lambda_gan, gan_start = 1.0, 0.5, 20_000
    grad_checkpoint, betas = True, (0.5, 0.9)
    grad_accum_steps = 8                    # four pictures at a time on each of eight GPUs

if script == 'encode':
    crops = 10
