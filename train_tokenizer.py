"""Stage 1: trains both tokenizers, Q_L over focus states and Q_A over alias views, in one run.

    python train_tokenizer.py config/charts.py
    torchrun --nproc_per_node=8 train_tokenizer.py config/tokenizer_256.py
    python train_tokenizer.py config/charts.py --init_from=resume      # goes on where it stopped; so does =auto, or it starts

Writes to out_dir: tokenizer.pt (what the later stages read), tokenizer_state.pt (for resuming),
tokenizer.jsonl (the log) and tokenizer.png (held-out pictures: what a focus state should be, what it decodes to).
"""
import copy
import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from util import runtime
from util.checkpoint import Log, check_same, load_checkpoint, load_optimizer, load_weights, read_weights, resumes, save_checkpoint
from configurator import UserError, configure
from data import batches, in_order, normalize, open_dataset
from util.metrics import psnr
from published import fill_official_tokenizer
from util.pictures import picture_grid, save_png
from pyramid import defocus, psf
from tokenizer import build_tokenizers, compile_convolutions

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
codebook_dim = 32                 # numbers a code
channels = 160                  # width at full resolution
channel_mult = (1, 1, 2, 2, 4)  # width at each resolution, relative to channels
res_blocks = 2                  # residual blocks at each resolution
phis = 4                        # convolutions φ shared among the token maps
# the alias tokenizer Q_A
dual = True                     # False: Q_A shares encoder, codebook and decoder with Q_L (Table 3)
alias_vocab_size = 512          # codes (paper)
alias_codebook_dim = 8            # numbers a code
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
batch_size = 256                # images per step, over all ranks
grad_accum_steps = 1            # forward and backward passes per step, each over batch_size / grad_accum_steps images
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
compile = False                 # compile Q_L's encoder and decoder: minutes of waiting, then faster steps
grad_checkpoint = False         # keep nothing inside encoders and decoders for the backward pass: a third more work, far less memory
device = 'auto'                 # auto | cpu | cuda
dtype = 'auto'                  # auto | float32 | bfloat16 | float16
seed = 0                        # everything random follows from it
config = configure(globals())

# settings that a resumed run may change
MAY_CHANGE = ('init_from', 'out_dir', 'steps', 'workers', 'grad_accum_steps', 'eval_every', 'eval_images', 'save_every', 'save_seconds',
              'log_every', 'log_to', 'compile', 'grad_checkpoint', 'device')


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
    network = SampleSimilarityLPIPS('lpips').to(dev)
    # its normalize() sends two constants to the GPU for every picture; it is affine, so two values of it say all
    zero, one = network.normalize(torch.zeros(1, 3, 1, 1, device=dev)), network.normalize(torch.ones(1, 3, 1, 1, device=dev))
    network.normalize = lambda pictures: zero + (one - zero) * pictures.float()
    return network


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


# -----------------------------------------------------------------------------
# a step

def set_up(dev):
    """All that is trained and what trains it, on a device: a namespace."""
    run = SimpleNamespace()
    run.autocast, run.scaler = runtime.precision(dtype, dev)
    run.structure, run.alias = (tokenizer.to(dev, memory_format=torch.channels_last) for tokenizer in build_tokenizers(config))
    run.structure.grad_checkpoint = run.alias.grad_checkpoint = grad_checkpoint
    run.lpips = load_lpips(dev) if lambda_lpips else None
    run.discriminator = PatchDiscriminator(gan_channels).to(dev, memory_format=torch.channels_last) if lambda_gan else nn.Module()
    run.networks = nn.ModuleDict({'structure': run.structure, 'alias': run.alias, 'discriminator': run.discriminator})
    runtime.broadcast_weights(run.networks)
    run.tokenizers = nn.ModuleList([run.structure, run.alias])
    run.optimizer = runtime.adamw(run.tokenizers, lr, betas, weight_decay)
    run.gan_optimizer = runtime.adamw(run.discriminator, lr, betas, weight_decay) if lambda_gan else None
    run.safe_step = runtime.SafeStep(run.optimizer, run.scaler, grad_clip)
    if compile:
        compile_convolutions(run.structure)
    return run


