"""README.md, PAPER.md and RESULTS.md: links lead somewhere, and what they call by name exists."""
import importlib
import re

import pytest

from configurator import HERE, read_settings

DOCUMENTS = {name: (HERE / name).read_text(encoding='utf-8') for name in ('README.md', 'PAPER.md', 'RESULTS.md')}
MODULES = [file.stem for file in HERE.glob('*.py')]


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


@pytest.mark.parametrize('name', DOCUMENTS)
def test_functions_and_classes_that_are_named_exist(name):
    for module, path in re.findall(r'`(\w+)\.([A-Za-z_]\w*(?:\.\w+)*)', DOCUMENTS[name]):
        if module in MODULES and path.split('.')[0] not in ('py', 'png', 'pt'):
            thing = importlib.import_module(module)
            for part in path.split('.'):
                thing = getattr(thing, part)


def test_tests_that_are_named_exist():
    tests = ''.join(file.read_text(encoding='utf-8') for file in (HERE / 'tests').glob('test_*.py'))
    names = re.findall(r'`(test_\w+)', DOCUMENTS['PAPER.md'])
    assert names and all(f'def {name}' in tests for name in names)


@pytest.mark.parametrize('name', ['README.md', 'RESULTS.md'])
def test_commands_use_settings_that_exist(name):
    checked = 0
    for line in DOCUMENTS[name].replace('\\\n', ' ').splitlines():
        known = None
        for word in re.split('[ `]', line):
            file = HERE / f'{word.removesuffix(".py").replace(".", "/")}.py'
            if re.fullmatch(r'[\w.]+', word) and file.is_file():
                known = read_settings(file)
            elif known and word.startswith('--') and '=' in word:
                checked += 1
                assert word[2:].partition('=')[0] in known, line
    assert checked >= 5
