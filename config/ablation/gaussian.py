"""Table 3, "w/ Gaussian blur": σ = ρ/2 instead of the disk. Give it after another config file."""
out_dir, tokenizer = 'out-gaussian', ''
kernel = 'gaussian'
