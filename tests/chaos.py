"""Kills every long stage with SIGKILL at random moments, gives the same command again until it finishes, and compares.

    python tests/chaos.py               # `make chaos`: 24 kills of single processes, 2 of an ablation, 2 of one of two ranks, a SIGTERM
    python tests/chaos.py --kills=1     # of each stage, nothing else: what tests/test_chaos.py runs

Weights, optimizers, logs (but for the speed in them), token files and pictures must equal those of an uninterrupted run bit for
bit, and no other file may be left; of the ablation, its results. A stage is forked from this process, which has imported torch:
what is killed is what a command line starts, without the seconds of the import and of counting. Two ranks are real commands,
torchrun --max-restarts.
"""
import os

os.environ['OMP_NUM_THREADS'] = '1'                         # threads would not survive the fork
import argparse
import json
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo                                        # else every training would, which takes seconds
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from util import training
from util.charts import Charts
from util.checkpoint import read_log

# every stage as its command line; small, but with warm start, dead codes, GAN, stochastic depth, teacher, random crops and noise
TRAINING = '--init_from=auto --device=cpu --dtype=float32 --warmup=2 --eval_every=7 --save_every=5 --log_every=1'
STAGES = {
    'train_tokenizer': f'{TRAINING} --steps=25 --image_size=24 --patch_nums=2,3,6 --channels=8 --channel_mult=1,1,1 --vocab_size=32 '
                       '--codebook_dim=8 --alias_vocab_size=16 --alias_codebook_dim=4 --warm_start=3 --batch_size=4 --reseed_every=4 '
                       '--eval_images=8 --lambda_gan=0.5 --gan_start=2 --gan_channels=8',
    'encode': '--batch_size=2 --crops=4 --device=cpu --dtype=float32',
    'train_fvar': f'{TRAINING} --steps=60 --depth=2 --embed_dim=32 --num_heads=2 --drop_path=0.2 --distill_warmup=4 --batch_size=8 '
                  '--eval_pictures=20',
    'sample': '--num_samples=60 --batch_size=2 --device=cpu',
    'ablation': '--rows=var,full --seeds=1 --tokenizer_steps=4 --steps=4 --results=out/results.json',
}

ABLATION = '''
if script == 'train_tokenizer':
    image_size, patch_nums, channels, channel_mult, res_blocks, vocab_size, codebook_dim = 12, (1, 2, 3), 8, (1, 1, 1), 1, 16, 4
    alias_vocab_size, alias_channels, max_radius, batch_size, eval_images = 16, 8, 60.0, 8, 8
if script == 'train_fvar':
    depth, embed_dim, num_heads, teacher_blocks, batch_size, eval_pictures = 2, 16, 2, 1, 8, 20
if script == 'evaluate':
    per_class, cnn_steps, cnn_batch, distance = 3, 3, 16, 'cnn'
'''


def command(stage, data):
    own_data = [] if stage in ('train_fvar', 'sample') else [f'--data={data}']
    if stage == 'ablation':
        own_data.append(f'--base={data / "ablation.py"}')
    config = [] if stage == 'ablation' else [str(HERE / 'config' / 'charts.py')]
    return [str(HERE / f'{stage}.py'), *config, '--out_dir=out', *own_data, *STAGES[stage].split()]


def without_counting():
    """Counting FLOPs and measuring the peak take seconds at the start of a run, in which there is nothing to lose."""
    training.count_flops, training.measured_peak = lambda function: 1, lambda device, autocast: 1e12


