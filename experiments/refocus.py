"""Measures how well the student refocuses held-out images that were blurred by a known radius.

    python -m experiments.refocus config/charts.py
    python -m experiments.refocus --out_dir=out-d16 --dtype=auto

Methods: unsharp masking, Wiener deconvolution, the student, and the student with Wiener's correction (see
editing.py). Prints PSNR, SSIM and edge sharpness; writes refocus.json.
"""
from collections import defaultdict

import torch

from configurator import configure
from data import normalize, open_dataset, to_uint8
from editing import consistent, refocus, wiener
from model import pictures_at_once
from published import load_deployed
from pyramid import defocus
from util import runtime
from util.checkpoint import digest, write_json
from util.metrics import psnr, ssim
from util.picture_sets import load_images

# input and output
out_dir = 'out'                 # folder of student.pt, and for refocus.json
init_from = ''                  # student.pt (default: the one in out_dir)
tokenizer = ''                  # tokenizer.pt (default: the one beside student.pt)
data = ''                       # images (default: the tokenizer's training data)
images = 200                    # number of held-out images
# sampling; the defaults are VAR's
top_k = 900                     # keep the k most likely codes; 0: all
top_p = 0.96                    # keep the most likely codes up to this probability; 0: all
# system
batch_size = 0                  # images at a time; 0: 50, or as many as fit in 16 GiB
device = 'auto'                 # auto | cpu | cuda
dtype = 'float32'               # auto | float32 | bfloat16 | float16
seed = 0                        # seed of the samples
config = configure(globals())


def unsharp(images, radius, amount=1.5):
    """Unsharp masking: images + amount·(images − blurred images). It does not know the blur kernel."""
    return images + amount * (images - defocus(images, radius))


def sharpness(images, truth):
    """Mean gradient of images over that of the truth, where the truth is steepest (a tenth of the pixels).

    Both (B, C, H, W). 1 is as sharp as the truth, less is softer.
    """
    def steepness(x):
        right = x[..., :-1, 1:] - x[..., :-1, :-1]
        down = x[..., 1:, :-1] - x[..., :-1, :-1]
        return (right ** 2 + down ** 2).sum(1).sqrt().flatten(1)

    expected = steepness(truth)
    edges = expected >= expected.quantile(0.9, dim=1, keepdim=True)
    return (steepness(images)[edges].mean() / expected[edges].mean()).item()


@torch.no_grad()
def restore(student, structure, images, radius, noise, autocast):
    """{method: restored images (N, 3, S, S) on the CPU} for images uint8 (N, 3, S, S).

    They are blurred by radius (px), made noisy (σ for images in [−1, 1]), and rounded to 8 bits as in a file.
    Wiener's filter knows the kernel and the noise; the student knows the radius, but no class.
    """
    dev, kernel = student.head.weight.device, structure.kernel
    random, restored = runtime.generator(seed, 'noise'), defaultdict(list)
    for part in images.split(batch_size or pictures_at_once(student)):
        x = normalize(runtime.to_device(part, dev))
        blurred = defocus(x, radius, kernel) + noise * torch.randn(x.shape, generator=random).to(dev)
        blurred = normalize(to_uint8(blurred))
        power = 3e-4 + 6 * noise ** 2 / x.var().item()      # best of a sweep, for charts and for photographs
        labels = torch.full((len(x),), student.num_classes, device=dev)
        sampling = {'cfg': 0, 'top_k': top_k, 'top_p': top_p}
        sampling['generator'] = torch.Generator(dev).manual_seed(seed)
        with autocast():
            sampled = refocus(student, structure, blurred, radius, labels, noise=0, **sampling)
        methods = {
            'blurred': blurred,
            'unsharp': unsharp(blurred, radius),
            'Wiener': wiener(blurred, radius, kernel, power),
            'student': sampled,
            'student + Wiener': consistent(sampled, blurred, radius, kernel, power)
        }
        for name, y in methods.items():
            restored[name].append(y.clamp(-1, 1).float().cpu())
    return {name: torch.cat(parts) for name, parts in restored.items()}


def refocus_metrics(student, structure, images, autocast):
    """Prints and returns one row per blur (radius of a focus state, in px), noise and method."""
    truth, rows = normalize(images), []
    runtime.say(f'{len(images)} held-out images\nradius  noise  method            PSNR, dB   SSIM  sharpness')
    for radius in sorted({r for r in structure.radii if r > 0.5}, reverse=True):
        for noise in (0.0, 0.05):
            for method, y in restore(student, structure, images, radius, noise, autocast).items():
                row = {'radius': radius, 'noise': noise, 'method': method, 'images': len(images)}
                row |= {'psnr': psnr(y, truth), 'ssim': ssim(y, truth), 'sharpness': sharpness(y, truth)}
                line = '{radius:6.3g} {noise:6.3g}  {method:17} {psnr:8.2f} {ssim:6.2f} {sharpness:10.2f}'
                runtime.say(line.format(**row))
                rows.append(row)
    return rows


def main():
    dev = runtime.start(device)
    autocast, _ = runtime.precision(dtype, dev)
    runtime.require_positive(config, 'images')
    structure, student, stage1, _ = load_deployed(out_dir, init_from, tokenizer, device=dev)
    held_out = open_dataset(data or stage1['config']['data'], 'val', structure.image_size)
    rows = refocus_metrics(student, structure, load_images(held_out, images)[0], autocast)
    results = {'config': config, 'student_digest': digest(student.state_dict()), 'refocus': rows}
    write_json(f'{out_dir}/refocus.json', results)
    runtime.say(f'wrote {out_dir}/refocus.json')


if __name__ == '__main__':
    runtime.run(main)
