"""configurator.py: what counts as a setting, what overrides it, and what is said about mistakes."""
import importlib
import os
import runpy
import subprocess
import sys

import pytest

from configurator import HERE, UserError, check_type, parse, read_config_file, read_settings

TOY = '''"""A toy script.

    python toy.py photo.jpg
"""
import sys
from configurator import configure

# things
name = 'charts'                 # a word
steps = 100_000                 # how many
rate = 1e-3                     # how fast; # is no end
on = True                       # already on
flag = False                    # off, until asked for
sizes = (1, 2, 3)               # whole numbers
noise = (0.5, 1.0)
anything = ()                   # of any kind
first, second = 1, 2.0          # two at once
long = (1,
        2)                      # over two lines
_hidden = 3                     # nobody's business
config = configure(globals())
later = 4                       # too late


def inside():
    deeper = 5                  # not at the top
'''
SCRIPTS = ('train_tokenizer', 'encode', 'train_fvar', 'sample', 'evaluate')
CONFIGS = sorted(str(file.relative_to(HERE)) for file in (HERE / 'config').rglob('*.py'))


@pytest.fixture
def toy_file(tmp_path):
    (tmp_path / 'toy.py').write_text(TOY)
    return str(tmp_path / 'toy.py')


@pytest.fixture
def toy(toy_file):
    """What the toy script makes of its arguments."""
    return lambda *arguments, positional=None: parse(runpy.run_path(toy_file), list(arguments), positional)


@pytest.fixture
def config(tmp_path):
    """Writes a config file; returns its path."""
    def write(text, name='mine.py'):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


# -----------------------------------------------------------------------------
# settings

def test_settings_are_the_assignments_above_configure_with_their_comments(toy_file):
    assert read_settings(toy_file) == {
        'name': 'a word', 'steps': 'how many', 'rate': 'how fast; # is no end', 'on': 'already on',
        'flag': 'off, until asked for', 'sizes': 'whole numbers', 'noise': '', 'anything': 'of any kind',
        'first': 'two at once', 'second': 'two at once', 'long': 'over two lines'}
    assert list(read_settings(toy_file))[0] == 'name'


def test_reading_settings_runs_nothing(config):
    assert read_settings(config('raise SystemExit\nsteps = 1  # never\nconfig = configure(globals())\n')) == {
        'steps': 'never'
    }


def test_a_file_that_never_configures_has_no_settings():
    assert read_settings(HERE / 'model.py') == {}


@pytest.mark.parametrize('script', SCRIPTS + (
    'pyramid', 'experiments/ablation', 'experiments/aliasing', 'experiments/bench', 'experiments/refocus'))
def test_every_setting_of_every_script_has_a_comment(script):
    settings = read_settings(HERE / f'{script}.py')
    assert settings and all(settings.values())


def test_an_imported_script_keeps_its_defaults_and_a_started_one_does_not(toy_file, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [toy_file, '--steps=7', '--second=3'])
    imported, started = (
        runpy.run_path(toy_file, run_name='toy'),
        runpy.run_path(toy_file, run_name='__main__'),
    )
    assert imported['config']['steps'] == imported['steps'] == 100_000
    assert started['config']['steps'] == started['steps'] == 7 and started['second'] == 3.0
    assert list(started['config']) == list(read_settings(toy_file))


# -----------------------------------------------------------------------------
# overrides

@pytest.mark.parametrize('argument, value', [
    ('--steps=2_000', 2000),
    ('--rate=1e-5', 1e-5),
    ('--rate=3', 3.0),
    ('--second=0', 0.0),
    ('--on=False', False),
    ('--flag', True),
    ('--flag=True', True),
    ('--sizes=4,5', (4, 5)),
    ('--sizes=[4,5]', (4, 5)),
    ('--sizes=(4,)', (4,)),
    ('--sizes=7', (7,)),
    ('--noise=0.1,2', (0.1, 2.0)),
    ('--anything=207', (207,)),
    ('--anything=207,980', (207, 980)),
    ('--name=7', '7'),
    ('--name=', ''),
    ('--name=a=b c', 'a=b c'),
    ('--name=~/run', os.path.expanduser('~/run')),
])
def test_a_value_takes_the_type_of_its_default(toy, argument, value):
    name = argument[2:].partition('=')[0]
    values = toy(argument)
    assert values == {name: value} and type(values[name]) is type(value)


