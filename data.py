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
import os
import signal
import threading
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from configurator import UserError
from util import runtime
from util.charts import Charts
from util.checkpoint import read_json, write_json


def normalize(images):
    """uint8 images of any shape → float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Images in [−1, 1] of any shape → uint8, rounded; values outside are clamped. Undoes normalize()."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# -----------------------------------------------------------------------------
# folders of images

def index_and_position(key):
    """A data set's key is an index, or (index, position): position numbers the samples of a whole run."""
    return key if isinstance(key, tuple) else (key, None)


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


def open_dataset(data, split, image_size, count=None, augment=True, flip=False, seed=0):
    """'charts' (count images, by default 12,000 for train and 1,000 for val) or a folder of images (all of them).

    'charts:4000' has 4,000 for train. augment, flip and seed are for a folder: see ImageFolder. Raises UserError if
    the number is not one.
    """
    name, _, many = data.partition(':')
    if name == 'charts':
        if many and not many.isdecimal():
            raise UserError(f'data={data!r}: write charts, or how many to train on as in charts:4000')
        return Charts(split, image_size, count or (int(many or 12_000) if split == 'train' else 1_000))
    return ImageFolder(data, split, image_size, augment, flip, seed)


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
        begun = read_json(description)
        if isinstance(begun, dict) and begun != made_with:
            other = [name for name in begun | made_with if begun.get(name) != made_with.get(name)]
            runtime.say(f'{path} was begun with other settings ({", ".join(other)}): it is begun anew')
        if begun != made_with or not path.is_file() or path.stat().st_size != rows * columns * np.dtype(dtype).itemsize:
            description.unlink(missing_ok=True)
            reserve(path, rows, columns, dtype, not_yet)
            write_json(description, made_with)
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
    missing files, a file of another size than the json says, tokens or labels out of range, and, where
    tokenizer_digest is given, tokens from another tokenizer.
    """

    def __init__(self, folder, split, tokenizer_digest=None):
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
        if tokenizer_digest and self.meta.get('tokenizer') != tokenizer_digest:
            raise UserError(f'{folder}: these tokens come from another tokenizer; run encode.py again')
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
