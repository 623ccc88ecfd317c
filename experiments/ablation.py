"""Tables 3 and 4 of the paper at desk scale: one budget for all rows, several seeds, and one CNN for FD-cnn.

    python -m experiments.ablation --processes=2    # everything; the same command continues after a stop
    python -m experiments.ablation --rows=var,full --seeds=2 --steps=400 --minutes=30 --results=quick.json
    python -m experiments.ablation --data=DIR --vocab_size=1024 --tokenizer_steps=1200 --cnn_steps=2000 \\
        --out_dir=out-ablation-photos --results=results/ablation_photos.json    # photographs
    python -m experiments.ablation --figures        # pictures of VAR and FVAR beside the results

Each row and seed trains tokenizers, encodes the data, trains a student, and evaluates it under three sampling
settings. Every stage runs in a folder named after its own settings and those of the stages before it. So rows
with the same stage 1 share it, and a changed setting repeats only what depends on it. SCRIPT.done marks a
finished stage; SCRIPT.log holds its output.

All rows start from config/desk.py and the settings below; config/ablation/ and VARIATIONS change them.
"""
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

import encode
import evaluate
import train_fvar
import train_tokenizer
from configurator import HERE, UserError, configure, parse_value, read_config_file
from data import normalize, open_dataset, sample_generators
from published import load_deployed
from util import runtime
from util.checkpoint import read_json, write_json
from util.picture_sets import load_images
from util.pictures import picture_grid, save_png

# input and output
out_dir = 'out-ablation'        # folder for tokenizers, token files, students and evaluations
results = 'results/ablation_charts.json'    # one entry per row and seed; one file per budget
data = 'charts:4000'            # 4000 training charts, or a folder with train/CLASS/*.jpg and val/CLASS/*.jpg
base = 'config/desk.py'         # network sizes and learning rates of all rows
rows = ''                       # a selection, for example var,full,focus_schedule=states (default: all)
# the budget of every row
seeds = 3                       # number of seeds: 0, 1, … seed the tokenizers, the student and its samples
tokenizer_steps = 700           # steps of stage 1; the first third is the warm start
steps = 1200                    # steps of stage 2; distillation ramps up over the first two thirds
vocab_size = 128                # codes of Q_L; use 1024 for photographs
cnn_steps = 150                 # training steps of the CNN behind FD-cnn; use 2000 for photographs
# scheduling
minutes = 0.0                   # start no new stage after this many minutes; 0: no limit
processes = 1                   # stages that run at the same time, each on one thread
# output instead of training
figures = False                 # draw the figures
config = configure(globals())

# Table 3, and Table 4, which has the same rows at 1024 pixels: files in config/ablation
TABLE_3 = {
    'var': 'VAR (baseline)',
    'full': 'FVAR (full)',
    'no_refocusing': 'w/o progressive refocusing',
    'gaussian': 'w/ Gaussian blur',
    'no_teacher': 'w/o high-frequency teacher',
    'no_dual': 'w/o dual tokenizers'
}
# one setting of the full row takes another value
VARIATIONS = {
    'focus_input=view': 'views encoded (Eq. 3)',
    'focus_schedule=states': 'schedule "states"',
    'focus_schedule=cosine': 'schedule "cosine"',
    'max_radius=12': "the paper's blur radius",
    'lambda_focus=0': 'no focus term',
    'alias_scales=1': '1 alias scale',
    'alias_scales=3': '3 alias scales',
    'teacher_blocks=2': '2 teacher blocks',
    'shared_blocks=0': 'separate teacher network',
    'lambda_feat=1': "10 × feature loss (the paper's weight)",
    'lambda_feat=0': 'no feature loss (KL only)',
    'lambda_logit=2': '4 × KL loss'
}
# Students are also sampled with the published setting, and with more guidance and more variety: the ranking
# of the rows may depend on it.
SAMPLINGS = (
    {'parts': 'samples', 'cfg': 1.5, 'top_p': 0.96},
    {'parts': 'samples', 'cfg': 4.0, 'top_p': 0.9}
)
DEFAULTS = {script.__name__: script.config for script in (train_tokenizer, encode, train_fvar, evaluate)}

