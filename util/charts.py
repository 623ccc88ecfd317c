"""The embedded data set: ten classes of optical test charts, drawn in code."""
import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from configurator import UserError


# -----------------------------------------------------------------------------
# charts: how each is drawn
#
# A chart is ink on paper. x (1, T) and y (T, 1) are the coordinates of a grid four times finer than the
# picture; the unit is the side of the picture, so that a chart is the same drawing at every size. Each
# function takes a generator and the grid and returns layers of ink (n, T, T) in [0, 1], or one (T, T).

SUPERSAMPLING = 4


def cover(distance):
    """Ink (T, T) of a shape, from the signed distance to its edge: positive inside, unit = the picture's side.

    The edge is one fine sample soft. That, and not more samples, is what makes 4 × 4 samples enough; and
    where structure is finer than a sample the distance tends to zero, so it fades to grey by itself.
    """
    return np.clip(distance * len(distance) + 0.5, 0, 1)


def place(rng, x, y, shift, turn=math.pi):
    """The grid's coordinates (T, T) seen from a random centre (± shift sides) and angle (± turn radians)."""
    x, y = x - rng.uniform(-shift, shift), y - rng.uniform(-shift, shift)
    angle = rng.uniform(-turn, turn)
    cosine, sine = math.cos(angle), math.sin(angle)
    return cosine * x + sine * y, cosine * y - sine * x


def stripes(t, period, inked=0.5):
    """Signed distance to the edges of stripes across t; inked is the share of a period they cover."""
    return period * (inked / 2 - np.abs(t / period - np.floor(t / period) - 0.5))


def siemens_star(rng, x, y):
    u, v = place(rng, x, y, shift=0.06)
    spokes = int(rng.integers(3, 6))
    return cover(np.sin(spokes * np.arctan2(v, u)) * np.sqrt(u * u + v * v) / spokes)


def zone_plate(rng, x, y):
    u, v = place(rng, x, y, shift=0.06)
    # cycles a side at half a side from the centre, √2 times that in the corners
    frequency, phase = rng.uniform(3.5, 5), rng.uniform(-0.6, 0.6) + math.pi * rng.integers(2)
    return 0.5 + 0.5 * np.cos(2 * math.pi * frequency * (u * u + v * v) + phase)


def line_grating(rng, x, y):
    u, _ = place(rng, x, y, shift=0.5, turn=0.4)
    return cover(stripes(u, period=rng.uniform(0.24, 0.4), inked=rng.uniform(0.4, 0.6)))


def checkerboard(rng, x, y):
    u, v = place(rng, x, y, shift=0.5, turn=0.15)
    square = rng.uniform(0.25, 0.36)
    columns, rows = stripes(u, 2 * square), stripes(v, 2 * square)
    return cover(np.maximum(np.minimum(columns, rows), -np.maximum(columns, rows)))


def halftone_dots(rng, x, y):
    u, v = place(rng, x, y, shift=0.5, turn=0.3)
    cell, towards = rng.uniform(0.28, 0.36), rng.uniform(-math.pi, math.pi)
    centre_u, centre_v = (np.floor(u / cell) + 0.5) * cell, (np.floor(v / cell) + 0.5) * cell
    tone = np.clip(0.5 + math.cos(towards) * centre_u + math.sin(towards) * centre_v, 0, 1)
    return cover(cell * (0.22 + 0.26 * tone) - np.sqrt((u - centre_u) ** 2 + (v - centre_v) ** 2))


def text(rng, x, y):
    side = len(y)
    height = int(rng.integers(92, 113)) / 128                # whole fine samples from 32 px up
    sheet = Image.new('L', (side, side))
    draw = ImageDraw.Draw(sheet)
    top = -rng.uniform(0, 0.7) * height
    while top < 1:
        left = -rng.uniform(0, 1) * height
        while left < 1:
            letter = LETTERS[rng.integers(len(LETTERS))]
            draw.text((left * side, top * side), letter, fill=255, font=font(round(height * side)), stroke_width=side // 64)
            left += font(128).getlength(letter) / 128 * height      # at another size hinting would move it
        top += 1.05 * height
    sheet = sheet.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC)
    return np.asarray(sheet, np.float32) / 255


LETTERS = 'ABDEFGHKLMNPRSTXYZ23456789' + 2 * ' '


@lru_cache
def font(size):
    return ImageFont.load_default(size)


