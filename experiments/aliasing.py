"""Aliasing measured: what folds into the views of the pyramid, and what a tokenizer and a generator make of pictures.

    python -m experiments.aliasing                                          # the pyramid at 256 px, on held-out charts and on noise
    python -m experiments.aliasing --tokenizer=out/tokenizer.pt             # and what that tokenizer reconstructs
    python -m experiments.aliasing --tokenizer=out/tokenizer.pt --samples=samples.npz   # and samples (.npz, or a folder of PNGs)

folding    alias: share of a view's energy that came from above its Nyquist frequency; kept: energy below it, relative to
           an ideal low-pass. Only the two together mean something: blurring all away removes aliasing too.
shift      move the picture by whole pixels and the view should move along: how far the error lies below the view
zone plate contrast of a chirp in the view, below Nyquist (wanted) and from there to twice that (all of it is alias)
edge       MTF from a slanted edge (ISO 12233): where it falls to one half, and its mean beyond Nyquist. An MTF50 above
           Nyquist is no gain: it is sharpness that the view can not hold
spectrum   signed distance of the radial power spectrum from that of real pictures, beside a real-vs-real floor; `its error`
           is the spectrum of reconstruction minus picture against the same

The views are the pyramid's own (pyramid.defocus_decimate) without the noise of Eq. 3, at the settings below; those of a
tokenizer's own pyramid take its image_size, patch_nums and max_radius. Prints a table for each measure; writes
out_dir/aliasing.json and aliasing.png, a zone plate that plain downsampling folds and a blur does not.
"""
import math
import os

import torch
import torch.nn.functional as F

from util import runtime
from util.checkpoint import digest, write_json
from configurator import UserError, configure
from data import normalize, open_dataset
from util.metrics import psnr
from util.picture_sets import load_images, read_samples
from util.pictures import picture_grid, save_png
from pyramid import defocus_decimate, focus_radii, psf, view_sizes
from tokenizer import load_tokenizers

# input and output
out_dir = 'out'                                 # where aliasing.json and aliasing.png go
data = ''                                       # 'charts' or a folder (default: what the tokenizer was trained on, else charts)
tokenizer = ''                                  # tokenizer.pt whose reconstructions are measured
samples = ''                                    # generated pictures: a folder of PNGs or .npz, as large as the tokenizer's
# pyramid
image_size = 256                                # side of the pictures the views are made of, in pixels
patch_nums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # side of each token map; view k is p_k·(image_size / p_K) pixels wide
max_radius = 12.0                               # ρ_max in pixels of a 256-pixel image
pictures = 10                                   # held-out pictures whose views are measured
# reconstructions and samples
real_images = 400                               # held-out pictures that are reconstructed and compared with
# system
batch_size = 50                                 # pictures a tokenizer takes at a time
device = 'auto'                                 # auto | cpu | cuda, of the tokenizer
seed = 0                                        # of the noise
config = configure(globals())

# (kernel, focus schedule) by their names in the tables; 'ideal' is the low-pass that Eq. 7 assumes, for reference
FILTERS = {'disk matched': ('disk', 'matched'), 'disk states': ('disk', 'states'), 'disk cosine': ('disk', 'cosine'),
           'Gaussian': ('gaussian', 'matched'), 'none': ('none', 'matched'), 'ideal': ('ideal', 'matched')}
FREQUENCIES = torch.linspace(0, 1, 201, dtype=torch.float64)       # of an MTF, in cycles a pixel: twice Nyquist
EXACT = 200.0                                   # dB; float64 errors lie below


# -----------------------------------------------------------------------------
# views of a picture that goes on periodically, so that borders neither fold nor move