def losses(run, images, noise, step):
    """One forward pass of both tokenizers: (loss, its terms by name, what codebooks and discriminator learn from)."""
    structure, alias, state = run.structure, run.alias, -1
    if pyramid == 'focus' and lambda_focus:
        state = torch.randint(len(patch_nums) - 1, (1,), generator=runtime.generator(seed, step, 2), device='cpu').item()
    views = alias.views(images, noise)
    energy = runtime.all_reduce(torch.stack([view.square().mean() for view in views]), average=True)
    if step < warm_start:
        picture, state_picture, vq, tokens, residuals = structure.autoencode(images), None, images.new_zeros(()), [], []
    else:
        picture, state_picture, vq, tokens, residuals = structure(images, noise, state)
    alias_l2, alias_vq, alias_tokens, alias_vectors = alias(alias.normalised(views, energy))
    terms = reconstruction_terms(images, picture, state_picture, state, structure, run.lpips)
    terms |= {'vq': vq, 'alias_l2': alias_l2, 'alias_vq': alias_vq}
    reconstruction = terms['l1'] + terms['l2'] + lambda_lpips * terms.get('lpips', 0)
    loss = reconstruction + lambda_focus * terms.get('focus', 0) + vq + alias_l2 + alias_vq
    if lambda_gan and step >= gan_start:
        terms['gan'] = -run.discriminator(picture).mean()
        weight = adaptive_weight(reconstruction, terms['gan'], structure.decoder.conv_out.weight)
        loss = loss + lambda_gan * weight * terms['gan']
    return loss, terms, {'pictures': [picture.detach()], 'energy': [energy], 'tokens': tokens, 'residuals': residuals,
                         'alias_tokens': alias_tokens, 'alias_vectors': alias_vectors}


def train_step(run, step, images):
    """One optimizer step on this rank's images (b, 3, S, S). Returns (loss terms by name, gradient norm), all of them tensors."""
    numbers, at_once = runtime.sample_numbers(step, batch_size), len(images) // grad_accum_steps
    terms, seen = {}, []
    for i, part in enumerate(images.split(at_once)):
        noise = runtime.noise_of(numbers[i * at_once:(i + 1) * at_once], images.device, seed, 1)
        with run.autocast():
            loss, found, saw = losses(run, part, noise, step)
        run.scaler.scale(loss / grad_accum_steps).backward()
        terms = {name: terms.get(name, 0) + value.detach() / grad_accum_steps for name, value in found.items()}
        seen.append(saw)
    runtime.average_gradients(run.tokenizers)
    networks = [run.structure.parameters(), run.alias.parameters()]
    norm, finite = run.safe_step(networks, runtime.learning_rate(step, steps, lr, warmup), terms)
    if lambda_gan and step >= gan_start:
        terms['discriminator'] = discriminator_step(run, images.split(at_once), [saw['pictures'][0] for saw in seen], finite)
    update_codebooks(run, seen, finite, step)
    return terms, norm


def discriminator_step(run, reals, fakes, finite):
    """The other player's turn; it stays as it is where the tokenizers' step was not finite. Returns its loss."""
    run.gan_optimizer.zero_grad(set_to_none=True)           # drops what the generator's loss left there
    total = 0
    for real, fake in zip(reals, fakes):
        with run.autocast():
            loss = discriminator_loss(run.discriminator, real, fake) / len(fakes)
        loss.backward()
        total = total + loss.detach()
    runtime.average_gradients(run.discriminator)
    run.gan_optimizer.found_inf = (~finite).float()
    run.gan_optimizer.step()
    return total


@torch.no_grad()
def update_codebooks(run, seen, finite, step):
    """Counts the codes of a step, follows the scale of the alias views, gives dead codes a new start, the same on every rank.

    seen: what losses() saw in each pass. finite: a tensor; where it is false nothing changes.
    """
    def of_maps(name):                                      # of each token map, all passes
        return [torch.cat(passes) for passes in zip(*(saw[name] for saw in seen))]

    run.alias.track_scale(torch.stack([saw['energy'][0] for saw in seen]).mean(0), finite)
    jobs = [(run.structure.quantizer.codebook, 'tokens', 'residuals')] if step >= warm_start else []
    jobs += [(run.alias.codebook, 'alias_tokens', 'alias_vectors')] if run.alias.dual else []
    reseed = step >= warm_start and reseed_every and (step - warm_start) % reseed_every == 0 and step < reseed_until * steps
    for i, (codebook, tokens, vectors) in enumerate(jobs):
        codebook.count(runtime.all_reduce(codebook.histogram(of_maps(tokens))), finite)
        if reseed:
            found = [runtime.gather(v.flatten(2).transpose(1, 2).contiguous()).flatten(0, 1) for v in of_maps(vectors)]
            codebook.reseed(found, runtime.generator(seed, step, 31 + i), dead_below, finite)


