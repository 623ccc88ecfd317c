"""Stage 1: trains both tokenizers, Q_L on focus states and Q_A on alias views, in one run.

    python train_tokenizer.py config/charts.py
    torchrun --nproc_per_node=8 train_tokenizer.py config/tokenizer_256.py
    python train_tokenizer.py config/charts.py --init_from=resume      # continue; =auto continues or starts

Writes to out_dir: tokenizer.pt (read by the later stages), tokenizer_state.pt (for resuming), tokenizer.jsonl
(the log), and tokenizer.png (held-out pictures: focus states as they should be, and as they are decoded).
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, configure
from data import batches, evenly_spaced, normalize, open_dataset
from pyramid import defocus
from tokenizer import build_tokenizers, compile_convolutions
from util import runtime, training
from util.checkpoint import (
    blame, check_resumed, load_checkpoint, load_optimizer, load_weights, locked, read_weights, resumes,
    save_checkpoint)
from util.metrics import psnr
from util.pictures import focus_labels, picture_grid, save_png

# input and output
out_dir = 'out'                 # everything is written here
init_from = 'scratch'           # scratch | resume | auto (resume if possible) | a tokenizer.pt | vae_….pth
# data
data = 'charts'                 # charts, or a folder with train/<class>/*.jpg and val/<class>/*.jpg
image_size = 256                # pixels; must be patch_nums[-1] · 2^(len(channel_mult) − 1)
flip = False                    # mirror half of the random crops (photographs, not charts)
workers = 0                     # processes that decode the images of a folder
# pyramid
patch_nums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # side of each token map (VAR's at 256 px)
pyramid = 'focus'               # focus, or scale: VAR's own tokenizer, the baseline
focus_input = 'image'           # image: encode the defocused image and pool its features; view: encode L_k
focus_schedule = 'matched'      # matched | states | cosine
max_radius = 12.0               # ρ_max in pixels of a 256-pixel image
kernel = 'disk'                 # disk | gaussian | none (Table 3)
noise = (1e-3, 1e-2)            # β_1 and β_K of Eq. 3, images in [−1, 1]
# structure tokenizer Q_L
vocab_size = 8192               # codes (paper)
codebook_dim = 32               # numbers per code
channels = 160                  # width at full resolution
channel_mult = (1, 1, 2, 2, 4)  # width at each resolution, relative to channels
res_blocks = 2                  # residual blocks at each resolution
phis = 4                        # convolutions φ, shared among the token maps
# alias tokenizer Q_A
dual = True                     # False: Q_A shares encoder, codebook and decoder with Q_L (Table 3)
alias_vocab_size = 512          # codes (paper)
alias_codebook_dim = 8          # numbers per code
alias_channels = 64             # width at full resolution; alias is sparse, so a small network will do
alias_res_blocks = 1            # residual blocks at each resolution
# loss
warm_start = 0                  # first steps, as a plain autoencoder; its features then seed the codes
beta = 0.25                     # commitment weight of the VQ loss
lambda_focus = 0.3              # weight of one random focus state per step; trains the decoder only
lambda_lpips = 0.0              # weight of LPIPS, which needs VGG weights on disk
lambda_gan = 0.0                # weight of the PatchGAN, times VQGAN's adaptive factor
gan_start = 0                   # first step with the discriminator
gan_channels = 64               # width of the discriminator
# codebook health
reseed_every = 50               # steps between searches for dead codes
reseed_until = 0.8              # fraction of the run after which codes are left alone
dead_below = 0.03               # a code is dead if it is used less than this times the average
# optimisation
optimizer = 'adamw'             # adamw (paper) | muon: for the convolutions, AdamW for the rest
steps = 100_000                 # optimizer steps (paper); 0 writes the tokenizers of init_from unchanged
batch_size = 256                # images per step, summed over ranks
grad_accum_steps = 1            # forward and backward passes that a step is split into
lr = 1e-4                       # peak learning rate, which the discriminator keeps throughout
warmup = 500                    # steps of linear warm-up
betas = (0.9, 0.95)             # Adam's decay rates
weight_decay = 0.0              # on the weights of convolutions only
grad_clip = 1.0                 # maximum gradient norm of each tokenizer; 0: none
# bookkeeping
eval_every = 2000               # steps between validations
eval_images = 256               # held-out images per validation
save_every = 2000               # steps between checkpoints
save_seconds = 1800.0           # or seconds, whichever comes first; 0 counts steps only
log_every = 20                  # steps between log lines
log_to = ''                     # also log to tensorboard | wandb, if installed
# system
compile = False                 # compile Q_L's encoder and decoder: slow to start, then faster steps
grad_checkpoint = False         # recompute activations in the backward pass: less memory, a third more work
device = 'auto'                 # auto | cpu | cuda
dtype = 'auto'                  # auto | float32 | bfloat16 | float16
seed = 0                        # determines everything random
config = configure(globals())

# what a resumed run cannot change: shapes of weights, and which images each step sees (the folder may move)
FIXED = (
    'image_size', 'flip', 'batch_size', 'seed', 'patch_nums', 'vocab_size', 'codebook_dim', 'channels',
    'channel_mult', 'res_blocks', 'phis', 'dual', 'alias_vocab_size', 'alias_codebook_dim', 'alias_channels',
    'alias_res_blocks', 'gan_channels', 'optimizer')


def patch_discriminator(width):
    """PatchGAN (Isola et al. 2017) as VQGAN uses it: (B, 3, S, S) → one logit per patch.

    GroupNorm replaces BatchNorm, whose statistics would depend on the number of ranks.
    """
    layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False),
                   nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
        width = 2 * width
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))


def load_lpips(dev):
    """torch-fidelity's LPIPS network. Nothing is downloaded; UserError says which file to put where."""
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS
    from torchvision.models import VGG16_Weights
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    urls = [url for url in (URL_VGG16_LPIPS, VGG16_Weights.IMAGENET1K_V1.url)
            if not (folder / Path(url).name).is_file()]
    if urls:
        raise UserError(f'LPIPS needs {" and ".join(urls)} in {folder}; or run with --lambda_lpips=0')
    network = SampleSimilarityLPIPS('lpips').to(dev)
    # its normalize() is affine, but sends two constants to the GPU for every picture: compute them once
    zero, one = (network.normalize(torch.full((1, 3, 1, 1), value, device=dev)) for value in (0.0, 1.0))
    network.normalize = lambda pictures: zero + (one - zero) * pictures.float()
    return network


