"""Stage 1: trains both tokenizers, Q_L over focus states and Q_A over alias views, in one run.

    python train_tokenizer.py config/charts.py
    torchrun --nproc_per_node=8 train_tokenizer.py config/tokenizer_256.py
    python train_tokenizer.py config/charts.py --init_from=resume      # goes on where it stopped; so does =auto, or it starts

Writes to out_dir: tokenizer.pt (what the later stages read), tokenizer_state.pt (for resuming),
tokenizer.jsonl (the log) and tokenizer.png (held-out pictures: what a focus state should be, what it decodes to).
"""
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

import runtime
from configurator import UserError, configure
from data import batches, in_order, normalize, open_dataset
from metrics import psnr
from model import fill_official_tokenizer
from pictures import picture_grid, save_png
from pyramid import defocus, psf
from tokenizer import build_tokenizers

# input and output
out_dir = 'out'                 # everything is written here
init_from = 'scratch'           # scratch | resume | auto (resume if it can) | VAR's published vae_ch160v4096z32.pth for Q_L
# data
data = 'charts'                 # charts, or a folder with train/<class>/*.jpg and val/<class>/*.jpg
image_size = 256                # pixels; must be patch_nums[-1] · 2^(len(channel_mult) − 1)
workers = 0                     # processes that decode images of a folder (charts are made in memory)
# the pyramid
patch_nums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # side of each token map (VAR's at 256 px)
pyramid = 'focus'               # focus, or scale: VAR's own tokenizer, the baseline
focus_input = 'image'           # image: encode the defocused picture, pool its features; view: encode L_k (Eq. 3)
focus_schedule = 'matched'      # matched | states | cosine
max_radius = 12.0               # ρ_max in pixels of a 256-pixel image
kernel = 'disk'                 # disk | gaussian | none (Table 3)
noise = (1e-3, 1e-2)            # β_1 and β_K of Eq. 3, images in [−1, 1]
# the structure tokenizer Q_L
vocab_size = 8192               # codes (paper)
code_width = 32                 # numbers a code
channels = 160                  # width at full resolution
channel_mult = (1, 1, 2, 2, 4)  # width at each resolution, relative to channels
res_blocks = 2                  # residual blocks at each resolution
phis = 4                        # convolutions φ shared among the token maps
# the alias tokenizer Q_A
dual = True                     # False: Q_A shares encoder, codebook and decoder with Q_L (Table 3)
alias_vocab_size = 512          # codes (paper)
alias_code_width = 8            # numbers a code
alias_channels = 64             # width at full resolution; alias is sparse, so this is a small network
alias_res_blocks = 1            # residual blocks at each resolution
# loss
warm_start = 0                  # steps without the quantizer: a plain autoencoder learns faster, and codes then start on its features
beta = 0.25                     # commitment weight of the VQ loss
lambda_focus = 0.02             # weight of one randomly chosen focus state a step; 0.1 cost photographs 0.4 dB, charts 0.1
lambda_lpips = 0.0              # weight of LPIPS; needs VGG weights on disk
lambda_gan = 0.0                # weight of the PatchGAN, times VQGAN's adaptive factor
gan_start = 0                   # step from which the discriminator counts
gan_channels = 64               # its width
# codebook health
reseed_every = 50               # steps between searches for dead codes
reseed_until = 0.8              # share of the run after which codes are left alone
dead_below = 0.03               # a code used less than this share of an even share is dead
# optimisation
steps = 100_000                 # optimizer steps (paper); 0 writes the tokenizers as init_from gives them
batch_size = 256                # images a step, over all ranks
lr = 1e-4                       # peak learning rate
warmup = 500                    # steps of linear warm-up
betas = (0.9, 0.95)             # Adam's averages
weight_decay = 0.0              # on the weights of convolutions only
grad_clip = 1.0                 # largest gradient norm of either tokenizer
# bookkeeping
eval_every = 2000               # steps between validations
eval_images = 256               # held-out images a validation
save_every = 2000               # steps between checkpoints
save_seconds = 1800.0           # and seconds, whichever is first; 0: steps alone
log_every = 20                  # steps between log lines
log_to = ''                     # tensorboard | wandb: show what is logged there too, if it is installed
# system
recompute = False               # keep nothing inside Q_L for the backward pass: a third more work, a fraction of the memory
device = 'auto'                 # auto | cpu | cuda
dtype = 'auto'                  # auto | float32 | bfloat16 | float16
seed = 0                        # everything random follows from it
config = configure(globals())


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017) as VQGAN uses it: (B, 3, S, S) → one logit a patch.

    GroupNorm stands in for BatchNorm, whose statistics would depend on the number of ranks.
    """

    def __init__(self, width, downsamplings=3):
        widths = [width * min(2 ** i, 8) for i in range(downsamplings + 1)]
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, downsamplings + 1):
            stride = 2 if i < downsamplings else 1
            layers += [nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False),
                       nn.GroupNorm(8, widths[i]), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))


def load_lpips(dev):
    """torch-fidelity's LPIPS network, from weights on disk only. UserError says which files go where."""
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS
    from torchvision.models import VGG16_Weights
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    urls = [url for url in (URL_VGG16_LPIPS, VGG16_Weights.IMAGENET1K_V1.url)
            if not os.path.isfile(os.path.join(folder, os.path.basename(url)))]
    if urls:
        raise UserError(f'LPIPS needs {" and ".join(urls)} in {folder}; or run with --lambda_lpips=0')
    return SampleSimilarityLPIPS('lpips').to(dev)


