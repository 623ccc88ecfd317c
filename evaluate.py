"""Measures a finished run: the tokenizer, the student, and the pictures it generates.

    python evaluate.py                                          # everything about out/, sampling on the fly
    python evaluate.py --out_dir=out-d16 --per_class=50 --dtype=auto
    python evaluate.py --parts=tokenizer                        # before there is a student
    python evaluate.py --samples=samples.npz                    # an .npz (arr_0) or a folder of PNGs
    python evaluate.py --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --distance=fid
    python evaluate.py --parts=tokenizer,samples --data=data/imagenet --vae=vae_ch160v4096z32.pth \\
        --init_from=var_d16.pth

tokenizer  PSNR and SSIM of held-out images, perplexity per token map, distance of the reconstructions
student    held-out cross-entropy per token map in nats per token, bits per image
samples    FID, IS, precision and recall by torch-fidelity if the Inception weights are on disk. Otherwise
           FD-cnn: the Fréchet distance between features of a small CNN that is trained here on the data. It
           compares runs on the same data and must never be called FID. `recognised` is the fraction of images
           that this CNN assigns to their class.

Each distance of samples is shown with that of reconstructions (the tokenizer's part of it) and of real
images outside the reference (the floor: what perfect samples would get). The reference is a split of the
data, a folder, or an .npz of images or of published statistics (mu and sigma of Inception features over a
training set). With statistics, FID is measured against these, and precision and recall against the images in
the same file, if any.

Samples are checked for flaws that would distort the metrics; a warning explains each. Prints all metrics and
writes them to out_dir/results.json, with the settings, versions and fingerprints needed to reproduce them.
"""
import hashlib
import json
import platform
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from configurator import UserError, configure
from data import TokenDataset, balanced_labels, normalize, open_dataset, to_uint8
from model import FVAR, held_out_loss, pictures_at_once
from published import load_deployed
from sample import generate_samples
from tokenizer import load_tokenizers
from util import runtime
from util.checkpoint import digest, load_checkpoint, load_weights, save_checkpoint, write_json
from util.metrics import (
    SmallCNN, cnn_statistics, frechet_distance, psnr, ssim, torch_fidelity_metrics, train_cnn)
from util.picture_sets import (
    check_count, check_samples, evenly_over_classes, fingerprint, load_arrays, load_images, read_reference,
    read_samples)

# input and output
out_dir = 'out'                 # folder of student.pt, and of results.json
parts = 'tokenizer,student,samples'  # what to measure
init_from = ''                  # student.pt (default: in out_dir), or with --vae a published transformer
tokenizer = ''                  # tokenizer.pt (default: next to student.pt)
vae = ''                        # a published VAR tokenizer instead
patch_nums = ()                 # token maps of published weights (default: read from them)
tokens = ''                     # folder with encode.py's token files (default: tokens next to tokenizer.pt)
# real images
data = ''                       # images (default: the tokenizer's training data)
reference = 'train'             # measure distances to: train | val | folder | .npz of images or statistics
real_images = 12_000            # at most this many per split, spread over the classes; 0: all
workers = 0                     # processes that decode the images of a folder
# generated images, with VAR's defaults
samples = ''                    # folder of PNGs (class folders or flat) or .npz (default: sample now)
per_class = 100                 # samples per class; published FIDs use 50 of each of 1000 classes
cfg = 1.5                       # guidance strength at the last token map, ramped up from 0; 0 turns it off
top_k = 900                     # keep the k most likely codes; 0 keeps all
top_p = 0.96                    # keep the most likely codes up to this total probability; 0 keeps all
# distances
distance = 'auto'               # fid | cnn | auto: fid if the Inception weights are on disk, else cnn
inception_weights = 'weights/weights-inception-2015-12-05-6726825d.pth'  # torch hub's folder is searched too
cnn_file = ''                   # trained CNN (default: cnn.pt in out_dir); share it to compare runs
cnn_steps = 300                 # optimizer steps of the CNN
cnn_batch = 64                  # images per step
cnn_lr = 5e-3                   # peak learning rate
cnn_seed = 0                    # another seed shows how much FD-cnn depends on the CNN
# system
batch_size = 0                  # images per batch; 0: 50, or as many as fit in 16 GiB
device = 'auto'                 # auto | cpu | cuda
dtype = 'float32'               # auto | float32 | bfloat16 | float16, for tokenizer and student, not the CNN
seed = 0                        # of the samples
config = configure(globals())


