"""Measures aliasing in the views of the pyramid, in a tokenizer's reconstructions, and in samples.

    python -m experiments.aliasing                                      # the pyramid at 256 px
    python -m experiments.aliasing --tokenizer=out/tokenizer.pt         # and that tokenizer's reconstructions
    python -m experiments.aliasing --tokenizer=out/tokenizer.pt --samples=samples.npz       # and samples

folding     alias: fraction of a view's energy that comes from above its Nyquist frequency. kept: energy below
            it, relative to an ideal low-pass. Read both: blurring everything away removes aliasing too.
zone plate  contrast of a chirp in the view, below Nyquist (wanted) and from there to twice Nyquist (alias).
spectrum    radial power spectrum relative to real pictures, in dB per ring, beside that of one half of these
            relative to the other. "its error" is the spectrum of reconstruction − picture.

The views come from pyramid.defocus_decimate without the noise of Eq. 3, with the settings below. Prints one
table per measure; writes aliasing.json.
"""
import math
from collections import defaultdict

import torch
import torch.nn.functional as F

from configurator import UserError, configure
from data import normalize, open_dataset
from pyramid import defocus_decimate, focus_radii, psf, view_sizes
from tokenizer import load_tokenizers
from util import runtime
from util.checkpoint import digest, write_json
from util.picture_sets import load_images, read_samples

# input and output
out_dir = 'out'                                 # folder for aliasing.json
data = ''                                       # 'charts' or a folder (default: that of the tokenizer)
tokenizer = ''                                  # tokenizer.pt to measure
samples = ''                                    # samples to measure: a folder of PNGs or an .npz
# pyramid
image_size = 256                                # side of the pictures behind the views, in pixels
patch_nums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # token map sides p_k; views are p_k·image_size/p_K wide
max_radius = 12.0                               # ρ_max in pixels of a 256-pixel image
pictures = 10                                   # number of held-out pictures behind the views
# reconstructions and samples
real_images = 400                               # number of held-out pictures to reconstruct and compare with
# system
batch_size = 50                                 # pictures per forward pass of the tokenizer
device = 'auto'                                 # auto | cpu | cuda, for the tokenizer
config = configure(globals())

# {name in the tables: (kernel, focus schedule)}; 'area' averages cells, as VAR does with features; 'ideal' is
# the low-pass that Eq. 7 assumes
FILTERS = {
    'disk matched': ('disk', 'matched'),
    'disk cosine': ('disk', 'cosine'),
    'Gaussian': ('gaussian', 'matched'),
    'area': ('area', 'matched'),
    'none': ('none', 'matched'),
    'ideal': ('ideal', 'matched')
}
# {title: (format, metrics of measure_view)}
TABLES = {
    'folding: alias / kept': ('.1%', 'alias', 'kept'),
    'zone plate: contrast below Nyquist / beyond': ('.2f', 'zone_wanted', 'zone_alias')
}


# -----------------------------------------------------------------------------
# views of a periodic picture, to avoid border effects

def band_limit(images, size, where):
    """Reads images (B, C, S, S) at pixel positions `where` (n,) on both axes, through an ideal low-pass.

    Returns (B, C, n, n). Only frequencies below size/2 cycles per side remain; all of them at size = S.
    """
    side = images.shape[-1]
    offset = (where.double()[:, None] - torch.arange(side)) / side
    offset = offset - offset.round()
    frequencies = size - 1 + size % 2                       # strictly below Nyquist, of both signs
    matrix = frequencies * torch.sinc(frequencies * offset) / torch.sinc(offset)
    if frequencies < size == side:
        matrix = matrix + torch.cos(math.pi * side * offset)            # Nyquist itself
    matrix = (matrix / side).to(images)
    return matrix @ images @ matrix.T


def sample_positions(side, size):
    """Where decimate() reads its `size` samples, in pixels of the full-size image."""
    step = side / size
    start = step // 2 if side % size == 0 else (step - 1) / 2
    return torch.arange(size).double() * step + start


