"""Images and tokens: the embedded charts, folders of images, token files, and the order of samples.

    train = open_dataset('charts', 'train', image_size=32)            # drawn in memory, nothing to download
    train = open_dataset('path/to/folder', 'train', image_size=256)   # train/<class>/*.jpg, val/<class>/*.jpg
    for images, labels in batches(train, batch_size=64, seed=0): ...  # endless
    images, labels = evenly_spaced(val, 64)                           # centre crops, one batch

Images stay uint8 (3, S, S) until they are on the device; normalize() makes them float in [−1, 1]. The order
of samples and their crops depend only on (seed, sample number), so a resumed run sees the same data, even
with another number of ranks.
"""
import glob
import itertools
import os
import signal
import sys
import threading
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader

from configurator import UserError
from util import runtime
from util.charts import Charts
from util.checkpoint import atomic_write, read_json, write_json


def normalize(images):
    """uint8 images of any shape → float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Images in [−1, 1] of any shape → uint8, rounded and clamped. The inverse of normalize()."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# -----------------------------------------------------------------------------
# folders of images

Image.init()
# Pillow recognises these but cannot decode them, except EPS, for which it would run Ghostscript
NOT_READ = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}
FORMATS = [name for name in Image.ID if name not in NOT_READ]
EXTENSIONS = tuple(end for end, name in Image.registered_extensions().items() if name in FORMATS)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28    # bytes; accept long text


def class_folders(folder):
    """Sorted names of the class folders, in numeric order if all are whole numbers. [] if there is none."""
    names = sorted(map(os.path.dirname, glob.glob('*/', root_dir=folder)))
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else names


def pictures_below(folder):
    """Sorted paths of all pictures in a folder and its subfolders, and paths of the files Pillow cannot read.

    Links are followed, each target once. Hidden files and folders are ignored.
    """
    seen, files = set(), []
    for where, folders, names in os.walk(folder, followlinks=True):
        target = os.path.realpath(where)
        if target in seen:                                  # a link to a parent folder would never end
            folders.clear()
            continue
        seen.add(target)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        files += [os.path.join(where, name) for name in names if not name.startswith('.')]
    pictures = {file for file in files if file.lower().endswith(EXTENSIONS)}
    return sorted(pictures), sorted(set(files) - pictures)


def report_left_out(folder, files):
    """Says in one line how many files of a folder are not used, and names up to three."""
    if files:
        runtime.say(f'warning: {folder!a}: left out {len(files)} files that are not pictures or not in a '
                    f'class folder, such as {files[:3]!a}')


def read_picture(path, least_side):
    """Reads a file as an upright RGB PIL image: transparency over white, the first frame of an animation.

    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but with no side below least_side (pixels). Raises
    whatever Pillow raises for files it cannot read; there is no common class.
    """
    if not os.path.isfile(path):                            # reading a pipe would block forever
        raise FileNotFoundError('missing or not a file')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with Image.open(path, formats=FORMATS) as image:
            image.draft(None, (least_side, least_side))
            image.load()
            with suppress(Exception):                       # rubbish in EXIF or XMP: the pixels are fine
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I'):                  # 16-bit grey, which convert() would clip at 255
                grey = np.rint(np.asarray(image).clip(0, 65535) / 257)
                image = Image.fromarray(grey.astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')


def square_crop(image, size, side, across=0.5, down=0.5):
    """A square of a PIL RGB image, resized with Lanczos, as a uint8 tensor (3, size, size).

    side: of the square in pixels of the image, at most its shorter side. across, down: its position in [0, 1]
    within the room there is; 0 is left or top, 0.5 centred.
    """
    width, height = image.size
    left, top = across * (width - side), down * (height - side)
    box = (left, top, min(left + side, width), min(top + side, height))
    image = image.resize((size, size), Image.Resampling.LANCZOS, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ImageFolder:
    """Pictures in root/split/<class>/, at any depth and in any format that Pillow reads.

    dataset[index] is the centre crop and the label; dataset[index, position] is a random crop, drawn from
    (seed, position) and mirrored half of the time if flip. Crops are uint8 (3, S, S), of the picture with its
    shorter side resized to 1.125 S. If root/train exists, classes are its folders, so that labels mean the
    same in every split. files: list of paths; labels: (N,) int64.

    Unreadable files are skipped: each is named in one line on stderr and marked in `skipped` (N,), and the
    next readable file takes its place. Raises UserError if the split, its classes or their pictures are
    missing, if train lacks a class, if no file can be read, or if the ranks find different files.
    """

    def __init__(self, root, split, image_size, flip=False, seed=0):
        folder, train = (os.path.join(root, name) for name in (split, 'train'))
        names = class_folders(folder)
        if not names:
            raise UserError(f"{folder!a}: no such folder, or it has no class folders; data must be 'charts' "
                            f'or a folder with train/<class>/*.jpg and val/<class>/*.jpg')
        self.classes = class_folders(train) or names
        self.files, labels = [], []
        left_out = [name for name in glob.glob('*', root_dir=folder) if name not in names]
        for name in names:
            files, others = pictures_below(os.path.join(folder, name))
            if not files or name not in self.classes:
                raise UserError(f'class {name!a} of {folder!a} has no pictures that Pillow reads, such as '
                                f'.jpg, or is not in train; add some or remove the folder')
            self.files += files
            left_out += others
            labels += [self.classes.index(name)] * len(files)
        report_left_out(folder, left_out)
        names = self.classes + [file[len(folder):] for file in self.files]
        self.contents = runtime.check_ranks_agree(ascii(folder), names)         # a hash
        self.labels = torch.tensor(labels)
        self.image_size, self.flip, self.seed = image_size, flip, seed
        self.resized_side = round(1.125 * image_size)
        # shared, because loader workers write to it
        self.skipped = torch.zeros(len(labels), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        index, position = key if isinstance(key, tuple) else (key, None)
        index = range(len(self))[index]                     # IndexError past the end
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            image = self.load(candidate)
            if image is not None:
                return self.crop(image, position), self.labels[candidate]
        raise UserError(f'none of the {len(self)} pictures can be read, starting with {self.files[0]!a}; '
                        f'the lines above say why')

    def load(self, index):
        """The whole picture as an upright RGB PIL image. If it is unreadable: None, and a line on stderr."""
        try:
            # twice the size needed: Lanczos halves better than the JPEG decoder
            return read_picture(self.files[index], 2 * self.resized_side)
        except Exception as error:                          # Pillow raises nearly anything on a broken file
            if not self.skipped[index]:
                reason = ' '.join(f'{type(error).__name__}: {error}'.split())
                print(f'warning: skipped {self.files[index]!a}: {reason}', file=sys.stderr)
            self.skipped[index] = True

    def crop(self, image, position=None):
        """A uint8 (3, S, S) crop of a PIL image: random if there is a position, otherwise at the centre."""
        across, down, mirror = 0.5, 0.5, 1.0
        if position is not None:
            across, down, mirror = np.random.default_rng((self.seed, position)).random(3)
        side = min(image.size) * self.image_size / self.resized_side
        crop = square_crop(image, self.image_size, side, across, down)
        return crop.flip(-1) if self.flip and mirror < 0.5 else crop


def open_dataset(data, split, image_size, count=None, flip=False, seed=0):
    """'charts' (count images; by default 12,000 for train and 1,000 for val), or a folder of images (all).

    'charts:4000' has 4,000 for train. flip and seed are for the random crops of a folder; charts are always
    the same. Raises UserError unless what follows the colon is a positive number, and warns if most
    pictures of a folder, judging by eight of them, have less than a quarter of the full contrast.
    """
    name, _, train_count = data.partition(':')
    if name == 'charts':
        train_count = train_count or '12000'
        if not train_count.isdecimal() or int(train_count) < 1:
            raise UserError(f'data={data!r}: write charts, or charts:4000 to train on 4000 of them')
        return Charts(split, image_size, count or (int(train_count) if split == 'train' else 1_000))
    folder = ImageFolder(data, split, image_size, flip, seed)
    pixels = evenly_spaced(folder, 8)[0].flatten(1)
    if (pixels.amax(1) - pixels.amin(1)).median() <= 64:
        runtime.say(f'warning: most pictures of {data!a} ({split}) are nearly flat or nearly black; scale '
                    f'values of 10 to 14 bits to 16 bits, and floating-point values to 255')
    return folder


# -----------------------------------------------------------------------------
# the order of samples

@lru_cache(maxsize=2)                                       # a batch spans one epoch, rarely two
def permutation(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


def endless_keys(count, batch_size, seed, start=0):
    """Yields this rank's part of each global batch from number `start` on, as a list of (index, position).

    Positions number the samples of the whole run, through one permutation of the data per epoch; a batch may
    span epochs. Ranks take contiguous parts. There is no state to save.
    """
    for step in itertools.count(start):
        yield [(permutation(count, seed, position // count)[position % count], position)
               for position in runtime.sample_numbers(step, batch_size)]


def batches(dataset, batch_size, seed, start=0, workers=0):
    """Endless iterator over this rank's (images (b, 3, S, S) uint8, labels (b,)), b = batch_size / ranks.

    The order is that of endless_keys(). workers: processes that decode images.
    """
    return fetch(dataset, endless_keys(len(dataset), batch_size, seed, start), workers)


def evenly_spaced(dataset, count):
    """Centre crops and labels of at most `count` items, evenly spaced because folders are sorted by class."""
    indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    return next(fetch(dataset, [indices]))


def fetch(dataset, batches_of_keys, workers=0):
    """Iterator over (images, labels), from lists of keys: indices, or (index, position) for random crops."""
    return iter(DataLoader(
        dataset, batch_sampler=batches_of_keys, num_workers=workers, worker_init_fn=leave_signals_to_training,
        multiprocessing_context='fork' if workers else None,    # a spawned worker would run the script again
        generator=torch.Generator()))                           # without it, the global one would advance


def leave_signals_to_training(worker):
    """Makes a loader worker ignore signals to the whole job: the last step before a stop needs its images.

    SIGTERM from the training process is obeyed: that is how loaders end their workers.
    """
    def obey_training():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    for number in set(runtime.STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):                      # missing on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_training, daemon=True).start()


# -----------------------------------------------------------------------------
# samples

def balanced_labels(num_classes, count, seed):
    """VAR's protocol: labels (count,) with every class equally often, shuffled. UserError if impossible."""
    if count % num_classes:
        raise UserError(f'{count} samples cannot be split evenly over {num_classes} classes: '
                        f'use a multiple of {num_classes}')
    order = torch.randperm(count, generator=runtime.generator(seed, 'order of the classes'))
    return order % num_classes


