"""Editing and refocusing photos with a trained student: no further training, no teacher.

A photo's tokens come from the tokenizer's encoder. Some of them stay, the student draws the rest. Inpainting, outpainting
and class-conditional editing differ only in the mask and the label; refocusing keeps the first maps whole, since a photo
that is out of focus *is* a focus state. Images are (B, 3, S, S) in [−1, 1], radii in pixels of that grid.
"""
import math

import torch
import torch.nn.functional as F

from configurator import UserError
from pyramid import defocus, psf
from tokenizer import area


# -----------------------------------------------------------------------------
# a mask says what is painted anew

def painted_cells(mask, patch_nums):
    """mask (S, S), 1 where to paint → for each map (1, p_k²) bool: is at least half of the token's cell to be painted?

    The first map is never painted: it holds the tone of the whole picture, which what is kept and what is new share.
    """
    cells = [area(mask[None, None], p).flatten(1) >= 0.5 for p in patch_nums]
    return [torch.zeros_like(cells[0]), *cells[1:]]


def feather(mask, margin):
    """Weight of the painted picture, (S, S): 0 outside the mask, rising over `margin` pixels inside it to 1.

    It rises inside only, so that every pixel outside stays as it was; not from the picture's own borders.
    """
    outside, weight = (1 - mask)[None, None], torch.zeros_like(mask)
    for _ in range(margin + 1):
        weight = weight + (1 - outside[0, 0]) / (margin + 1)
        outside = F.max_pool2d(outside, 3, stride=1, padding=1)
    return weight


def edit(student, tokenizer, photo, mask, labels, margin=2, **sampling):
    """The photo (1, 3, S, S) with the part where mask (S, S) is 1 drawn anew, once for every label: (B, 3, S, S).

    labels (B,): class of what is painted, num_classes for none. Pixels outside the mask are the photo's own, to the bit.
    sampling: cfg, top_k, top_p, generator, smooth as in VAR.generate.
    """
    cells = painted_cells(mask, tokenizer.patch_nums)
    given = [token_map.masked_fill(paint, -1) for token_map, paint in zip(tokenizer.encode(photo), cells)]
    _, images = student.generate(tokenizer, labels, given=given, **sampling)
    return torch.where(mask > 0, photo + feather(mask, margin) * (images - photo), photo)


# -----------------------------------------------------------------------------
# refocusing

def states_known(radii, radius):
    """How many focus states a photo defocused by `radius` pixels tells: the leading ones blurred at least as much."""
    if max(radii) == 0:
        raise UserError('this tokenizer has no focus states (pyramid=scale, or no kernel): only next-focus prediction can refocus')
    if not 0.5 < radius <= radii[0]:
        raise UserError(f'--radius={radius:g}: give the radius of the blur in pixels of the {len(radii)} focus states\' grid, above '
                        f'0.5 and at most {radii[0]:g}, the blur of the first state')
    return next(k for k, r in enumerate(radii) if r < radius - 1e-6)


def refocus(student, tokenizer, blurred, radius, labels, noise=1e-3, **sampling):
    """Photos (B, 3, S, S) out of focus by `radius` pixels → the same in focus, (B, 3, S, S).

    The photo is blurred on to every state it can tell, tokenized so far, and the student draws the other maps. Radii of
    blurs in a row add as squares, for that is how variances add. Then consistent() puts back what the blur has left;
    noise: its setting, 0 leaves the student's picture as it is. labels (B,), sampling: as in edit().
    Raises UserError for a radius that lies outside the tokenizer's focus states, and for a tokenizer without.
    """
    known = states_known(tokenizer.radii, radius)
    further = [math.sqrt(max(0.0, r * r - radius * radius)) for r in tokenizer.radii[:known]]
    given = tokenizer.encode(blurred, radii=further)
    _, images = student.generate(tokenizer, labels, given=given, **sampling)
    return consistent(images, blurred, radius, tokenizer.kernel, noise) if noise else images


def consistent(images, blurred, radius, kernel='disk', noise=1e-3):
    """x + W(blurred − F_ρ(x)), W being Wiener's filter: what the blur has not destroyed is the photo's, the rest stays the
    student's. The photo says more than the few tokens of its focus state."""
    return (images + wiener(blurred - defocus(images, radius, kernel), radius, kernel, noise)).clamp(-1, 1)


def wiener(images, radius, kernel='disk', noise=1e-3):
    """Wiener's deconvolution H* / (|H|² + noise) with the known PSF; noise: power of the noise relative to the picture's.

    Done on the picture mirrored at its borders, where defocus() is an exact multiplication by H; the mean is left alone.
    """
    S, weight, mean = images.shape[-1], psf(radius, kernel).to(images), images.mean((2, 3), keepdim=True)
    mirrored = torch.cat([images - mean, (images - mean).flip(-1)[..., 1:-1]], -1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)[..., 1:-1, :]], -2)
    half = weight.shape[-1] // 2
    at_corner = F.pad(weight, (0, mirrored.shape[-1] - weight.shape[-1]) * 2).roll((-half, -half), (0, 1))
    H = torch.fft.rfft2(at_corner).real                     # symmetric, so real
    result = torch.fft.irfft2(torch.fft.rfft2(mirrored) * H / (H * H + noise), s=mirrored.shape[-2:])
    return result[..., :S, :S] + mean


