"""Tensors to picture files and back: photos and masks in, labelled grids and GIFs out; and how far two pictures differ.

Images are float in [−1, 1].
"""
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from configurator import UserError
from data import normalize, read_picture, square_crop, to_uint8
from util.charts import Charts
from util.checkpoint import atomic_write


def open_photo(path, image_size):
    """A photo as a PIL RGB image, or an embedded chart by its name, image_size wide. UserError when it can not be read."""
    if path in Charts.classes:
        return to_picture(normalize(Charts('val', image_size, len(Charts.classes)).images[Charts.classes.index(path)]))
    try:
        return read_picture(path, 2 * image_size)
    except FileNotFoundError:
        raise UserError(f'{path!a}: no such picture') from None
    except Exception as error:                              # Pillow raises nearly anything on a broken file
        raise UserError(f'{path!a} can not be read as a picture ({type(error).__name__}: {error})') from None


def load_photo(path, image_size):
    """A photo's centre square at image_size pixels: (1, 3, S, S); path as in open_photo."""
    image = open_photo(path, image_size)
    return normalize(square_crop(image, image_size, min(image.size)))[None]


def read_box(name, text, limit):
    """Four whole numbers LEFT,TOP,RIGHT,BOTTOM in 0 … limit; UserError otherwise."""
    numbers = text if isinstance(text, tuple) else tuple(int(n) if n.strip().isdecimal() else -1 for n in text.split(','))
    if len(numbers) != 4 or not all(type(n) is int and 0 <= n <= limit for n in numbers):
        raise UserError(f'--{name}={",".join(map(str, numbers))}: give LEFT,TOP,RIGHT,BOTTOM, whole numbers from 0 to {limit}')
    return numbers


def load_mask(mask, photo, image_size):
    """The part of a photo to be drawn anew, (S, S) of 0 and 1, as load_photo crops it.

    mask: a picture of the photo's proportions, white there; or 'LEFT,TOP,RIGHT,BOTTOM', a box in pixels of the result.
    """
    if ',' in mask and not os.path.exists(mask):
        left, top, right, bottom = read_box('mask', mask, image_size)
        painted = torch.zeros(image_size, image_size)
        painted[top:bottom, left:right] = 1
    else:
        image, (width, height) = open_photo(mask, image_size), open_photo(photo, image_size).size
        if abs(image.width / image.height - width / height) > 0.02 * width / height:
            raise UserError(f'{mask!a} is {image.width} × {image.height}, the photo {width} × {height}: draw the mask on the photo')
        painted = (normalize(square_crop(image, image_size, min(image.size))).mean(0) > 0).float()
    if painted.min() == painted.max():
        raise UserError(f'--mask={mask}: {"all" if painted.max() else "nothing"} of the photo is to be drawn anew; '
                        f'white is what changes, black what stays')
    return painted


def place_photo(path, image_size, margins):
    """A photo with margins (left, top, right, bottom) in pixels of the result: (canvas (1, 3, S, S), margins (S, S) as 1).

    It is cut to the proportions of what the margins leave, around its centre; its edges go on into the margins.
    """
    left, top, right, bottom = read_box('outpaint', margins, image_size - 1)
    width, height = image_size - left - right, image_size - top - bottom
    if width < 1 or height < 1 or not any(margins):
        raise UserError(f'--outpaint={",".join(map(str, margins))}: of {image_size} pixels some must stay for the photo, '
                        f'and some for what is around it')
    image = ImageOps.fit(open_photo(path, image_size), (width, height), Image.Resampling.LANCZOS)
    photo = normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1))[None]
    painted = F.pad(torch.zeros(height, width), (left, right, top, bottom), value=1.0)
    return F.pad(photo, (left, right, top, bottom), mode='replicate'), painted


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


def line_chart(lines, x_name, y_name, width=480, height=320):
    """{name: (xs, ys)} → a PIL picture of the lines in one pair of axes, at most four of them; points that are not finite are left out."""
    font, left, top, right, colors = ImageFont.load_default(13), 58, 26, width - 16, ('#c0392b', '#2471a3', '#7f8c8d', '#27ae60')
    canvas = Image.new('RGB', (width, height), 'white')
    pen, inner = ImageDraw.Draw(canvas), (right - left, height - top - 42)
    lines = {name: [point for point in zip(*line) if math.isfinite(sum(point))] for name, line in lines.items()}
    low, high = ([choose(point[axis] for line in lines.values() for point in line) for axis in (0, 1)] for choose in (min, max))

    def place(point):
        x, y = ((value - a) / ((b - a) or 1) for value, a, b in zip(point, low, high))
        return left + x * inner[0], top + (1 - y) * inner[1]

    for axis in (0, 1):
        span = (high[axis] - low[axis]) or 1
        step = 10 ** math.floor(math.log10(span / 2))       # 1, 2 or 5 times a power of ten: two to six ticks
        step *= next(factor for factor in (5, 2, 1) if span / (step * factor) >= 2 or factor == 1)
        for i in range(math.ceil(low[axis] / step), math.floor(high[axis] / step) + 1):
            x, y = place((i * step, low[1]) if axis == 0 else (low[0], i * step))
            pen.line((x, top, x, top + inner[1]) if axis == 0 else (left, y, left + inner[0], y), '#dddddd')
            pen.text((x, top + inner[1] + 5) if axis == 0 else (left - 6, y), f'{i * step:.4g}', 'black', font, 'ma' if axis == 0 else 'rm')
    for (name, line), color in zip(lines.items(), colors):
        pen.line([place(point) for point in line], color, 2)
        pen.text((right, 4), name, color, font, 'ra')
        right -= font.getlength(name) + 12
    pen.text((left + inner[0] / 2, height - 4), x_name, 'black', font, 'md')
    pen.text((4, 4), y_name, 'black', font)
    return canvas


def side_by_side(pictures):
    """PIL pictures of one height as one."""
    canvas = Image.new('RGB', (sum(picture.width for picture in pictures), pictures[0].height))
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (sum(before.width for before in pictures[:i]), 0))
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