def adaptive_weight(reconstruction, adversarial, last_layer):
    """VQGAN's λ: the ratio of the two losses' gradients at the decoder's last layer, averaged over ranks."""
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
                 for loss in (reconstruction, adversarial)]
    norms = [runtime.all_reduce(gradient, average=True).norm() for gradient in gradients]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)


# -----------------------------------------------------------------------------
# one step

def set_up(dev):
    """The networks on a device and what trains them, as a namespace."""
    run = SimpleNamespace(dev=dev)
    run.autocast, run.scaler = runtime.precision(dtype, dev)
    run.structure, run.alias = build_tokenizers(config)
    run.structure.grad_checkpoint = run.alias.grad_checkpoint = grad_checkpoint
    run.tokenizers = nn.ModuleDict({'structure': run.structure, 'alias': run.alias})
    run.discriminator = patch_discriminator(gan_channels) if lambda_gan else nn.Sequential()
    run.networks = nn.ModuleDict({**run.tokenizers, 'discriminator': run.discriminator})
    run.networks.to(dev, memory_format=torch.channels_last)
    runtime.broadcast_weights(run.networks)
    if lambda_lpips:
        run.lpips = load_lpips(dev)
    matrices = [part.weight for part in run.tokenizers.modules()                # not to or from RGB
                if isinstance(part, nn.Conv2d) and min(part.in_channels, part.out_channels) > 3]
    run.optimizer = training.build_optimizer(optimizer, matrices, run.tokenizers, lr, betas, weight_decay)
    run.gan_optimizer = training.adamw(run.discriminator, lr, betas, weight_decay)
    run.safe_step = training.SafeStep(run.optimizer, run.scaler, grad_clip)
    if compile:
        compile_convolutions(run.structure)
    return run


def decodes_states():
    """Whether a step also decodes a focus state."""
    return pyramid == 'focus' and lambda_focus