def brick(rng, x, y):
    u, v = place(rng, x, y, shift=0.5, turn=0.12)
    height, length, mortar = rng.uniform(0.3, 0.38), rng.uniform(1.8, 2.1), rng.uniform(0.22, 0.3)
    odd_row = np.floor(v / height) % 2
    return cover(np.minimum(stripes(v, height, 1 - mortar),
                            stripes(u + odd_row * (length * height / 2), length * height, 1 - mortar / length)))


def concentric_rings(rng, x, y):
    u, v = place(rng, x, y, shift=0.12)
    period = rng.uniform(0.26, 0.34)
    return cover(stripes(np.sqrt(u * u + v * v) + period * rng.random(), period, inked=rng.uniform(0.4, 0.6)))


def slanted_edge(rng, x, y):
    u, _ = place(rng, x, y, shift=0.2)
    return cover(u)


def blobs(rng, x, y):
    layers = []
    for _ in range(rng.integers(3, 7)):
        radius, left, top = rng.uniform(0.07, 0.16), *rng.uniform(0.08, 0.92, size=2)
        bell_x = np.exp(-0.5 * ((x + 0.5 - float(left)) / radius) ** 2)
        bell_y = np.exp(-0.5 * ((y + 0.5 - float(top)) / radius) ** 2)
        layers.append(bell_y * bell_x)
    return np.stack(layers)


CHARTS = (siemens_star, zone_plate, line_grating, checkerboard, halftone_dots,
          text, brick, concentric_rings, slanted_edge, blobs)


# -----------------------------------------------------------------------------
# charts: the data set

# Few colours, each dark one far from each light one: what a small model should spend itself on is the drawing.
DARK = ((20, 20, 28), (24, 48, 120), (16, 80, 56), (120, 24, 40), (84, 36, 104))
LIGHT = ((248, 248, 244), (248, 212, 88), (140, 208, 240), (248, 172, 184), (164, 228, 172))


@lru_cache(maxsize=4)
def fine_grid(image_size):
    fine = image_size * SUPERSAMPLING
    t = ((np.arange(fine) + 0.5) / fine - 0.5).astype(np.float32)
    return t[None, :], t[:, None]


def draw_chart(rng, label, image_size):
    """One chart (3, S, S), uint8: ink averaged over 4 × 4 fine samples, then painted on the paper."""
    papers, inks = (LIGHT, DARK) if rng.random() < 0.5 else (DARK, LIGHT)
    paper = np.array(papers[rng.integers(len(papers))], np.float32)
    layers = CHARTS[label](rng, *fine_grid(image_size))
    layers = layers.reshape(-1, image_size, SUPERSAMPLING, image_size, SUPERSAMPLING).mean((2, 4))
    picture = np.broadcast_to(paper[:, None, None], (3, image_size, image_size))
    for layer in layers:
        ink = np.array(inks[rng.integers(len(inks))], np.float32)
        picture = picture + layer * (ink[:, None, None] - picture)
    return np.rint(picture).astype(np.uint8)


class Charts(Dataset):
    """Ten classes of optical test charts, anti-aliased at the source and kept in memory.

    Image i depends on (seed, split, i) only, and is the same drawing at every image_size (but for the hinting
    of letters). Labels cycle through the classes. images (N, 3, S, S) uint8; labels (N,) int64; dataset[i] is
    (image, label). UserError for a split other than 'train' and 'val', and for sizes or counts below 1.
    """
    classes = [chart.__name__ for chart in CHARTS]
    skipped = frozenset()

    def __init__(self, split, image_size, count, seed=0):
        if split not in ('train', 'val'):
            raise UserError(f"charts have no split {split!a}; take 'train' or 'val'")
        if image_size < 1 or count < 1 or seed < 0:
            raise UserError(f'charts need image_size and count of 1 or more and a seed of 0 or more; '
                            f'got {image_size}, {count}, {seed}')
        images = np.empty((count, 3, image_size, image_size), np.uint8)
        for i in range(count):
            rng = np.random.default_rng((seed, ('train', 'val').index(split), i))
            images[i] = draw_chart(rng, i % len(CHARTS), image_size)
        self.images = torch.from_numpy(images)
        self.labels = torch.arange(count) % len(CHARTS)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        index = key[0] if isinstance(key, tuple) else key       # (index, position) gives the same picture
        return self.images[index], int(self.labels[index])