def sample_generators(seed, numbers):
    """One generator per sample, which depends only on (seed, sample number), not on batches or ranks."""
    return [runtime.generator(seed, 'sample', number) for number in numbers]


# -----------------------------------------------------------------------------
# files that fill row by row and survive interruptions

def open_table(path, made_with, rows, columns, dtype, not_yet):
    """A memory map (rows, columns) of a file that all ranks fill. Unfinished rows end in `not_yet`.

    path: a .partial file. Rows of an interrupted run are kept if PATH.json says that it was made_with the
    same settings (a dictionary of JSON values). Otherwise the file is started again. Raises UserError if the
    ranks' settings differ, or if they run on several machines, which cannot share a memory map.
    """
    if int(os.environ.get('LOCAL_WORLD_SIZE', runtime.world_size())) < runtime.world_size():
        raise UserError(f'{path}: written by the ranks of one machine; start torchrun on one only')
    runtime.check_ranks_agree(f'what {path} is made with', made_with)
    description = f'{path}.json'
    row = np.full(columns, not_yet, dtype)
    known = read_json(description) or {}
    kept = known == made_with and path.is_file() and path.stat().st_size == rows * row.nbytes
    if runtime.rank() == 0 and not kept:
        if path.exists():
            changed = [name for name in made_with if known.get(name) != made_with[name]] or ['its size']
            runtime.say(f'{path} was made with other settings ({", ".join(changed)}): starting again')
        close_table(path)
        with atomic_write(path) as file:                    # in full: on a full disk a memory map would crash
            for _ in range(rows):
                file.write(row)
        write_json(description, made_with)
    runtime.barrier()
    return np.memmap(path, dtype, 'r+', shape=(rows, columns))


