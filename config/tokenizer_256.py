"""Both tokenizers at 256 pixels (the defaults), with what photographs need: LPIPS and the PatchGAN."""
out_dir = 'out-tokenizer_256'
data = 'data/imagenet'              # train/<class>/*, val/<class>/*
workers = 8                         # of each rank

if script == 'train_tokenizer':
    lambda_lpips = 1.0
    lambda_gan, gan_start = 0.5, 20_000     # once reconstructions are no longer blobs
    grad_checkpoint = True                  # ten focus states of each picture go through the encoder
    betas = (0.5, 0.9)                      # short averages: the two networks chase each other

if script == 'encode':
    crops = 10                              # 12.8 million rows of ImageNet, 28 GB of token files
