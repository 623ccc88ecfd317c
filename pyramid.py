"""The progressive refocusing pyramid (paper, section 3.2), and a picture of it.

    python pyramid.py photo.jpg --out=pyramid.png
    python pyramid.py siemens_star --image_size=512     # or any other of the embedded charts

plots three rows for any photo: the focused views L_k, the views D_k that plain downsampling gives, and
what the blur removed, A_k = D_k − L_k. Each column is one token map k, labelled with its blur radius ρ_k
and its sampling step s_k in pixels of the full-size image.

    python pyramid.py photo.jpg --blur=3 --out=blurred.png

writes the photo itself, 3 pixels out of focus (sample.py --refocus undoes that).

Images are float tensors (B, C, S, S) in [−1, 1].
"""
import math
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F

from configurator import UserError, configure

# picture
photo = ''                                      # the photo, or the name of an embedded chart
out = 'pyramid.png'                             # where the picture goes
image_size = 256                                # the photo is cropped to a square and resized to this side
blur = 0.0                                      # instead, write the photo blurred by this radius (pixels)
# pyramid
patch_nums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # p_k: side of each token map; image_size / p_K must be whole
focus_schedule = 'matched'                      # matched | states | cosine: see focus_radii
max_radius = 12.0                               # ρ_max in pixels of a 256-pixel image
kernel = 'disk'                                 # disk | gaussian | none
config = configure(globals(), positional='photo')


# -----------------------------------------------------------------------------
# kernels

def disk_kernel(radius):
    """The defocus kernel (point-spread function) of a circular aperture: (n, n), n odd, symmetric, sums to 1.

    radius is in pixels of the image it is applied to. The rim is one pixel soft,
    clip(ρ + ½ − distance, 0, 1), so the kernel is continuous in ρ. ρ ≤ ½ is the identity.
    """
    return radial_kernel(lambda r: (radius + 0.5 - r).clamp(0, 1), half=max(0, math.ceil(radius - 0.5)))


def gaussian_kernel(sigma):
    """A Gaussian cut off at 3 σ: (n, n), n odd, symmetric, sums to 1. sigma in pixels; σ ≤ 0 is the
    identity."""
    if sigma <= 0:
        return disk_kernel(0)
    return radial_kernel(lambda r: torch.exp(-0.5 * (r / sigma) ** 2), half=math.ceil(3 * sigma))


def radial_kernel(profile, half):
    if half > 5000:                             # building it would take gigabytes
        raise UserError(f'a blur of {half} pixels fits no image: lower it, or max_radius')
    offset = torch.arange(-half, half + 1, dtype=torch.float64, device='cpu')   # even where meta is default
    weight = profile(torch.hypot(offset[:, None], offset[None, :]))
    return (weight / weight.sum()).float()


@lru_cache(maxsize=None)                        # or every step would build it and send it to the device
def psf(radius, kernel, device='cpu'):
    """The kernel for a defocus radius: disk, Gaussian of σ = ρ/2, or identity. Cached: do not modify it."""
    if kernel == 'disk':
        weight = disk_kernel(radius)
    elif kernel == 'gaussian':
        weight = gaussian_kernel(radius / 2 if radius > 0.5 else 0)
    elif kernel == 'none':
        weight = disk_kernel(0)
    else:
        raise UserError(f'kernel={kernel!r}: choose disk, gaussian or none')
    return weight.to(device, non_blocking=True)


# -----------------------------------------------------------------------------
# focus schedule

