"""Figures of a finished run: of the tokenizer, of the student, and of pictures it generates.

    python evaluate.py                                          # everything about out/, sampling as it goes
    python evaluate.py --out_dir=out-d16 --per_class=50 --dtype=auto
    python evaluate.py --parts=tokenizer                        # before there is a student
    python evaluate.py --samples=samples.npz                    # of sample.py or made elsewhere: .npz (arr_0), or a folder of PNGs
    python evaluate.py --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --distance=fid
    python evaluate.py --parts=tokenizer,samples --data=data/imagenet --vae=vae_ch160v4096z32.pth --init_from=var_d16.pth
    python evaluate.py --parts=refocus

tokenizer  PSNR and SSIM of held-out images, perplexity of every token map, distance of reconstructions
student    held-out cross-entropy in nats a token for every token map, bits an image
samples    FID, IS, precision and recall by torch-fidelity, when the Inception weights are on disk. Without them
           FD-cnn, the Fréchet distance between features of a small CNN trained here on the data: it compares runs on
           the same data, and must never be called FID. `recognised` is the share the CNN assigns to their class.
refocus    (only when asked for) held-out images under a disk of known radius: what the student makes of them against
           unsharp masking and Wiener deconvolution; PSNR, SSIM and edge sharpness. Goes to out_dir/refocus.json.

Every distance stands beside that of reconstructions (what the tokenizer alone costs) and of real images that are not
in the reference (the floor: what as many perfect samples would get). The reference is a split of the data, a folder, an
.npz of images, or one with mu and sigma, the published statistics of Inception's features over a whole training set: FID
is then measured to these, precision and recall to the images beside them, if there are any.
Samples are looked at first; a warning says what a flaw does to the figures. Prints tables; writes out_dir/results.json,
which holds all settings, versions and fingerprints (of weights, samples, reference) needed to get the figures again.
"""
import hashlib
import json
import math
import os
import platform
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import runtime
from configurator import UserError, configure
from data import (TokenDataset, balanced_labels, fetch, normalize, open_dataset, pictures_below, read_picture, sample_generators,
                  to_uint8)
from editing import consistent, refocus, unsharp, wiener
from model import load_deployed
from pictures import psnr
from pyramid import defocus
from tokenizer import load_tokenizers

# input and output
out_dir = 'out'                 # where student.pt lies and results.json goes
parts = 'tokenizer,student,samples'  # what to evaluate
init_from = ''                  # student.pt (default: the one in out_dir), or with --vae a published transformer
tokenizer = ''                  # tokenizer.pt (default: the one beside student.pt)
vae = ''                        # a published VAR tokenizer instead
patch_nums = ()                 # token maps of published files (default: VAR's at 256 or 512 px)
tokens = ''                     # folder of encode.py's token files (default: tokens beside tokenizer.pt)
# real images
data = ''                       # images (default: what the tokenizer was trained on)
reference = 'train'             # what distances are measured to: train | val | folder | .npz of images or of statistics
real_images = 12_000            # images of a split at most, all classes alike; 0 is all (they are kept in memory)
workers = 0                     # processes that decode images of a folder
# generated images; the defaults are VAR's
samples = ''                    # folder of PNGs (class folders or flat) or .npz (default: sample here)
per_class = 100                 # how many of each class to sample; published FIDs: 50 of 1000 classes
cfg = 1.5                       # guidance strength, ramped up over the token maps; 0 is none
top_k = 900                     # most likely codes kept; 0 is all
top_p = 0.96                    # probability kept; 0 is all
# refocusing
refocus_images = 200            # held-out images that are put out of focus
# distances
distance = 'auto'               # fid | cnn | auto: fid if the Inception weights are on disk, else cnn
inception_weights = 'weights/weights-inception-2015-12-05-6726825d.pth'  # torch hub's folder is looked in as well
cnn_file = ''                   # trained CNN (default: cnn.pt in out_dir); runs that share one can be compared
cnn_steps = 300                 # optimizer steps of the CNN
cnn_batch = 64                  # images a step
cnn_lr = 5e-3                   # peak learning rate
cnn_seed = 0                    # another one shows how much FD-cnn depends on the CNN
# system
batch_size = 50                 # images at a time
device = 'auto'                 # auto | cpu | cuda
dtype = 'float32'               # auto | float32 | bfloat16 | float16, of tokenizer and student; the CNN is float32
seed = 0                        # of the samples
config = configure(globals())


