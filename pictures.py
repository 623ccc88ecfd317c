"""Tensors to picture files and back: one photo in, labelled grids and GIFs out; and how far two pictures differ.

Images are float in [−1, 1].
"""
import math

import torch
from PIL import Image, ImageDraw, ImageFont

from configurator import UserError
from data import normalize, read_picture, square_crop, to_uint8
from runtime import atomic_write


def load_photo(path, image_size):
    """A photo's centre square at image_size pixels: (1, 3, S, S). UserError when it can not be read."""
    try:
        image = read_picture(path, 2 * image_size)
    except FileNotFoundError:
        raise UserError(f'{path!a}: no such picture') from None
    except Exception as error:                              # Pillow raises nearly anything on a broken file
        raise UserError(f'{path!a} can not be read as a picture ({type(error).__name__}: {error})') from None
    return normalize(square_crop(image, image_size, min(image.size)))[None]


def to_picture(image, side=0):
    """One image (3, S, S) → PIL; with `side`, enlarged to that many pixels without smoothing."""
    picture = Image.fromarray(to_uint8(image.cpu()).permute(1, 2, 0).numpy())
    return picture.resize((side, side), Image.Resampling.NEAREST) if side else picture


def picture_grid(images, columns, row_names=(), column_names=(), side=0):
    """(N, 3, S, S) → a PIL picture, row by row, each cell `side` pixels (by default S, at least 64) wide.

    row_names are written to the left of the rows, column_names (of up to two lines) above the columns.
    """
    S = images.shape[-1]
    side = side or max(1, math.ceil(64 / S)) * S
    gap, font = 2, ImageFont.load_default(14)
    left = max((math.ceil(font.getlength(name)) + 12 for name in row_names), default=0)
    top = 40 if any('\n' in name for name in column_names) else 24 if column_names else 0
    rows = math.ceil(len(images) / columns)
    canvas = Image.new('RGB', (left + columns * (side + gap) - gap, top + rows * (side + gap) - gap), 'white')
    pen = ImageDraw.Draw(canvas)
    for column, name in enumerate(column_names):
        pen.text((left + column * (side + gap) + 4, 2), name, 'black', font)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        canvas.paste(to_picture(image, side), (left + column * (side + gap), top + row * (side + gap)))
    for row, name in enumerate(row_names):
        pen.text((6, top + row * (side + gap) + side // 2 - 9), name, 'black', font)
    return canvas


def save_png(path, picture):
    with atomic_write(path) as file:
        picture.save(file, 'PNG')


def save_gif(path, frames, seconds=0.5, last=2.0):
    """PIL frames → an endless GIF that rests on the last one."""
    durations = [int(1000 * seconds)] * (len(frames) - 1) + [int(1000 * last)]
    frames = [frame.quantize(256, dither=Image.Dither.NONE) for frame in frames]
    with atomic_write(path) as file:
        frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], duration=durations, loop=0)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB, the mean over the images of each one's own. a, b (B, 3, H, W) in [−1, 1].

    The peak is 2, the width of the range. Equal images have inf.
    """
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()
