"""The embedded data set: ten classes of optical test charts, drawn in code."""
import math

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont


# -----------------------------------------------------------------------------
# how each chart is drawn
#
# A chart is ink on paper. x (1, T) and y (T, 1) are the coordinates of a grid four times finer than the
# image, in units of its side, so that a chart is the same drawing at every size. Each function takes a
# generator and the grid, and returns ink (T, T) in [0, 1], or several layers of it (n, T, T).

SUPERSAMPLING = 4


def cover(distance):
    """Ink (T, T) of a shape, from the signed distance to its edge (positive inside, the image's side is 1).

    Edges are one fine sample soft, which makes 4 × 4 samples per pixel enough. Structure finer than a sample
    has distances near zero, so it fades to grey.
    """
    return np.clip(distance * len(distance) + 0.5, 0, 1)


def place(rng, x, y, shift, turn=math.pi):
    """The grid's coordinates (T, T) seen from a random centre (± shift) and angle (± turn radians)."""
    x = x - rng.uniform(-shift, shift)
    y = y - rng.uniform(-shift, shift)
    angle = rng.uniform(-turn, turn)
    cosine = math.cos(angle)
    sine = math.sin(angle)
    return cosine * x + sine * y, cosine * y - sine * x


def stripes(t, period, inked=0.5):
    """Signed distance to the edges of stripes across t, which cover this fraction of each period."""
    return period * (inked / 2 - np.abs(t / period % 1 - 0.5))


def siemens_star(rng, x, y):
    u, v = place(rng, x, y, shift=0.06)
    spokes = int(rng.integers(3, 6))
    radius = np.sqrt(u * u + v * v)
    return cover(np.sin(spokes * np.arctan2(v, u)) * radius / spokes)


def zone_plate(rng, x, y):
    u, v = place(rng, x, y, shift=0.06)
    frequency = rng.uniform(3.5, 5)                         # cycles per side, half a side from the centre
    phase = rng.uniform(-0.6, 0.6) + math.pi * rng.integers(2)
    return 0.5 + 0.5 * np.cos(2 * math.pi * frequency * (u * u + v * v) + phase)


def line_grating(rng, x, y):
    u, _ = place(rng, x, y, shift=0.5, turn=0.4)
    period = rng.uniform(0.24, 0.4)
    return cover(stripes(u, period, rng.uniform(0.4, 0.6)))


def checkerboard(rng, x, y):
    u, v = place(rng, x, y, shift=0.5, turn=0.15)
    period = 2 * rng.uniform(0.25, 0.36)
    columns = stripes(u, period)
    rows = stripes(v, period)
    dark, light = np.minimum(columns, rows), np.maximum(columns, rows)
    return cover(np.maximum(dark, -light))


def halftone_dots(rng, x, y):
    u, v = place(rng, x, y, shift=0.5, turn=0.3)
    cell = rng.uniform(0.28, 0.36)
    towards = rng.uniform(-math.pi, math.pi)
    centre_u = (np.floor(u / cell) + 0.5) * cell
    centre_v = (np.floor(v / cell) + 0.5) * cell
    tone = 0.5 + math.cos(towards) * centre_u + math.sin(towards) * centre_v
    tone = np.clip(tone, 0, 1)
    distance = np.sqrt((u - centre_u) ** 2 + (v - centre_v) ** 2)
    return cover(cell * (0.22 + 0.26 * tone) - distance)


def text(rng, x, y):
    side = len(y)
    height = int(rng.integers(92, 113)) / 128               # whole fine samples from 32 px up
    font = ImageFont.load_default(round(height * side))
    ruler = ImageFont.load_default(128)                     # hinting would move letters at other sizes
    sheet = Image.new('L', (side, side))
    draw = ImageDraw.Draw(sheet)
    top = -rng.uniform(0, 0.7) * height
    while top < 1:
        left = -rng.random() * height
        while left < 1:
            letter = LETTERS[rng.integers(len(LETTERS))]
            draw.text((left * side, top * side), letter, 255, font, stroke_width=side // 64)
            left += ruler.getlength(letter) / 128 * height
        top += 1.05 * height
    sheet = sheet.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC)
    return np.asarray(sheet, np.float32) / 255


