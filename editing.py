"""Editing and refocusing photos with a trained student: no further training, no teacher.

The tokenizer's encoder turns the photo into tokens. Some of them are kept; the student samples the others.
Inpainting, outpainting and class-conditional editing differ only in the mask and the label. Refocusing keeps
the first maps whole, because a photo that is out of focus *is* a focus state. Images are (B, 3, S, S) in
[−1, 1]; radii are in pixels of that grid.
"""
import math

import torch
import torch.nn.functional as F

from configurator import UserError
from pyramid import defocus, psf
from tokenizer import area


# -----------------------------------------------------------------------------
# editing: a mask says what to repaint

def painted_tokens(mask, patch_nums):
    """Which tokens to sample again: those with at least half of their cell inside the mask.

    mask (S, S), 1 where to repaint. Returns a bool tensor (1, p_k²) per map. The first map is always kept:
    it holds the tone of the whole picture, and old and new parts must agree on that. In the last map every
    cell that the mask touches is painted, so a thin mask changes details only.
    """
    inside = [
        area(mask[None, None], p).flatten(1)
        for p in patch_nums]
    painted = [
        cells >= 0.5
        for cells in inside]
    painted[0][:] = False
    painted[-1] = inside[-1] > 0
    return painted


def widen(image, margin):
    """The largest value of an image (S, S) within `margin` pixels, diagonals included, of every pixel."""
    return F.max_pool2d(image[None], 2 * margin + 1, stride=1, padding=margin)[0]


def feather(mask, margin=2):
    """Blending weight of the new content, (S, S): 0 outside the mask, rising to 1 over `margin` pixels in it.

    Every pixel outside stays as it was. There is no ramp at the picture's own borders. Where the mask is too
    thin for the ramp, the weight is scaled to reach 1 in its middle.
    """
    ramp = [
        -widen(-mask, distance)                             # the smallest value nearby
        for distance in range(margin + 1)]
    weight = sum(ramp) / len(ramp)
    return weight / widen(weight, margin).clamp(min=0.1)


def edit(student, tokenizer, photo, mask, labels, **sampling):
    """Repaints the part of photo (1, 3, S, S) where mask (S, S) is 1, once per label. Returns (B, 3, S, S).

    labels (B,): class of the new content, num_classes for none. Pixels outside the mask stay bit-identical.
    sampling: cfg, top_k, top_p, generator and smooth, as in VAR.generate.
    """
    painted = painted_tokens(mask, tokenizer.patch_nums)
    given = [
        tokens.masked_fill(cells, -1)
        for tokens, cells in zip(tokenizer.encode(photo), painted)]
    _, images = student.generate(tokenizer, labels, given=given, **sampling)
    return photo + feather(mask) * (images - photo)


# -----------------------------------------------------------------------------
# refocusing

def known_states(radii, radius):
    """Radii of the focus states that follow from a photo with this blur: those blurred at least as much.

    Raises UserError if the radius (pixels) is not above 0.5 and at most radii[0].
    """
    if not 0.5 < radius <= radii[0]:
        raise UserError(f'--radius={radius:g}: give the blur radius in pixels of the photo at the student\'s '
                        f'size, above 0.5 and at most {radii[0]:g}, the blur of the first state (0: this '
                        'tokenizer has no focus states and cannot refocus)')
    return [r for r in radii if r >= radius - 1e-6]


def refocus(student, tokenizer, blurred, radius, labels, noise=1e-3, **sampling):
    """Brings photos (B or 1, 3, S, S) that are out of focus by `radius` pixels into focus: (B, 3, S, S).

    The photo is blurred further to every state it determines (squared radii of successive blurs add, as
    variances do) and tokenized that far; the student samples the remaining maps. consistent() then restores
    what the blur preserved, given `noise`; 0 skips this. labels (B,) and sampling: as in edit(). Raises
    UserError if the radius is outside the tokenizer's focus states, or if it has none.
    """
    further = [
        math.sqrt(max(0.0, r * r - radius * radius))
        for r in known_states(tokenizer.radii, radius)]
    given = tokenizer.encode(blurred, radii=further)
    _, images = student.generate(tokenizer, labels, given=given, **sampling)
    if noise == 0:
        return images
    return consistent(images, blurred, radius, tokenizer.kernel, noise)


def consistent(images, blurred, radius, kernel='disk', noise=1e-3):
    """x + W(blurred − F_ρ(x)) with Wiener's filter W, clamped to [−1, 1], for the student's images x.

    What the blur has kept comes from the photo, which says more than the few tokens of its focus state; the
    rest stays the student's.
    """
    residual = blurred - defocus(images, radius, kernel)
    return (images + wiener(residual, radius, kernel, noise)).clamp(-1, 1)


def wiener(images, radius, kernel='disk', noise=1e-3):
    """Wiener deconvolution H* / (|H|² + noise) with the known PSF.

    images (B, 3, S, S); radius in pixels; noise: power of the noise relative to the picture's, above 0. Works
    on the picture mirrored at its borders, where defocus() is exactly a multiplication by H. The mean is left
    alone.
    """
    S = images.shape[-1]
    mean = images.mean((2, 3), keepdim=True)
    mirrored = F.pad(images - mean, (0, S - 2) * 2, mode='reflect')
    weight = psf(radius, kernel, images.device).to(images)
    half = len(weight) // 2
    centred = F.pad(weight, (0, mirrored.shape[-1] - len(weight)) * 2).roll((-half, -half), (0, 1))
    H = torch.fft.rfft2(centred).real                       # the PSF is symmetric, so H is real
    spectrum = torch.fft.rfft2(mirrored) * H / (H * H + noise)
    restored = torch.fft.irfft2(spectrum)
    return restored[..., :S, :S] + mean
