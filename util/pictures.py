"""Picture files: photos and masks in, labelled grids and GIFs out. Images are float in [−1, 1]."""
import math
import os
import unicodedata
from contextlib import suppress
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from configurator import UserError
from data import normalize, read_picture, square_crop, to_uint8
from util.charts import Charts
from util.checkpoint import atomic_write, read_log
from util.metrics import psnr


# -----------------------------------------------------------------------------
# photos and masks

def open_photo(path, image_size):
    """Opens a file, or an embedded chart by its name, as a PIL RGB image. Raises UserError if it cannot.

    image_size: of the chart. A JPEG may be decoded at a fraction of its size, but not below twice image_size.
    """
    if path in Charts.classes:
        charts = Charts('val', image_size, len(Charts.classes)).images
        return to_picture(normalize(charts[Charts.classes.index(path)]))
    return open_picture(path, 2 * image_size)


def open_picture(path, least_side):
    """Opens a file as a PIL RGB image, as read_picture() does. Raises UserError if it cannot."""
    try:
        return read_picture(path, least_side)
    except FileNotFoundError:
        raise UserError(f'{path!a}: no such picture') from None
    except Exception as error:                              # Pillow raises nearly anything on a broken file
        raise UserError(f'{path!a} cannot be read as a picture: {error!a}') from None


def load_photo(path, image_size):
    """The centre square of a photo: (1, 3, S, S). path: as in open_photo."""
    photo = open_photo(path, image_size)
    return normalize(square_crop(photo, image_size, min(photo.size)))[None]


def read_box(setting, box, limit):
    """LEFT,TOP,RIGHT,BOTTOM, numbers or strings, as integers. UserError unless all are from 0 to limit."""
    with suppress(ValueError):
        sides = [int(side) for side in map(str, box)]
        if len(sides) == 4 and set(sides) <= set(range(limit + 1)):
            return sides
    raise UserError(f'--{setting}: give LEFT,TOP,RIGHT,BOTTOM, whole numbers from 0 to {limit}')


def load_mask(mask, photo, image_size):
    """The part of a photo to repaint: (S, S), 1 inside and 0 outside, cropped like the photo in load_photo.

    mask: a picture with the photo's proportions, white where to repaint; or 'LEFT,TOP,RIGHT,BOTTOM', a box in
    pixels of the result. A pixel of the result is inside if any of the mask's pixels in it is white.
    """
    if ',' in mask and not os.path.exists(mask):
        left, top, right, bottom = read_box('mask', mask.split(','), image_size)
        inside = torch.zeros(image_size, image_size)
        inside[top:bottom, left:right] = 1
    else:
        picture = open_picture(mask, 10 ** 6)               # never decoded at a fraction of its size
        width, height = open_photo(photo, image_size).size
        if abs(picture.width * height / (picture.height * width) - 1) > 0.02:
            raise UserError(f'{mask!a} is {picture.width} × {picture.height}, the photo {width} × {height}: '
                            f'the mask must have the proportions of the photo')
        square = ImageOps.fit(picture.convert('L'), (min(picture.size),) * 2, Image.Resampling.NEAREST)
        white = torch.from_numpy(np.array(square)) > 127
        inside = F.adaptive_max_pool2d(white[None].float(), image_size)[0]
    if inside.min() == inside.max():
        raise UserError(f'--mask={mask}: covers {"all" if inside.max() else "nothing"} of the photo\'s '
                        f'centre square; white is repainted, black is kept')
    return inside


def place_photo(path, image_size, margins):
    """A photo inside margins LEFT,TOP,RIGHT,BOTTOM, in pixels of the result.

    Returns a canvas (1, 3, S, S) and a mask (S, S), 1 in the margins. The photo is cropped around its centre
    to the proportions of the space left for it, and its edge pixels are repeated into the margins.
    """
    left, top, right, bottom = read_box('outpaint', margins, image_size - 1)
    width = image_size - left - right
    height = image_size - top - bottom
    if min(width, height) < 1 or not any(margins):
        raise UserError(f'--outpaint: leave some of the {image_size} pixels for the photo, and some for what '
                        'is around it')
    photo = open_photo(path, image_size)
    photo = ImageOps.fit(photo, (width, height), Image.Resampling.LANCZOS)
    photo = normalize(torch.from_numpy(np.array(photo)).permute(2, 0, 1))[None]
    padding = left, right, top, bottom
    mask = F.pad(torch.zeros(height, width), padding, value=1.0)
    return F.pad(photo, padding, mode='replicate'), mask


# -----------------------------------------------------------------------------
# grids and files