def adaptive_weight(reconstruction, adversarial, last_layer):
    """VQGAN's λ: the ratio of the two losses' gradients at the decoder's last layer, averaged over ranks."""
    norms = [runtime.all_reduce(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float(), average=True).norm()
             for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)


def reconstruction_terms(images, picture, state_picture, state, structure, lpips):
    """The terms of the loss that compare pictures, by name, unweighted. images (B, 3, S, S) in [−1, 1]."""
    terms = {'l1': F.l1_loss(picture, images), 'l2': F.mse_loss(picture, images)}
    if state_picture is not None:
        terms['focus'] = F.mse_loss(state_picture, defocus(images, structure.radii[state], structure.kernel))
    if lpips is not None:
        terms['lpips'] = lpips((picture.clamp(-1, 1) + 1) * 127.5, (images + 1) * 127.5).mean()
    return terms


def discriminator_loss(discriminator, real, fake):
    """Hinge loss; fake is detached."""
    return 0.5 * (F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake.detach())).mean())


def reseed_dead_codes(structure, alias, residuals, alias_vectors, step):
    """Gives dead codes of both codebooks a new start on this step's residuals, the same on every rank."""
    replaced = []
    jobs = [(structure.quantizer.codebook, residuals, 1)] + ([(alias.codebook, alias_vectors, 2)] if alias.dual else [])
    for codebook, maps, stream in jobs:
        vectors = [runtime.gather(r.flatten(2).transpose(1, 2).contiguous()).flatten(0, 1) for r in maps]
        replaced.append(codebook.reseed(vectors, runtime.generator(seed, step, 30 + stream), dead_below))
    return replaced


@torch.no_grad()
def validate(structure, alias, images):
    """Held-out figures: PSNR of the picture and of every focus state (dB), perplexity of every token map, and the
    share of the alias views' energy that Q_A fails to reproduce (0 of an empty view)."""
    tokens = structure.encode(images)
    states = structure.decode_states(tokens)
    wanted = [defocus(images, radius, structure.kernel) for radius in structure.radii]
    views = alias.views(images)
    energies = [view.square().mean().item() for view in views]
    missed = [F.mse_loss(ours, view).item() / energy if energy > 1e-8 else 0.0      # less is rounding
              for ours, view, energy in zip(alias.decode(alias.encode(images)), views, energies)]
    counts = [torch.bincount(t.flatten(), minlength=structure.quantizer.codebook.num_embeddings).float() for t in tokens]
    used = [(c > 0).sum().item() for c in counts]
    return {'psnr': psnr(states[-1], images), 'psnr_states': [psnr(a, b) for a, b in zip(states, wanted)],
            'perplexity': structure.quantizer.codebook.perplexity().tolist(), 'codes_used': used,
            'alias_perplexity': alias.codebook.perplexity().tolist() if alias.dual else [], 'alias_missed': missed}


def collapsed(perplexity, tokens_a_step):
    """Token maps (from 1) that use fewer than 2 codes, or 1 % of what they could, as perplexity."""
    size = vocab_size
    return [k + 1 for k, (p, n) in enumerate(zip(perplexity, tokens_a_step)) if p < max(2, 0.01 * min(n, size))]


def draw(structure, images, path):
    """Pairs of rows for some held-out pictures: the focus states F_ρk(x), and what the tokens decode to."""
    states = structure.decode_states(structure.encode(images))
    rows = []
    for i in range(len(images)):
        rows += [defocus(images[i:i + 1], radius, structure.kernel)[0] for radius in structure.radii]
        rows += [state[i] for state in states]
    save_png(path, picture_grid(torch.stack(rows), len(states)))


