"""Sets of images, uint8 (N, 3, S, S): read from data sets, folders or .npz files, and checked for flaws.

Files are not trusted: an .npz is read without pickle, and a bad file raises a UserError that names it.
"""
import hashlib
import os

import numpy as np
import torch

from configurator import UserError
from data import fetch, pictures_below, report_left_out
from util import runtime
from util.pictures import open_photo


# -----------------------------------------------------------------------------
# reading

def evenly_over_classes(labels, count):
    """Ascending indices of `count` items, in proportion to class sizes. All if count is 0 or too large."""
    by_class = labels.argsort(stable=True)
    if 0 < count < len(labels):
        by_class = by_class[torch.arange(count) * len(labels) // count]
    return by_class.sort().values


def load_images(dataset, count, workers=0):
    """Centre crops of `count` items of a data set, spread over the classes (0: all), and their labels.

    workers: processes that decode images.
    """
    batches = evenly_over_classes(dataset.labels, count).split(256)
    images, labels = zip(*fetch(dataset, batches, workers))
    return torch.cat(images), torch.cat(labels)


def read_samples(path, image_size, classes):
    """Images from a folder (see read_folder) or an .npz, and their labels, None if there are none.

    An .npz has arr_0 (N, S, S, 3) uint8 and may have labels in arr_1 (N,): the format of guided-diffusion.
    """
    if os.path.isdir(path):
        return read_folder(path, image_size, classes)
    arrays = load_arrays(path, ('arr_0', 'arr_1'))
    images, labels = to_images(path, arrays.get('arr_0'), image_size), arrays.get('arr_1')
    if labels is None:
        return images, None
    if labels.shape != (len(images),) or not np.isin(labels, range(len(classes))).all():
        raise UserError(f'{path}: arr_1 must be {len(images)} class numbers from 0 to {len(classes) - 1}')
    return images, torch.from_numpy(labels.astype(np.int64))


def read_reference(path, image_size):
    """Images from a folder or an .npz to measure distances against, and the published statistics in the .npz.

    These are (mu (2048,), sigma (2048, 2048)) of Inception features, or None. An .npz of statistics may have
    images too, like those for guided-diffusion's evaluator; otherwise the images are (0, 3, S, S). Raises
    UserError for statistics of other features.
    """
    if os.path.isdir(path):
        return read_folder(path, image_size)[0], None
    arrays = load_arrays(path, ('arr_0', 'mu', 'sigma'))
    images = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    if arrays.keys() != {'mu', 'sigma'}:
        images = to_images(path, arrays.get('arr_0'), image_size)
    if arrays.keys() <= {'arr_0'}:
        return images, None
    mu, sigma = (arrays.get(name, np.zeros(0)) for name in ('mu', 'sigma'))
    if (mu.shape, sigma.shape) != ((2048,), (2048, 2048)) or not np.isfinite(mu.sum() + sigma.sum()):
        raise UserError(f'{path}: mu and sigma must be the finite mean (2048,) and covariance (2048, 2048) '
                        f'of Inception features')
    return images, (torch.from_numpy(mu), torch.from_numpy(sigma))


def read_folder(path, image_size, classes=()):
    """Pictures (N, 3, S, S) uint8 at any depth, shuffled, and their labels (N,) if all folders are named like
    classes, else None. Raises UserError if there are none, or if one is unreadable or of another size."""
    files, others = pictures_below(path)
    if not files:
        raise UserError(f'{path}: no pictures in this folder')
    report_left_out(path, others)
    images = torch.cat([
        to_images(file, np.array(open_photo(file, image_size))[None], image_size)
        for file in files]).contiguous()
    # sorted by name they would be in class order, which says nothing about how the samples were made
    order = torch.randperm(len(files), generator=runtime.generator('order of the files'))
    folders = [os.path.relpath(file, path).split(os.sep)[0] for file in files]
    labels = None
    if set(folders) <= set(classes):
        labels = torch.tensor([classes.index(folder) for folder in folders])[order]
    return images[order], labels


def load_arrays(path, names):
    """{name: array} of the given names that an .npz has. Never runs code. Raises UserError for a bad file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except Exception as error:                              # NumPy raises nearly anything on a broken file
        raise UserError(f'{path} cannot be read: missing, damaged, or not an .npz of plain arrays '
                        f'({type(error).__name__})') from None


def to_images(path, array, image_size):
    """An array (N, S, S, 3) uint8 as (N, 3, S, S). Raises UserError for something else. path: its file."""
    wrong = array is None or array.dtype != np.uint8 or array.shape[1:] != (image_size, image_size, 3)
    if wrong or not len(array):
        found = 'missing' if array is None else f'{array.dtype} {array.shape}'
        raise UserError(f'{path}: images (arr_0) must be uint8 (N, {image_size}, {image_size}, 3) like the '
                        f"tokenizer's, or a distance would measure the resizing, but are {found}")
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def image_hashes(images):
    """16 bytes per image; equal images have equal bytes."""
    return [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images]


def fingerprint(images):
    """16 hexadecimal digits for a whole set of images in their order."""
    return hashlib.blake2b(b''.join(image_hashes(images)), digest_size=8).hexdigest()


# -----------------------------------------------------------------------------
# flaws that would mislead: functions that return warnings, one line each

def check_count(what, count, num_features):
    """Warnings about the number of images in a set, `what`.

    num_features: of the network behind the distance.
    """
    if count <= num_features:
        return [f'{count} {what} for {num_features} features: their covariance is singular and the distance '
                f'far too high; compare only with runs that have as many']
    if num_features == 2048 and count < 50_000:
        return [f'{count} {what}: published FIDs use 50,000 samples and a whole training set or '
                f'its statistics; fewer images raise FID']
    return []


def check_samples(images, labels, num_classes, reference=(), path=''):
    """Warnings about samples (N, 3, H, W) with labels (N,) or None. Raises UserError if N < 10.

    reference: the images that distances are measured against. path: the folder the samples come from.
    """
    count = len(images)
    if count < 10:
        raise UserError(f'only {count} samples: too few for a distance; give at least 10, ideally thousands')
    lossy = sum(file.lower().endswith(('.jpg', '.jpeg', '.jfif', '.jpe')) for file in pictures_below(path)[0])
    flat = (images.amax((2, 3)) == images.amin((2, 3))).all(1)
    hashes = image_hashes(images[~flat])
    known = set(image_hashes(reference))
    copies = len(hashes) - len(set(hashes))
    stolen = sum(one in known for one in hashes)
    flaws = [
        (lossy, f'{lossy} of {count} samples are JPEG: FID counts its artefacts as errors; save PNG'),
        (flat.any(), f'{flat.sum()} of {count} samples are one flat colour: failures raise every distance'),
        (images.max() <= 1, 'no sample has a value above 1 of 255: were they made uint8 before scaling?'),
        (copies, f'{copies} of {count} samples repeat another one: the metrics are those of {count - copies} '
                 f'samples, and fewer raise FID and lower recall; was a seed used twice?'),
        (stolen, f'{stolen} of {count} samples are images of the reference: copying lowers the distance'),
        (labels is None, 'samples have no classes (class folders, or arr_1): `recognised` is left out, and '
                         'class frequencies are not checked'),
    ]
    if labels is not None:
        least, most = labels.bincount(minlength=num_classes).aminmax()
        in_order = num_classes > 1 and (labels.diff() >= 0).all()
        flaws += [
            (least < most, f'{least} to {most} samples per class: the distance counts this as an error'),
            (in_order, 'samples are in class order: harmless here, where IS shuffles them, but other '
                       'evaluators may report too low an IS'),
        ]
    return [warning for found, warning in flaws if found]