def forward(run, images, noise, step):
    """One pass of both tokenizers: (loss, its terms by name, what codebooks and discriminator learn from).

    The namespace is that of StructureTokenizer.forward(), with images, energy (mean square of the alias
    views) and alias, the namespace of AliasTokenizer.forward().
    """
    structure, alias, state = run.structure, run.alias, None
    if decodes_states():
        generator = runtime.generator(seed, 'state', step)
        state = torch.randint(len(patch_nums) - 1, (1,), generator=generator).item()
    if step < warm_start:
        out = SimpleNamespace(picture=structure.autoencode(images), state_picture=None,
                              vq=images.new_zeros(()), tokens=[], residuals=[])
    else:
        out = structure(images, noise, state)
    views = alias.views(images, noise)
    energy = torch.stack([view.square().mean() for view in views])
    out.images, out.energy = images, runtime.all_reduce(energy, average=True)
    out.alias = alias(alias.normalised(views, out.energy))

    terms = {'l1': F.l1_loss(out.picture, images), 'l2': F.mse_loss(out.picture, images)}
    if out.state_picture is not None:
        wanted = defocus(images, structure.radii[state], structure.kernel)
        terms['focus'] = F.mse_loss(out.state_picture, wanted)
    if lambda_lpips:
        pictures = out.picture.float().clamp(-1, 1), images
        terms['lpips'] = run.lpips(*((x + 1) * 127.5 for x in pictures)).mean()
    terms |= {'vq': out.vq, 'alias_l2': out.alias.l2, 'alias_vq': out.alias.vq}
    reconstruction = terms['l1'] + terms['l2'] + lambda_lpips * terms.get('lpips', 0)
    loss = reconstruction + lambda_focus * terms.get('focus', 0) + out.vq + out.alias.l2 + out.alias.vq
    if lambda_gan and step >= gan_start:
        terms['gan'] = -run.discriminator(out.picture).mean()
        weight = adaptive_weight(reconstruction, terms['gan'], structure.decoder.conv_out.weight)
        loss = loss + lambda_gan * weight * terms['gan']
    return loss, terms, out


def train_step(run, step, images):
    """One optimizer step on this rank's uint8 images (b, 3, S, S): (loss terms by name, gradient norm), all
    tensors."""
    images = normalize(runtime.to_device(images, run.dev)).contiguous(memory_format=torch.channels_last)
    numbers = np.array_split(runtime.sample_numbers(step, batch_size), grad_accum_steps)
    terms, passes = {}, []
    for part, of_part in zip(images.chunk(grad_accum_steps), numbers):
        noise = runtime.noise_of(of_part, run.dev, seed, 'noise')
        with run.autocast():
            loss, found, out = forward(run, part, noise, step)
        run.scaler.scale(loss / grad_accum_steps).backward()
        terms = {name: terms.get(name, 0) + term.detach() / grad_accum_steps for name, term in found.items()}
        passes.append(out)
    runtime.average_gradients(run.tokenizers)
    learning = (run.structure, run.alias) if dual else (run.structure,)
    parameters = [tokenizer.parameters() for tokenizer in learning]
    norm, finite = run.safe_step(parameters, training.learning_rate(step, steps, lr, warmup))
    if lambda_gan and step >= gan_start:
        terms['discriminator'] = discriminator_step(run, passes, finite)
    update_codebooks(run, passes, finite, step)
    return terms, norm


def discriminator_step(run, passes, finite):
    """One step on the hinge loss, which is returned. Skipped where `finite` (tensor) is false or its own
    gradient is not finite."""
    run.gan_optimizer.zero_grad(set_to_none=True)           # drops what the generator's loss left there
    total = 0
    for out in passes:
        with run.autocast():
            real = run.discriminator(out.images)
            fake = run.discriminator(out.picture.detach())
            loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / len(passes)
        loss.backward()
        total = total + loss.detach()
    runtime.average_gradients(run.discriminator)
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.discriminator.parameters()])
    run.gan_optimizer.found_inf = (~(finite & norm.isfinite())).float()
    run.gan_optimizer.step()
    return total


@torch.no_grad()
def update_codebooks(run, passes, finite, step):
    """Counts code use, tracks the scale of alias views and reseeds dead codes, identically on every rank.

    passes: the namespaces of forward(), one per pass. Nothing changes where `finite` (tensor) is false.
    """
    run.alias.track_scale(torch.stack([out.energy for out in passes]).mean(0), finite)
    since = step - warm_start
    reseed = reseed_every and since >= 0 and since % reseed_every == 0 and step < reseed_until * steps
    structure = [(out.tokens, out.residuals) for out in passes]
    alias = [(out.alias.tokens, out.alias.features) for out in passes]
    used = [(run.alias.codebook, [structure, alias])]       # one codebook for both
    if dual:
        used = [(run.structure.quantizer.codebook, [structure]), (run.alias.codebook, [alias])]
    for i, (codebook, users) in enumerate(used):
        hits = sum(codebook.histogram(tokens) for found in users for tokens, _ in found)
        codebook.count(runtime.all_reduce(hits), finite)
        if reseed:
            maps = [parts for found in users for parts in zip(*(vectors for _, vectors in found))]
            everywhere = [runtime.gather(torch.cat(parts).flatten(2).mT.flatten(0, 1)) for parts in maps]
            codebook.reseed(everywhere, runtime.generator(seed, 'dead codes', i, step), dead_below, finite)