@pytest.mark.parametrize('argument, message', [
    ('--steps=True', r'--steps takes int \(default 100000\); got True'),
    ('--steps=1.5', '--steps takes int .*got 1.5'),
    ('--steps=many', "--steps takes int .*got 'many'"),
    ('--steps=', "--steps takes int .*got ''"),
    ('--rate=True', '--rate takes float .*got True'),
    ('--steps=-1', '--steps=-1: must be at least 0 and less than 2.63'),
    ('--rate=-1e-9', '--rate=-1e-09: must be at least 0'),
    ('--rate=1e999', '--rate=inf: must be at least 0 and less than'),
    ('--steps=9223372036854775808', 'less than 2.63'),
    ('--rate=fast', '--rate takes float .*got .fast.'),
    ('--flag=1', '--flag takes bool .*got 1'),
    ('--flag=false', "--flag takes bool .*got 'false'"),
    ('--sizes=1,2.5', '--sizes takes int .*got 2.5'),
    ('--sizes=1,True', '--sizes takes int .*got True'),
    ('--sizes=2.5', '--sizes takes int .*got 2.5'),
    ('--sizes=few', '--sizes takes tuple .*got .few.'),
    ('--noise=0.1,True', '--noise takes float .*got True'),
    ('--anything=cat', '--anything takes tuple .*got .cat.'),
    ('--on', r'write --on=VALUE \(now True\)'),
    ('--steps', r'write --steps=VALUE \(now 100000\)'),
    ('--setps=3', "--setps=3: unknown setting 'setps'; did you mean 'steps'"),
    ('--xyzzy=3', "unknown setting 'xyzzy'; --help lists"),
    ('--later=3', "unknown setting 'later'"),
    ('--_hidden=4', "unknown setting '_hidden'"),
    ('loose', 'loose: expected a config file .* or --name=value'),
    ('-x', '-x: expected a config file'),
])
def test_a_mistyped_argument_is_named(toy, argument, message):
    with pytest.raises(UserError, match=message) as error:
        toy(argument)
    assert '\n' not in str(error.value)


def test_check_type_gives_tuples_for_the_lists_of_a_config_file():
    assert check_type('sizes', [4, 5], (1,)) == (4, 5)
    assert type(check_type('rate', 2, 1.0)) is float


def test_a_number_may_be_negative_where_its_default_is():
    assert check_type('drop_path', -1, -1.0) == -1.0
    with pytest.raises(UserError, match='--drop_path=-2.0: must be at least -1.0'):
        check_type('drop_path', -2, -1.0)


def test_nothing_given_overrides_nothing(toy):
    assert toy() == {}


def test_arguments_are_read_from_left_to_right(toy, config):
    file = config('steps, rate = 5, 0.5')
    assert toy('--steps=7', file) == {'steps': 5, 'rate': 0.5}
    assert toy(file, '--steps=7') == {'steps': 7, 'rate': 0.5}
    assert toy(file, config('rate = 2', 'other.py')) == {'steps': 5, 'rate': 2.0}
    assert toy('--steps=7', '--steps=8') == {'steps': 8}


def test_a_bare_argument_is_the_positional_setting(toy):
    assert toy('photo.jpg', '--steps=3', positional='name') == {'name': 'photo.jpg', 'steps': 3}


def test_a_setting_may_be_called_like_a_word_of_python(capsys):
    sample = vars(importlib.import_module('sample'))
    assert parse(sample, ['--class=3']) == {'class_': 3}
    with pytest.raises(UserError, match="--class takes int .default -1.; got 'dog'"):
        parse(sample, ['--class=dog'])
    with pytest.raises(SystemExit):
        parse(sample, ['--help'])
    assert '  --class=-1 ' in capsys.readouterr().out


def test_help_wins_over_everything_and_shows_the_defaults(toy, capsys):
    with pytest.raises(SystemExit) as stop:
        toy('--nonsense', '-h')
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and 'A toy script.' in shown
    assert "--name='charts'" in shown and '--noise=(0.5, 1.0)' in shown and '_hidden' not in shown


# -----------------------------------------------------------------------------
# config files

def test_a_config_file_is_python(toy, config):
    """Imports, functions and names with an underscore are its own business."""
    text = ('import math\nfrom math import sqrt\n\ndef twice(n):\n    return 2 * n\n\n'
            '_half = 4\nsteps = twice(_half) + int(sqrt(4))\n')
    assert toy(config(text)) == {'steps': 10}


def test_a_config_file_knows_which_script_reads_it(toy, config):
    assert toy(config("if script == 'toy':\n    steps = 1\nif script == 'encode':\n    steps = 2\n")) == {
        'steps': 1
    }


def test_settings_of_another_script_are_left_alone(toy, config):
    assert toy(config('steps = 1\nvocab_size = 16\nlambda_logit = "whatever"\n')) == {'steps': 1}


@pytest.mark.parametrize('text, message', [
    ('steps = 1\nrate = = 2\n', 'mine.py, line 2: SyntaxError: invalid syntax'),
    ('sizes = (1,\n', 'mine.py, line 1: SyntaxError'),
    ('steps = 1\n\nrate = steps / 0\n', 'mine.py, line 3: ZeroDivisionError: division by zero'),
    ('def half(n):\n    return n / None\n\nsteps = half(2)\n', 'mine.py, line 2: TypeError'),
    ('rate = lr\n', "mine.py, line 1: NameError: name 'lr' is not defined"),
    ('import nosuchmodule\n', 'mine.py, line 1: ModuleNotFoundError'),
    ('steps = 1\nstpes = 2\n', "mine.py: unknown setting 'stpes'; did you mean 'steps'"),
    ('vocabulary_size = 3\n', "mine.py: unknown setting 'vocabulary_size'; did you mean 'vocab_size'"),
    ('steps = 1.5\n', '--steps takes int .*got 1.5'),
    ('flag = 1\n', '--flag takes bool'),
    ('sizes = [1, "2"]\n', '--sizes takes int '),
    ('rate = float("nan")\n', '--rate=nan: must be'),
])
def test_a_mistake_in_a_config_file_is_named(toy, config, text, message):
    with pytest.raises(UserError, match=message) as error:
        toy(config(text))
    assert '\n' not in str(error.value)