def flops_per_image(run):
    """Of a training step, without what grad_checkpoint computes again."""
    meta = SimpleNamespace(lpips=copy.deepcopy(run.lpips))
    if lambda_lpips:
        meta.lpips.normalize = lambda pictures: pictures.float()
        meta.lpips.to('meta')
    with torch.device('meta'):
        meta.structure, meta.alias = build_tokenizers(config)
        image, none = torch.empty(1, 3, image_size, image_size), torch.zeros(())
        meta.discriminator = PatchDiscriminator(gan_channels) if lambda_gan else None
        return runtime.count_flops(lambda: (losses(meta, image, None, steps)[0] + (
            discriminator_loss(meta.discriminator, image, image) if lambda_gan else none)).backward())


@torch.no_grad()
def validate(structure, alias, images, at_once, dev):
    """Held-out figures of uint8 images: PSNR of the picture and of every focus state (dB), perplexity of every token map, and
    the share of the alias views' energy that Q_A fails to reproduce (0 of an empty view)."""
    decibels, energies, missed, hits = 0, 0, 0, 0
    for part in images.split(at_once):
        x = normalize(runtime.to_device(part, dev))
        tokens, views = structure.encode(x), alias.views(x)
        wanted = [defocus(x, radius, structure.kernel) for radius in structure.radii]
        decibels += len(part) * np.array([psnr(a, b) for a, b in zip(structure.decode_states(tokens), wanted)])
        energies += len(part) * np.array([view.square().mean().item() for view in views])
        missed += len(part) * np.array([F.mse_loss(*pair).item() for pair in zip(alias.decode(alias.encode(x)), views)])
        hits += structure.quantizer.codebook.histogram(tokens)
    real = energies > 1e-8 * len(images)                    # less is rounding
    return {'psnr': float(decibels[-1]) / len(images), 'psnr_states': (decibels / len(images)).tolist(),
            'perplexity': structure.quantizer.codebook.perplexity().tolist(), 'codes_used': (hits > 0).sum(1).tolist(),
            'alias_perplexity': alias.codebook.perplexity().tolist() if alias.dual else [],
            'alias_missed': np.where(real, missed / np.where(real, energies, 1), 0.0).tolist()}


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


def check_settings():
    """UserError for settings that make no sense."""
    runtime.require_positive(config, 'eval_every', 'eval_images', 'save_every', 'log_every', 'vocab_size', 'codebook_dim', 'channels',
                             'res_blocks', 'phis', 'alias_vocab_size', 'alias_codebook_dim', 'alias_channels', 'alias_res_blocks',
                             'gan_channels')
    if len(patch_nums) < 2:
        raise UserError(f'patch_nums={patch_nums}: give at least two token maps, or nothing comes into focus')
    runtime.share_of_batch(batch_size, grad_accum_steps)    # says so at once if it does not divide


def resume(run, state_file):
    """Takes up a stopped run; returns (step, metrics) of its checkpoint."""
    saved = load_checkpoint(state_file, 'tokenizer training', made_by='train_tokenizer.py', shared=True)
    check_same(saved['config'], config, [key for key in config if key not in MAY_CHANGE], state_file)
    for name, network in run.networks.items():
        load_weights(network, saved[name], state_file)
    load_optimizer(run.optimizer, saved['optimizer'])
    if run.gan_optimizer:
        load_optimizer(run.gan_optimizer, saved['gan_optimizer'])
    run.scaler.load_state_dict(saved['scaler'])
    run.safe_step.load_state_dict(saved['safe_step'])
    return saved['step'], saved['metrics']


