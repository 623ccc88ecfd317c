"""Held-out images under a disk of known radius: what the student makes of them, against classical remedies.

    python -m experiments.refocus config/charts.py
    python -m experiments.refocus --out_dir=out-d16 --dtype=auto

Methods: unsharp masking, Wiener deconvolution, the student, and the student with Wiener's correction (editing.py).
Prints PSNR, SSIM and edge sharpness; writes out_dir/refocus.json.
"""
import os

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
out_dir = 'out'                 # where student.pt lies and refocus.json goes
init_from = ''                  # student.pt (default: the one in out_dir), or with --vae a published transformer
tokenizer = ''                  # tokenizer.pt (default: the one beside student.pt)
data = ''                       # images (default: what the tokenizer was trained on)
images = 200                    # held-out images that are put out of focus
workers = 0                     # processes that decode images of a folder
# sampling; the defaults are VAR's
top_k = 900                     # most likely codes kept; 0 is all
top_p = 0.96                    # probability kept; 0 is all
# system
batch_size = 0                  # images at a time; 0: 50, or as many as take 16 GiB
device = 'auto'                 # auto | cpu | cuda
dtype = 'float32'               # auto | float32 | bfloat16 | float16
seed = 0                        # of the samples
config = configure(globals())


def unsharp(images, radius, amount=1.5):
    """Unsharp masking: images + amount·(images − blurred by radius), the classical remedy that knows no PSF."""
    return images + amount * (images - defocus(images, radius))


def sharpness(images, truth):
    """Mean gradient of images relative to the truth's, at the tenth of the pixels where the truth's is steepest: 1 is as
    sharp as the truth, less is softer. (B, C, H, W) each."""
    def steepness(x):
        right, down = x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]
        return (right ** 2 + down ** 2).sum(1).sqrt().flatten(1)

    of_truth = steepness(truth)
    edges = of_truth >= of_truth.quantile(0.9, dim=1, keepdim=True)
    return (steepness(images)[edges].mean() / of_truth[edges].mean()).item()


@torch.no_grad()
def refocus_metrics(student, structure, images, autocast):
    """Rows of figures, one for each blur (a focus state's radius, px; noise σ for images in [−1, 1]) and method.

    images uint8 (N, 3, S, S) are blurred, made noisy and rounded to 8 bits, as a file would hold them. Wiener's filter is told
    the PSF and the noise, and weighs it as a sweep found best; the student is told the radius, no class.
    """
    dev, rows = student.head.weight.device, []
    for radius in sorted({r for r in structure.radii if r > 0.5}, reverse=True):
        for noise in (0.0, 0.05):
            drawn, methods, truth = runtime.generator(seed, 8), {}, []
            for part in images.split(batch_size or pictures_at_once(student)):
                x = normalize(runtime.to_device(part, dev))
                blurred = defocus(x, radius, structure.kernel)
                blurred = normalize(to_uint8(blurred + noise * torch.randn(x.shape, generator=drawn).to(dev)))
                power = 3e-4 + 6 * noise ** 2 / x.var().item()     # best of a sweep, for charts and for photographs
                labels = torch.full((len(x),), student.num_classes, device=dev)
                sampling = {'cfg': 0, 'top_k': top_k, 'top_p': top_p, 'generator': torch.Generator(dev).manual_seed(seed)}
                with autocast():
                    drawn_anew = refocus(student, structure, blurred, radius, labels, noise=0, **sampling)
                found = {'blurred': blurred, 'unsharp': unsharp(blurred, radius),
                         'Wiener': wiener(blurred, radius, structure.kernel, power), 'student': drawn_anew,
                         'student + Wiener': consistent(drawn_anew, blurred, radius, structure.kernel, power)}
                for name, y in found.items():
                    methods.setdefault(name, []).append(y.clamp(-1, 1).float().cpu())
                truth.append(x.cpu())
            truth = torch.cat(truth)
            for name, y in methods.items():
                y = torch.cat(y)
                rows.append({'radius': radius, 'noise': noise, 'method': name, 'psnr': psnr(y, truth), 'ssim': ssim(y, truth),
                             'sharpness': sharpness(y, truth), 'images': len(y)})
    return rows


def print_refocus(rows):
    methods = list(dict.fromkeys(row['method'] for row in rows))
    runtime.say(f'{rows[0]["images"]} held-out images out of focus: PSNR (dB) / SSIM / edge sharpness\n{"radius":>6} {"noise":>6}'
                + ''.join(f'{name:>21}' for name in methods))
    for i in range(0, len(rows), len(methods)):
        cells = (f'{row["psnr"]:.2f} / {row["ssim"]:.2f} / {row["sharpness"]:.2f}' for row in rows[i:i + len(methods)])
        runtime.say(f'{rows[i]["radius"]:6.3g} {rows[i]["noise"]:6.3g}' + ''.join(f'{cell:>21}' for cell in cells))


def main():
    dev = runtime.start(device)
    autocast, _ = runtime.precision(dtype, dev)
    runtime.require_positive(config, 'images')
    structure, student, stage1, _ = load_deployed(out_dir, init_from, tokenizer, device=dev)
    held_out = open_dataset(data or stage1['config']['data'], 'val', structure.image_size)
    rows = refocus_metrics(student, structure, load_images(held_out, images, workers)[0], autocast)
    print_refocus(rows)
    write_json(os.path.join(out_dir, 'refocus.json'), {'config': config, 'student_digest': digest(student.state_dict()), 'refocus': rows})
    runtime.say(f'wrote {out_dir}/refocus.json')


if __name__ == '__main__':
    runtime.run(main)