def main():
    dev = runtime.start(device, seed)
    autocast, scaler = runtime.precision(dtype, dev)
    runtime.require_positive(config, 'eval_every', 'eval_images', 'save_every', 'log_every', 'vocab_size', 'code_width', 'channels',
                             'res_blocks', 'phis', 'alias_vocab_size', 'alias_code_width', 'alias_channels', 'alias_res_blocks',
                             'gan_channels')
    if len(patch_nums) < 2:
        raise UserError(f'patch_nums={patch_nums}: give at least two token maps, or nothing comes into focus')
    runtime.share_of_batch(batch_size)                      # says so at once if it does not divide
    train, held_out = open_dataset(data, 'train', image_size), open_dataset(data, 'val', image_size, augment=False)
    validation = normalize(next(in_order(held_out, eval_images, count=eval_images))[0]).to(dev)

    structure, alias = (tokenizer.to(dev, memory_format=torch.channels_last) for tokenizer in build_tokenizers(config))
    structure.recompute = recompute
    lpips = load_lpips(dev) if lambda_lpips else None
    discriminator = PatchDiscriminator(gan_channels).to(dev) if lambda_gan else nn.Module()
    networks = nn.ModuleDict({'structure': structure, 'alias': alias, 'discriminator': discriminator})
    tokenizers = nn.ModuleList([structure, alias])
    optimizer = runtime.adamw(tokenizers, lr, betas, weight_decay)
    gan_optimizer = runtime.adamw(discriminator, lr, betas, weight_decay) if lambda_gan else None
    safe_step = runtime.SafeStep(optimizer, scaler, grad_clip)

    step, figures, state_file = 0, {}, f'{out_dir}/tokenizer_state.pt'
    if runtime.resumes(init_from, state_file):
        saved = runtime.load_checkpoint(state_file, 'tokenizer training', dev, made_by='train_tokenizer.py')
        runtime.check_same(saved['config'], config, [key for key in config if key not in MAY_CHANGE], state_file)
        for name, network in networks.items():
            runtime.load_weights(network, saved[name], state_file)
        optimizer.load_state_dict(saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
        safe_step.load_state_dict(saved.get('safe_step', {}))
        if gan_optimizer:
            gan_optimizer.load_state_dict(saved['gan_optimizer'])
        step, figures = saved['step'], saved.get('figures', {})
    elif init_from not in ('scratch', 'auto'):
        if not os.path.isfile(init_from):
            raise UserError(f'--init_from={init_from}: no such file; choose scratch, resume, auto or a published tokenizer')
        fill_official_tokenizer(structure, runtime.read_weights(init_from, dev))
    runtime.say(f'structure tokenizer {millions(structure)}, alias tokenizer {millions(alias)}, {len(train)} images of '
                f'{len(train.classes)} classes, radii ' + ' '.join(f'{r:.2g}' for r in structure.radii))
    sharp = [k + 1 for k, radius in enumerate(structure.radii[:-1]) if psf(radius, structure.kernel).numel() == 1]
    if sharp and max(structure.radii):
        runtime.say(f'note: half a pixel of blur is none, so token maps {sharp} have no alias for a teacher to see; raise '
                    'max_radius if it should')

    def save(figures):
        if runtime.rank() == 0:
            weights = {name: network.state_dict() for name, network in networks.items()}
            runtime.save_checkpoint(f'{out_dir}/tokenizer.pt', {
                'kind': 'tokenizer', 'config': config, 'step': step, 'figures': figures, 'classes': train.classes,
                'structure': weights['structure'], 'alias': weights['alias']})
            runtime.save_checkpoint(state_file, {
                'kind': 'tokenizer training', 'config': config, 'step': step, 'figures': figures, **weights,
                'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(), 'safe_step': safe_step.state_dict(),
                'gan_optimizer': gan_optimizer.state_dict() if gan_optimizer else {}})
        runtime.barrier()

    if steps == 0:
        save({})
    log = runtime.Log(f'{out_dir}/tokenizer.jsonl', step, log_to, config)
    bar = runtime.progress(steps, step, 'tokenizers', unit='img', scale=batch_size)
    supply = runtime.Waiting(batches(train, batch_size, seed, runtime.rank(), runtime.world_size(), step, workers))
    saving = runtime.Saving(save_every, save_seconds, dev)
    while step < steps:
        images = normalize(next(supply)[0].to(dev)).contiguous(memory_format=torch.channels_last)
        noise_of = runtime.shared_noise(runtime.generator(seed, step, 1))
        state = -1
        if pyramid == 'focus' and lambda_focus:
            state = torch.randint(len(patch_nums) - 1, (1,), generator=runtime.generator(seed, step, 2)).item()

        # both tokenizers, forwards
        alias_views = alias.views(images, noise_of)
        alias.track_scale(alias_views, lambda t: runtime.all_reduce(t, average=True))
        with autocast():
            if step < warm_start:
                picture, state_picture, vq, tokens, residuals = structure.autoencode(images), None, images.new_zeros(()), [], []
            else:
                picture, state_picture, vq, tokens, residuals = structure(images, noise_of, state)
            alias_l2, alias_vq, alias_tokens, alias_vectors = alias(alias.normalised(alias_views))
            terms = reconstruction_terms(images, picture, state_picture, state, structure, lpips)
            terms |= {'vq': vq, 'alias_l2': alias_l2, 'alias_vq': alias_vq}
            reconstruction = terms['l1'] + terms['l2'] + lambda_lpips * terms.get('lpips', 0)
            loss = reconstruction + lambda_focus * terms.get('focus', 0) + vq + alias_l2 + alias_vq
            if lambda_gan and step >= gan_start:
                terms['gan'] = -discriminator(picture).mean()
                weight = adaptive_weight(reconstruction, terms['gan'], structure.decoder.conv_out.weight)
                loss = loss + lambda_gan * weight * terms['gan']

        # and backwards
        scaler.scale(loss).backward()
        runtime.average_gradients(tokenizers)
        norm = safe_step([structure.parameters(), alias.parameters()], runtime.learning_rate(step, steps, lr, warmup), terms)
        finite = math.isfinite(norm)                        # else the step was skipped, and nothing else may learn from it
        if finite and lambda_gan and step >= gan_start:
            gan_optimizer.zero_grad(set_to_none=True)       # drops what the generator's loss left there
            with autocast():
                terms['discriminator'] = discriminator_loss(discriminator, images, picture)
            terms['discriminator'].backward()
            runtime.average_gradients(discriminator)
            gan_optimizer.step()

        # codebook health
        if finite and tokens:
            structure.quantizer.codebook.count(tokens, runtime.all_reduce)
        if finite and alias.dual:
            alias.codebook.count(alias_tokens, runtime.all_reduce)
        if finite and tokens and reseed_every and (step - warm_start) % reseed_every == 0 and step < reseed_until * steps:
            reseed_dead_codes(structure, alias, residuals, alias_vectors, step)
        step += 1
        bar.update()

        if step % log_every == 0 or step == steps:
            means = runtime.mean_terms(terms)
            log(step=step - 1, **means, grad_norm=norm, skipped=safe_step.skipped, spikes=safe_step.spikes)
            bar.set_postfix(loss=f'{means["l1"] + means["l2"]:.4f}', vq=f'{means["vq"]:.3f}')
        if step > warm_start and step % eval_every == 0 or step == steps:
            figures = validate(structure.eval(), alias, validation)
            log(step=step - 1, **{f'val_{name}': value for name, value in figures.items()})
            runtime.say(f'step {step}: PSNR {figures["psnr"]:.2f} dB, focus states {brief(figures["psnr_states"])}, '
                        f'perplexity {brief(figures["perplexity"], 0)}, alias missed {brief(figures["alias_missed"], 2)}')
            bad = collapsed(figures['perplexity'], [batch_size * p * p for p in patch_nums])
            if bad:
                runtime.say(f'warning: token maps {bad} use almost no codes; raise batch_size, reseed_until or lambda_focus')
        if saving.due(step, steps):
            save(figures)
            saving.stop_if_asked(step)
    saving.end()
    bar.close()
    if runtime.rank() == 0:
        draw(structure, validation[:8], f'{out_dir}/tokenizer.png')
        runtime.say(f'wrote {out_dir}/tokenizer.pt and {out_dir}/tokenizer.png; waited for data {supply.share():.1%} of the time')


# settings that a resumed run may change
MAY_CHANGE = ('init_from', 'out_dir', 'steps', 'workers', 'eval_every', 'eval_images', 'save_every', 'save_seconds', 'log_every',
              'log_to', 'recompute', 'device')


def brief(numbers, digits=1):
    return ' '.join(f'{number:.{digits}f}' for number in numbers)


def millions(module):
    return f'{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M'


if __name__ == '__main__':
    runtime.run(main)
