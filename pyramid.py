"""The progressive refocusing pyramid (paper, section 3.2), and a picture of it.

    python pyramid.py photo.jpg --out=pyramid.png
    python pyramid.py siemens_star --image_size=512     # or any other of the embedded charts

draws three rows for any photo: the focused views L_k, the views D_k that plain downsampling gives, and
what the blur removed, A_k = D_k − L_k. Every column is one token map k with its blur radius ρ_k and its
sampling step s_k, in pixels of the full-size image.

    python pyramid.py photo.jpg --blur=3 --out=blurred.png

writes the photo itself, 3 pixels out of focus (sample.py --refocus takes that back).

Images are float tensors (B, C, S, S) in [−1, 1].
"""
import math
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F

from configurator import UserError, configure

# picture
photo = ''                                      # the photo, or the name of an embedded chart (may stand without --photo=)
out = 'pyramid.png'                             # where the drawing goes
image_size = 256                                # the photo is cropped to a square and resized to this side
blur = 0.0                                      # instead of the drawing: the photo under a blur of this radius, in pixels
# pyramid
patch_nums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # side of each token map; view k is p_k·(image_size / p_K) pixels wide
focus_schedule = 'matched'                      # matched | states | cosine: how the radius falls (see focus_radii)
max_radius = 12.0                               # ρ_max in pixels of a 256-pixel image
kernel = 'disk'                                 # disk | gaussian | none
config = configure(globals(), positional='photo')


# -----------------------------------------------------------------------------
# kernels

def disk_kernel(radius):
    """The defocus PSF of a circular aperture: (n, n), n odd, symmetric, sums to 1.

    radius in pixels of the image it is applied to. The rim is one pixel soft, clip(ρ + ½ − r, 0, 1), so
    that the kernel is continuous in ρ; ρ ≤ ½ is the identity.
    """
    return radial_kernel(lambda r: (radius + 0.5 - r).clamp(0, 1), half=max(0, math.ceil(radius - 0.5)))


def gaussian_kernel(sigma):
    """A Gaussian cut at 3 σ: (n, n), n odd, symmetric, sums to 1. sigma in pixels; σ ≤ 0 is the identity."""
    if sigma <= 0:
        return torch.ones(1, 1)
    return radial_kernel(lambda r: torch.exp(-0.5 * (r / sigma) ** 2), half=math.ceil(3 * sigma))


def radial_kernel(profile, half):
    offset = torch.arange(-half, half + 1, dtype=torch.float64)
    weight = profile(torch.hypot(offset[:, None], offset[None, :]))
    return (weight / weight.sum()).float()


@lru_cache(maxsize=None)                                    # else it would be made, and sent to the device, in every step
def psf(radius, kernel, device='cpu'):
    """The kernel that stands for a defocus radius: a disk, a Gaussian of σ = ρ/2, or nothing at all. Not to be written to."""
    if torch.device(device).type != 'cpu':
        return psf(radius, kernel).to(device, non_blocking=True)
    if kernel == 'disk':
        return disk_kernel(radius)
    if kernel == 'gaussian':
        return gaussian_kernel(radius / 2 if radius > 0.5 else 0)
    if kernel == 'none':
        return torch.ones(1, 1)
    raise UserError(f'kernel={kernel!r}: choose disk, gaussian or none')


# -----------------------------------------------------------------------------
# focus schedule