# A stage must not outlive this process, or the next ablation would write to the same files. Its standard
# input is a pipe that closes when this process ends, however that happens.
STAGE = '''
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
'''
PIPE, KEPT_OPEN = os.pipe()
LOCKS = defaultdict(threading.Lock)     # per folder: a row waits while another trains shared tokenizers
deadline = math.inf                     # no stage starts after this time (time.monotonic)


class OutOfTime(Exception):
    """The deadline has passed and a stage is still to be run."""


# -----------------------------------------------------------------------------
# stages

@cache                                  # each read looks through the settings of all scripts
def config_values(file, script):
    return read_config_file(HERE / file, script, DEFAULTS[script])


def settings(row='', seed=0):
    """{script: its settings that differ from its defaults}, without files. row='': what all rows share."""
    changes = {
        'train_tokenizer': {
            'data': data,
            'steps': tokenizer_steps,
            'warm_start': tokenizer_steps // 3,
            'vocab_size': vocab_size
        },
        'encode': {},
        'train_fvar': {'steps': steps, 'distill_warmup': 2 * steps // 3},
        'evaluate': {'cnn_steps': cnn_steps}
    }
    name, _, text = row.partition('=')
    for script, defaults in DEFAULTS.items():
        values = config_values(base, script) | changes[script] | {'seed': seed}
        if row in TABLE_3:
            values |= config_values(f'config/ablation/{row}.py', script)
        if name in defaults:
            values[name] = parse_value(name, text, defaults[name])
        changes[script] = {
            name: value
            for name, value in values.items()
            if name not in ('out_dir', 'tokenizer') and value != defaults[name]
        }
    return changes


def short_hash(*values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def folders(of):
    """(folder of the tokenizers and token files, folder of the student) for some settings."""
    stage1 = f'{out_dir}/tokenizer-{short_hash(of["train_tokenizer"], of["encode"])}'
    return stage1, f'{stage1}/student-{short_hash(of["train_fvar"])}'


def run(script, folder, values):
    """Runs a stage in a folder, unless it has finished there. Raises UserError if it fails."""
    global deadline
    # the first evaluation trains the CNN that all others load
    with LOCKS['CNN' if script == 'evaluate' else folder]:
        marker, log = Path(folder, f'{script}.done'), Path(folder, f'{script}.log')
        if marker.exists():
            return
        if time.monotonic() > deadline:
            raise OutOfTime
        marker.parent.mkdir(parents=True, exist_ok=True)
        runtime.say(f'{time.strftime("%H:%M:%S")} {script} in {folder}')
        command = [sys.executable, '-c', STAGE, str(HERE / f'{script}.py')]
        for name, value in (values | {'out_dir': folder}).items():
            text = ','.join(map(str, value)) if isinstance(value, tuple) else value
            command.append(f'--{name}={text}')
        with open(log, 'w', encoding='utf-8') as file:
            environment = os.environ | {'OMP_NUM_THREADS': '1'}
            stage = subprocess.run(command, stdin=PIPE, stdout=file, stderr=file, env=environment)
        if stage.returncode:
            deadline = 0                                    # the other threads stop too
            last = log.read_text(encoding='utf-8').splitlines()[-1:]
            raise UserError(f'{script} failed ({log}): {"".join(last).removeprefix("error: ")}')
        marker.touch()


def evaluate_row(of):
    """Runs the unfinished stages of some settings; returns the metrics. FD is FD-cnn, bits are per image."""
    stage1, student = folders(of)
    tokenizer = {'tokenizer': f'{stage1}/tokenizer.pt'}
    resume = {'init_from': 'auto'}
    run('train_tokenizer', stage1, of['train_tokenizer'] | resume)
    run('encode', stage1, of['encode'])
    run('train_fvar', student, of['train_fvar'] | tokenizer | resume)
    files = tokenizer | {'init_from': f'{student}/student.pt', 'cnn_file': f'{out_dir}/cnn.pt'}
    fd_sampled = []
    for sampling in (*SAMPLINGS, {}):                       # last with all parts
        values = of['evaluate'] | sampling
        folder = f'{student}/evaluation-{short_hash(values)}'
        run('evaluate', folder, values | files)
        found = read_json(f'{folder}/results.json')
        sets = {line['set']: line for line in found['distances'] if line['against'] == 'reference'}
        fd = sets['generated']['fd_cnn']
        fd_sampled.append((found['config']['cfg'], found['config']['top_p'], fd))
    return {
        'psnr': found['tokenizer']['psnr'],
        'ssim': found['tokenizer']['ssim'],
        'floor': sets['real']['fd_cnn'],
        'rfd': sets['reconstructed']['fd_cnn'],
        'fd': fd,
        'recognised': sets['generated']['recognised'],
        'bits': found['student']['bits_per_image'],
        'fd_sampled': fd_sampled,
        'torch': torch.__version__
    }


def work():
    """Evaluates all rows until `minutes` run out, and writes the results as they come."""
    global deadline
    known_rows = TABLE_3 | VARIATIONS
    wanted = rows.split(',') if rows else list(known_rows)
    for row in wanted:
        if row not in known_rows:
            raise UserError(f'--rows={rows}: no row {row!r}; choose from {", ".join(known_rows)}')
    common = json.loads(json.dumps(settings()))             # with lists for tuples
    saved = read_json(results) or {'settings': common, 'runs': []}
    if saved['settings'] != common:
        raise UserError(f'{results} was made with other settings: choose another --results')
    runs = {(run['row'], run['seed']): run for run in saved['runs']}
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf

    pool = ThreadPoolExecutor(processes)
    jobs = [(row, seed) for row in wanted for seed in range(seeds)]
    # settings() parses Python, which Python 3.11 cannot do in several threads
    futures = [pool.submit(evaluate_row, settings(row, seed)) for row, seed in jobs]
    unfinished = 0
    try:
        for (row, seed), future in zip(jobs, futures):
            try:
                runs[row, seed] = {'row': row, 'seed': seed} | future.result()
                write_json(results, {'settings': common, 'runs': list(runs.values())})
            except OutOfTime:
                unfinished += 1
    finally:
        deadline = 0                                        # after an error or Ctrl-C, too
        pool.shutdown(wait=False, cancel_futures=True)
    runtime.say(f'{len(jobs) - unfinished} of {len(jobs)} runs finished')


# -----------------------------------------------------------------------------
# figures

@torch.no_grad()
def make_figures():
    """Draws VAR and FVAR, seed 0: per class a held-out image, reconstructions, and four samples of each."""
    common = settings()
    dataset = open_dataset(data, 'val', common['train_tokenizer']['image_size'])
    real, labels = load_images(dataset, 50 * len(dataset.classes))
    classes = torch.arange(len(dataset.classes))
    real = normalize(real[(labels == classes[:, None]).int().argmax(1)])        # the first of each class
    columns = {'real': real}
    how = DEFAULTS['evaluate'] | common['evaluate']
    for name, row in (('VAR', 'var'), ('FVAR', 'full')):
        stage1, folder = folders(settings(row))
        structure, student, *_ = load_deployed(folder, tokenizer=f'{stage1}/tokenizer.pt')
        columns[f'{name}\ndecoded'] = structure.decode(structure.encode(real))
        generators = sample_generators(0, range(4 * len(classes)))
        _, samples = student.generate(
            structure, classes.repeat(4), how['cfg'], how['top_k'], how['top_p'], generators)
        columns |= {f'{name}\nsample {i + 1}': part for i, part in enumerate(samples.chunk(4))}
    cells = torch.stack(list(columns.values()), 1).flatten(0, 1)
    grid = picture_grid(cells, len(columns), dataset.classes, list(columns))
    save_png(Path(results).with_suffix('.png'), grid)


def main():
    positive = ('seeds', 'tokenizer_steps', 'steps', 'vocab_size', 'cnn_steps', 'processes')
    runtime.require_positive(config, *positive)
    if figures:
        make_figures()
    else:
        work()


if __name__ == '__main__':
    runtime.run(main)
