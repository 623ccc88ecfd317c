r"""Tables 3 and 4 of the paper at desk scale: all rows with one budget, several seeds, and one CNN for FD-cnn.

    python -m experiments.ablation --processes=2                # all of it; the same command goes on where it stopped
    python -m experiments.ablation --seeds=2 --tokenizer_steps=200 --steps=400 --minutes=30 --results=quick.json    # a first half an hour
    python -m experiments.ablation --data=DIR --vocab_size=1024 --tokenizer_steps=2500 --cnn_steps=2000 --out_dir=out-photos \
        --results=results/ablation_photos.json      # on photographs
    python -m experiments.ablation --table                      # what was found so far, as a Markdown table
    python -m experiments.ablation --figures                    # VAR and FVAR side by side: ablation_charts_samples.png, …_curves.png

A row and a seed take six pieces of work, each a run of a script of this folder on one thread: tokenizers → token files →
student → evaluation, and two evaluations that only sample in another way. Rows with the same stage 1 share its pieces.
SCRIPT.done.json in its folder says that a piece is finished, and with which settings, those of the pieces before it
included: where one has changed, it is done again.
All rows have config/desk.py and the settings below in common; config/ablation/*.py and TABLE_4 say what differs.
"""
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

import encode
import evaluate
from util import runtime
from util.checkpoint import read_log, write_json
import train_fvar
import train_tokenizer
from configurator import HERE, UserError, configure, parse_value, read_config_file
from data import normalize, open_dataset, sample_generators
from experiments.aliasing import spectrum_distance
from published import load_deployed
from util.picture_sets import load_images
from util.pictures import line_chart, picture_grid, save_png, side_by_side

# input and output
out_dir = 'out-ablation'        # tokenizers, token files and students, a folder for each row and seed
results = 'results/ablation_charts.json'    # what was found; --table reads nothing else
data = 'charts:4000'            # charts, so many to train on; or a folder with train/<class>/*.jpg and val/<class>/*.jpg
base = 'config/desk.py'         # sizes and learning rates of all rows
rows = ''                       # only these, as var,full,focus_schedule=states (default: all)
# the budget of every row
seeds = 3                       # 0, 1, ... of its tokenizers, students and samples
tokenizer_steps = 700           # of stage 1, the first third of them warm start
steps = 1200                    # of stage 2; over the first two thirds distillation gains its weight
vocab_size = 128                # codes of Q_L; photographs need 1024
cnn_steps = 150                 # of the CNN behind FD-cnn; photographs need 2000
# doing it in pieces
minutes = 0.0                   # no piece is begun after that; 0 is no limit
processes = 1                   # pieces at a time
# instead of doing it
table = False                   # print the table
figures = False                 # draw the pictures
config = configure(globals())

# Table 3: files of config/ablation. Table 4: one setting of the full row is another; where it is no other, all pieces are shared
TABLE_3 = {'var': 'VAR (baseline)', 'full': 'FVAR (full)', 'no_refocusing': 'w/o progressive refocusing',
           'gaussian': 'w/ Gaussian blur', 'no_teacher': 'w/o high-frequency teacher', 'no_dual': 'w/o dual tokenizers'}
TABLE_4 = {'focus_input=view': 'views encoded (Eq. 3)', 'focus_schedule=matched': 'schedule matched',
           'focus_schedule=states': 'schedule states', 'focus_schedule=cosine': 'schedule cosine',
           'max_radius=12': "the paper's blur", 'lambda_focus=0.1': 'five times the focus term', 'lambda_focus=0': 'no focus term',
           'alias_scales=1': '1 alias scale', 'alias_scales=3': '3 alias scales',
           'teacher_blocks=2': '2 teacher blocks', 'shared_blocks=0': 'a whole second network',
           'lambda_feat=1': "the paper's feature term, ten times ours", 'lambda_feat=0': 'no feature term, KL alone'}
# students are sampled in these ways too (cfg, top_p): the published one, and more guidance with more variety; which row wins may
# depend on it
SAMPLINGS = ((1.5, 0.96), (4.0, 0.9))
DEFAULTS = {script.__name__: script.config for script in (train_tokenizer, encode, train_fvar, evaluate)}


