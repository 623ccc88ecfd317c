"""Pictures and tokens: the embedded charts, folders of images, token files, and the order they come in and are made in.

    train = open_dataset('charts', 'train', image_size=32)            # made here, nothing to download
    train = open_dataset('path/to/folder', 'train', image_size=256)   # train/<class>/*.jpg, val/<class>/*.jpg
    for images, labels in batches(train, batch_size=64, seed=0): ...  # endless
    for images, labels in in_order(val, batch_size=64): ...           # once

Pictures stay uint8 (3, S, S) until the device has them; normalize() makes them float in [−1, 1]. What
sample comes when, and how it is cropped, depends on (seed, sample number) alone: a run that resumes at
another batch, or on another number of ranks, sees what it would have seen.
"""
import errno
import itertools
import json
import math
import os
import signal
import threading
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset

import runtime
from configurator import UserError


def normalize(images):
    """uint8 images of any shape → float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Images in [−1, 1] of any shape → uint8, rounded; values outside are clamped. Undoes normalize()."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


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
        index, _ = index_and_position(key)
        return self.images[index], int(self.labels[index])


def index_and_position(key):
    """A data set's key is an index, or (index, position): position numbers the samples of a whole run."""
    return key if isinstance(key, tuple) else (key, None)


# -----------------------------------------------------------------------------
# folders of images

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')


def class_folders(folder):
    try:
        return sorted(name for name in os.listdir(folder)
                      if os.path.isdir(os.path.join(folder, name)) and not name.startswith('.'))
    except OSError as error:
        raise UserError(f'{folder!a} can not be read: {error.strerror}') from None


def pictures_below(folder):
    """Paths of all pictures in a folder and the folders in it, sorted. Links are followed, each target once."""
    seen, files = set(), []
    for where, folders, names in os.walk(folder, followlinks=True):
        target = os.path.realpath(where)
        if target in seen:                                  # a link back up would go round for ever
            folders.clear()
            continue
        seen.add(target)
        folders.sort()
        files += [os.path.join(where, name) for name in names
                  if name.lower().endswith(EXTENSIONS) and not name.startswith('.')]
    return sorted(files)


