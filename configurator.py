"""Settings of a script: plain globals, overridden by config files and --name=value.

A script writes its settings as top-level assignments, each with a comment, and calls

    config = configure(globals())

Every assignment above that call is a setting. The command line, for example

    python train_fvar.py config/charts.py --steps=100 --distill=False

is read from left to right. A config file is Python code that is executed; its global names override the
settings of the same name. One file can serve several scripts: the variable `script` ('train_fvar',
'encode', …) says which one reads it, and settings of other scripts are ignored. `--help` prints the
docstring and the settings with their comments.
"""
import ast
import difflib
import os
import runpy
import sys
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can fix. Shown as one line; exit status 2."""


class Console:
    """stdout or stderr that never raises: a run must not end because of what it prints, or who reads it.

    Characters that the encoding lacks become '?'. Text is dropped if the stream is closed or its reader gone.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, 'w')       # None if it was closed from the start
        if hasattr(self.stream, 'reconfigure'):
            self.stream.reconfigure(errors='replace')

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def read_settings(source_file):
    """Reads the settings of a script from its source, without running it.

    Returns {name: comment} in order, for each top-level `name = value` or `a, b = values` above the call of
    configure(), and nothing without that call. The comment is on the assignment's last line; it may be ''.
    """
    source = Path(source_file).read_text(encoding='utf-8')
    lines, settings = source.splitlines(), {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign):
            continue
        if ast.unparse(node.value).startswith('configure('):
            return settings
        comment = lines[node.end_lineno - 1][node.end_col_offset:].strip(' #')
        for target in ast.walk(node.targets[0]):
            if isinstance(target, ast.Name) and not target.id.startswith('_'):
                settings[target.id] = comment
    return {}


@cache
def settings_of_all_scripts():
    """The names that a shared config file may set."""
    files = (*HERE.glob('*.py'), *HERE.glob('experiments/*.py'))
    return {name for file in files for name in read_settings(file)}


def check_type(name, value, default):
    """Converts a value to the type of its default (int → float, list → tuple). UserError if it does not fit.

    Numbers must be finite, and may be negative only if the default is (−1 often means automatic). Items of a
    tuple are like the first of its default. A ~ at the start of a text is the home folder.
    """
    wanted = type(default)
    if (wanted, type(value)) in ((float, int), (tuple, list)):
        value = wanted(value)
    if type(value) is not wanted:
        raise UserError(f'--{name} takes {wanted.__name__} (default {default!r}); got {value!r}')
    if wanted is str:
        return os.path.expanduser(value)
    if wanted in (int, float) and not min(default, 0) <= value < 2 ** 63:
        raise UserError(f'--{name}={value}: must be at least {min(default, 0)} and less than 2^63')
    if wanted is tuple and default:
        return tuple(check_type(name, item, default[0]) for item in value)
    return value


def parse_value(name, text, default):
    """Converts text from the command line to the default's type. Strings need no quotes."""
    if isinstance(default, str):
        return check_type(name, text, default)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        value = text
    if isinstance(default, tuple) and not isinstance(value, (tuple, list, str)):
        value = (value,)                                    # --classes=207
    return check_type(name, value, default)


def unknown(name, known, where):
    close = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean {close[0]!r}?' if close else '--help lists the settings'
    return UserError(f'{where}: unknown setting {name!r}; {hint}')


def read_config_file(path, script, settings):
    """Runs a config file and returns the values it sets for this script. UserError names the bad line."""
    path = str(path)
    if not Path(path).is_file():
        raise UserError(f'{path}: no such config file')
    try:
        scope = runpy.run_path(path, {'script': script})
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [getattr(error, 'lineno', 1), *(frame.lineno for frame in frames if frame.filename == path)]
        reason = ' '.join(str(error).splitlines())
        raise UserError(f'{path}, line {lines[-1]}: {type(error).__name__}: {reason}') from None

    values = {}
    del scope['script']
    for name, value in scope.items():
        if name in settings:
            values[name] = check_type(name, value, settings[name])
        elif name.startswith('_') or hasattr(value, '__name__'):            # modules, functions and classes
            continue
        elif name not in settings_of_all_scripts():
            raise unknown(name, settings_of_all_scripts(), path)
    return values


def parse(namespace, arguments, positional=None):
    """What the arguments override, as {name: value}; see configure(). --help prints settings and exits."""
    source_file = namespace['__file__']
    comments = read_settings(source_file)
    settings = {name: namespace[name] for name in comments}
    if '--help' in arguments or '-h' in arguments:
        print(namespace['__doc__'], '\nSettings, overridden by a config file or --name=value:\n')
        for name, comment in comments.items():
            setting = f'--{name.rstrip("_")}={settings[name]!r}'
            print(f'  {setting:36}  {comment}')
        raise SystemExit(0)

    values = {}
    for argument in arguments:
        if argument.startswith('--'):
            name, equals, text = argument[2:].partition('=')
            key = name if name in settings else f'{name}_'  # --class sets class_
            if key not in settings:
                raise unknown(name, settings, argument)
            if not equals and settings[key] is not False:
                raise UserError(f'{argument}: write --{name}=VALUE (now {settings[key]!r})')
            values[key] = parse_value(name, text if equals else 'True', settings[key])
        elif argument.endswith('.py'):
            values |= read_config_file(argument, Path(source_file).stem, settings)
        elif positional:
            values[positional] = argument
        else:
            raise UserError(f'{argument}: expected a config file (something.py) or --name=value')
    if values.get('out_dir') == '':                         # would write to /tokenizer.pt
        raise UserError('--out_dir=: give a folder; . is the current one')
    return values


def configure(namespace, positional=None):
    """Applies the command line to a script's globals, and returns all settings as a dict.

    namespace: the script's globals(). positional: the setting that a bare argument sets (pyramid.py PHOTO).
    Imported scripts keep their defaults. A mistake ends the program with one line and status 2.
    """
    if namespace['__name__'] == '__main__':
        sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
        try:
            namespace.update(parse(namespace, sys.argv[1:], positional))
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)
            raise SystemExit(2) from None
    return {name: namespace[name] for name in read_settings(namespace['__file__'])}
