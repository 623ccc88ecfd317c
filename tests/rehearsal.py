"""The protocol, rehearsed: every command of the README's real run, two ranks on the CPU, in minutes.

    python tests/rehearsal.py           # `make rehearsal`

The scripts run with their real configurations on a folder of JPEGs in data/imagenet, as torchrun starts them;
command lines only shrink what is large. All of it is switched on: LPIPS (the real networks; the numbers in
its files of weights are random here), the GAN, passes that add up their gradients, distillation, FSDP,
processes that decode pictures. Every long stage is sent SIGTERM on its way and resumed, and must end with the
very weights, log and token files of a run left alone.
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
from pathlib import Path

from chaos import HERE, assert_same     # first: it turns threads off, and lets the next ones be found
from data import TokenDataset
from util.charts import Charts
from util.checkpoint import read_log

import numpy as np
import torch
from PIL import Image
from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS
from torchvision.models import VGG16_Weights, vgg16

CLASSES, TRAIN, HELD_OUT, IMAGE_SIZE = 5, 12, 6, 32      # pictures of each class
COMMON = '--device=cpu --dtype=float32'
TRAINING = f'{COMMON} --batch_size=8 --warmup=4 --log_every=1'
TOKENIZER = f"""train_tokenizer.py config/tokenizer_256.py {TRAINING} --image_size=32 --patch_nums=1,2,3,4
    --channels=16 --channel_mult=1,1,1,1 --res_blocks=1 --vocab_size=64 --codebook_dim=8 --max_radius=24
    --alias_vocab_size=16 --alias_codebook_dim=4 --alias_channels=8 --gan_start=8 --gan_channels=16 --steps=24
    --grad_accum_steps=2 --reseed_every=4 --eval_every=10 --eval_images=8 --save_every=5 --workers=1"""
ENCODE = f'encode.py config/tokenizer_256.py {COMMON} --crops=2 --batch_size=1 --workers=1'
SMALL = f'{TRAINING} --depth=2 --embed_dim=64 --num_heads=2 --teacher_blocks=1 --eval_every=25 --save_every=6'
FVAR = f'train_fvar.py config/d16.py {SMALL} --steps=60'
FSDP = f'train_fvar.py config/d36_512.py {SMALL} --steps=30 --tokenizer=out-tokenizer_256/tokenizer.pt'
SAMPLE = f'sample.py config/d16.py {COMMON} --num_samples=50 --batch_size=5'
EVALUATE = f"""evaluate.py config/d16.py {COMMON} --parts=tokenizer,samples --samples=samples.npz
    --distance=cnn --cnn_steps=20 --workers=1"""


# -----------------------------------------------------------------------------
# what the scripts need

def draw_data():
    """Charts as a folder of JPEGs, a little larger than needed."""
    for split, each in (('train', TRAIN), ('val', HELD_OUT)):
        charts = Charts(split, IMAGE_SIZE + 9, each * len(Charts.classes))
        for i, (image, label) in enumerate(zip(charts.images, charts.labels.tolist())):
            if label < CLASSES:
                path = Path('data/imagenet', split, Charts.classes[label], f'{i:03}.jpg')
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=95)


def draw_weights():
    """The two files LPIPS is loaded from, with random numbers in them.

    Nobody looks at VGG's classifier, which is nearly all of it: every weight there is the same zero.
    """
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    folder.mkdir(parents=True)
    with torch.device('meta'):
        vgg = vgg16().state_dict()
    for name, weight in vgg.items():
        if name.startswith('features') and weight.dim() > 1:
            vgg[name] = torch.randn(weight.shape) * (2 / weight[0].numel()) ** 0.5
        else:
            vgg[name] = torch.zeros(()).expand(weight.shape)
    widths = 64, 128, 256, 512, 512
    lpips = {f'lin{i}.model.1.weight': torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    for url, weights in ((VGG16_Weights.IMAGENET1K_V1.url, vgg), (URL_VGG16_LPIPS, lpips)):
        torch.save(weights, folder / os.path.basename(url))


# -----------------------------------------------------------------------------
# commands

def start(line, ranks):
    """Starts a command line of the README on so many ranks; what it prints goes to printed.txt."""
    script, *arguments = (str(HERE / word) if word.startswith('config/') else word for word in line.split())
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] * (ranks > 1)
    with open('printed.txt', 'a', encoding='utf-8') as printed:
        print(f'\n$ {line}', file=printed, flush=True)
        return subprocess.Popen([sys.executable, *torchrun, HERE / script, *arguments],
                                stdout=printed, stderr=subprocess.STDOUT)


def status(job):
    """What a command ends with; one that takes longer than ten minutes is stopped."""
    try:
        return job.wait(600)
    finally:
        job.terminate()


def run(line, ranks=2):
    assert status(start(line, ranks)) == 0, f'failed: {line}'


def interrupt(line, arrived):
    """Starts a command on two ranks, sends it SIGTERM once arrived() is true, and returns what it printed."""
    job = start(line, ranks=2)
    while not arrived():
        assert job.poll() is None, f'ended before it could be interrupted: {line}'
        time.sleep(0.005)
    job.send_signal(signal.SIGTERM)
    assert status(job) != 0, f'was done before it could be interrupted: {line}'
    return Path('printed.txt').read_text(encoding='utf-8').rpartition('\n$ ')[2]


def at_step(log, step):
    return lambda: any(record['step'] >= step for record in read_log(log))


# -----------------------------------------------------------------------------
# the stages

def train(line, out_dir, name, stops):
    """Trains without interruption in whole-OUT_DIR, and with some soon after these steps in OUT_DIR.

    The two must end alike. Returns the records of the log that are of training steps.
    """
    run(f'{line} --out_dir=whole-{out_dir}')
    log = Path(out_dir, f'{name}.jsonl')
    for resumed, step in enumerate(stops):
        printed = interrupt(f'{line} --init_from=resume' if resumed else line, at_step(log, step))
        assert 'stopped by SIGTERM after step' in printed, printed
        saved = torch.load(Path(out_dir, f'{name}_state.pt'), weights_only=True)['step']
        assert saved > step and saved == read_log(log)[-1]['step'] + 1, f'saved after step {saved}'
    run(f'{line} --init_from=resume')
    assert_same_training(f'whole-{out_dir}', out_dir, name)
    records = [record for record in read_log(log) if 'lr' in record]
    assert all(None not in record.values() for record in records), 'a number was not finite'
    assert all(record['images_per_second'] > 0 and record['mfu'] > 0 for record in records)
    assert records[-1]['skipped'] == 0
    return records


def assert_same_training(whole, interrupted, name):
    """Two runs have the same checkpoints and logs, but for settings (where they lie) and the clock."""
    def checkpoint(folder, file):
        found = torch.load(Path(folder, file), weights_only=True)
        for group in found.get('optimizer', {}).get('param_groups', ()):
            group['betas'] = tuple(group['betas'])          # FSDP's way of loading makes a list of it
        return {key: value for key, value in found.items() if key != 'config'}

    def log(folder):
        return [{key: value for key, value in record.items() if key not in ('images_per_second', 'mfu')}
                for record in read_log(Path(folder, f'{name}.jsonl'))]

    for file in ('tokenizer.pt' if name == 'tokenizer' else 'student.pt', f'{name}_state.pt'):
        assert_same(checkpoint(whole, file), checkpoint(interrupted, file), file)
    assert_same(log(whole), log(interrupted), f'{name}.jsonl')


def train_tokenizer():
    """Interrupted before the GAN joins, and after."""
    records = train(TOKENIZER, 'out-tokenizer_256', 'tokenizer', stops=(3, 14))
    assert len(records) == 24 and all(record['lpips'] > 0 and record['focus'] > 0 for record in records)
    for term in ('gan', 'discriminator'):
        assert [record['step'] for record in records if term in record] == list(range(8, 24)), term


def encode():
    """Token files; the interruption comes when there are some rows of them."""
    tokens, rows = Path('out-tokenizer_256/tokens'), 2 * CLASSES * TRAIN
    partial, columns = tokens / 'train.partial', (1 + 4 + 9 + 16) + (1 + 4 + 9) + 1

    def done():
        if not Path(f'{partial}.json').is_file():           # written when every row has its mark of "not yet"
            return 0
        return int((np.fromfile(partial, np.uint16).reshape(rows, columns)[:, -1] < CLASSES).sum())

    run(f'{ENCODE} --out_dir=whole-out-tokenizer_256')
    interrupt(ENCODE, lambda: done() >= 10)
    assert 10 <= done() < rows
    run(ENCODE)
    for split, each in (('train', 2 * TRAIN), ('val', HELD_OUT)):
        dataset = TokenDataset(tokens, split)
        assert dataset.batch(range(len(dataset)))[2].bincount().tolist() == [each] * CLASSES
        for file in (f'{split}.bin', f'{split}.json'):
            assert (tokens / file).read_bytes() == Path(f'whole-{tokens}', file).read_bytes(), file


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
    assert np.array_equal(two['arr_0'], one['arr_0']) and np.array_equal(two['arr_1'], one['arr_1'])


def evaluate():
    run(EVALUATE, ranks=1)
    rows = json.loads(Path('out-d16/results.json').read_text(encoding='utf-8'))['distances']
    assert {row['set'] for row in rows} == {'generated', 'reconstructed', 'real'}
    assert all(math.isfinite(row['fd_cnn']) for row in rows)


STAGES = {
    'pictures': draw_data,
    'stand-ins for the weights of LPIPS': draw_weights,
    'tokenizers, stopped before and after the GAN joined: resumed, the same bit for bit': train_tokenizer,
    'token files, stopped: given again, the same byte for byte': encode,
    'student and teacher, stopped: resumed, the same bit for bit': train_fvar,
    'as d36_512 has it, FSDP and recomputing, stopped: resumed, the same bit for bit': train_sharded,
    'samples: the same from two processes and from one': sample,
    'evaluation: finite distances': evaluate,
}


def main():
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix='rehearsal-'))
    os.chdir(folder)
    os.environ['TORCH_HOME'] = str(folder / 'torch')
    try:
        for name, function in STAGES.items():
            stage_began = time.monotonic()
            function()
            print(f'{name} ({time.monotonic() - stage_began:.0f} s)', flush=True)
    except BaseException:
        print(f'failed: {folder} is kept; printed.txt there holds what the scripts said', file=sys.stderr)
        raise
    os.chdir(HERE)
    shutil.rmtree(folder)
    print(f'rehearsed: the whole protocol on two ranks, in {time.monotonic() - began:.0f} s')


if __name__ == '__main__':
    main()