def view(images, radius, size, kernel):
    """The pyramid's view (B, C, size, size) of a periodic picture. kernel may also be 'area' or 'ideal'."""
    side = images.shape[-1]
    if kernel == 'area':
        return F.interpolate(images, size, mode='area')
    if kernel == 'ideal':
        return band_limit(images, size, sample_positions(side, size))
    period = side // math.gcd(side, size)                   # pixels after which the view's grid repeats
    margin = psf(radius, kernel).shape[-1] // 2 + 2         # 2 for bicubic decimation
    margin = period * math.ceil(margin / period)
    border = margin * size // side                          # the margin in pixels of the view
    wrapped = F.pad(images, [margin] * 4, mode='circular')
    result = defocus_decimate(wrapped, radius, size + 2 * border, kernel)
    return result[..., border:-border, border:-border]


def energy(x):
    return x.square().mean().item()


# -----------------------------------------------------------------------------
# measures of a view

def folding(images, radius, size, kernel):
    """(alias, kept) in [0, 1] for the views of images (B, C, S, S) with mean zero; see the top of the file.

    Views are linear: the view of what the ideal low-pass at the view's Nyquist removes is the alias. At
    fractional steps, interpolation errors below Nyquist count as kept.
    """
    side = images.shape[-1]
    low = band_limit(images, size, torch.arange(side))
    wanted = energy(view(low, radius, size, kernel))
    alias = energy(view(images - low, radius, size, kernel))
    return alias / (wanted + alias), wanted / energy(view(images, radius, size, 'ideal'))


def zone_plate(side, top):
    """A chirp (2, 1, side, side) in [−1, 1], as cosine and sine, which give the contrast at each pixel.

    Its frequency grows linearly from 0 in the centre to `top` cycles per pixel half a side away.
    """
    t = torch.arange(side).double() - side / 2
    squares = t[:, None] ** 2 + t ** 2
    phase = 2 * math.pi * top / side * squares
    return torch.stack([phase.cos(), phase.sin()])[:, None]


def zone_contrast(side, radius, size, kernel):
    """(wanted, alias): mean contrast of a zone plate's view below Nyquist, and from there to twice Nyquist.

    1 is the contrast of the plate itself. alias is None if the picture holds no frequency beyond Nyquist.
    A tenth on either side of Nyquist is left out, because a chirp has no single frequency. The plate is
    enlarged until its view has 128 pixels, so that the chirp is slow.
    """
    times = math.ceil(128 / size)
    side, size = times * side, times * size
    nyquist = size / side / 2                               # cycles per pixel of the full-size image
    top = min(2 * nyquist, 0.5)
    plate = view(zone_plate(side, top), radius, size, kernel)
    contrast = plate.square().sum(0)[0].sqrt()
    t = (sample_positions(side, size) - side / 2).abs()
    across = t * 2 * top / side                             # frequency along the axis
    down = across[:, None]
    larger = torch.maximum(down, across)
    inside = torch.hypot(down, across) < 0.9 * top          # away from the border, where plates meet
    wanted = contrast[inside & (larger < 0.9 * nyquist)].mean().item()
    alias = contrast[inside & (larger > 1.1 * nyquist)]
    return wanted, alias.mean().item() if len(alias) else None


def measure_view(images, radius, size, kernel):
    """All metrics of one view of images (B, 1, S, S) with mean zero."""
    side = images.shape[-1]
    alias, kept = folding(images, radius, size, kernel)
    wanted, beyond = zone_contrast(side, radius, size, kernel)
    return {
        'step': side / size,
        'alias': alias,
        'kept': kept,
        'zone_wanted': wanted,
        'zone_alias': beyond
    }


# -----------------------------------------------------------------------------
# spectra

def fade(images):
    """Pictures of mean zero under a Hann window, without the edge where a picture meets its repetition."""
    side = images.shape[-1]
    t = (torch.arange(side).double() + 0.5) / side
    window = torch.sin(math.pi * t) ** 2
    faded = images - images.mean((-1, -2), keepdim=True)
    faded = window[:, None] * window * faded
    return faded - faded.mean((-1, -2), keepdim=True)


def radial_power(images):
    """Power (8,) of images (B, C, S, S) in rings of 1/16 cycle per pixel, faded and without their means.

    White noise has equal power in all rings but the first, which loses a little with the mean.
    """
    spectrum = torch.fft.fft2(fade(images.double()))
    power = spectrum.abs().square().mean((0, 1))
    f = torch.fft.fftfreq(images.shape[-1], dtype=torch.float64)
    radius = torch.hypot(f[:, None], f)
    ring = (radius * 16).floor()
    rings = [power[(ring == b) & (radius > 0)].mean() for b in range(8)]
    return torch.stack(rings).clamp(min=1e-12)