def read_picture(path, least_side):
    """The file as an upright RGB PIL image, transparency over white, animations' first frame.

    A JPEG may come at 1/2, 1/4 or 1/8 of its size, but never with a shorter side below least_side (px).
    Raises whatever Pillow does on a file that can not be read; it has no common error class.
    """
    if os.path.exists(path) and not os.path.isfile(path):   # a pipe would be waited for, for ever
        raise OSError('it is no file')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                     # odd EXIF and the like: the pixels are fine
        warnings.simplefilter('error', Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.draft(None, (least_side, least_side))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I'):                  # 16-bit grey, which convert() would clip at 255
                grey = np.asarray(image).astype(np.float32) / 257
                image = Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')


def square_crop(image, size, side, across=0.5, down=0.5):
    """A square of a PIL RGB image as a uint8 tensor (3, size, size): Lanczos cuts and resizes in one pass.

    side: of the square, in pixels of the image (at most its shorter side). across and down in [0, 1] say where
    it lies in the room there is: 0 left or top, 0.5 centred. What lies outside the square is never computed.
    """
    width, height = image.size
    left, top = across * (width - side), down * (height - side)
    box = (left, top, min(left + side, width), min(top + side, height))
    image = image.resize((size, size), Image.Resampling.LANCZOS, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ImageFolder(Dataset):
    """Pictures in root/split/<class>/, at any depth: jpg, jpeg, png, webp or bmp in any case.

    dataset[index] is the centre crop and the label; dataset[index, position] is a random crop (mirrored half
    of the time if flip) drawn from (seed, position), unless augment is False. Crops are uint8 (3, S, S), from
    the picture with its shorter side at 1.125 S. classes are root/train's where that exists, so that labels
    mean the same in every split. files: list of paths; labels (N,) int64.

    A file that can not be read is skipped: named in one warning, kept in `skipped`, and the next readable
    file stands in. UserError for a missing root or split, no class, an empty class, a class that train does
    not have, and when no file at all can be read.
    """

    def __init__(self, root, split, image_size, augment=True, flip=False, seed=0):
        if image_size < 1 or seed < 0:
            raise UserError(f'image_size must be 1 or more and seed 0 or more; got {image_size}, {seed}')
        root = os.path.expanduser(root)
        folder, train = os.path.join(root, split), os.path.join(root, 'train')
        if not os.path.isdir(root):
            raise UserError(f"{root!a}: no such folder; data is 'charts' or a folder with train/<class>/*.jpg "
                            f'and val/<class>/*.jpg')
        if not os.path.isdir(folder):
            raise UserError(f'{root!a} has no split {split!a}; put its pictures in {split}/<class>/')
        names = class_folders(folder)
        if not names:
            raise UserError(f'{folder!a} has no class folders; put its pictures in {split}/<class>/')
        self.classes = class_folders(train) if os.path.isdir(train) else names

        self.files, labels = [], []
        for name in names:
            if name not in self.classes:
                raise UserError(f'class {name!a} of {folder!a} is not in train; rename it or add it there')
            files = pictures_below(os.path.join(folder, name))
            if not files:
                raise UserError(f'class {name!a} of {folder!a} has no pictures (jpg, jpeg, png, webp, bmp); '
                                f'add some or remove the folder')
            self.files += files
            labels += [self.classes.index(name)] * len(files)
        self.labels = torch.tensor(labels)
        self.image_size, self.augment, self.flip, self.seed = image_size, augment, flip, seed
        self.resized_side = round(1.125 * image_size)
        self.unreadable = torch.zeros(len(labels), dtype=torch.bool).share_memory_()    # workers report here

    @property
    def skipped(self):
        """Indices of the files found unreadable so far, by this process or a loader worker."""
        return set(self.unreadable.nonzero().flatten().tolist())

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        index, position = index_and_position(key)
        index = range(len(self))[index]                     # IndexError past the end
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            image = self.load(candidate)
            if image is not None:
                return self.crop(image, position), int(self.labels[candidate])
        raise UserError(f'none of the {len(self)} pictures can be read; the warnings say why, '
                        f'{self.files[0]!a} is the first')

    def load(self, index):
        """The whole picture as an upright RGB PIL image, or None (and a warning, once) if it can not be read."""
        try:
            # twice what is needed: the last halving is Lanczos's, which is better at it than the JPEG decoder
            return read_picture(self.files[index], 2 * self.resized_side)
        except Exception as error:                          # Pillow raises nearly anything on a broken file
            if not self.unreadable[index]:
                warnings.warn(f'skipped {self.files[index]!a}: {type(error).__name__}: {error}')
            self.unreadable[index] = True
            return None

    def crop(self, image, position=None):
        """A uint8 (3, S, S) crop of a PIL image: at the centre, or for a position drawn from (seed, position)."""
        across, down, mirror = 0.5, 0.5, 1.0
        if self.augment and position is not None:
            across, down, mirror = np.random.default_rng((self.seed, position)).random(3)
        side = min(image.size) * self.image_size / self.resized_side
        crop = square_crop(image, self.image_size, side, across, down)
        return crop.flip(-1) if self.flip and mirror < 0.5 else crop


def open_dataset(data, split, image_size, count=None, augment=True, seed=0):
    """'charts' (count images, by default 12,000 for train and 1,000 for val) or a folder of images (all of them).

    'charts:4000' has that many for train. UserError if that is no number.
    """
    name, _, many = data.partition(':')
    if name == 'charts':
        if many and not many.isdecimal():
            raise UserError(f'data={data!r}: write charts, or how many to train on as in charts:4000')
        return Charts(split, image_size, count or (int(many or 12_000) if split == 'train' else 1_000), seed)
    return ImageFolder(data, split, image_size, augment, seed=seed)


# -----------------------------------------------------------------------------
# the order of things

@lru_cache(maxsize=2)                                       # a batch looks at one epoch, rarely at two
def permutation(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


class EndlessBatches:
    """Batch sampler: the data order as a function of (seed, batch number), with no state to save.

    Samples are numbered through an endless run of permutations of the data, one an epoch. Global batch b
    is samples b·batch_size … (b+1)·batch_size − 1, and each rank takes its contiguous share. Yields lists of
    (index, position), position being the sample's number, from batch `start` on. A batch may span epochs.
    UserError if batch_size is not a multiple of world_size, or seed is negative.
    """

    def __init__(self, count, batch_size, seed, rank=0, world_size=1, start=0):
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f'batch_size={batch_size} is not a multiple of {world_size} ranks; '
                            f'take {max(1, round(batch_size / world_size)) * world_size}')
        if seed < 0:
            raise UserError(f'seed must be 0 or more; got {seed}')
        self.count, self.batch_size, self.seed, self.start = count, batch_size, seed, start
        self.share, self.rank = batch_size // world_size, rank

    def __iter__(self):
        return map(self.batch, itertools.count(self.start))

    def batch(self, number):
        """This rank's keys of global batch `number`."""
        first = number * self.batch_size + self.rank * self.share
        return [(self.sample(position), position) for position in range(first, first + self.share)]

    def sample(self, position):
        epoch, place_in_epoch = divmod(position, self.count)
        return int(permutation(self.count, self.seed, epoch)[place_in_epoch])


def batches(dataset, batch_size, seed, rank=0, world_size=1, start=0, workers=0):
    """Endless iterator over this rank's (images (b, 3, S, S) uint8, labels (b,) int64), b = batch_size / world_size.

    The order is EndlessBatches'. Charts are indexed in memory; folders are read by `workers` processes.
    """
    return fetch(dataset, EndlessBatches(len(dataset), batch_size, seed, rank, world_size, start), workers)


def in_order(dataset, batch_size, workers=0, count=None):
    """Iterator over every item once, centre crops, in batches as above; the last may be short.

    count: over that many items only, spread evenly, because folders come class by class.
    """
    count = min(count or len(dataset), len(dataset))
    indices = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    return fetch(dataset, [indices[i:i + batch_size] for i in range(0, count, batch_size)], workers)


def fetch(dataset, batches_of_keys, workers):
    if isinstance(dataset, Charts):
        for keys in batches_of_keys:
            indices = [index_and_position(key)[0] for key in keys]
            yield dataset.images[indices], dataset.labels[indices]
        return
    # fork, because a spawned worker would import, and so run, the script that wants the data; and a
    # generator of its own, because the loader would otherwise draw from the one that training restores
    loader = DataLoader(dataset, batch_sampler=batches_of_keys, num_workers=workers, generator=torch.Generator(),
                        multiprocessing_context='fork' if workers else None, worker_init_fn=leave_signals_to_training)
    try:
        yield from loader
    except UserError as error:                              # a worker's comes wrapped in its traceback
        raise UserError(str(error).strip().split('UserError: ')[-1]) from None


def leave_signals_to_training(worker):
    """A cluster, or Ctrl-C, signals every process of a job; the step that is finished before the end needs its images.

    SIGTERM from training itself is obeyed: that is how loaders end their workers.
    """
    def obey_training():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):                      # not on a Mac, which is no cluster
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_training, daemon=True).start()


