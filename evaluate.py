"""Figures of a finished run: of the tokenizer, of the student, and of pictures it generates.

    python evaluate.py                                          # everything about out/, sampling as it goes
    python evaluate.py --out_dir=out-d16 --per_class=50 --dtype=auto
    python evaluate.py --parts=tokenizer                        # before there is a student
    python evaluate.py --samples=samples.npz                    # of sample.py or made elsewhere: .npz (arr_0), or a folder of PNGs
    python evaluate.py --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --distance=fid
    python evaluate.py --parts=tokenizer,samples --data=data/imagenet --vae=vae_ch160v4096z32.pth --init_from=var_d16.pth

tokenizer  PSNR and SSIM of held-out images, perplexity of every token map, distance of reconstructions
student    held-out cross-entropy in nats a token for every token map, bits an image
samples    FID, IS, precision and recall by torch-fidelity, when the Inception weights are on disk. Without them
           FD-cnn, the Fréchet distance between features of a small CNN trained here on the data: it compares runs on
           the same data, and must never be called FID. `recognised` is the share the CNN assigns to their class.

Every distance stands beside that of reconstructions (what the tokenizer alone costs) and of real images that are not
in the reference (the floor: what as many perfect samples would get). The reference is a split of the data, a folder, an
.npz of images, or one with mu and sigma, the published statistics of Inception's features over a whole training set: FID
is then measured to these, precision and recall to the images beside them, if there are any.
Samples are looked at first; a warning says what a flaw does to the figures. Prints tables; writes out_dir/results.json,
which holds all settings, versions and fingerprints (of weights, samples, reference) needed to get the figures again.
"""
import hashlib
import json
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from util import runtime
from util.checkpoint import digest, load_checkpoint, load_weights, save_checkpoint, write_json
from configurator import UserError, configure
from data import TokenDataset, balanced_labels, normalize, open_dataset, sample_generators, to_uint8
from util.metrics import SmallCNN, frechet_distance, look, psnr, share, ssim, statistics, torch_fidelity_metrics, train_cnn
from model import FVAR, held_out_loss, pictures_at_once
from published import load_deployed
from util.picture_sets import (check_files, check_reference, check_samples, fingerprint, fingerprints, load_arrays, load_images,
                          read_reference, read_samples, spread)
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
# distances
distance = 'auto'               # fid | cnn | auto: fid if the Inception weights are on disk, else cnn
inception_weights = 'weights/weights-inception-2015-12-05-6726825d.pth'  # torch hub's folder is looked in as well
cnn_file = ''                   # trained CNN (default: cnn.pt in out_dir); runs that share one can be compared
cnn_steps = 300                 # optimizer steps of the CNN
cnn_batch = 64                  # images a step
cnn_lr = 5e-3                   # peak learning rate
cnn_seed = 0                    # another one shows how much FD-cnn depends on the CNN
# system
batch_size = 0                  # images at a time; 0: 50, or as many as take 16 GiB
device = 'auto'                 # auto | cpu | cuda
dtype = 'float32'               # auto | float32 | bfloat16 | float16, of tokenizer and student; the CNN is float32
seed = 0                        # of the samples
config = configure(globals())

MOST = 50                       # images at a time where batch_size does not say


# -----------------------------------------------------------------------------
# what judges, and what is judged

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


def load_or_train_cnn(train, held_out, data_name, classes, dev):
    """(CNN, its held-out accuracy): from the file where that fits the data and the settings, else trained and saved.

    train, held_out: (images, labels).
    """
    path = cnn_file or f'{out_dir}/cnn.pt'
    settings = {'data': data_name, 'image_size': train[0].shape[-1], 'classes': classes, 'images': len(train[0]),
                'steps': cnn_steps, 'batch': cnn_batch, 'lr': cnn_lr, 'seed': cnn_seed}
    if os.path.isfile(path):
        saved = load_checkpoint(path, 'cnn')
        if saved['settings'] == settings:
            cnn = SmallCNN(len(classes)).to(dev, memory_format=torch.channels_last)
            load_weights(cnn, saved['cnn'], path)
            return cnn.eval(), saved['accuracy']
        runtime.say(f'{path} was trained on other data or with other settings: training it again, figures may shift')
    cnn = train_cnn(*train, len(classes), cnn_steps, cnn_batch, cnn_lr, device=dev, seed=cnn_seed,
                    augment=data_name.partition(':')[0] != 'charts')
    accuracy = share(look(cnn, held_out[0])[1] == held_out[1])
    save_checkpoint(path, {'kind': 'cnn', 'settings': settings, 'accuracy': accuracy, 'cnn': cnn.state_dict()})
    return cnn, accuracy


@torch.no_grad()
def generate(student, structure, autocast):
    """(images, labels): per_class samples of every class, those that sample.py --num_samples writes with the same seed."""
    labels = balanced_labels(student.num_classes, per_class * student.num_classes, seed)
    dev, images = student.head.weight.device, []
    with runtime.progress(len(labels), label='sample') as bar:
        for numbers in torch.arange(len(labels)).split(batch_size or pictures_at_once(student)):
            generators = sample_generators(seed, numbers)
            with autocast():
                _, drawn = student.generate(structure, runtime.to_device(labels[numbers], dev), cfg, top_k, top_p, generators)
            images.append(to_uint8(drawn).cpu())
            bar.update(len(numbers))
    return torch.cat(images), labels