def flops_per_image():
    """FLOPs of one training step of the tokenizers per image, without LPIPS and discriminator."""
    with torch.device('meta'):
        structure, alias = build_tokenizers(config)
        image, state = torch.empty(1, 3, image_size, image_size), 0 if decodes_states() else None
        views = alias.normalised(alias.views(image))
        return 3 * training.count_flops(lambda: (structure(image, None, state), alias(views)))


@torch.no_grad()
def validate(run, step, images, size):
    """Prints and returns metrics of held-out uint8 images, in batches of `size`: PSNR of the picture and of
    every focus state (dB), codes used, and the fraction of alias energy that Q_A misses (0 for an empty
    view). Perplexity is from training."""
    structure, alias, codebook = run.structure, run.alias, run.structure.quantizer.codebook
    sums, hits, K = 0, 0, len(patch_nums)
    for part in images.split(size):
        x = normalize(runtime.to_device(part, run.dev))
        tokens, views = structure.encode(x), alias.views(x)
        found = [*map(psnr, structure.decode_states(tokens), structure.focus_states(x)),
                 *(view.square().mean() for view in views),
                 *map(F.mse_loss, alias.decode(alias.encode(x)), views)]
        sums += len(part) * np.array([float(number) for number in found])
        hits += codebook.histogram(tokens)
    psnrs, energy, missed = np.split(sums / len(images), [K, 2 * K - 1])
    missed = np.where(energy > 1e-8, missed, 0) / np.maximum(energy, 1e-8)      # less energy is rounding
    metrics = {'psnr': psnrs[-1].item(), 'psnr_states': psnrs.tolist(), 'alias_missed': missed.tolist(),
               'perplexity': codebook.perplexity().tolist(), 'codes_used': (hits > 0).sum(1).tolist(),
               'alias_perplexity': alias.codebook.perplexity().tolist() if dual else []}
    runtime.say(f'step {step}: PSNR {psnrs[-1]:.2f} dB, focus states {brief(psnrs, ".1f")}, perplexity '
                f'{brief(metrics["perplexity"], ".0f")}, alias missed {brief(missed, ".2f")}')
    # a perplexity below 2, or below 1 % of the codes that a token map could use
    collapsed = [k for k, (p, n) in enumerate(zip(metrics['perplexity'], patch_nums), start=1)
                 if p < max(2, 0.01 * min(batch_size * n * n, vocab_size))]
    if collapsed:
        runtime.say(f'warning: token maps {collapsed} use almost no codes; raise reseed_until, or start anew '
                    'with a larger batch_size')
    return metrics


def brief(numbers, form):
    return ' '.join(format(number, form) for number in numbers)


def save_pictures(structure, images, path):
    """Two rows per image: the blurred originals F_ρk(x), and what the first k token maps decode to."""
    wanted = structure.focus_states(images)
    decoded = structure.decode_states(structure.encode(images))
    rows = torch.stack([*wanted, *decoded], 1).flatten(0, 1)
    save_png(path, picture_grid(rows, len(wanted), ('blurred', 'decoded') * len(images),
                                focus_labels(structure.radii, decoded, wanted), side=112))


# -----------------------------------------------------------------------------
# the run

def save(run, step, metrics, classes):
    """Writes tokenizer.pt and tokenizer_state.pt."""
    if runtime.rank() == 0:
        common = {'config': config, 'step': step, 'metrics': metrics}
        weights = {name: tokenizer.state_dict() for name, tokenizer in run.tokenizers.items()}
        save_checkpoint(f'{out_dir}/tokenizer.pt', common | weights | {
            'kind': 'tokenizer', 'classes': classes})
        save_checkpoint(f'{out_dir}/tokenizer_state.pt', common | {
            'kind': 'tokenizer training', 'networks': run.networks.state_dict(),
            'safe_step': run.safe_step.state_dict(),
            'optimizers': [run.optimizer.state_dict(), run.gan_optimizer.state_dict()]})