# -----------------------------------------------------------------------------
# two images

def ssim(a, b):
    """Structural similarity (Wang et al. 2004), mean over images, channels and windows. a, b (B, C, H, W) in [−1, 1].

    11 × 11 Gaussian windows of σ = 1.5 that lie inside the image, K₁ = 0.01, K₂ = 0.03, range 2; on each colour
    channel, at full size. Raises UserError for images smaller than a window.
    """
    H, W = a.shape[-2:]
    if min(H, W) < 11:
        raise UserError(f'SSIM needs images of at least 11 × 11 pixels, got {H} × {W}')
    window = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5 ** 2))
    window = window / window.sum()
    # windowed means as matrix products: float64, because variances are small differences of large numbers
    down, across = (torch.eye(n, dtype=torch.float64).unfold(1, 11, 1) @ window for n in (H, W))   # (n, n − 10)

    def mean(x):
        return down.T @ x @ across

    a, b = a.cpu().double(), b.cpu().double()
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a ** 2, mean(b * b) - mean_b ** 2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a ** 2 + mean_b ** 2 + c1) * (variance_a + variance_b + c2)))
    return similarity.mean().item()


def sharpness(images, truth):
    """Mean gradient of images relative to the truth's, at the tenth of the pixels where the truth's is steepest: 1 is as
    sharp as the truth, less is softer. (B, C, H, W) each."""
    def steepness(x):
        right, down = x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]
        return (right ** 2 + down ** 2).sum(1).sqrt().flatten(1)

    of_truth = steepness(truth)
    edges = of_truth >= of_truth.quantile(0.9, dim=1, keepdim=True)
    return (steepness(images)[edges].mean() / of_truth[edges].mean()).item()


# -----------------------------------------------------------------------------
# two sets of images

def statistics(features):
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64. Raises UserError for N < 2."""
    if len(features) < 2:
        raise UserError(f'a Fréchet distance needs at least 2 images, got {len(features)}')
    features = features.double()
    mu = features.mean(0)
    return mu, (features - mu).T @ (features - mu) / (len(features) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), as Heusel et al. 2017 define FID. Means (D,), covariances (D, D).

    Σ₁Σ₂ has the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½, so no matrix needs an inverse and singular ones are fine.
    """
    mu1, sigma1, mu2, sigma2 = (t.double() for t in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap).clamp(min=0).item()


def torch_fidelity_metrics(generated, real, weights_path, device='cpu', batch_size=50, cache='', names=(None, None), moments=None):
    """FID, Inception score, precision and recall (k = 3) of generated against real images, by torch-fidelity.

    generated, real: uint8 (N, 3, H, W), N ≥ 10 each (IS takes ten parts). weights_path: Inception's weights on disk.
    cache, names: a folder, and names of the two sets in it, so that a set compared twice is looked at once.
    moments: published (mu, sigma) of real features: FID is then measured to them, and real may be None: no precision
    and recall. UserError for smaller sets.
    """
    sizes = [len(images) for images in (generated, real) if images is not None]
    if min(sizes) < 10:
        raise UserError(f'{" and ".join(map(str, sizes))} images: FID, IS, precision and recall need at least 10 on both sides')
    from torch_fidelity import calculate_metrics
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id_cached

    class Pictures(torch.utils.data.TensorDataset):         # items must be tensors, not tuples of one
        def __getitem__(self, index):
            return self.tensors[0][index]

    options = dict(
        input1=Pictures(generated), input2=None if real is None else Pictures(real), feature_extractor='inception-v3-compat',
        feature_extractor_weights_path=str(weights_path), input1_cache_name=names[0], input2_cache_name=names[1],
        cache=bool(cache), cache_root=str(cache) or None, cuda=torch.device(device).type == 'cuda', batch_size=batch_size,
        save_cpu_ram=True, verbose=False)
    if moments:                                             # both layers at once, for IS then finds its own in the cache
        extractor = create_feature_extractor('inception-v3-compat', ['2048', 'logits_unbiased'], **options)
        features = extract_featuresdict_from_input_id_cached(1, extractor, **options)['2048']
    found = calculate_metrics(isc=True, fid=moments is None, prc=real is not None, **options)
    return {'fid': frechet_distance(*statistics(features), *moments) if moments else found['frechet_inception_distance'],
            'isc': found['inception_score_mean'], 'precision': found.get('precision'), 'recall': found.get('recall')}