# -----------------------------------------------------------------------------
# the parts

@torch.no_grad()
def tokenizer_metrics(structure, images, autocast):
    """(figures, reconstructions): PSNR (dB) and SSIM of uint8 images and what their tokens decode to; perplexity."""
    dev, sums, decoded = structure.quantizer.codebook.weight.device, np.zeros(2), []
    for part in images.split(batch_size or MOST):
        x = normalize(runtime.to_device(part, dev))
        with autocast():
            y = structure.decode(structure.encode(x)).float()
        sums += len(part) * np.array([psnr(y, x), ssim(y, x)])
        decoded.append(to_uint8(y).cpu())
    decibel, similarity = (sums / len(images)).tolist()
    return {'psnr': decibel, 'ssim': similarity, 'images': len(images),
            'perplexity': structure.quantizer.codebook.perplexity().tolist()}, torch.cat(decoded)


def student_metrics(student, structure, token_dataset, autocast):
    """held_out_loss of the student alone over all of a TokenDataset."""
    rows = torch.arange(len(token_dataset)).split(batch_size or pictures_at_once(student))
    batches = (token_dataset.batch(part.numpy()) for part in rows)
    loss = held_out_loss(FVAR(student), structure, batches, student.head.weight.device, autocast)
    return loss | {'images': len(token_dataset)}


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
                row |= torch_fidelity_metrics(sets[a][0], sets[b][0], weights_path, dev, batch_size or MOST, cache, (a, b),
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
        if part not in ('tokenizer', 'student', 'samples'):
            raise UserError(f'--parts={parts}: {part!r} is no part; give some of tokenizer,student,samples')
    if min(per_class, cnn_steps, cnn_batch) < 1 or real_images < 0:
        raise UserError('--per_class, --cnn_steps and --cnn_batch must be at least 1, '
                        '--real_images at least 0')
    if distance not in ('auto', 'fid', 'cnn'):
        raise UserError(f'--distance={distance}: choose auto, fid or cnn')
    if reference not in ('train', 'val') and not os.path.exists(reference):
        raise UserError(f'--reference={reference}: no such file; choose train, val, a folder of images, or an .npz of images or of '
                        f'statistics (mu, sigma)')
    if runtime.world_size() > 1:
        raise UserError('evaluate.py is one process: start it with python, not with torchrun')
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
    dataset = TokenDataset(folder, 'val', digest(structure.state_dict()))
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
    if vae or 'student' in chosen or ('samples' in chosen and not samples):
        structure, student, stage1, stage2 = load_deployed(out_dir, init_from, tokenizer, vae, patch_nums, dev)
    else:
        structure, _, stage1 = load_tokenizers(tokenizer_file, dev)
    data_name = data or stage1['config']['data']
    results = {'config': config, 'data': data_name, 'image_size': structure.image_size, 'versions': versions(),
               'device': torch.cuda.get_device_name(dev) if dev.type == 'cuda' else dev.type,
               'tokenizer_step': stage1['step'], 'tokenizer_digest': digest(structure.state_dict()), 'warnings': []}
    if student:
        results |= {'student_step': stage2['step'], 'student_digest': digest(student.state_dict())}

    if 'student' in chosen:
        folder = tokens or os.path.join(os.path.dirname(tokenizer_file), 'tokens')
        results['student'] = figures = student_metrics(student, structure, open_tokens(folder, structure, stage2['classes']), autocast)
        runtime.say(f'student: {figures["ce"]:.3f} nats a token, {figures["bits_per_image"]:.0f} bits an image '
                    f'({figures["images"]} held-out images)\n  nats a token, for each token map: '
                    + ' '.join(f'{ce:.2f}' for ce in figures['ce_per_map']))
    if 'tokenizer' in chosen or 'samples' in chosen:
        datasets = {split: open_dataset(data_name, split, structure.image_size, augment=False) for split in ('train', 'val')}
        classes = datasets['train'].classes
        if student and not (vae and student.num_classes == len(classes)):       # published weights only number theirs
            check_classes(stage2['classes'], classes, data_name)
        real = {split: load_images(dataset, real_images, workers) for split, dataset in datasets.items()}
        evaluate_pictures(chosen, structure, student, real, data_name, classes, autocast, dev, results)
    write_json(os.path.join(out_dir, 'results.json'), results)
    runtime.say(f'wrote {out_dir}/results.json')


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
                            'statistics_digest': digest(dict(zip(('mu', 'sigma'), moments))) if moments else None}

    if 'samples' in chosen:
        generated = read_samples(samples, structure.image_size, classes) if samples else generate(student, structure, autocast)
        sets['generated'], count = generated, len(generated[0])
        results['samples'] = {'images': count, 'fingerprint': fingerprint(fingerprints(generated[0])), 'made_with': made_with(samples)}

    if not weights_path:
        cnn, accuracy = load_or_train_cnn(real['train'], real['val'], data_name, classes, dev)
        results['cnn'] = {'accuracy': accuracy, 'digest': digest(cnn.state_dict())}
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
        results['tokenizer'], decoded = tokenizer_metrics(structure, images, autocast)
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