class Piece(NamedTuple):
    """A run of a script: its settings without files, the pieces before it (the first has its tokenizer), its folder."""
    script: str
    settings: dict
    needs: tuple
    folder: str

    @property
    def marker(self):
        return f'{self.folder}/{self.script}.done.json'


@cache                                                      # reading one looks through all scripts
def set_by(file, script):
    return read_config_file(HERE / file, script, DEFAULTS[script])


def settings(script, row='', seed=0):
    """All settings of a script but files, for a row of TABLE_3 or TABLE_4; '' is what all rows have in common."""
    defaults = DEFAULTS[script]
    values = defaults | set_by(base, script) | (set_by(f'config/ablation/{row}.py', script) if row in TABLE_3 else {})
    name, _, text = row.partition('=')
    if name in defaults:
        values[name] = parse_value(name, text, defaults[name])
    budget = {'train_tokenizer': {'data': data, 'steps': tokenizer_steps, 'warm_start': tokenizer_steps // 3, 'vocab_size': vocab_size},
              'train_fvar': {'steps': steps, 'distill_warmup': 2 * steps // 3},
              'evaluate': {'cnn_steps': cnn_steps}}
    values |= budget.get(script, {}) | {'seed': seed}
    return {name: values[name] for name in values if name not in ('out_dir', 'init_from', 'tokenizer', 'tokens', 'cnn_file')}


def plan():
    """(pieces in the order of their doing, {(row, seed): its evaluation})."""
    pieces, runs = [], {}

    def add(script, values, needs, folder):
        """The new piece, or the one that does the same for an earlier row."""
        piece = Piece(script, values, needs, f'{out_dir}/{folder}')
        same = [other for other in pieces if other[:3] == piece[:3]]
        pieces.extend([] if same else [piece])
        return same[0] if same else piece

    wanted = rows.split(',') if rows else [*TABLE_3, *TABLE_4]
    if unknown := [row for row in wanted if row not in TABLE_3 | TABLE_4]:
        raise UserError(f'--rows={rows}: there is no row {unknown[0]!r}; there are {", ".join(TABLE_3 | TABLE_4)}')
    for row, seed in [(row, seed) for some in (TABLE_3, TABLE_4) for seed in range(seeds) for row in some]:
        tokenizer = add('train_tokenizer', settings('train_tokenizer', row, seed), (), f'tokenizer-{row}-{seed}')
        tokens = add('encode', settings('encode', row, seed), (tokenizer,), f'tokenizer-{row}-{seed}')
        student = add('train_fvar', settings('train_fvar', row, seed), (tokens,), f'{row}-{seed}')
        # any evaluation trains the CNN where there is none; this one is there to do so before all others
        cnn = add('evaluate', settings('evaluate') | {'parts': 'tokenizer'}, (pieces[0],), 'cnn')
        needs, how = (tokens, student, cnn), settings('evaluate', row, seed)
        others = [add('evaluate', how | {'parts': 'samples', 'cfg': cfg, 'top_p': top_p}, needs, f'{row}-{seed}/cfg={cfg},top_p={top_p}')
                  for cfg, top_p in SAMPLINGS]
        runs[row, seed] = add('evaluate', how, (*needs, *others), f'{row}-{seed}')
    # chosen last: which row a piece has its folder from must not depend on what is wanted
    runs = {(row, seed): run for (row, seed), run in runs.items() if row in wanted}
    needed = {piece.marker for run in runs.values() for piece in with_needs(run)}
    return [piece for piece in pieces if piece.marker in needed], runs


def with_needs(piece):
    """A piece and all that come before it, each once."""
    found = {piece.marker: piece}
    for need in piece.needs:
        found |= {other.marker: other for other in with_needs(need)}
    return list(found.values())


def made_with(piece):
    """{'script.setting': value} of a piece and those before it; where two run the same script, its own tokenizer's come first."""
    values = {}
    for need in reversed(piece.needs):
        values |= made_with(need)
    return values | {f'{piece.script}.{name}': value for name, value in piece.settings.items()}


def finished(piece):
    """What the marker says ({'seconds', 'made_with'}), or None where it is not there or of other settings."""
    if not os.path.isfile(piece.marker):
        return None
    said = json.loads(Path(piece.marker).read_text(encoding='utf-8'))
    defaults = {f'{script}.{name}': value for script in DEFAULTS for name, value in DEFAULTS[script].items()}
    then, now = defaults | said['made_with'], made_with(piece)      # a setting that did not exist then had its default
    return said if all(json.dumps(then[name]) == json.dumps(now[name]) for name in now) else None


def changed(script, values):
    """Those of a script's settings that are not its defaults."""
    return {name: value for name, value in values.items() if value != DEFAULTS[script][name]}


def start(piece):
    """The process of a piece; what it prints goes to SCRIPT.log in its folder."""
    values = changed(piece.script, piece.settings) | {'out_dir': piece.folder}
    if piece.script in ('train_fvar', 'evaluate'):
        values['tokenizer'] = f'{piece.needs[0].folder}/tokenizer.pt'
    if piece.script == 'evaluate':
        values['cnn_file'] = f'{out_dir}/cnn.pt'
        if len(piece.needs) > 1:
            values['init_from'] = f'{piece.needs[1].folder}/student.pt'
    texts = {name: ','.join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    command = [sys.executable, HERE / f'{piece.script}.py', *(f'--{name}={text}' for name, text in texts.items())]
    os.makedirs(piece.folder, exist_ok=True)
    with open(f'{piece.folder}/lock', 'w') as lock:
        # a piece holds it, and goes on by itself when this process is killed: two at once would write the same files
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(piece.marker).unlink(missing_ok=True)          # from here on the files are of these settings
        runtime.say(f'{time.strftime("%H:%M:%S")} {piece.script} in {piece.folder}')
        with open(f'{piece.folder}/{piece.script}.log', 'w', encoding='utf-8') as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {'OMP_NUM_THREADS': '1'}, pass_fds=[lock.fileno()])


def work(pieces, runs):
    """Does what is not finished, as far as the minutes reach. UserError with the last words of a piece that fails."""
    began, running, done = time.monotonic(), {}, {piece.marker for piece in pieces if finished(piece)}
    runtime.say(f'{len(pieces)} pieces, {len(done)} of them finished')
    try:
        while True:
            for piece in pieces:
                late = minutes and time.monotonic() - began > 60 * minutes
                ready = piece.marker not in done | running.keys() and all(need.marker in done for need in piece.needs)
                if ready and not late and len(running) < processes:
                    running[piece.marker] = piece, start(piece), time.monotonic()
            if not running:
                break
            time.sleep(0.1)
            for marker, (piece, process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[marker]
                    if process.returncode:
                        log = f'{piece.folder}/{piece.script}.log'
                        last = Path(log).read_text(encoding='utf-8').splitlines()[-1:]
                        raise UserError(f'{piece.script} failed ({log}): {"".join(last).removeprefix("error: ")}')
                    write_json(marker, {'seconds': round(time.monotonic() - started, 1), 'made_with': made_with(piece)})
                    done.add(marker)
                    if piece.script == 'evaluate':
                        collect(runs)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.wait()
    runtime.say(f'{len(pieces) - len(done)} pieces are left')


def outcome(evaluation):
    """What a finished evaluation found (FD is FD-cnn, bits are an image's), and the seconds that each piece took."""
    tokens, student, _, *others = evaluation.needs
    all_found = [json.loads(Path(f'{piece.folder}/results.json').read_text(encoding='utf-8')) for piece in (evaluation, *others)]
    distances = [{row['set']: row for row in some['distances'] if row['against'] == 'reference'} for some in all_found]
    found, of = all_found[0], distances[0]
    values = {'psnr': found['tokenizer']['psnr'], 'ssim': found['tokenizer']['ssim'], 'floor': of['real']['fd_cnn'],
              'rfd': of['reconstructed']['fd_cnn'], 'fd': of['generated']['fd_cnn'], 'recognised': of['generated']['recognised'],
              'bits': found['student']['bits_per_image']}
    fd_sampled = [[piece.settings['cfg'], piece.settings['top_p'], round(sets['generated']['fd_cnn'], 4)]
                  for piece, sets in zip((evaluation, *others), distances)]
    return {name: round(value, 4) for name, value in values.items()} | {
        'fd_sampled': fd_sampled, 'ce_per_map': [round(ce, 3) for ce in found['student']['ce_per_map']],
        'seconds': {piece.script: finished(piece)['seconds'] for piece in (*tokens.needs, tokens, student, evaluation)},
        'machine': f'{platform.machine()}, {os.cpu_count()} cores, one thread a piece', 'torch': found['versions']['torch']}


def collect(runs):
    """Adds what is finished to the results file. UserError if that was made with other settings."""
    common = json.loads(json.dumps({script: changed(script, settings(script)) for script in DEFAULTS}))
    saved = json.loads(Path(results).read_text(encoding='utf-8')) if os.path.isfile(results) else {'settings': common, 'runs': []}
    if saved['settings'] != common:
        raise UserError(f'{results} was made with other settings than these: give another --results')
    known = {(run['row'], run['seed']): run for run in saved['runs']}
    known |= {(row, seed): {'row': row, 'seed': seed} | outcome(piece) for (row, seed), piece in runs.items()
              if all(map(finished, with_needs(piece)))}
    write_json(results, saved | {'runs': list(known.values())})


def read_runs():
    """The runs of the results file. UserError where there is none."""
    runs = json.loads(Path(results).read_text(encoding='utf-8'))['runs'] if os.path.isfile(results) else []
    if not runs:
        raise UserError(f'{results}: nothing is finished yet; python -m experiments.ablation goes on')
    return runs


def spread(values, digits=2):
    return f'{mean(values):.{digits}f}' + (f' ± {stdev(values):.{digits}f}' if len(values) > 1 else '')


def against(ours, theirs):
    """The mean of ours − theirs ({seed: value}) over the seeds of both, its standard error, and percent of theirs, of every
    seed too; as text."""
    both = [seed for seed in ours if seed in theirs]
    if not both:
        return '–'
    differences = [ours[seed] - theirs[seed] for seed in both]
    error = f' ± {stdev(differences) / len(both) ** 0.5:.2f}' if len(both) > 1 else ''
    each = ': ' + ', '.join(f'{100 * (ours[seed] / theirs[seed] - 1):+.0f}' for seed in both) if len(both) > 1 else ''
    return f'{mean(differences):+.2f}{error} ({100 * mean(differences) / mean(theirs[seed] for seed in both):+.1f} %{each})'


def markdown_table(head, *body):
    first, *others = [f'| {" | ".join(map(str, cells))} |' for cells in (head, *body)]
    return '\n'.join([first, '|' + ' --- |' * len(head), *others])


def markdown(runs):
    """The tables of some results, a line for every row that has a run: all figures, then FD-cnn by way of sampling, against VAR and
    against the full row."""
    ways = sorted({(cfg, top_p) for run in runs for cfg, top_p, _ in run['fd_sampled']})
    names = [f'cfg {cfg:g}, top_p {top_p:g}' for cfg, top_p in ways]
    overall = [('', 'seeds', 'PSNR, dB', 'SSIM', 'floor', 'rFD', 'FD-cnn', 'FD-cnn − VAR', 'recognised, %', 'bits an image', 'bits − VAR',
                'nats a token, each map')]
    by_way = [('FD-cnn', *(title for name in names for title in (name, '− VAR')))]
    less_full = [('FD-cnn − FVAR (full)', *names)]

    def of_seeds(row, key):
        """{seed: value} of a row; key: of the value, or the (cfg, top_p) with which FD-cnn was found."""
        values = [(run['seed'], run | {(cfg, top_p): fd for cfg, top_p, fd in run['fd_sampled']}) for run in runs if run['row'] == row]
        return {seed: value[key] for seed, value in values if key in value}

    def less(other, row, key):
        return against(of_seeds(row, key), of_seeds(other, key) if row != other else {})

    for row, name in (TABLE_3 | TABLE_4).items():
        if some := [run for run in runs if run['row'] == row]:
            of = {key: [run[key] for run in some] for key in some[0]}
            overall.append((name, len(some), spread(of['psnr']), spread(of['ssim'], 3), f'{mean(of["floor"]):.2f}', spread(of['rfd']),
                            spread(of['fd']), less('var', row, 'fd'), spread([100 * share for share in of['recognised']], 1),
                            spread(of['bits'], 1), less('var', row, 'bits'),
                            ' '.join(f'{mean(map_):.2f}' for map_ in zip(*of['ce_per_map']))))
            by_way.append((name, *(cell for way in ways for cell in (spread(of_seeds(row, way).values()), less('var', row, way)))))
            less_full.append((name, *(less('full', row, way) for way in ways)))
    shares = [100 * run['rfd'] / run['fd'] for run in runs]
    return '\n\n'.join([*(markdown_table(*lines) for lines in (overall, by_way, less_full)), (
        f'rFD is {min(shares):.0f} to {max(shares):.0f} % of FD-cnn. ± is the standard deviation over seeds; of differences, taken seed '
        'by seed, the standard error of their mean; behind the colon percent of each seed.')])


@torch.no_grad()
def draw(runs):
    """Two pictures of VAR and FVAR, seed 0, beside the results: X.json has X_samples.png and X_curves.png.

    In the first a row for each class: a held-out picture, what the tokenizers make of it, four samples of each. In the second the
    loss of the students, the spectrum of what the tokenizers get wrong relative to that of the pictures, and that of samples.
    """
    dataset = open_dataset(data, 'val', settings('train_tokenizer')['image_size'], augment=False)
    found, labels = load_images(dataset, 50 * len(dataset.classes))
    of_class = [(labels == label).nonzero().flatten() for label in range(len(dataset.classes))]
    count = min(map(len, of_class))                         # as many of every class
    real = normalize(found[torch.cat([some[:count] for some in of_class])])
    wanted, numbers = torch.arange(len(of_class)).repeat_interleave(count), torch.arange(len(real))
    rings = [(ring + 0.5) / 16 for ring in range(8)]

    decoded, drawn, losses, errors, spectra = {}, {}, {}, {}, {}
    for name, run in (('VAR', runs['var', 0]), ('FVAR', runs['full', 0])):
        (tokens, student, *_), how = run.needs, run.settings
        structure, network, *_ = load_deployed(student.folder, tokenizer=f'{tokens.folder}/tokenizer.pt')
        decoded[name] = torch.cat([structure.decode(structure.encode(part)) for part in real.split(100)])
        drawn[name] = torch.cat([
            network.generate(structure, wanted[some], how['cfg'], how['top_k'], how['top_p'], sample_generators(0, some))[1]
            for some in numbers.split(100)])
        records = [record for record in read_log(f'{student.folder}/fvar.jsonl') if 'ce' in record]
        ce = [mean(record['ce'] for record in records[max(0, i - 4):i + 1]) for i in range(len(records))]
        losses[name] = [record['step'] for record in records], ce
        errors[name] = rings, spectrum_distance(decoded[name] - real, real).tolist()
        spectra[name] = rings, spectrum_distance(drawn[name], real).tolist()
    spectra['real, half against half'] = rings, spectrum_distance(real[::2], real[1::2]).tolist()

    beside = Path(results).with_suffix('')
    names = ['real', 'VAR\ndecoded', 'FVAR\ndecoded'] + [f'{name}\nsample {i}' for name in ('VAR', 'FVAR') for i in '1234']
    cells = torch.cat([pictures.unflatten(0, (-1, count))[:, :shown] for pictures, shown in (
        (real, 1), (decoded['VAR'], 1), (decoded['FVAR'], 1), (drawn['VAR'], 4), (drawn['FVAR'], 4))], 1)
    save_png(f'{beside}_samples.png', picture_grid(cells.flatten(0, 1), len(names), dataset.classes, names))
    charts = [line_chart(losses, 'step', 'students: nats a token (mean of 5 records)'),
              line_chart(errors, 'cycles a pixel', 'tokenizers: error / picture, dB'),
              line_chart(spectra, 'cycles a pixel', 'samples / real pictures, dB')]
    save_png(f'{beside}_curves.png', side_by_side(charts))


def main():
    runtime.require_positive(config, 'seeds', 'tokenizer_steps', 'steps', 'vocab_size', 'cnn_steps', 'processes')
    if table:
        print(markdown(read_runs()))
        return
    pieces, runs = plan()
    if figures:
        draw(runs)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that a killed run takes its pieces with it
    collect(runs)                                           # says at once if the results are of other settings
    work(pieces, runs)


if __name__ == '__main__':
    runtime.run(main)