def check_settings():
    """Raises UserError for settings that make no sense."""
    if not set(parts.split(',')) <= {'tokenizer', 'student', 'samples'}:
        raise UserError(f'--parts={parts}: choose from tokenizer,student,samples')
    runtime.require_positive(config, 'per_class', 'cnn_steps', 'cnn_batch')
    if distance not in ('auto', 'fid', 'cnn'):
        raise UserError(f'--distance={distance}: choose auto, fid or cnn')
    if reference not in ('train', 'val') and not Path(reference).exists():
        raise UserError(f'--reference={reference}: no such file; choose train, val, a folder of images, '
                        f'or an .npz of images or statistics (mu, sigma)')
    if vae and not data:
        raise UserError(f'--vae={vae}: published weights do not name their training data; give --data=DIR')
    if runtime.world_size() > 1:
        raise UserError('evaluate.py runs as one process: start it with python, not with torchrun')


def check_classes(known, found, where):
    """Raises UserError unless class numbers mean the same to the student and to the data.

    Published weights only number their classes, so there the counts must agree.
    """
    if len(known) != len(found) if vae else known != found:
        raise UserError(f'{where}: its {len(found)} classes are not the {len(known)} that the student was '
                        f'trained on, in that order')


# -----------------------------------------------------------------------------
# what measures distances: Inception or the CNN

# its name ends in the first digits of its SHA-256
INCEPTION = ('https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/'
             'weights-inception-2015-12-05-6726825d.pth')


def find_inception():
    """Path of the Inception weights, or '' if they are not on disk.

    Raises UserError for a file with other weights: with those it would not be FID.
    """
    in_hub = f'{torch.hub.get_dir()}/checkpoints/{Path(INCEPTION).name}'
    for path in map(Path, (inception_weights, in_hub)):
        if path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest()[:8] not in INCEPTION:
                raise UserError(f'{path} is truncated or another file: '
                                f'download {INCEPTION} again, or use --distance=cnn')
            return path
    return ''


def choose_distance(only_statistics):
    """Path of the Inception weights for FID, or '' for FD-cnn; says why.

    only_statistics: the reference has no images. Raises UserError if that leaves nothing to measure with.
    """
    path = '' if distance == 'cnn' else find_inception()
    if path:
        return path
    remedy = f'put {INCEPTION} at {inception_weights}'
    if only_statistics:
        raise UserError(f'--reference={reference} holds statistics of Inception features, which FD-cnn '
                        f'cannot use: give images; or for FID, leave out --distance=cnn and {remedy}')
    if distance == 'fid':
        raise UserError(f'the Inception weights are not on disk: {remedy}')
    if distance == 'auto':
        runtime.say(f'no FID: the Inception weights are not on disk: {remedy}. '
                    'Using FD-cnn, which compares runs on the same data and is not FID.')
    return ''


def load_or_train_cnn(train, held_out, data_name, classes, dev):
    """The CNN behind FD-cnn and its held-out accuracy. train, held_out: (images, labels).

    It is read from its file if that was made from the same data with the same settings.
    """
    if len(classes) == 1:
        runtime.say('note: one class teaches the CNN nothing, so its features stay random')
    path = Path(cnn_file or f'{out_dir}/cnn.pt')
    settings = {
        'data': data_name, 'image_size': train[0].shape[-1], 'classes': classes,
        'images': fingerprint(train[0]),
        'steps': cnn_steps, 'batch': cnn_batch, 'lr': cnn_lr, 'seed': cnn_seed,
    }
    if path.is_file():
        saved = load_checkpoint(path, 'cnn')
        if saved['settings'] == settings:
            cnn = SmallCNN(len(classes)).to(dev, memory_format=torch.channels_last)
            load_weights(cnn, saved['cnn'], path)
            return cnn.eval(), saved['accuracy']
        runtime.say(f'{path} was trained on other data or with other settings: training it again, which '
                    f'may shift the metrics')
    cnn = train_cnn(
        *train, len(classes), cnn_steps, cnn_batch, cnn_lr,
        augment=data_name.split(':')[0] != 'charts', device=dev, seed=cnn_seed)
    _, accuracy = cnn_statistics(cnn, *held_out)
    save_checkpoint(path, {
        'kind': 'cnn', 'settings': settings, 'accuracy': accuracy, 'cnn': cnn.state_dict()})
    return cnn, accuracy