def focus_radii(patch_nums, image_size, max_radius=12.0, schedule='matched'):
    """ρ_k for every token map, falling to 0 (Eq. 2), in pixels of the full-size image.

    max_radius is ρ_max at 256 pixels and grows with image_size: blur belongs to the picture, not to its grid.

    'cosine'   Eq. 2 with its sign mended, one radius a token map: ρ_max·(1 + cos(π(k−1)/(K−1)))/2
    'states'   the paper's K = 4 states (12, 9, 3, 0 pixels) shared by groups of token maps, only the last in focus
    'matched'  ρ_k = ρ_max·s_k/s_1: blur in proportion to the step it is sampled with
    """
    rho_max, maps = max_radius * image_size / 256, len(patch_nums)
    if maps == 1:
        return [0.0]
    if schedule == 'cosine':
        radii = [rho_max * (1 + math.cos(math.pi * k / (maps - 1))) / 2 for k in range(maps)]
    elif schedule == 'states':
        radii = [rho_max * (1 + math.cos(math.pi * (3 * k // (maps - 1)) / 3)) / 2 for k in range(maps)]
    elif schedule == 'matched':
        radii = [rho_max * patch_nums[0] / p for p in patch_nums]
    else:
        raise UserError(f'focus_schedule={schedule!r}: choose matched, states or cosine')
    radii[-1] = 0.0                                         # cos(π) is only nearly −1; 'matched' never gets there
    return radii


# -----------------------------------------------------------------------------
# Eq. 1, 3, 4

def reflect_pad(images, margin):
    if margin >= images.shape[-1]:
        raise UserError(f'a blur of {margin} pixels does not fit an image of {images.shape[-1]}: lower max_radius')
    return F.pad(images, (margin,) * 4, mode='reflect') if margin else images


def in_float32(device):
    """A context without autocast; the meta device, on which shapes alone are computed, knows none."""
    return nullcontext() if device.type == 'meta' else torch.autocast(device.type, enabled=False)


def convolve(images, weight, stride=1):
    """images ⋆ weight at every stride-th pixel, borders reflected: only the pixels that are kept are computed."""
    B, C, H, W = images.shape
    padded = reflect_pad(images, weight.shape[-1] // 2)
    # as the channels of one picture: on CPUs two to five times as fast as B·C pictures of one channel each
    channels, kernels = padded.reshape(1, B * C, *padded.shape[-2:]), weight.to(images).expand(B * C, 1, -1, -1)
    with in_float32(images.device):                         # bfloat16 would round the picture itself
        result = F.conv2d(channels, kernels, stride=stride, groups=B * C)
    return result.reshape(B, C, *result.shape[-2:])


def convolve_fft(images, weight):
    """convolve(images, weight) by FFT: cheaper for wide kernels, as long as no pixel is dropped."""
    margin, (height, width) = weight.shape[-1] // 2, images.shape[-2:]
    padded = reflect_pad(images, margin)
    size = [fast_length(n) for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(weight.to(images), s=size)
    # the kernel sits in the corner, so the result is shifted by one margin: reading from 2·margin undoes that
    return torch.fft.irfft2(spectrum, s=size)[..., 2 * margin:2 * margin + height, 2 * margin:2 * margin + width]


def fast_length(n):
    """The least number ≥ n without a prime factor above 5: an FFT of 258 = 2·3·43 takes three times one of 270."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def defocus(images, radius, kernel='disk'):
    """F_ρ(x) = k_ρ ⋆ x (Eq. 1): a photo taken out of focus. Same shape; borders reflect.

    radius in pixels of `images`. Raises UserError if the kernel is larger than the image.
    """
    weight = psf(radius, kernel, images.device)
    if weight.numel() == 1:
        return images
    return convolve(images, weight) if len(weight) <= 9 else convolve_fft(images, weight)


def decimate(images, size):
    """x↓s (Eq. 3, 4): (B, C, S, S) → (B, C, size, size) with nothing done against aliasing.

    An integer step s = S/size keeps every s-th pixel, a fractional one interpolates (bicubic).
    """
    side = images.shape[-1]
    if side % size == 0:
        step = side // size
        return images[..., ::step, ::step]
    return F.interpolate(images, (size, size), mode='bicubic', align_corners=False, antialias=False)


def defocus_decimate(images, radius, size, kernel='disk'):
    """decimate(defocus(images, radius), size), by the cheapest exact route."""
    weight = psf(radius, kernel, images.device)
    side = images.shape[-1]
    if weight.numel() > 1 and side % size == 0 and size < side:
        return convolve(images, weight, stride=side // size)
    return decimate(defocus(images, radius, kernel), size)


def view_sizes(patch_nums, image_size):
    """Pixels on a side of every view: p_k·f, with f = image_size / p_K. UserError if that is no integer."""
    if image_size % patch_nums[-1]:
        raise UserError(f'image_size={image_size} is not a multiple of the last of patch_nums={tuple(patch_nums)}')
    return [p * (image_size // patch_nums[-1]) for p in patch_nums]


def noise_levels(noise, maps):
    """β_k, linear over the token maps from noise[0] to noise[1], for images in [−1, 1]."""
    first, last = noise
    return [first + (last - first) * k / max(1, maps - 1) for k in range(maps)]


def noise_like(images, k, generator=None):
    """ε of Eq. 3 for token map k (from 0), standard normal. generator: None, a torch.Generator, or a function (shape, k) → noise,
    by which a sample's noise may depend on its number alone."""
    if callable(generator):
        return generator(images.shape, k).to(images)
    return torch.randn(images.shape, generator=generator, device=generator.device if generator else images.device).to(images)


def build_pyramid(images, patch_nums, radii, noise=(0.0, 0.0), kernel='disk', generator=None):
    """Eq. 3 and 4: three lists over k of (B, C, p_k·f, p_k·f): focused L_k, downsampled D_k, alias A_k = D_k − L_k.

    radii as focus_radii gives them. noise = (β_1, β_K), drawn as noise_like says.
    kernel='none' is plain next-scale prediction: L_k = D_k without noise, so that A_k is exactly zero.
    """
    betas = noise_levels(noise if kernel != 'none' else (0.0, 0.0), len(patch_nums))
    focused, downsampled, alias = [], [], []
    for k, (size, radius, beta) in enumerate(zip(view_sizes(patch_nums, images.shape[-1]), radii, betas)):
        L = defocus_decimate(images, radius, size, kernel)
        if beta:
            L = L + beta * noise_like(L, k, generator)
        D = decimate(images, size)
        focused.append(L)
        downsampled.append(D)
        alias.append(D - L)
    return focused, downsampled, alias


# -----------------------------------------------------------------------------
# the drawing

def draw(images, patch_nums, radii, kernel, side=160):
    """A labelled PIL picture of the three rows for images (1, 3, S, S)."""
    from util.pictures import picture_grid

    focused, downsampled, alias = build_pyramid(images, patch_nums, radii, kernel=kernel)
    alias = [2 * view for view in alias]                    # small: drawn at twice its contrast, around grey
    views = [F.interpolate(view, (side, side), mode='nearest')[0] for view in focused + downsampled + alias]
    labels = [f'k={k}  blur {radius:.3g}\ns={patch_nums[-1] / p:.3g}  p={p}'
              for k, (p, radius) in enumerate(zip(patch_nums, radii), start=1)]
    return picture_grid(torch.stack(views), len(patch_nums), ('L: focused', 'D: downsampled', 'A = D - L (twice)'), labels, side)


def main():
    from util.pictures import load_photo, save_png, to_picture

    if not photo:
        raise UserError('which photo? python pyramid.py PHOTO --out=pyramid.png')
    if blur:
        save_png(out, to_picture(defocus(load_photo(photo, image_size), blur, kernel)[0]))
        print(f'wrote {out}: {photo}, {blur:g} pixels out of focus')
        return
    radii = focus_radii(patch_nums, image_size, max_radius, focus_schedule)
    save_png(out, draw(load_photo(photo, image_size), patch_nums, radii, kernel))
    print(f'wrote {out}: {len(patch_nums)} views of {photo}, radii ' + ' '.join(f'{r:.3g}' for r in radii))


if __name__ == '__main__':
    from util.runtime import run
    run(main)