def focus_radii(patch_nums, image_size, max_radius=12.0, schedule='matched'):
    """ρ_k for every token map, falling to 0 (Eq. 2), in pixels of the full-size image.

    max_radius is ρ_max at 256 pixels. It scales with image_size, because blur is a property of the picture.

    'cosine'   Eq. 2 with its sign corrected, one radius per map: ρ_max·(1 + cos(π(k−1)/(K−1)))/2
    'states'   the paper's K = 4 states (12, 9, 3, 0 pixels), shared by groups of maps; only the last is sharp
    'matched'  ρ_k = ρ_max·s_k/s_1: blur in proportion to the sampling step

    Raises UserError unless patch_nums grow.
    """
    if not patch_nums or list(patch_nums) != sorted(set(patch_nums)) or patch_nums[0] < 1:
        raise UserError(f'patch_nums={tuple(patch_nums)} must grow from a number ≥ 1')
    rho_max = max_radius * image_size / 256
    K = len(patch_nums)
    last = max(1, K - 1)
    if schedule == 'cosine':
        radii = [rho_max * (1 + math.cos(math.pi * k / last)) / 2 for k in range(K)]
    elif schedule == 'states':
        radii = [rho_max * (1 + math.cos(math.pi * (3 * k // last) / 3)) / 2 for k in range(K)]
    elif schedule == 'matched':
        radii = [rho_max * patch_nums[0] / p for p in patch_nums]
    else:
        raise UserError(f'focus_schedule={schedule!r}: choose matched, states or cosine')
    radii[-1] = 0.0                             # cos(π) is not exactly −1, and 'matched' never reaches 0
    return radii


# -----------------------------------------------------------------------------
# Eq. 1, 3, 4

def reflect_pad(images, margin):
    side = images.shape[-1]
    if margin >= side:
        raise UserError(f'a blur of {margin} pixels does not fit an image of {side}: lower it, or max_radius')
    return F.pad(images, (margin,) * 4, mode='reflect')


def in_float32(device):
    """A context without autocast. The meta device, which computes shapes only, has none to turn off."""
    return nullcontext() if device.type == 'meta' else torch.autocast(device.type, enabled=False)


def convolve(images, weight, stride=1):
    """images ⋆ weight at the middle of every cell of `stride` pixels, with reflected borders. Dropped pixels
    are never computed."""
    padded = reflect_pad(images, weight.shape[-1] // 2)[..., stride // 2:, stride // 2:]
    # one picture of B·C channels is much faster on CPUs than B·C pictures of one channel
    channels = padded.flatten(0, 1)
    kernels = weight.to(images).expand(len(channels), 1, -1, -1)
    with in_float32(images.device):             # bfloat16 would round the picture itself
        result = F.conv2d(channels, kernels, stride=stride, groups=len(channels))
    return result.unflatten(0, images.shape[:2])


def convolve_fft(images, weight):
    """convolve(images, weight) by FFT: cheaper for wide kernels when no pixel is dropped."""
    margin, side = weight.shape[-1] // 2, images.shape[-1]
    padded = reflect_pad(images, margin)
    size = [fast_length(side + 2 * margin)] * 2
    spectrum = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(weight.to(images), s=size)
    # the kernel sits in the corner, so the result is shifted by one margin on top of the padding's
    inside = slice(2 * margin, 2 * margin + side)
    return torch.fft.irfft2(spectrum, s=size)[..., inside, inside]


def fast_length(n):
    """The smallest number ≥ n without a prime factor above 5: FFTs of other lengths are much slower."""
    while 30 ** 30 % n:                         # 0 if 2, 3 and 5 are the only prime factors of n
        n += 1
    return n


def defocus(images, radius, kernel='disk'):
    """F_ρ(x) = k_ρ ⋆ x (Eq. 1): a photo taken out of focus. Same shape, reflected borders.

    radius is in pixels of `images`. Raises UserError if the kernel is larger than the image.
    """
    weight = psf(radius, kernel, images.device)
    if weight.numel() == 1:
        return images
    return convolve(images, weight) if len(weight) <= 9 else convolve_fft(images, weight)


def decimate(images, size):
    """x↓s (Eq. 3, 4): (B, C, S, S) → (B, C, size, size), with nothing done against aliasing.

    An integer step s = S/size keeps the pixel in the middle of each s × s cell (for an even s, the one just
    right of and below it). A fractional step interpolates about the same points (bicubic).
    """
    side = images.shape[-1]
    if side % size == 0:
        step = side // size
        return images[..., step // 2::step, step // 2::step]
    return F.interpolate(images, size, mode='bicubic')


def defocus_decimate(images, radius, size, kernel='disk'):
    """decimate(defocus(images, radius), size), by the cheapest exact route."""
    weight = psf(radius, kernel, images.device)
    side = images.shape[-1]
    if weight.numel() > 1 and side % size == 0 and size < side:
        return convolve(images, weight, stride=side // size)
    return decimate(defocus(images, radius, kernel), size)


def view_sizes(patch_nums, image_size):
    """The side of every view in pixels: p_k·f, f = image_size / p_K. UserError if f is not whole."""
    if image_size % patch_nums[-1]:
        raise UserError(f'image_size={image_size} is not a multiple of the last of patch_nums='
                        f'{tuple(patch_nums)}')
    return [p * (image_size // patch_nums[-1]) for p in patch_nums]


def noise_levels(noise, K):
    """β_1 … β_K, linear from noise[0] to noise[1], for images in [−1, 1]."""
    return [noise[0] + (noise[1] - noise[0]) * k / max(1, K - 1) for k in range(K)]


def noise_like(images, k, generator):
    """ε of Eq. 3 for token map k (counted from 0), standard normal.

    generator: a torch.Generator, or a function (shape, k) → noise, which can tie noise to sample
    numbers.
    """
    if callable(generator):
        return generator(images.shape, k).to(images)
    return torch.randn(images.shape, generator=generator, device=generator.device).to(images)


def build_pyramid(images, patch_nums, radii, noise=(0.0, 0.0), kernel='disk', generator=None):
    """Eq. 3 and 4: lists over k of focused views L_k, downsampled D_k and alias A_k = D_k − L_k.

    Each view is (B, C, p_k·f, p_k·f). radii come from focus_radii; noise is (β_1, β_K); generator: see
    noise_like, None adds no noise. kernel='none' adds neither blur nor noise: L_k = D_k, and A_k is exactly
    zero.
    """
    noisy = generator is not None and kernel != 'none'
    betas = noise_levels(noise, len(patch_nums))
    focused, downsampled = [], []
    sizes = view_sizes(patch_nums, images.shape[-1])
    for k, (size, radius) in enumerate(zip(sizes, radii)):
        view = defocus_decimate(images, radius, size, kernel)
        focused.append(view + betas[k] * noise_like(view, k, generator) if noisy else view)
        downsampled.append(decimate(images, size))
    return focused, downsampled, [D - L for D, L in zip(downsampled, focused)]


# -----------------------------------------------------------------------------
# the picture

def plot_pyramid(images, patch_nums, radii, kernel):
    """A labelled PIL picture of the three rows for images (1, 3, S, S)."""
    from util.pictures import picture_grid

    focused, downsampled, alias = build_pyramid(images, patch_nums, radii, kernel=kernel)
    alias = [2 * view for view in alias]        # faint, so shown at twice its contrast
    views = [F.interpolate(view, 160, mode='nearest')[0] for view in focused + downsampled + alias]
    labels = [f'k={k}  blur {radius:.3g}\ns={patch_nums[-1] / p:.3g}  p={p}'
              for k, (p, radius) in enumerate(zip(patch_nums, radii), start=1)]
    rows = ('L: focused', 'D: downsampled', 'A = D - L (x 2)')
    return picture_grid(torch.stack(views), len(patch_nums), rows, labels)


def main():
    from util.pictures import load_photo, save_png, to_picture
    from util.runtime import require_positive

    require_positive(config, 'image_size')
    if not photo:
        raise UserError('which photo? python pyramid.py PHOTO --out=pyramid.png')
    images = load_photo(photo, image_size)
    if blur:
        save_png(out, to_picture(defocus(images, blur, kernel)[0]))
        print(f'wrote {out}: {photo}, {blur:g} pixels out of focus')
        return
    radii = focus_radii(patch_nums, image_size, max_radius, focus_schedule)
    save_png(out, plot_pyramid(images, patch_nums, radii, kernel))
    print(f'wrote {out}: {len(patch_nums)} views of {photo}, radii ' + ' '.join(f'{r:.3g}' for r in radii))


if __name__ == '__main__':
    from util.runtime import run
    run(main)