# Fonts with many letters that Linux, macOS or Windows have, and some for Chinese, Japanese and Korean
FONTS = ('DejaVuSans.ttf', 'Arial Unicode.ttf', 'arial.ttf', 'NotoSans-Regular.ttf',
         'NotoSansCJK-Regular.ttc', 'wqy-microhei.ttc', 'DroidSansFallbackFull.ttf', 'msyh.ttc', 'malgun.ttf')


@lru_cache
def fonts():
    """Pillow's own font, which has ASCII only, and those of FONTS that this machine has."""
    found = [ImageFont.load_default(14)]
    for name in FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, 14))
    return found


def font_for(text):
    """The first font with all letters of a text, or None."""
    if text.isascii():
        return fonts()[0]
    for font in fonts():
        missing = list(font.getmask('\uffff'))              # what a font draws for letters it lacks
        if missing not in [list(font.getmask(letter)) for letter in text]:
            return font


def legible(text):
    """A text that some font has the letters for: the text itself, or what is left of it in ASCII."""
    if font_for(text):
        return text
    return unicodedata.normalize('NFKD', text).encode('ascii', 'ignore').decode().strip()


def to_picture(image):
    """One image (3, S, S) as a PIL picture."""
    return Image.fromarray(to_uint8(image.cpu()).permute(1, 2, 0).numpy())


def picture_grid(images, columns, row_names=(), column_names=(), side=0):
    """Images (N, 3, S, S) row by row in one PIL picture, each `side` pixels wide (default: S, at least 64).

    They are resized without smoothing. row_names, made legible(), go to the left of the rows, column_names
    (ASCII, one or two lines each) above the columns.
    """
    row_names = [legible(' '.join(name.split())) for name in row_names]
    S = images.shape[-1]
    side = side or math.ceil(64 / S) * S
    pitch = side + 2
    left = max((math.ceil(font_for(name).getlength(name)) + 12 for name in row_names), default=0)
    top = max((24 + 16 * name.count('\n') for name in column_names), default=0)
    corners = [
        (left + i % columns * pitch, top + i // columns * pitch)
        for i in range(len(images))]
    size = left + columns * pitch - 2, corners[-1][1] + side
    canvas = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(canvas)
    for image, corner in zip(images, corners):
        cell = to_picture(image).resize((side, side), Image.Resampling.NEAREST)
        canvas.paste(cell, corner)
    for name, (_, y) in zip(row_names, corners[::columns]):
        draw.text((6, y + side // 2 - 9), name, 'black', font_for(name))
    for name, (x, _) in zip(column_names, corners):
        draw.text((x + 4, 2), name, 'black', font_for(name))
    return canvas


def focus_labels(radii, decoded, blurred):
    """Two lines per token map: its blur radius, and the PSNR of its state against the blurred picture.

    decoded and blurred: per map, images (B, 3, S, S).
    """
    return [f'k={k}, blur {radius:.2g} px\n{psnr(*pair):.1f} dB'.replace('inf dB', 'the same')
            for k, (radius, *pair) in enumerate(zip(radii, decoded, blurred), start=1)]


def add_row(path, row, images, name):
    """Writes images (N, 3, S, S) as row number `row` (from 0) of a PNG, below what it has of earlier rows.

    Later rows, from before a resume, are dropped.
    """
    new = picture_grid(images, len(images), [name])
    top = row * (new.height + 2)
    canvas = Image.new('RGB', (new.width, top + new.height), 'white')
    with suppress(UserError):                               # no picture there: start with this row
        canvas.paste(old := open_picture(path, 10 ** 6), (new.width - old.width, 0))
    canvas.paste(new, (0, top))
    save_png(path, canvas)


def plot_losses(log, path, names):
    """Draws numbers of a log over its steps, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for name in names:
        points = [(r['step'] + 1, r[name]) for r in read_log(log) if r.get(name) is not None]
        style = {'marker': 'o'} if name.startswith('val_') else {'alpha': 0.5}
        axes.plot(*zip(*points), label=name, **style)       # without points, nothing
    axes.set(xlabel='step', ylabel='nats per token')
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format='png', dpi=100)


def save_png(path, picture):
    with atomic_write(path) as file:
        picture.save(file, 'PNG')


def save_gif(path, frames):
    """PIL frames → an endless GIF: half a second per frame, two for the last."""
    first, *rest = frames
    milliseconds = [500] * len(rest) + [2000]
    with atomic_write(path) as file:
        first.save(
            file, 'GIF', save_all=True, append_images=rest,
            duration=milliseconds, loop=0)