def undone_batches(table, batch_size, not_yet):
    """This rank's part of the unfinished batches: ranges of rows, the same for any number of ranks."""
    rows = range(len(table))
    batches = [rows[i:i + batch_size] for i in rows[::batch_size]]
    undone = [batch for batch in batches if (table[batch, -1] == not_yet).any()]
    runtime.barrier()                                       # no rank may write before all have looked
    return undone[runtime.rank()::runtime.world_size()]


def close_table(path):
    """Deletes the files of open_table()."""
    Path(f'{path}.json').unlink(missing_ok=True)
    path.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# token files

class TokenDataset:
    """The output of encode.py: {split}.bin, one uint16 row per crop, and {split}.json, which describes it.

    A row holds the structure tokens of every map (L = Σ p² over patch_nums), the alias tokens (La, over
    alias_patch_nums) and the label. meta: the JSON as a dict. classes: class names. Raises UserError for
    missing or damaged files, for files that differ between ranks and, if tokenizer_digest is given, for
    tokens from another tokenizer.
    """

    def __init__(self, folder, split, tokenizer_digest=None):
        self.path = Path(folder, f'{split}.bin')
        try:
            meta = self.meta = read_json(self.path.with_suffix('.json'))
            self.classes = meta['classes']
            self.lengths = [*(sum(p * p for p in meta[f'{kind}patch_nums']) for kind in ('', 'alias_')), 1]
            limits = meta['vocab_size'], meta['alias_vocab_size'], len(self.classes)
            self.limits = np.repeat(limits, self.lengths)       # per column
            self.tokens = np.memmap(self.path, '<u2', 'r').reshape(-1, len(self.limits))
            if self.tokens.shape != (meta['rows'], meta['columns']):
                raise ValueError
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            raise UserError(f'no usable token files {split}.bin and {split}.json in {str(folder)!a}: '
                            f'missing, damaged or from different runs; run encode.py') from None
        if tokenizer_digest and meta.get('tokenizer') != tokenizer_digest:
            raise UserError(f'{folder}: these tokens come from another tokenizer; run encode.py again')
        runtime.check_ranks_agree(ascii(str(self.path)), meta)

    def __len__(self):
        return len(self.tokens)

    def batch(self, rows):
        """Rows (array or list of indices) → structure (B, L), alias (B, La), labels (B,): int64 tensors.

        Raises UserError for numbers out of range.
        """
        tokens = self.tokens[rows].astype(np.int64)
        if (tokens >= self.limits).any():
            raise UserError(f'{str(self.path)!a} is damaged: it has numbers out of range; delete it and run '
                            f'encode.py again')
        # contiguous, or a copy to a GPU would wait
        structure, alias, labels = (part.contiguous()
                                    for part in torch.from_numpy(tokens).split(self.lengths, dim=1))
        return structure, alias, labels.squeeze(1)
