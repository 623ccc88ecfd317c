"""The protocol, rehearsed: every command of the README's real run, two ranks on the CPU, in minutes.

    python tests/rehearsal.py           # `make rehearsal`

The scripts run with their real configurations on a folder of JPEGs in data/imagenet, as torchrun starts them; the command
lines only shrink what is large. All of it is switched on: LPIPS (the real networks, whose two files of weights are random
numbers here), the GAN, passes that add up their gradients, distillation, FSDP, processes that decode pictures. Every long
stage is sent SIGTERM on its way and resumed, and must end with the very weights, log and token files of a run left alone.
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from chaos import HERE, assert_same     # it comes first: it turns threads off and lets the following be found
from data import Charts, TokenDataset
from runtime import read_log

import numpy as np
import torch
from PIL import Image
from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS
from torchvision.models import VGG16_Weights, vgg16

CLASSES, IMAGE_SIZE = 5, 32
COMMON = '--device=cpu --dtype=float32'
TRAINING = f'{COMMON} --batch_size=8 --warmup=4 --log_every=1'
TOKENIZER = ('train_tokenizer.py config/tokenizer_256.py --image_size=32 --patch_nums=1,2,3,4 --channels=16 --channel_mult=1,1,1,1 '
             '--res_blocks=1 --vocab_size=64 --code_width=8 --alias_vocab_size=16 --alias_code_width=4 --alias_channels=8 '
             '--max_radius=24 --gan_start=8 --gan_channels=16 --grad_accum_steps=2 --steps=24 --reseed_every=4 --eval_every=10 '
             f'--eval_images=8 --save_every=5 --workers=1 {TRAINING}')
ENCODE = f'encode.py config/tokenizer_256.py --crops=2 --batch_size=1 --workers=1 {COMMON}'
SMALL = f'--depth=2 --width=64 --num_heads=2 --teacher_blocks=1 --eval_every=25 --save_every=6 {TRAINING}'
FVAR = f'train_fvar.py config/d16.py --steps=60 {SMALL}'
FSDP = f'train_fvar.py config/d36_512.py --tokenizer=out-tokenizer_256/tokenizer.pt --steps=30 {SMALL}'
SAMPLE = f'sample.py config/d16.py --num_samples=50 --batch_size=5 {COMMON}'
EVALUATE = 'evaluate.py config/d16.py --samples=samples.npz --parts=tokenizer,samples --distance=cnn --cnn_steps=20 --workers=1 ' + COMMON


# -----------------------------------------------------------------------------
# what the scripts need

def draw_data(folder):
    """Charts as a folder of JPEGs, a dozen of each class to train on and half of that held out; a little larger than needed."""
    for split, each in (('train', 12), ('val', 6)):
        charts = Charts(split, IMAGE_SIZE + 9, each * len(Charts.classes))
        for i, (image, label) in enumerate(zip(charts.images, charts.labels.tolist())):
            if label < CLASSES:
                path = folder / split / Charts.classes[label] / f'{i:03}.jpg'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=95)


def draw_weights(folder):
    """The two files LPIPS is loaded from, with random numbers in them. Of VGG it uses the features alone; the rest is one zero."""
    folder.mkdir(parents=True)
    with torch.device('meta'):
        vgg = vgg16().state_dict()
    for name, weight in vgg.items():
        if name.startswith('features') and weight.dim() > 1:
            vgg[name] = torch.randn(weight.shape) * (2 / weight[0].numel()) ** 0.5
        else:
            vgg[name] = torch.zeros(()).expand(weight.shape)
    lpips = {f'lin{i}.model.1.weight': torch.rand(1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    for url, weights in ((VGG16_Weights.IMAGENET1K_V1.url, vgg), (URL_VGG16_LPIPS, lpips)):
        torch.save(weights, folder / os.path.basename(url))


# -----------------------------------------------------------------------------
# commands

def start(line, ranks=2):
    """Starts a command line of the README; what it prints goes to printed.txt."""
    script, *arguments = (str(HERE / word) if word.startswith('config/') else word for word in line.split())
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
    with open('printed.txt', 'a', encoding='utf-8') as printed:
        print(f'\n$ {line}', file=printed, flush=True)
        return subprocess.Popen([sys.executable, *torchrun, str(HERE / script), *arguments], stdout=printed, stderr=printed)


def run(line, ranks=2):
    assert start(line, ranks).wait(600) == 0, f'failed: {line}'


def interrupt(line, arrived):
    """Runs a command until arrived() is true, then sends it SIGTERM. Returns what it printed in all."""
    job = start(line)
    while not arrived():
        assert job.poll() is None, f'ended before it could be interrupted: {line}'
        time.sleep(0.005)
    job.send_signal(signal.SIGTERM)
    assert job.wait(600) != 0, f'was done before it was interrupted: {line}'
    return Path('printed.txt').read_text(encoding='utf-8').rpartition('\n$ ')[2]


def at_step(log, step):
    return lambda: any(record['step'] >= step for record in read_log(log))


@contextmanager
def stage(name):
    """Says how many seconds a stage took."""
    began = time.monotonic()
    yield
    print(f'{name}: {time.monotonic() - began:.0f} s', flush=True)


# -----------------------------------------------------------------------------
# the stages

def train(line, out_dir, name, stops):
    """Trains once without and once with interruptions after these steps, in whole-OUT_DIR and OUT_DIR. Returns the log."""
    run(f'{line} --out_dir=whole-{out_dir}')
    log = Path(out_dir, f'{name}.jsonl')
    for resumed, step in enumerate(stops):
        printed = interrupt(f'{line} --init_from=resume' if resumed else line, at_step(log, step))
        assert 'stopped by SIGTERM after step' in printed, printed
        saved = torch.load(Path(out_dir, f'{name}_state.pt'), weights_only=True)['step']
        assert saved > step and saved == read_log(log)[-1]['step'] + 1, f'step {saved}, interrupted after step {step}'
    run(f'{line} --init_from=resume')
    assert_same_training(f'whole-{out_dir}', out_dir, name)
    records = [record for record in read_log(log) if 'lr' in record]
    assert all(math.isfinite(value) for record in records for value in record.values() if not isinstance(value, list))
    assert records[-1]['skipped'] == 0 and all(record['images_per_second'] > 0 and record['mfu'] > 0 for record in records)
    return records


def assert_same_training(whole, interrupted, name):
    """Two runs have the same checkpoints and logs; settings that say where they lie, and the clock, are left out."""
    for file in ('tokenizer.pt' if name == 'tokenizer' else 'student.pt', f'{name}_state.pt'):
        found = [torch.load(Path(folder, file), weights_only=True) for folder in (whole, interrupted)]
        for checkpoint in found:
            del checkpoint['config']
        assert_same(*found, file)
    logs = [[{key: value for key, value in record.items() if key not in ('images_per_second', 'mfu')}
             for record in read_log(Path(folder, f'{name}.jsonl'))] for folder in (whole, interrupted)]
    assert_same(*logs, name)


def train_tokenizer():
    records = train(TOKENIZER, 'out-tokenizer_256', 'tokenizer', stops=(3, 14))     # before the GAN joins, and after
    assert len(records) == 24
    assert all(record['lpips'] > 0 and record['focus'] > 0 for record in records)
    for term in ('gan', 'discriminator'):
        assert [record['step'] for record in records if term in record] == list(range(8, 24)), term


def encode():
    """Token files, interrupted in the midst of them."""
    tokens, pictures = Path('out-tokenizer_256/tokens'), CLASSES * 12
    partial, columns = tokens / 'train.partial', 1 + 4 + 9 + 16 + 1 + 4 + 9 + 1

    def done():
        size = partial.stat().st_size if partial.is_file() else 0
        rows = np.fromfile(partial, np.uint16).reshape(-1, columns) if size == 2 * pictures * 2 * columns else np.empty((0, 1))
        return int((rows[:, -1] < CLASSES).sum())

    run(f'{ENCODE} --out_dir=whole-out-tokenizer_256')
    interrupt(ENCODE, lambda: (tokens / 'train.partial.json').is_file() and done() >= 10)
    assert 10 <= done() < 2 * pictures and not (tokens / 'train.bin').exists()
    run(ENCODE)
    for split, rows in (('train', 2 * pictures), ('val', CLASSES * 6)):
        dataset = TokenDataset(tokens, split)
        assert len(dataset) == rows and dataset.batch(range(rows))[2].bincount().tolist() == [rows // CLASSES] * CLASSES
        for name in (f'{split}.bin', f'{split}.json'):
            assert (tokens / name).read_bytes() == Path('whole-out-tokenizer_256/tokens', name).read_bytes(), name


def train_fvar():
    records = train(FVAR, 'out-d16', 'fvar', stops=(13,))
    assert len(records) == 60 and all(record['teacher_ce'] > 0 and 'kl' in record for record in records)


def train_sharded():
    records = train(FSDP, 'out-d36_512', 'fvar', stops=(7,))
    config = torch.load('out-d36_512/fvar_state.pt', weights_only=True)['config']
    assert len(records) == 30 and config['fsdp'] and config['grad_checkpoint'] and config['shared_aln']


def sample():
    """The same samples from two processes and from one."""
    run(f'{SAMPLE} --out=samples.npz')
    run(f'{SAMPLE} --out=alone.npz', ranks=1)
    two, one = (np.load(name) for name in ('samples.npz', 'alone.npz'))
    assert two['arr_0'].shape == (50, IMAGE_SIZE, IMAGE_SIZE, 3) and two['arr_0'].std() > 0
    assert two['arr_0'].tobytes() == one['arr_0'].tobytes() and two['arr_1'].tobytes() == one['arr_1'].tobytes()


def evaluate():
    run(EVALUATE, ranks=1)
    rows = json.loads(Path('out-d16/results.json').read_text(encoding='utf-8'))['distances']
    assert {row['set'] for row in rows} == {'generated', 'reconstructed', 'real'}
    assert all(math.isfinite(row['fd_cnn']) for row in rows)


def main():
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix='rehearsal-'))
    os.chdir(folder)
    os.environ['TORCH_HOME'] = str(folder / 'torch')
    try:
        with stage('pictures, and stand-ins for the weights of LPIPS'):
            draw_data(folder / 'data' / 'imagenet')
            draw_weights(folder / 'torch' / 'hub' / 'checkpoints')
        with stage('tokenizers: stopped before and after the GAN joined, resumed, the same bit for bit'):
            train_tokenizer()
        with stage('token files: stopped, given again, the same byte for byte'):
            encode()
        with stage('student and teacher: stopped, resumed, the same bit for bit'):
            train_fvar()
        with stage('with FSDP, recomputing: stopped, resumed, the same bit for bit'):
            train_sharded()
        with stage('samples: the same bytes from two processes and from one'):
            sample()
        with stage('evaluation'):
            evaluate()
    except BaseException:
        print(f'failed: {folder} is kept; printed.txt there holds what the scripts said', file=sys.stderr)
        raise
    os.chdir(HERE)
    shutil.rmtree(folder)
    print(f'rehearsed: the whole protocol on two ranks, in {time.monotonic() - began:.0f} s')


if __name__ == '__main__':
    main()
