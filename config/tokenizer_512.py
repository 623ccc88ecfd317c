"""Both tokenizers at 512 pixels: tokenizer_256's settings, VAR's token maps for this size."""
out_dir = 'out-tokenizer_512'
data = 'data/imagenet'
workers = 8

if script == 'train_tokenizer':
    image_size, patch_nums = 512, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    lambda_lpips, lambda_gan, gan_start = 1.0, 0.5, 20_000
    grad_checkpoint, betas = True, (0.5, 0.9)

if script == 'encode':
    crops = 10
