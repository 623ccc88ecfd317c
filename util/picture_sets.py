"""Sets of pictures, uint8 (N, 3, S, S): read from a data set, a folder or an .npz, and looked at for what would mislead.

A file is never trusted: an .npz is read without pickle, and what is wrong with a file is a UserError that names it.
"""
import hashlib
import os
import zipfile

import numpy as np
import torch

from util import runtime
from configurator import UserError
from data import fetch, pictures_below, read_picture


# -----------------------------------------------------------------------------
# reading

def spread(labels, count):
    """Indices of `count` items (0, or more than there are: all), every class with its share; ascending."""
    by_class = labels.argsort(stable=True)
    if 0 < count < len(labels):
        by_class = by_class[torch.arange(count) * len(labels) // count]
    return by_class.sort().values


def load_images(dataset, count, workers=0):
    """(images, labels) of at most `count` items of a data set, centre crops; workers: processes that decode them."""
    indices = spread(dataset.labels, count).tolist()
    images, labels = zip(*fetch(dataset, [indices[i:i + 256] for i in range(0, len(indices), 256)], workers))
    return torch.cat(images), torch.cat(labels)


def read_samples(path, image_size, classes):
    """(images, labels or None) from a folder of pictures or an .npz; see read_folder and read_npz. Real ones are read alike."""
    if os.path.isdir(path):
        return read_folder(path, image_size, classes)
    if os.path.isfile(path):
        return read_npz(path, image_size, len(classes))
    raise UserError(f'--samples={path}: no such folder or file')


def read_reference(path, image_size):
    """(images or None, moments or None) from a folder of pictures or an .npz: what distances are measured to.

    moments: (mu (2048,), sigma (2048, 2048)) of Inception's features, in an .npz that holds them. Those that are published
    for guided-diffusion's evaluator hold 10,000 images (arr_0) as well. UserError for statistics of other features.
    """
    arrays = load_arrays(path, ('mu', 'sigma')) if os.path.isfile(path) else {}
    if not arrays:
        return read_folder(path, image_size)[0] if os.path.isdir(path) else read_npz(path, image_size)[0], None
    mu, sigma = (arrays.get(name, np.zeros(0)) for name in ('mu', 'sigma'))
    if mu.shape != (2048,) or sigma.shape != (2048, 2048) or {mu.dtype.kind, sigma.dtype.kind} != {'f'}:
        raise UserError(f'{path}: mu and sigma must be mean (2048,) and covariance (2048, 2048) of Inception\'s pool3 features, '
                        f'they are {mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}')
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all() and np.allclose(sigma, sigma.T, atol=1e-4)):
        raise UserError(f'{path}: mu and sigma are damaged: not finite, or not symmetric')
    with zipfile.ZipFile(path) as file:                     # looked for only: 10,000 images are not read twice
        has_images = 'arr_0.npy' in file.namelist()
    return read_npz(path, image_size)[0] if has_images else None, (torch.from_numpy(mu), torch.from_numpy(sigma))


