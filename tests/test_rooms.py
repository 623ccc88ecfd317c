"""Who may import whom: pyramid → tokenizer → model, stages above, experiments above those, util below."""
import ast

import pytest

from configurator import HERE

METHOD = ['pyramid', 'tokenizer', 'model']
STAGES = ['train_tokenizer', 'encode', 'train_fvar', 'sample', 'evaluate', 'editing', 'published']


def imported_by(file, later=True):
    """Modules that a file imports, anywhere in it; later=False: but not those that a function imports when it is called."""
    modules, tree = set(), ast.parse(file.read_text(encoding='utf-8'))
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not later]:
        function.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return modules | {module.split('.')[0] for module in modules}


@pytest.mark.parametrize('name', METHOD)
def test_a_file_of_the_method_imports_only_what_comes_before_it(name):
    above = {*METHOD[METHOD.index(name):], *STAGES, 'data', 'experiments'}
    assert not imported_by(HERE / f'{name}.py') & above


def test_util_and_stages_import_no_experiment_and_util_no_method():
    for file in (HERE / 'util').glob('*.py'):
        assert not imported_by(file) & {*METHOD, *STAGES, 'experiments'}, file.name
    for file in HERE.glob('*.py'):
        assert 'experiments' not in imported_by(file), file.name


def test_stage_1_loads_no_transformer():
    """Followed from file to file, which takes no seconds."""
    loaded, new = set(), {'train_tokenizer', 'encode'}
    while new:
        loaded |= new
        files = [HERE / f'{name.replace(".", "/")}.py' for name in new]
        new = set().union(*(imported_by(file, later=False) for file in files if file.exists())) - loaded
    assert {'data', 'util.checkpoint', 'util.charts'} < loaded and 'model' not in loaded