def resume(run, state_file):
    """Restores a stopped run; returns (step, metrics) of its checkpoint."""
    saved = load_checkpoint(state_file, 'tokenizer training', made_by='train_tokenizer.py', shared=True)
    check_resumed(saved, config, FIXED, state_file)
    with blame(state_file):
        load_weights(run.networks, saved['networks'], state_file)
        for optimizer, state in zip((run.optimizer, run.gan_optimizer), saved['optimizers']):
            load_optimizer(optimizer, state)
        run.safe_step.load_state_dict(saved['safe_step'])
        return saved['step'], saved['metrics']


def start_from(run):
    """Fills the tokenizers with the weights of init_from; VAR's file has only the structure tokenizer."""
    saved = read_weights(init_from)
    if warm_start:
        runtime.say(f'note: the first {warm_start} steps train without codes; use --warm_start=0 to keep '
                    f'those of {init_from}')
    if isinstance(saved, dict) and saved.get('kind') == 'tokenizer':
        for name, tokenizer in run.tokenizers.items():
            load_weights(tokenizer, saved[name], init_from)
    else:
        from published import fill_official_tokenizer       # here: it imports the transformer
        fill_official_tokenizer(run.structure, saved)


def check_settings():
    """Raises UserError for settings that would fail, some of them only in a later step."""
    runtime.require_positive(
        config, 'image_size', 'eval_every', 'eval_images', 'save_every', 'log_every', 'vocab_size',
        'codebook_dim', 'channels', 'res_blocks', 'phis', 'alias_vocab_size', 'alias_codebook_dim',
        'alias_channels', 'alias_res_blocks', 'gan_channels')
    if len(patch_nums) < 2:
        raise UserError(f'patch_nums={patch_nums}: give at least two token maps, or nothing comes into focus')
    if lambda_lpips and image_size < 16:
        raise UserError(f'image_size={image_size}: LPIPS needs at least 16 pixels; use --lambda_lpips=0')
    if lambda_gan and dtype == 'float16':
        raise UserError("--dtype=float16 loses the GAN's small gradients: use bfloat16, or --lambda_gan=0")
    if lambda_gan and (image_size < 24 or gan_channels % 4):
        raise UserError(f'image_size={image_size}, gan_channels={gan_channels}: the discriminator needs '
                        '24 pixels or more and a multiple of 4 channels; or use --lambda_gan=0')


def describe(run, dataset):
    """Prints model sizes, data and radii."""
    radii = run.structure.radii
    runtime.say(f'structure tokenizer {runtime.millions(run.structure)}, alias tokenizer '
                f'{runtime.millions(run.alias)}, {len(dataset)} images of {len(dataset.classes)} classes, '
                f'radii {brief(radii, ".2g")}')
    sharp = [k for k, radius in enumerate(radii[:-1], start=1) if radius <= 0.5]
    if sharp and max(radii):
        runtime.say(f'note: blur of ≤ ½ pixel is no blur, so token maps {sharp} have no alias for a teacher '
                    'to see; raise max_radius to change that')


def main():
    # device, data
    dev = runtime.start(device, seed)
    check_settings()
    batch_per_pass = runtime.share_of_batch(batch_size, grad_accum_steps)
    dataset = open_dataset(data, 'train', image_size, flip=flip, seed=seed)
    held_out, _ = evenly_spaced(open_dataset(data, 'val', image_size), eval_images)

    with locked(f'{out_dir}/tokenizer.lock'):
        # networks
        run = set_up(dev)
        step, metrics, state_file = 0, {}, f'{out_dir}/tokenizer_state.pt'
        if resumes(init_from, state_file):
            step, metrics = resume(run, state_file)
        elif init_from not in ('scratch', 'auto'):
            start_from(run)
        describe(run, dataset)

        # training
        supply = batches(dataset, batch_size, seed, step, workers)
        if steps == 0:
            save(run, step, metrics, dataset.classes)
        training.train(
            run, config, 'tokenizer', step, metrics, flops_per_image,
            train_step=lambda step: train_step(run, step, next(supply)[0]),
            validate=lambda step: validate(run, step, held_out, batch_per_pass),
            save=lambda step, metrics: save(run, step, metrics, dataset.classes),
            validate_after=warm_start)
    if runtime.rank() == 0:
        save_pictures(run.structure, normalize(held_out[:6].to(dev)), f'{out_dir}/tokenizer.png')
        runtime.say(f'wrote {out_dir}/tokenizer.pt and {out_dir}/tokenizer.png')


if __name__ == '__main__':
    runtime.run(main)