# -----------------------------------------------------------------------------
# metrics

def tokenizer_metrics(structure, images, autocast):
    """PSNR (dB) and SSIM of uint8 images, and training perplexity; then the reconstructions, uint8."""
    codebook = structure.quantizer.codebook
    psnr_sum, ssim_sum, decoded = 0.0, 0.0, []
    for batch in images.split(batch_size or 50):
        x = normalize(runtime.to_device(batch, codebook.weight.device))
        with autocast():
            y = structure.decode(structure.encode(x))
        psnr_sum += len(batch) * psnr(y, x)
        ssim_sum += len(batch) * ssim(y, x)
        decoded.append(to_uint8(y).cpu())
    metrics = {
        'psnr': psnr_sum / len(images), 'ssim': ssim_sum / len(images), 'images': len(images),
        'perplexity': codebook.perplexity().tolist(),
    }
    return metrics, torch.cat(decoded)


def student_metrics(student, structure, token_dataset, autocast):
    """held_out_loss of the student alone, over a whole TokenDataset."""
    rows = torch.arange(len(token_dataset)).split(batch_size or pictures_at_once(student))
    batches = (token_dataset.batch(part.numpy()) for part in rows)
    loss = held_out_loss(FVAR(student), structure, batches, student.head.weight.device, autocast)
    return loss | {'images': len(token_dataset)}


def generate(student, structure, autocast):
    """per_class samples of every class, as sample.py --num_samples writes them: (images, labels)."""
    labels = balanced_labels(student.num_classes, per_class * student.num_classes, seed)
    batches = torch.arange(len(labels)).split(batch_size or pictures_at_once(student))
    generated = generate_samples(
        structure, student, labels, batches, seed, autocast, cfg=cfg, top_k=top_k, top_p=top_p)
    return torch.cat([images for _, images in generated]), labels


def report(name, metrics):
    """Prints metrics on one line, by their names in results.json, and returns them."""
    def text(value):
        if isinstance(value, list):
            return ' '.join(map(text, value))
        return f'{value:.5g}' if isinstance(value, float) else str(value)

    runtime.say(f'{name}: ' + ', '.join(f'{key} {text(value)}' for key, value in metrics.items()))
    return metrics


# a set of images, and what it is measured against
PAIRS = [
    ('generated', 'reference'), ('reconstructed', 'reference'), ('reconstructed', 'originals'),
    ('real', 'reference')]


def compare(sets, weights_path, cnn, dev, moments):
    """Prints and returns a row of metrics for each of PAIRS in sets: {name: (images, labels or None)}.

    Measures by torch-fidelity if there is a weights_path, else by the CNN. moments: published statistics of
    the reference, or None.
    """
    if not weights_path:
        seen = {name: cnn_statistics(cnn, *pair) for name, pair in sets.items()}
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name, against in PAIRS:
            if name not in sets:
                continue
            images, others = sets[name][0], sets[against][0]
            if weights_path:
                published = moments if against == 'reference' else None
                metrics = torch_fidelity_metrics(
                    images, others, weights_path, cache, (name, against), published, dev, batch_size or 50)
            else:
                (moments1, accuracy), (moments2, _) = seen[name], seen[against]
                metrics = {'fd_cnn': frechet_distance(*moments1, *moments2), 'recognised': accuracy}
            counts = {'images': len(images), 'against_images': len(others) or None}
            row = report(f'{name} against {against}', counts | metrics)
            rows.append({'set': name, 'against': against} | row)
    return rows


# -----------------------------------------------------------------------------
# the run

def versions():
    """Versions of what the metrics depend on."""
    found = {'python': platform.python_version()}
    for package in ('torch', 'torch-fidelity', 'numpy', 'pillow'):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def made_with(path):
    """The settings that sample.py stored in an .npz; None for samples from elsewhere."""
    with suppress(UserError, KeyError, ValueError):
        return json.loads(str(load_arrays(path, ('made_with',))['made_with']))


