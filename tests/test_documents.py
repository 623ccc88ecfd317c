"""README.md, PAPER.md and RESULTS.md: links lead somewhere, what they call by name exists, and what they claim was measured."""
import ast
import importlib
import re
from statistics import mean, stdev

import pytest
import torch

from configurator import HERE, read_settings
from experiments import results
from tokenizer import MultiScaleQuantizer

DOCUMENTS = {name: (HERE / name).read_text(encoding='utf-8') for name in ('README.md', 'PAPER.md', 'RESULTS.md')}
SOURCES = [file for folder in ('.', 'util', 'experiments') for file in sorted((HERE / folder).glob('[!_]*.py'))]


def anchors(text):
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', text, flags=re.S), flags=re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('name', DOCUMENTS)
def test_links_and_pictures_lead_somewhere(name):
    text = DOCUMENTS[name]
    links = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'src="([^"]+)"', text)
    assert links
    for link in links:
        if not link.startswith('http'):
            file, _, anchor = link.partition('#')
            assert not file or (HERE / file).exists(), link
            assert not anchor or anchor in anchors(DOCUMENTS[file or name]), link


@pytest.mark.parametrize('name, least', [('README.md', 2), ('PAPER.md', 30), ('RESULTS.md', 2)])
def test_functions_and_classes_that_are_named_exist(name, least):
    """`module.function`, whatever the module's folder, or `Class.method`."""
    modules = [importlib.import_module('.'.join(file.relative_to(HERE).with_suffix('').parts)) for file in SOURCES]
    owners = {thing.__name__: thing for module in modules for thing in vars(module).values() if isinstance(thing, type)}
    owners |= {module.__name__.split('.')[-1]: module for module in modules}
    owners |= {'torch': torch, 'quantizer': MultiScaleQuantizer}        # the latter as tokenizers call theirs
    checked = 0
    for owner, path in re.findall(r'`(\w+)\.([A-Za-z_]\w*(?:\.\w+)*)', DOCUMENTS[name]):
        if path not in ('py', 'pt', 'png', 'gif', 'json', 'jsonl', 'npz'):
            thing = owners[owner]
            for part in path.split('.'):
                thing = getattr(thing, part)
            checked += 1
    assert checked >= least


def test_tests_that_are_named_exist():
    tests = ''.join(file.read_text(encoding='utf-8') for file in (HERE / 'tests').glob('test_*.py'))
    names = re.findall(r'`(test_\w+)', DOCUMENTS['PAPER.md'])
    assert names and all(f'def {name}' in tests for name in names)


COMMANDS = {name: DOCUMENTS[name] for name in ('README.md', 'RESULTS.md')} | {
    'Makefile': re.sub(r'\$\(call run,(\w+)\)', r'\1.py', (HERE / 'Makefile').read_text(encoding='utf-8')),
    'docstrings': '\n'.join(ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or '' for file in SOURCES)}


@pytest.mark.parametrize('name, least', [('README.md', 5), ('RESULTS.md', 5), ('Makefile', 15), ('docstrings', 40)])
def test_commands_use_settings_that_exist(name, least):
    checked = 0
    for line in COMMANDS[name].replace('\\\n', ' ').splitlines():
        known = None
        for word in re.split(r'[\s`]', line):
            file = HERE / f'{word.removesuffix(".py").replace(".", "/")}.py'
            if re.fullmatch(r'[\w.]+', word) and file.is_file():
                known = {setting.rstrip('_') for setting in read_settings(file)}        # class_ is --class
            elif known and word.startswith('--') and '=' in word:
                checked += 1
                assert word[2:].partition('=')[0] in known, line
    assert checked >= least


VARS_OWN, DEFAULT, STRONG = [1.5, 0.96], [2.0, 0.4], [4.0, 0.9]     # cfg and top_p
# of README.md: what is compared with the full method, on which data, and how sampled
CLAIMS = {
    'Predicting focus beats predicting scale': [
        ('VAR', 'demo', None), ('var', 'charts', DEFAULT), ('var', 'charts_4800', DEFAULT),
        ('var', 'photos', DEFAULT), ('var', 'photos', VARS_OWN), ('var', 'photos', STRONG)],
    'The disk beats a Gaussian': [('gaussian', 'charts', DEFAULT), ('gaussian', 'photos', DEFAULT)],
    'The teacher helps': [('no_teacher', 'charts', DEFAULT), ('no_teacher', 'photos', DEFAULT)],
    'Two tokenizers beat one': [('no_dual', data, way) for data in ('charts', 'photos') for way in (DEFAULT, VARS_OWN)]}


@pytest.mark.parametrize('claim', CLAIMS)
def test_the_results_in_the_readme_are_those_of_the_runs(claim):
    """That table is typed by hand: means over seeds before → after, and (mean ± standard error) of the paired difference."""
    def distances(row, data, way):
        if data == 'demo':
            return {run['seed']: run['fd_cnn'] for run in results.read('demo') if run['method'] == row}
        return results.distances(results.runs_by_row(f'ablation_{data}')[row], way)

    means, differences = [], []
    for row, data, way in CLAIMS[claim]:
        without, full = distances(row, data, way), distances('FVAR' if data == 'demo' else 'full', data, way)
        pairs = [full[seed] - without[seed] for seed in full]
        means.append(f'{mean(without.values()):.1f} → {mean(full.values()):.1f}')
        differences.append(f'({mean(pairs):+.1f} ± {stdev(pairs) / len(pairs) ** 0.5:.1f})'.replace('-', '−'))
    cell = re.search(rf'^\| {claim} \|.*\|(.*)\|$', DOCUMENTS['README.md'], re.M)[1]
    assert re.findall(r'\([+−][^)]*\)', cell) == differences
    typed = re.findall(r'\d+\.\d → \d+\.\d', cell)
    assert typed and typed == means[:len(typed)]            # of the last ways of sampling only the difference may be given