# -----------------------------------------------------------------------------
# samples to be drawn

def balanced_labels(num_classes, count, seed):
    """VAR's protocol: labels (count,), every class equally often, shuffled by the seed. UserError where that can't be."""
    each, rest = divmod(count, num_classes)
    if rest or not each:
        nearest = [str(n * num_classes) for n in (each, each + 1) if n]
        raise UserError(f'{count} samples can not be equally many of each of {num_classes} classes: take {" or ".join(nearest)}')
    return torch.arange(num_classes).repeat(each)[torch.randperm(count, generator=runtime.generator(seed, 7))]


def sample_generators(seed, numbers):
    """A generator for each of some samples, a function of (seed, its number) alone: any batch, any rank, the same picture."""
    return [runtime.generator(seed, 9, number) for number in numbers]


# -----------------------------------------------------------------------------
# files that fill row by row, and go on after a kill

def open_table(path, made_with, rows, columns, dtype, not_yet):
    """A memory map (rows, columns) of one file for all ranks; the last number of a row is written last, till then it is not_yet.

    path: a .partial file. What an interrupted run has left there stays if PATH.json says that it was made_with the same
    settings (a dictionary of plain values, lists for tuples); otherwise it is begun anew, and rank 0 says so.
    """
    path, description = Path(path), Path(f'{path}.json')
    if runtime.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = runtime.read_json(description)
        if isinstance(begun, dict) and begun != made_with:
            other = [name for name in begun | made_with if begun.get(name) != made_with.get(name)]
            runtime.say(f'{path} was begun with other settings ({", ".join(other)}): it is begun anew')
        if begun != made_with or not path.is_file() or path.stat().st_size != rows * columns * np.dtype(dtype).itemsize:
            description.unlink(missing_ok=True)
            reserve(path, rows, columns, dtype, not_yet)
            runtime.write_json(description, made_with)
    runtime.barrier()
    return np.memmap(path, dtype, 'r+', shape=(rows, columns))