def band_limit(images, size, where):
    """Reads images (B, C, S, S) at positions where (n,) of both axes, in pixels, through the ideal low-pass of `size` samples.

    (B, C, n, n). What is kept lies strictly below Nyquist, size/2 cycles a side; at size = S that is everything.
    """
    side = images.shape[-1]
    f = torch.arange(size // 2 + 1, dtype=torch.float64)
    weight = torch.full_like(f, 2 / side)
    weight[0] = 1 / side
    if size % 2 == 0:
        weight[-1] = 1 / side if size == side else 0
    at, pixel = (2 * math.pi / side * torch.outer(t.double(), f) for t in (where, torch.arange(side)))
    matrix = ((weight * at.cos()) @ pixel.cos().T + (weight * at.sin()) @ pixel.sin().T).to(images)
    return matrix @ images @ matrix.T


def places(side, size):
    """Where decimate() reads its `size` samples, in pixels of the full-size image."""
    step = side / size
    return torch.arange(size, dtype=torch.float64) * step + (0 if side % size == 0 else (step - 1) / 2)


def view(images, radius, size, kernel):
    """The pyramid's view (B, C, size, size) of a picture that goes on periodically. kernel: also 'ideal'."""
    side = images.shape[-1]
    if kernel == 'ideal':
        return band_limit(images, size, places(side, size))
    period = side // math.gcd(side, size)                   # pixels after which the grid of the view repeats
    margin = period * math.ceil((psf(radius, kernel).shape[-1] // 2 + 2) / period)      # + 2 for bicubic decimation
    cut = margin * size // side                             # the margin in pixels of the view
    at = torch.arange(-margin, side + margin) % side
    return defocus_decimate(images[..., at[:, None], at], radius, size + 2 * cut, kernel)[..., cut:cut + size, cut:cut + size]


def energy(x):
    return x.square().mean().item()


def decibels(signal, error):
    """10·log10 of signal energy over error energy, EXACT at most."""
    return min(EXACT, 10 * math.log10(energy(signal) / max(energy(error), 1e-30)))


# -----------------------------------------------------------------------------
# the measures of a view

def folding(images, radius, size, kernel):
    """(alias, kept) of the views of images (B, C, S, S) of mean zero: shares of energy in [0, 1].

    A picture is what an ideal low-pass at the view's Nyquist leaves and the rest, and views are linear: the view of the rest
    is the alias. At fractional steps errors of bicubic interpolation below Nyquist count as kept; shift_error sees them.
    """
    side = images.shape[-1]
    low = band_limit(images, size, torch.arange(side))
    wanted, alias = (energy(view(part, radius, size, kernel)) for part in (low, images - low))
    return alias / (wanted + alias), wanted / energy(band_limit(images, size, places(side, size)))


def shift_error(images, radius, size, kernel, shifts):
    """How far the view of the shifted picture is from the shifted view: decibels below the view, over all shifts.

    shifts in pixels of the full-size image, right and down at once; the view moves by shift·size/S of its own pixels.
    """
    still, errors = view(images, radius, size, kernel), []
    for shift in shifts:
        moved = view(images.roll((shift, shift), (-1, -2)), radius, size, kernel)
        errors.append(moved - band_limit(still, size, torch.arange(size) - shift * size / images.shape[-1]))
    return decibels(still, torch.stack(errors))


def zone_plate(side, top):
    """A chirp in quadrature (2, 1, side, side) in [−1, 1]: its frequency is 0 in the centre, `top` cycles a pixel half a side off.

    Frequencies grow as the distance, with x across and y down. Cosine and sine, so that the contrast is known at each pixel.
    """
    t = torch.arange(side, dtype=torch.float64) - side / 2
    phase = 2 * math.pi * top / side * (t[:, None] ** 2 + t ** 2)
    return torch.stack([phase.cos(), phase.sin()])[:, None]


def zone_contrast(radius, side, size, kernel):
    """(wanted, alias): mean contrast of a zone plate's view below Nyquist, and from there to twice that. 1 is the plate's own.

    The plate reaches twice the view's Nyquist, at most its own; alias is None where that leaves nothing to fold. Left out is
    a tenth on either side of Nyquist, where a chirp has no one frequency. The picture is repeated to 128 pixels a view at
    least, so that the chirp is slow.
    """
    times = math.ceil(128 / size)
    side, size = times * side, times * size
    nyquist = size / side / 2                               # cycles a pixel of the full-size image
    top = min(2 * nyquist, 0.5)
    contrast = view(zone_plate(side, top), radius, size, kernel).square().sum(0)[0].sqrt()
    t = (places(side, size) - side / 2).abs() * 2 * top / side          # frequency along an axis
    along = torch.maximum(t[:, None], t)
    inside = torch.hypot(t[:, None], t) < 0.9 * top                     # off the border, where plates meet
    below, above = inside & (along < 0.9 * nyquist), inside & (along > 1.1 * nyquist)
    return contrast[below].mean().item(), contrast[above].mean().item() if above.any() else None


# -----------------------------------------------------------------------------
# a slanted edge

def slanted_edge(side, offsets, slope=0.0875):
    """(images (B, 1, side, side) in [−1, 1], distance as a function): an edge near the middle, one pixel soft: its MTF is sinc(f).

    offsets (B,) from the middle, in pixels. distance(where) is that of positions (n,) from the edge: (B, 1, n, n), in pixels.
    """
    def distance(where):
        t = where - side / 2
        return ((t + slope * t[:, None]) - offsets[:, None, None].double())[:, None] / math.hypot(1, slope)

    return (2 * distance(torch.arange(side))).clamp(-1, 1), distance


def edge_mtf(values, distance, half):
    """MTF at FREQUENCIES from pixels of any shape and their distance from an edge in the same pixels, up to ±half.

    Bins of an eighth of a pixel make the edge profile, its differences the line's, and a Fourier transform the MTF. Aliasing
    does not hide here: pixels at all phases sample the edge more finely than the view does.
    """
    bins = 8
    index = ((distance + half) * bins).floor().long()
    inside = (index >= 0) & (index < 2 * half * bins)
    count = torch.bincount(index[inside], minlength=2 * half * bins)
    profile, t = (torch.bincount(index[inside], x[inside].double(), minlength=2 * half * bins) / count for x in (values, distance))
    line, t = profile.diff(), (t[1:] + t[:-1]) / 2          # pixels need not lie evenly in their bins
    line = line * (0.5 + 0.5 * torch.cos(math.pi * (2 * t.abs() / half - 1).clamp(0, 1)))     # the outer half fades
    angle = 2 * math.pi * torch.outer(FREQUENCIES, t)
    mtf = torch.hypot((line * angle.cos()).sum(1), (line * angle.sin()).sum(1)) / line.sum().abs().clamp(min=1e-6)
    return mtf / torch.sinc(FREQUENCIES / bins) ** 2        # of the bins and of the differences


def mtf50(mtf):
    """The first frequency at which an MTF is one half, in cycles a pixel; 1 where it never falls so far, 0 without an edge."""
    below = (mtf < 0.5).nonzero()
    i = below[0].item() if len(below) else len(mtf)
    if i in (0, len(mtf)):
        return float(i > 0)
    return (FREQUENCIES[i - 1] + (mtf[i - 1] - 0.5) / (mtf[i - 1] - mtf[i]) * FREQUENCIES[1]).item()


def edge_figures(mtf):
    """(MTF50 in cycles a pixel, mean response from Nyquist to twice that)."""
    return mtf50(mtf), mtf[FREQUENCIES > 0.5].mean().item()


def view_mtf(radius, side, size, kernel):
    """MTF of a view, in cycles a pixel of the view, from edges at sixteen places within a pixel of it."""
    step = side / size
    edges, distance = slanted_edge(side, torch.arange(16) * step / 16)
    middle = slice(size // 4, size - size // 4)             # the edge breaks where top and bottom meet
    views, where = view(edges, radius, size, kernel), distance(places(side, size)) / step
    return edge_mtf(views[..., middle, :], where[..., middle, :], half=max(1, min(8, size // 4)))


# -----------------------------------------------------------------------------
# spectra

def fade(images):
    """Pictures of mean zero, faded out towards the border (Hann): the edge where they meet their repetition is not theirs."""
    t = (torch.arange(images.shape[-1], dtype=torch.float64) + 0.5) / images.shape[-1]
    window = torch.sin(math.pi * t) ** 2
    window = window[:, None] * window
    images = window * (images - images.mean((-1, -2), keepdim=True))
    return images - images.mean((-1, -2), keepdim=True)


def radial_power(images, bands=8):
    """Power (bands,) of images (B, C, S, S) without their means, under a Hann window, in rings up to 0.5 cycles a pixel.

    Ring b holds the frequencies from b/(2·bands) on; the constant is left out. White noise has the same in all
    but the first, which loses a little with the mean.
    """
    spectrum = torch.fft.fft2(fade(images.double())).abs().square().mean((0, 1))
    f = torch.fft.fftfreq(images.shape[-1], dtype=torch.float64)
    radius = torch.hypot(f[:, None], f)
    ring = (radius * 2 * bands).floor().long()
    return torch.stack([spectrum[(ring == b) & (radius > 0)].mean() for b in range(bands)]).clamp(min=1e-12)


def spectrum_distance(images, real):
    """10·log10 of the power of images over that of real ones, for each ring: positive is too much. (bands,)"""
    return 10 * torch.log10(radial_power(images) / radial_power(real))


# -----------------------------------------------------------------------------
# reconstructions and samples

@torch.no_grad()
def reconstruct(structure, images):
    """What a tokenizer makes of images (B, 3, S, S), S as large as its own, on the CPU."""
    dev = structure.quantizer.codebook.weight.device
    return torch.cat([structure.decode(structure.encode(part.float().to(dev))).float().cpu() for part in images.split(batch_size)])


def reconstruction_shift(structure, images, shifts):
    """PSNR (dB) between reconstructions of two crops that lie `shift` pixels apart, where they overlap, for each shift.

    images (B, 3, S + max(shifts), …) are larger than the tokenizer's. Also the PSNR of the reconstructions themselves:
    errors that have nothing to do with each other make the former 3 dB lower, errors that move along make it infinite.
    """
    S = structure.image_size
    still = reconstruct(structure, images[..., :S, :S])
    moved = ((t, reconstruct(structure, images[..., t:t + S, t:t + S])) for t in shifts)
    same = [min(EXACT, psnr(still[..., t:, t:], there[..., :S - t, :S - t])) for t, there in moved]
    return same, psnr(still, images[..., :S, :S])


def reconstruction_mtf(structure, count=64):
    """(MTF of a picture of an edge, of its reconstruction) in cycles a pixel: of the mean edge, so that edges which come out
    at the wrong place count as blur."""
    side = structure.image_size
    edges, distance = slanted_edge(side, (torch.arange(count) / count - 0.5) * 2 * side / structure.patch_nums[-1])
    edges = 0.8 * edges.expand(-1, 3, -1, -1)
    where = distance(torch.arange(side)).expand_as(edges)
    return [edge_mtf(images, where, half=max(1, min(8, side // 4))) for images in (edges, reconstruct(structure, edges))]


# -----------------------------------------------------------------------------
# the run

def print_table(title, head, columns, names):
    """columns: {name: a text for each of names}."""
    width = max(8, *(len(text) + 2 for name, texts in columns.items() for text in [name, *texts]))
    left = max(map(len, [head, *names]))
    runtime.say(f'\n{title}\n{head:{left}}' + ''.join(f'{name:>{width}}' for name in columns))
    for row, name in enumerate(names):
        runtime.say(f'{name:{left}}' + ''.join(f'{texts[row]:>{width}}' for texts in columns.values()))


def show(number, form):
    return '–' if number is None else 'exact' if number >= EXACT else format(number, form)


def measure_pyramid(images):
    """Every measure of every filter and scale, printed; as a dictionary. images (B, C, S, S) in [−1, 1]."""
    sizes = view_sizes(patch_nums, image_size)
    noise = torch.randn(4, 1, image_size, image_size, generator=runtime.generator(seed), dtype=torch.float64)
    faded, noise, results = fade(images.double()), noise - noise.mean((-1, -2), keepdim=True), {}
    for name, (kernel, schedule) in FILTERS.items():
        results[name] = rows = []
        radii = focus_radii(patch_nums, image_size, max_radius, schedule)
        for size, radius in zip(sizes, radii):
            step, period = image_size / size, image_size // math.gcd(image_size, size)
            row = {'step': step, 'radius': radius if kernel in ('disk', 'gaussian') else 0.0}
            row['alias'], row['kept'] = folding(faded, radius, size, kernel)
            row['alias_noise'], row['kept_noise'] = folding(noise, radius, size, kernel)
            row['shift_on_grid'] = shift_error(faded, radius, size, kernel, [period])
            row['shift_off_grid'] = shift_error(faded, radius, size, kernel, range(1, math.ceil(step))) if step > 1 else None
            row['zone_wanted'], row['zone_alias'] = zone_contrast(radius, image_size, size, kernel)
            row['mtf50'], row['mtf_beyond'] = edge_figures(view_mtf(radius, image_size, size, kernel))
            rows.append(row)

    names = [f'{k:2} {step:5.3g}' for k, step in enumerate((image_size / size for size in sizes), start=1)]
    for title, first, second, form in (
            ('folding, pictures: alias / kept', 'alias', 'kept', '.1%'),
            ('folding, white noise: alias / kept', 'alias_noise', 'kept_noise', '.1%'),
            ('shift by a multiple of s / by less, dB: error below the view', 'shift_on_grid', 'shift_off_grid', '.1f'),
            ('zone plate: contrast below Nyquist / beyond it', 'zone_wanted', 'zone_alias', '.2f'),
            ('slanted edge: MTF50 in cycles a view pixel, 1.00 is never / mean response beyond Nyquist', 'mtf50', 'mtf_beyond', '.2f')):
        columns = {name: [f'{show(row[first], form)} / {show(row[second], form)}' for row in rows] for name, rows in results.items()}
        print_table(title, ' k     s', columns, names)
    return results


def measure_tokenizer(structure, data_name):
    """Shift-equivariance and edges of reconstructions, printed; as a dictionary."""
    f = structure.image_size // structure.patch_nums[-1]
    larger = open_dataset(data_name, 'val', structure.image_size + f, real_images)
    shifts = range(1, f + 1)
    moved, still = reconstruction_shift(structure, normalize(load_images(larger, real_images)[0]), shifts)
    print_table(f'reconstructions (PSNR {still:.2f} dB) against those of the shifted picture, dB; {still - 3.01:.2f} would be '
                'errors that have nothing in common', 'pixels', {'dB': [show(value, '.2f') for value in moved]}, list(map(str, shifts)))
    edges = {name: edge_figures(mtf) for name, mtf in zip(('picture', 'reconstruction'), reconstruction_mtf(structure))}
    columns = {'MTF50': [f'{a:.3f}' for a, _ in edges.values()], 'beyond Nyquist': [f'{b:.3f}' for _, b in edges.values()]}
    print_table('slanted edge, cycles a pixel', '', columns, list(edges))
    return {'psnr': still, 'shift_psnr': dict(zip(shifts, moved)), 'edge': edges}


def measure_spectra(sets, real, labels):
    """Spectrum distances of {name: images} from real pictures, and of two halves of those, printed; as a dictionary."""
    order = labels.argsort(stable=True)                     # every class in both halves
    distances = {name: spectrum_distance(images, real).tolist() for name, images in sets.items()}
    distances['real, half/half'] = spectrum_distance(real[order[::2]], real[order[1::2]]).tolist()
    rings = [f'{b / 16:.3f} – {(b + 1) / 16:.3f}' for b in range(8)]
    print_table(f'radial power against {len(real)} real pictures, dB', 'cycles a pixel',
                {name: [f'{value:+.2f}' for value in values] for name, values in distances.items()}, rings)
    return distances


def draw():
    """A zone plate up to the Nyquist frequency of the picture, as some views hold it: a PIL picture."""
    plate = zone_plate(image_size, 0.5)[:1]
    radii = focus_radii(patch_nums, image_size, max_radius, 'matched')
    sizes = view_sizes(patch_nums, image_size)
    chosen = [k for k, p in enumerate(patch_nums) if patch_nums[-1] % p == 0][-4:]
    cells = [view(plate, radii[k], sizes[k], kernel) for kernel in ('none', 'disk', 'gaussian', 'ideal') for k in chosen]
    cells = torch.cat([F.interpolate(cell, (256, 256), mode='nearest') for cell in cells]).expand(-1, 3, -1, -1)
    return picture_grid(cells, len(chosen), ('plain', 'disk', 'Gaussian', 'ideal'),
                        [f's={patch_nums[-1] / patch_nums[k]:.3g}  blur {radii[k]:.3g} px' for k in chosen], side=256)


def main():
    runtime.require_positive(config, 'image_size', 'pictures', 'batch_size')
    if not patch_nums or list(patch_nums) != sorted(set(patch_nums)) or patch_nums[0] < 1 or real_images < 2:
        raise UserError(f'patch_nums={patch_nums} must grow from a number ≥ 1, and real_images={real_images} be at least 2')
    dev = runtime.start(device, seed)
    structure, _, stage1 = load_tokenizers(tokenizer, dev) if tokenizer else (None, None, {'config': {'data': 'charts'}})
    data_name, side = data or stage1['config']['data'], structure.image_size if structure else image_size
    results = {'config': config, 'data': data_name, 'torch': torch.__version__}

    views_of = open_dataset(data_name, 'val', image_size, pictures)
    images, _ = load_images(views_of, pictures)
    generated = read_samples(samples, side, views_of.classes)[0] if samples else None
    results['pyramid'] = measure_pyramid(normalize(images).mean(1, keepdim=True))
    if structure:
        results['tokenizer_digest'] = digest(structure.state_dict())
        results['tokenizer'] = measure_tokenizer(structure, data_name)
    if structure or samples:
        real, labels = load_images(open_dataset(data_name, 'val', side, real_images), real_images)
        sets = {}
        if structure:
            sets['reconstructed'] = reconstruct(structure, normalize(real))
            sets['its error'] = sets['reconstructed'] - normalize(real)
        if samples:
            sets['generated'] = normalize(generated)
        results['spectrum'] = measure_spectra(sets, normalize(real), labels)
    write_json(os.path.join(out_dir, 'aliasing.json'), results)
    save_png(os.path.join(out_dir, 'aliasing.png'), draw())
    runtime.say(f'wrote {out_dir}/aliasing.json and aliasing.png')


if __name__ == '__main__':
    runtime.run(main)