def main():
    check_settings()
    dev = runtime.start(device)
    autocast, _ = runtime.precision(dtype, dev)

    # networks
    folder = Path(tokenizer or init_from or f'{out_dir}/student.pt').parent
    student = None
    if vae or 'student' in parts or 'samples' in parts and not samples:
        structure, student, stage1, stage2 = load_deployed(
            out_dir, init_from, tokenizer, vae, patch_nums, dev)
    else:
        structure, _, stage1 = load_tokenizers(tokenizer or folder / 'tokenizer.pt', dev)
    data_name = data or stage1['config']['data']
    results = {
        'config': config, 'data': data_name, 'image_size': structure.image_size, 'versions': versions(),
        'device': torch.cuda.get_device_name(dev) if dev.type == 'cuda' else dev.type,
        'tokenizer_step': stage1['step'], 'tokenizer_digest': digest(structure.state_dict()),
    }
    if student:
        results |= {'student_step': stage2['step'], 'student_digest': digest(student.state_dict())}

    if 'student' in parts:
        held_out = TokenDataset(tokens or folder / 'tokens', 'val', results['tokenizer_digest'])
        check_classes(stage2['classes'], held_out.classes, held_out.path)
        results['student'] = report('student', student_metrics(student, structure, held_out, autocast))
    if 'tokenizer' in parts or 'samples' in parts:
        datasets = {split: open_dataset(data_name, split, structure.image_size)
                    for split in ('train', 'val')}
        classes = datasets['train'].classes
        if student:
            check_classes(stage2['classes'], classes, data_name)
        real = {split: load_images(dataset, real_images, workers) for split, dataset in datasets.items()}
        results |= evaluate_pictures(structure, student, real, data_name, classes, autocast, dev)
    write_json(f'{out_dir}/results.json', results)
    runtime.say(f'wrote {out_dir}/results.json')


def evaluate_pictures(structure, student, real, data_name, classes, autocast, dev):
    """The part of the results about images: tokenizer and distances. real: {split: (images, labels)}."""
    # what distances are measured against
    if reference in real:
        against, moments = real[reference][0], None
    else:
        against, moments = read_reference(reference, structure.image_size)
    results = {'reference': {
        'name': reference, 'images': len(against), 'fingerprint': fingerprint(against),
        'statistics_digest': digest(dict(zip(('mu', 'sigma'), moments))) if moments else None,
    }}

    # what measures them
    weights_path = choose_distance(only_statistics=len(against) == 0)
    cnn, num_features = None, 2048
    if not weights_path:
        cnn, accuracy = load_or_train_cnn(*real.values(), data_name, classes, dev)
        num_features = cnn.head.in_features
        results['cnn'] = report('CNN for FD-cnn', {'accuracy': accuracy, 'digest': digest(cnn.state_dict())})

    # samples, and a floor of as many real images, because fewer have a larger distance by chance alone
    images, labels = real['val']
    count = len(images)
    sets = {'reference': (against, None)}
    warnings = []
    if not (moments and weights_path):
        warnings += check_count('reference images', len(against), num_features)
    if 'samples' in parts:
        if samples:
            generated = read_samples(samples, structure.image_size, classes)
        else:
            generated = generate(student, structure, autocast)
        sets['generated'] = generated
        count = len(generated[0])
        results['samples'] = {
            'images': count, 'fingerprint': fingerprint(generated[0]), 'made_with': made_with(samples)}
        warnings += check_samples(*generated, len(classes), against, samples)
        warnings += check_count('samples', count, num_features)
    floor_images, floor_labels = real['train' if reference == 'val' else 'val']
    chosen = evenly_over_classes(floor_labels, count)
    sets['real'] = floor_images[chosen], floor_labels[chosen]
    if len(chosen) < count:
        warnings.append(f'only {len(chosen)} real images for {count} samples: the floor is too high')
    for warning in warnings:
        runtime.say(f'warning: {warning}')
    results['warnings'] = warnings

    if 'tokenizer' in parts:
        metrics, decoded = tokenizer_metrics(structure, images, autocast)
        results['tokenizer'] = report('tokenizer', metrics)
        chosen = evenly_over_classes(labels, count)
        sets['reconstructed'] = decoded[chosen], labels[chosen]
        sets['originals'] = images[chosen], labels[chosen]
    results['distances'] = compare(sets, weights_path, cnn, dev, moments)
    return results


if __name__ == '__main__':
    runtime.run(main)