def reserve(path, rows, columns, dtype, not_yet):
    """A file of rows · columns numbers with not_yet at the end of every row; its space is claimed now, so that a full disk
    shows here as an error and not later as a crash inside a memory map."""
    with open(path, 'wb') as file:
        try:
            os.posix_fallocate(file.fileno(), 0, rows * columns * np.dtype(dtype).itemsize)
        except (OSError, OverflowError) as error:
            path.unlink()
            raise OSError(getattr(error, 'errno', errno.EFBIG), str(error), str(path)) from None
    np.memmap(path, dtype, 'r+', shape=(rows, columns))[:, -1] = not_yet


def undone_batches(table, batch_size, not_yet):
    """This rank's share of the batches (ranges of rows) that are not done. A batch is the same rows on any number of ranks."""
    batches = [range(first, min(first + batch_size, len(table))) for first in range(0, len(table), batch_size)]
    undone = [batch for batch in batches if (table[batch.start:batch.stop, -1] == not_yet).any()]
    runtime.barrier()                                       # all ranks must have looked before one writes
    return undone[runtime.rank()::runtime.world_size()]


def close_table(path):
    """Removes what open_table made, once its contents are elsewhere."""
    Path(f'{path}.json').unlink(missing_ok=True)
    Path(path).unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# token files

class TokenDataset:
    """What encode.py wrote: {folder}/{split}.bin, one uint16 row a picture, and {folder}/{split}.json about it.

    A row holds the structure tokens of every scale (L = Σ p² over patch_nums), then the alias tokens (La, over
    alias_patch_nums), then the label. meta is the json as a dict; classes the class names. UserError for
    missing files, a file of another size than the json says, and tokens or labels out of range.
    """

    def __init__(self, folder, split):
        folder = Path(folder).expanduser()
        self.path, description = folder / f'{split}.bin', folder / f'{split}.json'
        if not (self.path.is_file() and description.is_file()):
            raise UserError(f'no token files {split}.bin and {split}.json in {str(folder)!a}; run encode.py')
        try:
            self.meta = json.loads(description.read_text(encoding='utf-8'))
            self.classes, self.rows, columns = self.meta['classes'], self.meta['rows'], self.meta['columns']
            self.structure_length = sum(p * p for p in self.meta['patch_nums'])
            self.alias_length = sum(p * p for p in self.meta['alias_patch_nums'])
            self.limits = self.meta['vocab_size'], self.meta['alias_vocab_size'], len(self.classes)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{str(description)!a} is damaged ({type(error).__name__}: {error}); '
                            f'run encode.py again') from None
        if columns != self.structure_length + self.alias_length + 1 or self.rows < 1:
            raise UserError(f'{str(description)!a} does not add up: {self.rows} rows of {columns} tokens; '
                            f'run encode.py again')
        size, wanted = self.path.stat().st_size, self.rows * columns * 2
        if size != wanted:
            raise UserError(f'{str(self.path)!a} has {size} bytes instead of {wanted}: '
                            f'truncated, or of another run; run encode.py again')
        self.tokens = np.memmap(self.path, dtype='<u2', mode='r', shape=(self.rows, columns))

    def __len__(self):
        return self.rows

    def batch(self, rows):
        """Rows (ndarray or list of indices) → structure (B, L), alias (B, La), labels (B,): int64 tensors."""
        tokens = torch.from_numpy(self.tokens[rows].astype(np.int64))
        parts = tokens.split((self.structure_length, self.alias_length, 1), dim=1)
        for name, part, limit in zip(('structure tokens', 'alias tokens', 'labels'), parts, self.limits):
            if part.numel() and part.max() >= limit:
                raise UserError(f'{str(self.path)!a}: {name} up to {int(part.max())} where there are only {limit}: '
                                f'damaged; run encode.py again')
        structure, alias, label = parts
        return structure, alias, label.squeeze(1)