def main():
    dev = runtime.start(device, seed)
    check_settings()
    train, held_out = open_dataset(data, 'train', image_size), open_dataset(data, 'val', image_size, augment=False)
    validation = next(in_order(held_out, eval_images, count=eval_images))[0]

    run = set_up(dev)
    structure, alias = run.structure, run.alias
    step, metrics, state_file = 0, {}, f'{out_dir}/tokenizer_state.pt'
    if resumes(init_from, state_file):
        step, metrics = resume(run, state_file)
    elif init_from not in ('scratch', 'auto'):
        if not os.path.isfile(init_from):
            raise UserError(f'--init_from={init_from}: no such file; choose scratch, resume, auto or a published tokenizer')
        fill_official_tokenizer(structure, read_weights(init_from))
    runtime.say(f'structure tokenizer {millions(structure)}, alias tokenizer {millions(alias)}, {len(train)} images of '
                f'{len(train.classes)} classes, radii ' + ' '.join(f'{r:.2g}' for r in structure.radii))
    sharp = [k + 1 for k, radius in enumerate(structure.radii[:-1]) if psf(radius, structure.kernel).numel() == 1]
    if sharp and max(structure.radii):
        runtime.say(f'note: half a pixel of blur is none, so token maps {sharp} have no alias for a teacher to see; raise '
                    'max_radius if it should')

    def save(metrics):
        if runtime.rank() == 0:
            weights = {name: network.state_dict() for name, network in run.networks.items()}
            save_checkpoint(f'{out_dir}/tokenizer.pt', {
                'kind': 'tokenizer', 'config': config, 'step': step, 'metrics': metrics, 'classes': train.classes,
                'structure': weights['structure'], 'alias': weights['alias']})
            save_checkpoint(state_file, {
                'kind': 'tokenizer training', 'config': config, 'step': step, 'metrics': metrics, **weights,
                'optimizer': run.optimizer.state_dict(), 'scaler': run.scaler.state_dict(), 'safe_step': run.safe_step.state_dict(),
                'gan_optimizer': run.gan_optimizer.state_dict() if run.gan_optimizer else {}})
        runtime.barrier()

    if steps == 0:
        save({})
    log = Log(f'{out_dir}/tokenizer.jsonl', step, log_to, config)
    bar = runtime.progress(steps, step, 'tokenizers', images_per_step=batch_size)
    supply = runtime.Waiting(batches(train, batch_size, seed, runtime.rank(), runtime.world_size(), step, workers))
    saving = runtime.Saving(save_every, save_seconds)
    speed = runtime.Speed(batch_size, flops_per_image(run) if step < steps else 0, runtime.peak_flops(dev, run.autocast))
    speed.start(step)
    while step < steps:
        images = normalize(runtime.to_device(next(supply)[0], dev)).contiguous(memory_format=torch.channels_last)
        terms, norm = train_step(run, step, images)
        step += 1
        bar.update()

        if step % log_every == 0 or step == steps:
            means = runtime.mean_terms(terms)
            log(step=step - 1, **means, grad_norm=norm.item(), skipped=run.safe_step.check(),
                lr=run.optimizer.param_groups[0]['lr'], **speed.report(step))
            bar.set_postfix(loss=f'{means["l1"] + means["l2"]:.4f}', vq=f'{means["vq"]:.3f}')
        if step > warm_start and step % eval_every == 0 or step == steps:
            metrics = validate(structure, alias, validation, runtime.share_of_batch(batch_size, grad_accum_steps), dev)
            log(step=step - 1, **{f'val_{name}': value for name, value in metrics.items()})
            runtime.say(f'step {step}: PSNR {metrics["psnr"]:.2f} dB, focus states {brief(metrics["psnr_states"])}, '
                        f'perplexity {brief(metrics["perplexity"], 0)}, alias missed {brief(metrics["alias_missed"], 2)}')
            bad = collapsed(metrics['perplexity'], [batch_size * p * p for p in patch_nums])
            if bad:
                runtime.say(f'warning: token maps {bad} use almost no codes; raise batch_size, reseed_until or lambda_focus')
            speed.start(step)
        if saving.due(step, steps):
            save(metrics)
            saving.stop_if_asked(step)
            speed.start(step)
    saving.end()
    bar.close()
    if runtime.rank() == 0:
        draw(structure, normalize(validation[:8].to(dev)), f'{out_dir}/tokenizer.png')
        runtime.say(f'wrote {out_dir}/tokenizer.pt and {out_dir}/tokenizer.png; waited for data {supply.share():.1%} of the time')


def brief(numbers, digits=1):
    return ' '.join(f'{number:.{digits}f}' for number in numbers)


def millions(module):
    return f'{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M'


if __name__ == '__main__':
    runtime.run(main)