def find_inception():
    """(path, '') of the Inception weights, or ('', one line that says which file is missing where).

    Raises UserError for a file that is not the published one: a number from other weights is not FID.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    except ImportError as error:
        return '', f'torch-fidelity can not be imported ({error}): pip install -r requirements.txt'
    name = os.path.basename(url)
    for path in (inception_weights, os.path.join(torch.hub.get_dir(), 'checkpoints', name)):
        if os.path.isfile(path):
            sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            if not sha256.startswith(name.split('-')[-1].removesuffix('.pth')):     # torch hub's way of naming files
                raise UserError(f'{path} is truncated or another file: get {url} again, or use --distance=cnn')
            return path, ''
    return '', f'the Inception weights are not on disk: put {url} at {inception_weights}'


# -----------------------------------------------------------------------------
# the CNN behind FD-cnn

class SmallCNN(nn.Module):
    """A small classifier of pictures: four 3×3 convolutions with BatchNorm, and the mean over the picture as features.

    Images (B, 3, S, S) in [−1, 1]; those wider than 64 px are averaged down to 64.
    """

    def __init__(self, num_classes, width=32):
        super().__init__()
        layers, shapes = [], [(3, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
        for width_in, width_out, stride in shapes:
            layers += [nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(4 * width, num_classes)

    def features(self, x):
        """(B, 3, S, S) → (B, 4·width)."""
        if x.shape[-1] > 64:
            x = F.interpolate(x, (64, 64), mode='area')
        return self.layers(x).mean((2, 3))

    def forward(self, x):
        """(B, 3, S, S) → class logits (B, num_classes)."""
        return self.head(self.features(x))


def train_cnn(images, labels, num_classes, steps=300, batch=64, lr=5e-3, augment=False, device='cpu', seed=0):
    """A SmallCNN in eval mode, trained on images uint8 (N, 3, S, S) with labels (N,). The same seed gives the same CNN.

    augment: mirror half of the images and shift all by up to an eighth: for photographs, where mirrored and shifted
    is still the same class.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cnn = SmallCNN(num_classes)
    cnn = cnn.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(cnn.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = runtime.generator(seed, 6)
    shift = images.shape[-1] // 8
    bar = runtime.progress(steps, label='cnn', scale=batch)
    for _ in range(steps):
        picks = torch.randint(len(images), (batch,), generator=generator)
        x = normalize(images[picks].to(device)).contiguous(memory_format=torch.channels_last)
        if augment:
            mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
            top, left = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
            x = torch.where(mirrored.to(device), x.flip(-1), x)
            x = F.pad(x, 4 * [shift], mode='reflect')[:, :, top:top + images.shape[-2], left:left + images.shape[-1]]
        loss = F.cross_entropy(cnn(x), labels[picks].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    bar.close()
    return cnn.eval()


@torch.no_grad()
def look(cnn, images):
    """Features (N, D) and predicted classes (N,) of uint8 images, on the CPU."""
    dev = cnn.head.weight.device
    features = torch.cat([cnn.features(normalize(part.to(dev))) for part in images.split(256)])
    return features.cpu(), cnn.head(features).argmax(1).cpu()


def load_or_train_cnn(train, held_out, data_name, classes, dev):
    """(CNN, its held-out accuracy): from the file where that fits the data and the settings, else trained and saved.

    train, held_out: (images, labels).
    """
    path = cnn_file or f'{out_dir}/cnn.pt'
    settings = {'data': data_name, 'image_size': train[0].shape[-1], 'classes': classes, 'images': len(train[0]),
                'steps': cnn_steps, 'batch': cnn_batch, 'lr': cnn_lr, 'seed': cnn_seed}
    if os.path.isfile(path):
        saved = runtime.load_checkpoint(path, 'cnn', dev)
        if saved['settings'] == settings:
            cnn = SmallCNN(len(classes)).to(dev, memory_format=torch.channels_last)
            runtime.load_weights(cnn, saved['cnn'], path)
            return cnn.eval(), saved['accuracy']
        runtime.say(f'{path} was trained on other data or with other settings: training it again, figures may shift')
    cnn = train_cnn(*train, len(classes), cnn_steps, cnn_batch, cnn_lr, device=dev, seed=cnn_seed,
                    augment=data_name.partition(':')[0] != 'charts')
    accuracy = share(look(cnn, held_out[0])[1] == held_out[1])
    runtime.save_checkpoint(path, {'kind': 'cnn', 'settings': settings, 'accuracy': accuracy, 'cnn': cnn.state_dict()})
    return cnn, accuracy


def share(hits):
    return hits.float().mean().item()


# -----------------------------------------------------------------------------
# real and generated images, uint8 (N, 3, S, S)

def spread(labels, count):
    """Indices of `count` items (0, or more than there are: all), every class with its share; ascending."""
    by_class = labels.argsort(stable=True)
    if 0 < count < len(labels):
        by_class = by_class[torch.arange(count) * len(labels) // count]
    return by_class.sort().values


def load_images(dataset, count):
    """(images, labels) of at most `count` items of a data set, centre crops."""
    indices = spread(dataset.labels, count).tolist()
    images, labels = zip(*fetch(dataset, [indices[i:i + 256] for i in range(0, len(indices), 256)], workers))
    return torch.cat(images), torch.cat(labels)


@torch.no_grad()
def generate(student, structure, autocast):
    """(images, labels): per_class samples of every class, those that sample.py --num_samples writes with the same seed."""
    labels = balanced_labels(student.num_classes, per_class * student.num_classes, seed)
    dev, images = student.head.weight.device, []
    with runtime.progress(len(labels), label='sample') as bar:
        for numbers in torch.arange(len(labels)).split(batch_size):
            generators = sample_generators(seed, numbers)
            with autocast():
                _, drawn = student.generate(structure, labels[numbers].to(dev), cfg, top_k, top_p, generators)
            images.append(to_uint8(drawn).cpu())
            bar.update(len(numbers))
    return torch.cat(images), labels


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
    order = torch.randperm(len(files), generator=runtime.generator(seed, 8))
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


# -----------------------------------------------------------------------------
# the parts

@torch.no_grad()
def tokenizer_figures(structure, images, autocast):
    """(figures, reconstructions): PSNR (dB) and SSIM of uint8 images and what their tokens decode to; perplexity."""
    dev, sums, decoded = structure.quantizer.codebook.weight.device, np.zeros(2), []
    for part in images.split(batch_size):
        x = normalize(part.to(dev))
        with autocast():
            y = structure.decode(structure.encode(x)).float()
        sums += len(part) * np.array([psnr(y, x), ssim(y, x)])
        decoded.append(to_uint8(y).cpu())
    decibel, similarity = (sums / len(images)).tolist()
    return {'psnr': decibel, 'ssim': similarity, 'images': len(images),
            'perplexity': structure.quantizer.codebook.perplexity().tolist()}, torch.cat(decoded)


@torch.no_grad()
def student_figures(student, structure, token_dataset, autocast):
    """Cross-entropy in nats a token, for every token map and over all; bits an image. All labels given, nothing dropped."""
    dev, sums = student.head.weight.device, torch.zeros(len(student.lengths), dtype=torch.float64)
    for rows in torch.arange(len(token_dataset)).split(batch_size):
        wanted, _, labels = (t.to(dev) for t in token_dataset.batch(rows.numpy()))
        with autocast():
            logits = student(labels, structure.token_inputs(list(wanted.split(student.lengths, 1))))
        nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction='none').view(wanted.shape)
        sums += torch.stack([part.sum() for part in nats.split(student.lengths, 1)]).cpu()
    nats_of_map = sums / len(token_dataset)                 # summed over the tokens of an image
    return {'ce': (nats_of_map.sum() / sum(student.lengths)).item(), 'images': len(token_dataset),
            'ce_per_map': (nats_of_map / torch.tensor(student.lengths)).tolist(),
            'bits_an_image': nats_of_map.sum().item() / math.log(2)}


@torch.no_grad()
def refocus_figures(student, structure, images, autocast):
    """Rows of figures, one for each blur (a focus state's radius, px; noise σ for images in [−1, 1]) and method.

    images uint8 (N, 3, S, S) are blurred, made noisy and rounded to 8 bits, as a file would hold them. Wiener's filter is told
    the PSF and the noise, and weighs it as a sweep found best; the student is told the radius, no class.
    """
    dev, rows = student.head.weight.device, []
    for radius in sorted({r for r in structure.radii if r > 0.5}, reverse=True):
        for noise in (0.0, 0.05):
            drawn, methods, truth = runtime.generator(seed, 8), {}, []
            for part in images.split(batch_size):
                x = normalize(part.to(dev))
                blurred = defocus(x, radius, structure.kernel)
                blurred = normalize(to_uint8(blurred + noise * torch.randn(x.shape, generator=drawn).to(dev)))
                power = 3e-4 + 6 * noise ** 2 / x.var().item()     # best of a sweep, for charts and for photographs
                labels = torch.full((len(x),), student.num_classes, device=dev)
                sampling = {'cfg': 0, 'top_k': top_k, 'top_p': top_p, 'generator': torch.Generator(dev).manual_seed(seed)}
                with autocast():
                    drawn_anew = refocus(student, structure, blurred, radius, labels, noise=0, **sampling)
                found = {'blurred': blurred, 'unsharp': unsharp(blurred, radius),
                         'Wiener': wiener(blurred, radius, structure.kernel, power), 'student': drawn_anew,
                         'student + Wiener': consistent(drawn_anew, blurred, radius, structure.kernel, power)}
                for name, y in found.items():
                    methods.setdefault(name, []).append(y.clamp(-1, 1).float().cpu())
                truth.append(x.cpu())
            truth = torch.cat(truth)
            for name, y in methods.items():
                y = torch.cat(y)
                rows.append({'radius': radius, 'noise': noise, 'method': name, 'psnr': psnr(y, truth), 'ssim': ssim(y, truth),
                             'sharpness': sharpness(y, truth), 'images': len(y)})
    return rows


def print_refocus(rows):
    methods = list(dict.fromkeys(row['method'] for row in rows))
    runtime.say(f'{rows[0]["images"]} held-out images out of focus: PSNR (dB) / SSIM / edge sharpness\n{"radius":>6} {"noise":>6}'
                + ''.join(f'{name:>21}' for name in methods))
    for i in range(0, len(rows), len(methods)):
        cells = (f'{row["psnr"]:.2f} / {row["ssim"]:.2f} / {row["sharpness"]:.2f}' for row in rows[i:i + len(methods)])
        runtime.say(f'{rows[i]["radius"]:6.3g} {rows[i]["noise"]:6.3g}' + ''.join(f'{cell:>21}' for cell in cells))


# set, and what it is measured against
PAIRS = [('generated', 'reference'), ('reconstructed', 'reference'), ('reconstructed', 'originals'), ('real', 'reference')]
TITLES = {'fid': 'FID', 'isc': 'IS', 'precision': 'precision', 'recall': 'recall', 'fd_cnn': 'FD-cnn', 'recognised': 'recognised'}


def compare(sets, weights_path, cnn, dev, moments=None):
    """A row of figures for each of PAIRS that is there. sets: {name: (images, labels or None)}.

    With weights_path by torch-fidelity, else by the CNN. moments: published statistics of the reference, which may then
    have no images (None).
    """
    pairs = [(a, b) for a, b in PAIRS if a in sets]
    rows = [{'set': a, 'against': b, 'images': len(sets[a][0]), 'against_images': None if sets[b][0] is None else len(sets[b][0])}
            for a, b in pairs]
    if weights_path:
        with tempfile.TemporaryDirectory() as cache:
            for row, (a, b) in zip(rows, pairs):
                row |= torch_fidelity_metrics(sets[a][0], sets[b][0], weights_path, dev, batch_size, cache, (a, b),
                                              moments if b == 'reference' else None)
        return rows
    seen = {name: look(cnn, images) for name, (images, _) in sets.items()}
    moments = {name: statistics(features) for name, (features, _) in seen.items()}
    for row, (a, b) in zip(rows, pairs):
        labels = sets[a][1]
        row['fd_cnn'] = frechet_distance(*moments[a], *moments[b])
        row['recognised'] = None if labels is None else share(seen[a][1] == labels)
    return rows


def print_rows(rows):
    columns = [key for key in TITLES if key in rows[0]]
    runtime.say(f'{"":14} {"against":10} {"images":>7}' + ''.join(f'{TITLES[key]:>12}' for key in columns))
    for row in rows:
        values = ('–' if row[key] is None else f'{100 * row[key]:.1f} %' if key == 'recognised' else f'{row[key]:.3f}'
                  for key in columns)
        runtime.say(f'{row["set"]:14} {row["against"]:10} {row["images"]:7}' + ''.join(f'{value:>12}' for value in values))


# -----------------------------------------------------------------------------
# the run

def choose_parts():
    """The parts as a list, after a look at all settings; UserError for one that makes no sense."""
    chosen = [part.strip() for part in parts.split(',')]
    for part in chosen:
        if part not in ('tokenizer', 'student', 'samples', 'refocus'):
            raise UserError(f'--parts={parts}: {part!r} is no part; give some of tokenizer,student,samples, or refocus')
    if min(per_class, refocus_images, batch_size, cnn_steps, cnn_batch) < 1 or real_images < 0:
        raise UserError('--per_class, --refocus_images, --batch_size, --cnn_steps and --cnn_batch must be at least 1, '
                        '--real_images at least 0')
    if distance not in ('auto', 'fid', 'cnn'):
        raise UserError(f'--distance={distance}: choose auto, fid or cnn')
    if reference not in ('train', 'val') and not os.path.exists(reference):
        raise UserError(f'--reference={reference}: no such file; choose train, val, a folder of images, or an .npz of images or of '
                        f'statistics (mu, sigma)')
    if runtime.world_size() > 1:
        raise UserError('evaluate.py is one process: start it with python, not with torchrun')
    if 'refocus' in chosen and len(chosen) > 1:
        raise UserError(f'--parts={parts}: refocus is measured by itself')
    return chosen


def choose_distance(only_statistics=False):
    """Path of the Inception weights, or '' where the CNN is to be used; says why.

    only_statistics: of Inception's features is what the reference is; UserError where the CNN would be used then.
    """
    path, missing = ('', '') if distance == 'cnn' else find_inception()
    if missing and distance == 'fid':
        raise UserError(missing)
    if not path and only_statistics:
        raise UserError(f'--reference={reference} holds statistics of Inception features, which FD-cnn can not be measured to: '
                        f'give images; or for FID, {missing or "leave --distance=cnn out"}')
    if missing:
        runtime.say(f'no FID: {missing}. Using FD-cnn, which compares runs on the same data and is not FID.')
    return path


def versions():
    """Of what figures depend on; None where it is not installed."""
    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    return {'python': platform.python_version()} | {name: version(name) for name in ('torch', 'torch-fidelity', 'numpy', 'pillow')}


def made_with(path):
    """What sample.py says about how an .npz was made; None for one from elsewhere."""
    said = load_arrays(path, ('made_with',)).get('made_with') if os.path.isfile(path) else None
    try:
        return None if said is None else json.loads(str(said))
    except ValueError:
        return None


def check_classes(known, found, where):
    """UserError unless class numbers mean the same to the student and to some data."""
    if list(known) != list(found):
        raise UserError(f'{where}: its {len(found)} classes are not the {len(known)} the student was trained on, in that order')


def open_tokens(folder, structure, classes):
    """The held-out token files, if they are of this tokenizer and these classes; else UserError."""
    dataset = TokenDataset(folder, 'val')
    if dataset.meta['tokenizer'] != runtime.digest(structure.state_dict()):
        raise UserError(f'{folder}: these tokens come from another tokenizer; run encode.py again')
    check_classes(classes, dataset.classes, folder)
    return dataset


def main():
    dev = runtime.start(device)
    autocast, _ = runtime.precision(dtype, dev)
    chosen = choose_parts()
    tokenizer_file = tokenizer or os.path.join(os.path.dirname(init_from) if init_from else out_dir, 'tokenizer.pt')
    if vae and not data:
        raise UserError(f'--vae={vae}: published files do not say what they were trained on; give it as --data=DIR')
    student = None
    if vae or chosen == ['refocus'] or 'student' in chosen or ('samples' in chosen and not samples):
        structure, student, stage1, stage2 = load_deployed(out_dir, init_from, tokenizer, vae, patch_nums, dev)
    else:
        structure, _, stage1 = load_tokenizers(tokenizer_file, dev)
    data_name = data or stage1['config']['data']
    results = {'config': config, 'data': data_name, 'image_size': structure.image_size, 'versions': versions(),
               'device': torch.cuda.get_device_name(dev) if dev.type == 'cuda' else dev.type,
               'tokenizer_step': stage1['step'], 'tokenizer_digest': runtime.digest(structure.state_dict()), 'warnings': []}
    if student:
        results |= {'student_step': stage2['step'], 'student_digest': runtime.digest(student.state_dict())}

    if 'student' in chosen:
        folder = tokens or os.path.join(os.path.dirname(tokenizer_file), 'tokens')
        results['student'] = figures = student_figures(student, structure, open_tokens(folder, structure, stage2['classes']), autocast)
        runtime.say(f'student: {figures["ce"]:.3f} nats a token, {figures["bits_an_image"]:.0f} bits an image '
                    f'({figures["images"]} held-out images)\n  nats a token, for each token map: '
                    + ' '.join(f'{ce:.2f}' for ce in figures['ce_per_map']))
    if chosen == ['refocus']:
        images, _ = load_images(open_dataset(data_name, 'val', structure.image_size, augment=False), refocus_images)
        results['refocus'] = refocus_figures(student, structure, images, autocast)
        print_refocus(results['refocus'])
    if 'tokenizer' in chosen or 'samples' in chosen:
        datasets = {split: open_dataset(data_name, split, structure.image_size, augment=False) for split in ('train', 'val')}
        classes = datasets['train'].classes
        if student and not (vae and student.num_classes == len(classes)):       # published weights only number theirs
            check_classes(stage2['classes'], classes, data_name)
        real = {split: load_images(dataset, real_images) for split, dataset in datasets.items()}
        evaluate_pictures(chosen, structure, student, real, data_name, classes, autocast, dev, results)
    name = 'refocus.json' if chosen == ['refocus'] else 'results.json'
    runtime.write_json(os.path.join(out_dir, name), results)
    runtime.say(f'wrote {out_dir}/{name}')


def evaluate_pictures(chosen, structure, student, real, data_name, classes, autocast, dev, results):
    """The tokenizer's figures and all distances, printed and put into results. real: {split: (images, labels)}."""
    def warn(line):
        runtime.say(f'warning: {line}')
        results['warnings'].append(line)

    sets, count, moments = {'reference': real.get(reference)}, 0, None
    if reference not in real:
        images, moments = read_reference(reference, structure.image_size)
        sets['reference'] = images, None
    against = sets['reference'][0]
    weights_path, cnn = choose_distance(only_statistics=against is None), None
    known = [] if against is None else fingerprints(against)
    results['reference'] = {'name': reference, 'images': len(known), 'fingerprint': fingerprint(known),
                            'statistics_digest': runtime.digest(dict(zip(('mu', 'sigma'), moments))) if moments else None}

    if 'samples' in chosen:
        generated = read_samples(samples, structure.image_size, classes) if samples else generate(student, structure, autocast)
        sets['generated'], count = generated, len(generated[0])
        results['samples'] = {'images': count, 'fingerprint': fingerprint(fingerprints(generated[0])), 'made_with': made_with(samples)}

    if not weights_path:
        cnn, accuracy = load_or_train_cnn(real['train'], real['val'], data_name, classes, dev)
        results['cnn'] = {'accuracy': accuracy, 'digest': runtime.digest(cnn.state_dict())}
        runtime.say(f'CNN for FD-cnn: recognises {100 * accuracy:.1f} % of {len(real["val"][0])} held-out images')

    num_features = 2048 if weights_path else cnn.head.in_features
    if 'samples' in chosen:
        for line in check_samples(*generated, num_features, len(classes), known) + check_files(samples):
            warn(line)
    for line in [] if moments and weights_path else check_reference(len(known), num_features):
        warn(line)

    # fewer images have a larger distance by chance alone, so every row gets as many as there are samples
    images, labels = real['val']
    if 'tokenizer' in chosen:
        results['tokenizer'], decoded = tokenizer_figures(structure, images, autocast)
        runtime.say('tokenizer: PSNR {psnr:.2f} dB, SSIM {ssim:.3f} ({images} held-out images)'.format(**results['tokenizer'])
                    + '\n  perplexity of each token map: ' + ' '.join(f'{p:.0f}' for p in results['tokenizer']['perplexity']))
        some = spread(labels, count)
        sets |= {'reconstructed': (decoded[some], labels[some]), 'originals': (images[some], labels[some])}
    count = count or len(images)
    images, labels = real['train' if reference == 'val' else 'val']
    some = spread(labels, count)
    sets['real'] = images[some], labels[some]
    if len(some) < count:
        warn(f'only {len(some)} real images beside {count} samples: the floor is higher than the samples\' own would be')
    results['distances'] = compare(sets, weights_path, cnn, dev, moments)
    print_rows(results['distances'])


if __name__ == '__main__':
    runtime.run(main)