def draw_data(folder, image_size=27):
    """Charts of four classes as a folder of pictures, 12 each to train on and 5 held out."""
    for split, count in (('train', 120), ('val', 50)):
        charts = Charts(split, image_size, count)
        for i, (image, label) in enumerate(zip(charts.images, charts.labels.tolist())):
            if label < 4:
                path = folder / split / Charts.classes[label] / f'{i:03}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def start(stage, data, folder):
    """The process number of a stage that has just been started in a folder; what it prints goes to STAGE.txt there."""
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(folder)
        printed = os.open(f'{stage}.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.argv = command(stage, data)
        if stage == 'ablation':                             # python -m experiments.ablation
            runpy.run_module('experiments.ablation', run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name='__main__')
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def ended(child, seconds):
    """Whether a process ends within some seconds by itself; it must do so well."""
    limit = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert status == 0, f'a stage failed, status {status}: see what it printed'
            return True
        if time.monotonic() >= limit:
            return False
        time.sleep(0.002)


def assert_same(a, b, where):
    """Two values are equal, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b) and (not isinstance(a, dict) or a.keys() == b.keys()), where
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key], f'{where}/{key}')
    else:
        assert a == b, f'{where}: {a!r} or {b!r}'


def without_speed(log):
    """The records of a log, in order, but for what the clock decides."""
    def kept(record):
        return {name: value for name, value in record.items() if name not in ('images_per_second', 'mfu')}
    return [json.dumps(kept(json.loads(line))) for line in log.read_text().splitlines()]


def assert_same_files(whole, killed):
    """Two folders hold the same files. Checkpoints may differ in how equal strings are shared, logs in speed, in nothing else."""
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()) for folder in (whole, killed)]
    assert names[0] == names[1], f'{names[0]} or {names[1]}'
    for name in names[0]:
        if '.pt' in name:
            assert_same(*(torch.load(folder / name, weights_only=True) for folder in (whole, killed)), name)
        elif name.endswith('.jsonl'):
            assert without_speed(whole / name) == without_speed(killed / name), name
        else:
            assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def assert_same_results(whole, killed):
    """Two ablations found the same."""
    found = [json.loads((folder / 'results.json').read_text()) for folder in (whole, killed)]
    assert found[0] == found[1] and len(found[0]['runs']) == 2


def kill_stage(stage, data, folder, kills, moments, compare=assert_same_files):
    """Runs a stage in folder/whole without, in folder/killed with that many kills. Returns how many there were."""
    whole, killed = folder / 'whole', folder / 'killed'
    shutil.copytree(whole, before := folder / f'before-{stage}')
    began, done = time.monotonic(), 0
    ended(start(stage, data, whole), 600)
    duration = time.monotonic() - began
    while done < kills:                                     # once more from the start, if it was too quick for all of them
        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(before, killed)
        while True:
            child, wait = start(stage, data, killed), moments.uniform(0, duration * (0.9 if kills == 1 else 0.6))
            if ended(child, wait if done < kills else 600):
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
            print(f'kill {done} of {stage}, {wait:.2f} s after its start', flush=True)
        compare(whole / 'out', killed / 'out')
    print(f'{stage}: {kills} kills, nothing lost ({duration:.1f} s uninterrupted)', flush=True)
    return kills


def torchrun(stage, data, folder, ranks=2):
    folder.mkdir(exist_ok=True)
    arguments = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', '--max-restarts=3', *command(stage, data)]
    return subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=open(folder / 'torchrun.txt', 'a'))


def wait_for_step(folder, step, job):
    while not any(record['step'] >= step for record in read_log(folder / 'out' / 'fvar.jsonl')):
        assert job.poll() is None, f'ended too early: see {folder}/torchrun.txt'
        time.sleep(0.005)


def ranks_of(job):
    """Process numbers of the ranks of a torchrun, by Linux's /proc."""
    children = Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split()
    return [int(child) for child in children if b'train_fvar' in Path(f'/proc/{child}/cmdline').read_bytes()]


def kill_a_rank(data, folder, moments):
    """Two ranks; one of them is killed, twice; then a run that SIGTERM stops is finished by a single process. Returns kills."""
    ready = folder / 'before-train_fvar'
    for name in ('two', 'two-killed', 'two-stopped'):
        shutil.copytree(ready, folder / name)
    assert torchrun('train_fvar', data, folder / 'two').wait(600) == 0

    job = torchrun('train_fvar', data, folder / 'two-killed')
    for number, (first, last) in enumerate(((3, 25), (35, 50)), start=1):
        step, rank = moments.randint(first, last), moments.randrange(2)
        wait_for_step(folder / 'two-killed', step, job)
        os.kill(ranks_of(job)[rank], signal.SIGKILL)
        print(f'kill {number} of rank {rank} of 2, soon after step {step}', flush=True)
    assert job.wait(600) == 0
    assert_same_files(folder / 'two' / 'out', folder / 'two-killed' / 'out')

    job = torchrun('train_fvar', data, folder / 'two-stopped')
    wait_for_step(folder / 'two-stopped', 17, job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(600) != 0
    step = torch.load(folder / 'two-stopped' / 'out' / 'fvar_state.pt', weights_only=True)['step']
    ended(start('train_fvar', data, folder / 'two-stopped'), 600)
    logs = [[json.loads(line) for line in without_speed(folder / name / 'out' / 'fvar.jsonl')] for name in ('two', 'two-stopped')]
    assert [r['step'] for r in logs[0]] == [r['step'] for r in logs[1]] and logs[0][:step] == logs[1][:step]
    assert all(abs(a['ce'] - b['ce']) < 1e-3 for a, b in zip(*logs) if 'ce' in a)
    print(f'two ranks: 2 kills, nothing lost; stopped by SIGTERM after step {step}, finished by one process', flush=True)
    return 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, help='of each stage; then without two ranks')
    parser.add_argument('--seed', type=int, default=random.randrange(10 ** 6), help='of the moments')
    options = parser.parse_args()
    if options.kills:                                       # short: fewer steps between them, too
        for stage in ('train_tokenizer', 'train_fvar'):
            STAGES[stage] += ' --steps=13'
        STAGES['encode'] += ' --crops=1'
    torch.set_num_threads(1)
    without_counting()
    print(f'moments by --seed={options.seed}')
    moments = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix='chaos-'))
    (folder / 'whole').mkdir()
    draw_data(folder / 'data')
    (folder / 'data' / 'ablation.py').write_text(ABLATION)
    kills = sum(kill_stage(stage, folder / 'data', folder, options.kills or 6, moments) for stage in STAGES if stage != 'ablation')
    if options.kills is None:
        kills += kill_stage('ablation', folder / 'data', folder, 2, moments, assert_same_results)
        kills += kill_a_rank(folder / 'data', folder, moments)
    shutil.rmtree(folder)                                   # kept, to be looked at, when anything was lost
    print(f'{kills} kills, nothing lost')


if __name__ == '__main__':
    main()
