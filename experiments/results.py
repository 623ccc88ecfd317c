"""Writes the tables of README.md and RESULTS.md from the JSON files in results/.

    python -m experiments.results           # or make results

The comment <!-- table: NAME --> precedes each of them; NAME is a key of TABLES below.
"""
import math
import re
from collections import defaultdict
from statistics import mean, stdev

from configurator import HERE, UserError, configure
from experiments.ablation import TABLE_3, VARIATIONS
from util import runtime
from util.checkpoint import atomic_write, read_json

config = configure(globals())       # there are no settings, but there is --help

DOCUMENTS = ('README.md', 'RESULTS.md')
TITLES = TABLE_3 | VARIATIONS    # of an ablation's rows, in their order


def read(name):
    """What a file of results/ holds. Raises UserError if there is none."""
    found = read_json(HERE / 'results' / f'{name}.json')
    if not found:
        raise UserError(f'results/{name}.json is missing; RESULTS.md says which command writes it')
    return found


def simple(columns, rows):
    """A table with a row per dictionary. columns: {key: (heading, format)}."""
    head = [heading for heading, _ in columns.values()]
    return [head, *([format(row[key], form) for key, (_, form) in columns.items()] for row in rows)]


# -----------------------------------------------------------------------------
# ablations

def runs_by_row(name):
    """{row: {seed: its run}} of an ablation, in the order of TITLES."""
    found = defaultdict(dict)
    for run in sorted(read(name)['runs'], key=lambda run: list(TITLES).index(run['row'])):
        found[run['row']][run['seed']] = run
    return found


def mean_std(values, form):
    """Mean ± standard deviation over seeds."""
    std = f' ± {stdev(values):{form}}' if len(values) > 1 else ''
    return f'{mean(values):{form}}{std}'


def difference(fd, other):
    """Mean ± standard error of fd − other over the seeds in both. Both are {seed: FD-cnn}."""
    pairs = [fd[seed] - other[seed] for seed in fd.keys() & other.keys()]
    if not pairs or fd == other:
        return '–'
    error = f' ± {stdev(pairs) / math.sqrt(len(pairs)):.2f}' if len(pairs) > 1 else ''
    return f'{mean(pairs):+.2f}{error}'


def distances(by_seed, way):
    """{seed: FD-cnn} of a row with one way of sampling, [cfg, top_p]."""
    return {seed: fd for seed, run in by_seed.items() for *how, fd in run['fd_sampled'] if how == way}


def averages(columns, groups):
    """A row per group of runs with the means over seeds. columns as in simple(); groups: {title: runs}."""
    table = [['', 'seeds', *(heading for heading, _ in columns.values())]]
    for title, runs in groups.items():
        cells = [mean_std([run[key] for run in runs], form) for key, (_, form) in columns.items()]
        table.append([title, str(len(runs)), *cells])
    return table


def quality(name):
    """Tokenizer and student metrics for every row of an ablation."""
    columns = {
        'psnr': ('PSNR, dB', '.2f'), 'ssim': ('SSIM', '.3f'), 'rfd': ('rFD', '.2f'),
        'bits': ('bits per image', '.1f'), 'recognised': ('recognised', '.1%')
    }
    return averages(columns, {TITLES[row]: by_seed.values() for row, by_seed in runs_by_row(name).items()})


def sampling(name):
    """FD-cnn of every row with each way of sampling, and how far it is from VAR's, seed by seed."""
    found = runs_by_row(name)
    var = found['var']
    ways = sorted(how for *how, _ in var[0]['fd_sampled'])
    table = [['FD-cnn', *(cell for way in ways for cell in ('cfg {:g}, top_p {:g}'.format(*way), '− VAR'))]]
    for row, by_seed in found.items():
        fds = [(distances(by_seed, way), distances(var, way)) for way in ways]
        table.append([TITLES[row], *(cell for fd, of_var in fds
                                     for cell in (mean_std(fd.values(), '.2f'), difference(fd, of_var)))])
    return table


def compared(*comparisons):
    """FD-cnn and bits of two rows beside each other. comparisons: (label, file, row, the other row)."""
    table = [['', 'seeds', 'FD-cnn', 'of the other', 'difference', 'bits per image', 'of the other']]
    for label, name, *rows in comparisons:
        found = runs_by_row(name)
        both = [found[row] for row in rows]
        fd, other = ({seed: run['fd'] for seed, run in by_seed.items()} for by_seed in both)
        bits, other_bits = (mean(run['bits'] for run in by_seed.values()) for by_seed in both)
        table.append([label, str(len(fd)), mean_std(fd.values(), '.2f'), mean_std(other.values(), '.2f'),
                      difference(fd, other), f'{bits:.1f}', f'{other_bits:.1f}'])
    return table


# -----------------------------------------------------------------------------
# everything else