def spectrum_distance(images, real):
    """10·log10 of the power of images over that of real ones per ring (8,): positive is too much."""
    return 10 * torch.log10(radial_power(images) / radial_power(real))


# -----------------------------------------------------------------------------
# reconstructions

@torch.no_grad()
def reconstruct(structure, images):
    """Encodes and decodes images (B, 3, S, S) of the tokenizer's size; returns them on the CPU."""
    dev = structure.quantizer.codebook.weight.device
    decoded = []
    for part in images.split(batch_size):
        tokens = structure.encode(part.float().to(dev))
        decoded.append(structure.decode(tokens).float().cpu())
    return torch.cat(decoded)


# -----------------------------------------------------------------------------
# the run

def filtered_views():
    """Yields (filter, (radius, size, kernel)) for every view of every filter."""
    for name, (kernel, schedule) in FILTERS.items():
        radii = focus_radii(patch_nums, image_size, max_radius, schedule)
        for radius, size in zip(radii, view_sizes(patch_nums, image_size)):
            yield name, (radius, size, kernel)


def show(number, form):
    return '–' if number is None else format(number, form)


def measure_pyramid(images):
    """Prints and returns {filter: metrics per view} for images (B, 1, S, S)."""
    results = defaultdict(list)
    images = fade(images.double())
    for name, how in filtered_views():
        results[name].append(measure_view(images, *how))
    for title, (form, *metrics) in TABLES.items():
        runtime.say(f'\n{title}\n     s' + ''.join(f'{name:>16}' for name in results))
        for views in zip(*results.values()):
            line = f'{views[0]["step"]:6.3g}'
            for row in views:
                cell = ' / '.join(show(row[metric], form) for metric in metrics)
                line += f'{cell:>16}'
            runtime.say(line)
    return results


def measure_spectra(sets, real, labels):
    """Prints and returns the spectrum distance from real pictures of {name: images}, and of half of these."""
    order = labels.argsort(stable=True)                     # puts every class in both halves
    distances = {
        name: spectrum_distance(images, real).tolist()
        for name, images in sets.items()
    }
    halves = real[order[::2]], real[order[1::2]]
    distances['real, half/half'] = spectrum_distance(*halves).tolist()
    runtime.say(f'\nradial power relative to {len(real)} real pictures, dB in rings of 1/16 cycle per pixel')
    for name, values in distances.items():
        runtime.say(f'{name:15}' + ''.join(f'{value:+7.2f}' for value in values))
    return distances


def main():
    runtime.require_positive(config, 'image_size', 'pictures', 'batch_size')
    if real_images < 2:
        raise UserError(f'real_images={real_images} must be at least 2')
    dev = runtime.start(device)
    structure, data_name, side = None, data or 'charts', image_size
    if tokenizer:
        structure, _, stage1 = load_tokenizers(tokenizer, dev)
        data_name, side = data or stage1['config']['data'], structure.image_size
    held_out = open_dataset(data_name, 'val', image_size, pictures)
    sets = {}
    if samples:
        sets['generated'] = normalize(read_samples(samples, side, held_out.classes)[0])

    images, _ = load_images(held_out, pictures)
    results = {'config': config, 'data': data_name}
    results['pyramid'] = measure_pyramid(normalize(images).mean(1, keepdim=True))
    if structure:
        results['tokenizer_digest'] = digest(structure.state_dict())
    if structure or samples:
        same_size = open_dataset(data_name, 'val', side, real_images)
        real, labels = load_images(same_size, real_images)
        real = normalize(real)
        if structure:
            sets['reconstructed'] = reconstruct(structure, real)
            sets['its error'] = sets['reconstructed'] - real
        results['spectrum'] = measure_spectra(sets, real, labels)
    write_json(f'{out_dir}/aliasing.json', results)
    runtime.say(f'wrote {out_dir}/aliasing.json')


if __name__ == '__main__':
    runtime.run(main)