def test_the_line_named_is_one_of_the_config_file_even_if_a_library_fails(toy, config):
    with pytest.raises(UserError, match='mine.py, line 3: JSONDecodeError'):
        toy(config('import json\n\nsteps = json.loads("{")\n'))


def test_a_missing_config_file_is_named(toy, tmp_path):
    with pytest.raises(UserError, match='nowhere.py: no such config file'):
        toy(str(tmp_path / 'nowhere.py'))


@pytest.mark.parametrize('config_file', CONFIGS)
def test_every_script_takes_every_file_in_config(config_file):
    for script in SCRIPTS:
        settings = importlib.import_module(script).config
        assert read_config_file(HERE / config_file, script, settings)['out_dir'].startswith('out')


@pytest.mark.parametrize('config_file', CONFIGS)
def test_what_a_config_file_sets_for_one_script_is_a_setting_of_that_script(config_file):
    """A name under the wrong `if script ==` would be taken for another script's, and do nothing."""
    def names(script):
        return set(runpy.run_path(str(HERE / config_file), {'script': script}))

    for script in SCRIPTS:
        assert names(script) - names('nobody') <= set(importlib.import_module(script).config)


# -----------------------------------------------------------------------------
# the command line itself

@pytest.mark.parametrize('name_of_script', ['train_fvar', 'experiments/ablation', 'experiments/refocus'])
def test_help_of_a_script_is_its_docstring_and_every_setting_with_its_comment(run_script, name_of_script):
    status, shown, err = run_script(name_of_script, '--help')
    script = importlib.import_module(name_of_script.replace('/', '.'))
    assert not status and err == '' and shown.startswith(script.__doc__.strip())
    lines = shown.splitlines()
    for name, comment in read_settings(HERE / f'{name_of_script}.py').items():
        assert [
            line
            for line in lines
            if line.startswith(f'  --{name}={script.config[name]!r} ') and line.endswith(f'  {comment}')
        ]


def test_a_mistake_on_the_command_line_is_one_line_and_status_2():
    run = subprocess.run([sys.executable, 'sample.py', 'config/charts.py', '--per_clas=3'], cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ''
    assert run.stderr == "error: --per_clas=3: unknown setting 'per_clas'; did you mean 'per_class'?\n"


# -----------------------------------------------------------------------------
# the console

SPEAKER = '''"""ρ × …"""
import os, sys
from configurator import configure
rows = 3                        # × rows
config = configure(globals())
for i in range(3):
    print('3 × 4 … ρ', flush=True)
    print('3 × 4 … ρ', os.fsdecode(b'\\xff'), file=sys.stderr)
open('saved', 'w').close()
'''


@pytest.fixture
def speak(tmp_path):
    """Runs a script that prints and then saves a file."""
    def speak(*arguments, **options):
        (tmp_path / 'speaker.py').write_text(SPEAKER, encoding='utf-8')
        environment = os.environ | {'PYTHONPATH': str(HERE)} | options.pop('env', {})
        command = [sys.executable, 'speaker.py', *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, **options)
    return speak


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252', 'utf-8'])
def test_a_narrow_encoding_does_not_end_a_run(speak, tmp_path, encoding):
    for arguments in (), ('--help',), ('--rows=×',):
        done = speak(*arguments, env={'PYTHONIOENCODING': encoding}, capture_output=True)
        assert done.returncode == (2 if arguments == ('--rows=×',) else 0) and b'Traceback' not in done.stderr
        assert len(done.stdout + done.stderr) > 10
    assert (tmp_path / 'saved').exists()


@pytest.mark.skipif(os.name != 'posix', reason='closes a stream as a shell does')
@pytest.mark.parametrize('stream', [1, 2])
def test_a_console_that_is_closed_or_that_nobody_reads_ends_no_run(speak, tmp_path, stream):
    for arguments in (), ('--help',):
        reader, writer = os.pipe()
        os.close(reader)
        for instead in (lambda: os.close(stream), lambda: os.dup2(writer, stream)):
            (tmp_path / 'saved').unlink(missing_ok=True)
            other = {'stdout' if stream == 2 else 'stderr': subprocess.PIPE}
            done = speak(*arguments, preexec_fn=instead, **other)
            assert done.returncode == 0 and b'Traceback' not in (done.stderr or b'')
            assert (tmp_path / 'saved').exists() != bool(arguments)
        os.close(writer)