def read_folder(path, image_size, classes=()):
    """Pictures at any depth, shuffled; labels where all lie in folders named like classes. UserError naming a bad file."""
    files = pictures_below(path)
    if not files:
        raise UserError(f'{path}: no pictures in this folder')
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    for i, file in enumerate(files):
        try:
            picture = read_picture(file, image_size)
        except Exception as error:                          # Pillow raises nearly anything on a broken file
            raise UserError(f'{file!a} can not be read ({type(error).__name__}: {error}): remove it or make it again') from None
        check_size(file, picture.size, image_size)
        images[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    folders = [os.path.relpath(file, path).split(os.sep)[0] for file in files]
    labels = torch.tensor([classes.index(folder) for folder in folders]) if set(folders) <= set(classes) else None
    # sorted names are in class order, which says nothing about how the samples were made
    order = torch.randperm(len(files), generator=runtime.generator(0, 8))
    return images[order], None if labels is None else labels[order]


def load_arrays(path, names):
    """{name: array} of those that an .npz has; UserError if it can not be read. Never runs code from the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile):
        raise UserError(f'{path} can not be read: damaged, or not an .npz of plain arrays') from None


def read_npz(path, image_size, num_classes=0):
    """arr_0 (N, S, S, 3) uint8, and labels from arr_1 (N,) if it is there: what guided-diffusion's evaluator reads.

    num_classes: 0 leaves the labels alone, those of a reference say nothing here.
    """
    arrays = load_arrays(path, ('arr_0', 'arr_1') if num_classes else ('arr_0',))
    if 'arr_0' not in arrays:
        raise UserError(f'{path} has no arr_0: save with np.savez(path, images), images uint8 (N, S, S, 3)')
    images, labels = arrays['arr_0'], arrays.get('arr_1')
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise UserError(f'{path}: arr_0 must be uint8 (N, S, S, 3), it is {images.dtype} {images.shape}; figures are of '
                        f'rounded values from 0 to 255')
    check_size(path, images.shape[2:0:-1], image_size)
    if labels is not None:
        if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu' or not 0 <= labels.min() <= labels.max() < num_classes:
            raise UserError(f'{path}: arr_1 must be {len(images)} class numbers from 0 to {num_classes - 1}')
        labels = torch.from_numpy(labels.astype(np.int64))
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels


def check_size(name, size, image_size):
    if tuple(size) != (image_size, image_size):
        raise UserError(f'{name}: these are {size[0]} × {size[1]} px, the tokenizer\'s images {image_size} × {image_size}: '
                        f'a distance between them would measure the resizing')


def fingerprints(images):
    """16 bytes for every image: equal ones have equal bytes."""
    return [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images]


def fingerprint(of_images):
    """One for a whole set of images in their order, from the fingerprints of each; hexadecimal."""
    return hashlib.blake2b(b''.join(of_images), digest_size=8).hexdigest()


# -----------------------------------------------------------------------------
# what would mislead

def check_reference(count, num_features):
    """Warnings, a line each, about a reference of so many images."""
    if count <= num_features:
        return [f'{count} reference images for {num_features} features: their covariance is singular and every distance too high; '
                f'compare only with runs that have the same reference']
    if num_features == 2048 and count < 50_000:
        return [f'{count} reference images (--real_images, --reference): published FIDs compare with whole training sets or their '
                f'statistics; fewer raise it']
    return []


def check_files(path):
    """Warnings, a line each, about how samples were saved."""
    files = pictures_below(path) if os.path.isdir(path) else []
    lossy = sum(file.lower().endswith(('.jpg', '.jpeg')) for file in files)
    return [f'{lossy} of {len(files)} samples are JPEG: FID counts what compression did to them as an error; save PNG'] if lossy else []


def check_samples(images, labels, num_features, num_classes, known=()):
    """Warnings, a line each, about samples that make the figures say something else than they seem to.

    images uint8 (N, 3, S, S); labels (N,) or None; num_features of the network behind the distance; known: fingerprints of
    the reference's images. UserError for N < 10.
    """
    count, warnings = len(images), []
    if count < 10:
        raise UserError(f'only {count} samples: no distance can be measured; give at least 10, better thousands')
    if count <= num_features:
        warnings.append(f'{count} samples for {num_features} features: their covariance is singular and the distance far too '
                        f'high; compare it only with the floor and with runs of as many samples')
    if num_features == 2048 and num_features < count < 50_000:
        warnings.append(f'{count} samples: published FIDs use 50,000; fewer raise it')
    flat = (images.amax((2, 3)) == images.amin((2, 3))).all(1)
    if flat.any():
        warnings.append(f'{int(flat.sum())} of {count} samples are one flat colour: failed samples raise every distance')
    if images.max() <= 1:
        warnings.append('samples hold nothing above 1 of 255: were they made uint8 before they were scaled? The figures are of black '
                        'pictures')
    found = fingerprints(images[~flat])
    copies, known = len(found) - len(set(found)), set(known)
    if copies:
        warnings.append(f'{copies} of {count} samples repeat another one: the figures are of {count - copies} samples, and fewer '
                        f'raise FID and lower recall; was a seed used twice?')
    if stolen := sum(one in known for one in found):
        warnings.append(f'{stolen} of {count} samples are images of the reference itself: the distance is too low, it rewards copying')
    if labels is None:
        return warnings + ['samples carry no class (class folders, or arr_1): no `recognised`, and nobody checks that '
                           'classes are as frequent as in the real images']
    frequency = labels.bincount(minlength=num_classes)
    if frequency.min() != frequency.max():
        warnings.append(f'{frequency.min()} to {frequency.max()} samples a class: the distance counts the imbalance as an error')
    if num_classes > 1 and (labels.diff() >= 0).all():
        warnings.append('samples are in class order: harmless here, where IS is taken over shuffled parts, but evaluators '
                        'that do not shuffle report too low an IS')
    return warnings
