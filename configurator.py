"""Settings of a script: plain globals, overridden by config files and --key=value.

A script writes its settings as top-level assignments, each with one comment, and calls

    config = configure(globals())

Everything assigned above that call is a setting. The command line is then

    python train_fvar.py config/charts.py --steps=100 --distill=False

read from left to right. A config file is ordinary Python (the user's own: it is executed) whose
global names override settings of the same name. It may serve several scripts: the name `script`
('train_fvar', 'encode', ...) tells it who is reading, and settings that belong to another script of
this folder are left alone. `--help` prints the docstring and the settings with their comments.
"""
import ast
import difflib
import keyword
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake the user can mend: shown as one line, exit status 2."""


def read_settings(source_file):
    """The settings of a script, read from its source without running it.

    Returns {name: comment}, in order: every top-level `name = value` (or `a, b = values`) above the
    line that calls configure(), with the comment beside it ('' when there is none). A file which
    never calls configure() has no settings.
    """
    lines = Path(source_file).read_text(encoding='utf-8').splitlines()
    settings = {}
    for node in ast.parse('\n'.join(lines)).body:
        if not isinstance(node, ast.Assign):
            continue
        if isinstance(node.value, ast.Call) and getattr(node.value.func, 'id', '') == 'configure':
            return settings
        comment = lines[node.end_lineno - 1][node.end_col_offset:].strip().lstrip('#').strip()
        for target in ast.walk(node.targets[0]):
            if isinstance(target, ast.Name) and not target.id.startswith('_'):
                settings[target.id] = comment
    return {}


def settings_of_all_scripts():
    """Names of the settings of every script in this folder: what a shared config file may set."""
    names = set()
    for file in (*HERE.glob('*.py'), *HERE.glob('experiments/*.py')):
        names.update(read_settings(file))
    return names


def check_type(name, value, default):
    """The value converted to the default's type (int → float, list → tuple), or a UserError.

    A number may be negative only where the default is (−1 for "choose for me"), and must be finite.
    """
    wanted = type(default)
    if wanted in (int, float) and type(value) in (int, float) and not min(default, 0) <= value < 2 ** 63:
        raise UserError(f'--{name}={value}: must be at least {min(default, 0)} and less than 2^63')
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is tuple and type(value) in (list, tuple):
        kind = type(default[0]) if default else None
        if kind and not all(type(item) is kind or (kind is float and type(item) is int) for item in value):
            raise UserError(f'--{name} takes {kind.__name__}s separated by commas, like {default}; got {value!r}')
        return tuple(value)
    if type(value) is not wanted:
        raise UserError(f'--{name} takes {wanted.__name__} (default {default!r}); '
                        f'got {type(value).__name__} {value!r}')
    return value


def parse_value(name, text, default):
    """Text from the command line as a value of the default's type. Strings need no quotes."""
    if isinstance(default, str):
        return text
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
    """Runs a config file; returns the values it sets for this script. Raises UserError naming the line."""
    if not Path(path).is_file():
        raise UserError(f'{path}: no such config file')
    scope = {'script': script, '__file__': str(path)}
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), str(path), 'exec'), scope)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f'{path}, line {error.lineno}: not valid Python: {error.msg}') from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f'{path}, line {lines[-1]}' if lines else str(path)
        reason = ' '.join(str(error).splitlines())
        raise UserError(f'{where}: {type(error).__name__}: {reason}') from None

    values, everyone = {}, None
    for name, value in scope.items():
        if name.startswith('_') or name == 'script' or type(value) is type(ast) or callable(value):
            continue
        if name in settings:
            values[name] = check_type(name, value, settings[name])
        else:
            everyone = everyone or settings_of_all_scripts()
            if name not in everyone:
                raise unknown(name, everyone, path)
    return values


def print_help(source_file, doc, settings):
    print(doc.strip(), '\n\nSettings, each overridden by a config file or --name=value:\n')
    comments = read_settings(source_file)
    shown = {name: f'--{name.rstrip("_")}={value!r}' for name, value in settings.items()}
    width = min(44, max(map(len, shown.values())))
    for name, text in shown.items():
        print(f'  {text:{width}}  {comments[name]}'.rstrip())


def parse(namespace, arguments, positional=None):
    """What the arguments override, as {name: value}; see configure()."""
    source_file = namespace['__file__']
    settings = {name: namespace[name] for name in read_settings(source_file)}
    script = Path(source_file).stem
    if '--help' in arguments or '-h' in arguments:
        print_help(source_file, namespace['__doc__'] or '', settings)
        raise SystemExit(0)

    values = {}
    for argument in arguments:
        if argument.startswith('--'):
            name, equals, text = argument[2:].partition('=')
            name += '_' * keyword.iskeyword(name)           # --class sets class_
            if name not in settings:
                raise unknown(name, settings, argument)
            if not equals and settings[name] is not False:
                raise UserError(f'{argument}: write --{name}=VALUE (now {settings[name]!r})')
            values[name] = parse_value(name.rstrip('_'), text if equals else 'True', settings[name])
        elif argument.endswith('.py'):
            values.update(read_config_file(argument, script, settings))
        elif positional:
            values[positional] = argument
        else:
            raise UserError(f'{argument}: expected a config file (something.py) or --name=value')
    if values.get('out_dir') == '':                         # or "/tokenizer.pt" would be written
        raise UserError('--out_dir=: name a folder; . is this one')
    return values


def configure(namespace, positional=None):
    """Applies the command line to a script's globals; returns all settings as a dict.

    namespace: the script's globals(). positional: the setting that a bare argument sets (pyramid.py PHOTO).
    Imported scripts keep their defaults. A mistake ends the program with one line and status 2.
    """
    if namespace['__name__'] == '__main__':
        try:
            namespace.update(parse(namespace, sys.argv[1:], positional))
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)
            raise SystemExit(2) from None
    return {name: namespace[name] for name in read_settings(namespace['__file__'])}