LETTERS = 'ABDEFGHKLMNPRSTXYZ23456789  '


def brick(rng, x, y):
    u, v = place(rng, x, y, shift=0.5, turn=0.12)
    height = rng.uniform(0.3, 0.38)
    length = rng.uniform(1.8, 2.1)                          # in units of the height, as is the mortar
    mortar = rng.uniform(0.22, 0.3)
    odd_row = np.floor(v / height) % 2
    rows = stripes(v, height, 1 - mortar)
    bricks = stripes(u + odd_row * (length * height / 2), length * height, 1 - mortar / length)
    return cover(np.minimum(rows, bricks))


def concentric_rings(rng, x, y):
    u, v = place(rng, x, y, shift=0.12)
    period = rng.uniform(0.26, 0.34)
    radius = np.sqrt(u * u + v * v) + period * rng.random()
    return cover(stripes(radius, period, rng.uniform(0.4, 0.6)))


def slanted_edge(rng, x, y):
    u, _ = place(rng, x, y, shift=0.2)
    return cover(u)


def blobs(rng, x, y):
    layers = []
    for _ in range(rng.integers(3, 7)):
        radius = rng.uniform(0.07, 0.16)
        left = rng.uniform(0.08, 0.92)
        top = rng.uniform(0.08, 0.92)
        bell_x = np.exp(-0.5 * ((x + 0.5 - left) / radius) ** 2)
        bell_y = np.exp(-0.5 * ((y + 0.5 - top) / radius) ** 2)
        layers.append(bell_y * bell_x)
    return np.stack(layers)


CHARTS = (siemens_star, zone_plate, line_grating, checkerboard, halftone_dots,
          text, brick, concentric_rings, slanted_edge, blobs)


# -----------------------------------------------------------------------------
# the data set

# Few colours, and dark ones far from light ones: a small model should focus on the drawing.
DARK = ('#14141c', '#183078', '#105038', '#781828', '#542468')
LIGHT = ('#f8f8f4', '#f8d458', '#8cd0f0', '#f8acb8', '#a4e4ac')


def pick_colour(rng, colours):
    """A random colour (3, 1, 1), float32 in [0, 255]."""
    rgb = ImageColor.getrgb(colours[rng.integers(len(colours))])
    return np.array(rgb, np.float32)[:, None, None]


def draw_chart(rng, label, image_size):
    """One chart (3, S, S), uint8: ink averaged over 4 × 4 fine samples, then painted on the paper."""
    fine = image_size * SUPERSAMPLING
    grid = ((np.arange(fine) + 0.5) / fine - 0.5).astype(np.float32)
    papers, inks = (LIGHT, DARK) if rng.random() < 0.5 else (DARK, LIGHT)
    picture = pick_colour(rng, papers)
    layers = CHARTS[label](rng, grid[None], grid[:, None])
    layers = layers.reshape(-1, image_size, SUPERSAMPLING, image_size, SUPERSAMPLING).mean((2, 4))
    for layer in layers:
        picture = picture + layer * (pick_colour(rng, inks) - picture)
    return np.rint(picture).astype(np.uint8)


class Charts:
    """Ten classes of optical test charts, anti-aliased when drawn and kept in memory.

    Image i depends only on (split, i), and is the same drawing at every image_size, except that letters are
    hinted. Labels cycle through the classes. images: (N, 3, S, S) uint8; labels: (N,) int64; dataset[i] is
    (image, label), also for a key (i, position). skipped: (N,) bool, as for an ImageFolder, but never true.
    """
    classes = [chart.__name__ for chart in CHARTS]

    def __init__(self, split, image_size, count):
        stream = ('train', 'val').index(split)
        charts = [draw_chart(np.random.default_rng((0, stream, i)), i % len(CHARTS), image_size)
                  for i in range(count)]
        self.images = torch.from_numpy(np.stack(charts))
        self.labels = torch.arange(count) % len(CHARTS)
        self.skipped = torch.zeros(count, dtype=torch.bool)
        self.contents = count

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        index = key[0] if isinstance(key, tuple) else key
        return self.images[index], self.labels[index]