DEMO = {
    'method': ('method', ''), 'seed': ('seed', ''), 'psnr': ('PSNR, dB', '.1f'), 'rfd': ('rFD', '.1f'),
    'nats_per_token': ('nats per token', '.2f'), 'fd_cnn': ('FD-cnn', '.1f'),
    'recognised': ('recognised', '.1%')
}
MEMORY = {
    'config': ('`config/`', ''), 'millions': ('million parameters', ',.0f'),
    'tokens': ('tokens per picture', ',d'), 'gib': ('GiB per GPU', '.0f'),
    'gib_validation': ('GiB, validating', '.0f'), 'tflop_per_image': ('TFLOP per picture', '.2f'),
    'hours': ('hours', ',.0f'), 'disk_gb': ('disk, GB', '.0f')
}


def demo():
    """FVAR and VAR with the settings of the demo."""
    groups = defaultdict(list)
    for run in read('demo'):
        groups[run['method']].append(run)
    return averages({key: DEMO[key] for key in ('fd_cnn', 'recognised', 'rfd', 'psnr')}, groups)


def changes():
    """Pairs of runs of the demo that differ in one thing, before → after."""
    columns = {key: DEMO[key] for key in ('psnr', 'rfd', 'nats_per_token', 'fd_cnn')}
    table = [['change', 'data, seed', *(heading for heading, _ in columns.values())]]
    for pair in read('changes'):
        cells = [' → '.join(format(value, form) for value in pair.get(key, ()))
                 for key, (_, form) in columns.items()]
        table.append([pair['change'], f'{pair["data"]}, {pair["seed"]}', *cells])
    return table


def aliasing():
    """Alias and kept energy of every view, by what blurred it."""
    views_of = read('aliasing')['pyramid']
    filters = {'disk matched': 'disk', 'area': 'area', 'Gaussian': 'Gaussian'}
    table = [['step s_k', 'no blur: alias']]
    table[0] += [f'{name}: {key}' for name in filters.values() for key in ('alias', 'kept')]
    for plain, *views in zip(*(views_of[key] for key in ('none', *filters))):
        cells = [plain['alias'], *(view[key] for view in views for key in ('alias', 'kept'))]
        table.append([f'{plain["step"]:.3g}', *(f'{cell:.1%}' for cell in cells)])
    return table


def refocusing(metric):
    """One metric of every method, by blur and noise."""
    found = defaultdict(dict)
    for row in read('refocus')['refocus']:
        blur = f'{row["radius"]:.3g} px, σ = {row["noise"]:g}'
        found[blur][row['method']] = f'{row[metric]:.2f}'
    methods = next(iter(found.values()))
    return [['blur, noise', *methods], *([blur, *values.values()] for blur, values in found.items())]


def speed(name):
    """Milliseconds per call in two precisions, and how much of the peak that is."""
    found = defaultdict(list)
    for dtype in ('float32', 'bfloat16'):
        for row in read(f'{name}_{dtype}')['rows']:
            cells = [f'{1000 * row["seconds"]:.0f} ms', f'{row["mfu"]:.0%}']
            found[f'{row["part"]}: {row["what"]}'] += cells
    return [['', 'float32', 'of peak', 'bfloat16', 'of peak'], *([name, *row] for name, row in found.items())]


TABLES = {
    'demo': demo,
    'demo, seeds': lambda: simple(DEMO, read('demo')),
    'changes': changes,
    'charts': lambda: quality('ablation_charts'),
    'charts, sampling': lambda: sampling('ablation_charts'),
    'photographs': lambda: quality('ablation_photos'),
    'photographs, sampling': lambda: sampling('ablation_photos'),
    'teacher': lambda: compared(
        ('charts', 'ablation_charts', 'full', 'no_teacher'),
        ('photographs', 'ablation_photos', 'full', 'no_teacher'),
        ('500 charts', 'ablation_small', 'full', 'no_teacher'),
        ('500 charts, 4 × KL', 'ablation_small', 'lambda_logit=2', 'no_teacher')),
    'length': lambda: compared(
        ('1,200 steps', 'ablation_charts', 'full', 'var'),
        ('4,800 steps', 'ablation_charts_4800', 'full', 'var'),
        ('9,600 steps', 'ablation_charts_9600', 'full', 'var')),
    'aliasing': aliasing,
    'refocusing, PSNR': lambda: refocusing('psnr'),
    'refocusing, sharpness': lambda: refocusing('sharpness'),
    'speed': lambda: speed('bench'),
    'speed, d12': lambda: speed('bench_d12'),
    'memory': lambda: simple(MEMORY, read('memory')),
    'memory of the real run': lambda: simple(
        MEMORY, [row for row in read('memory') if row['config'] in ('tokenizer_256', 'd16')])
}


def rewrite(text):
    """A document with its tables rebuilt from the results."""
    def table(match):
        head, *body = TABLES[match[1]]()
        lines = [head, ['---'] * len(head), *body]
        return f'<!-- table: {match[1]} -->\n' + ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)

    return re.sub(r'<!-- table: (.+) -->\n(?:\|.*\n)*', table, text)


def main():
    for document in DOCUMENTS:
        text = (HERE / document).read_text(encoding='utf-8')
        with atomic_write(HERE / document) as file:
            file.write(rewrite(text).encode())
        runtime.say(f'wrote the tables of {document}')


if __name__ == '__main__':
    runtime.run(main)
