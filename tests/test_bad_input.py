"""Bad input, as tables: pictures, data folders, token files, checkpoints and options that are wrong.

Each is handled and counted, or ends the run with one line and status 2 (a mistake) or 1 (a fault of the
machine) and changes nothing. More tables: BAD in test_end_to_end.py, test_data.py, test_official.py and
test_samples.py.
"""
import errno
import io
import json
import os
import runpy
import shutil
import struct
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from util import checkpoint
from configurator import HERE
from data import ImageFolder
from model import build_student
from tokenizer import build_tokenizers

STAGE1 = dict(
    image_size=16,
    patch_nums=(1, 2, 4),
    vocab_size=32,
    codebook_dim=4,
    channels=8,
    channel_mult=(1, 1, 1),
    res_blocks=1,
    alias_vocab_size=8,
    alias_codebook_dim=4,
    alias_channels=4,
    alias_res_blocks=1,
    beta=0.25,
    dual=True,
)
STAGE2 = dict(
    depth=1, embed_dim=16, num_heads=2, mlp_ratio=2.0, qk_norm=True, shared_aln=False, drop_path=0.0
)
ARGUMENTS = {
    'train_tokenizer': '--data={data} --image_size=16 --patch_nums=1,2,4 --channels=8 --channel_mult=1,1,1 '
                       '--batch_size=4 --steps=1',
    'encode': '',
    'train_fvar': '--depth=1 --embed_dim=16 --num_heads=2 --teacher_blocks=1 --batch_size=4 --steps=1',
    'sample': '--per_class=1',
}


def photo(size=(24, 20), mode='RGB'):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)).convert(
        mode
    )


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_claims(width, height):
    """The header of a PNG of that size (px), and nothing behind it."""
    header = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + struct.pack('>I', 13)
        + header
        + struct.pack('>I', zlib.crc32(header))
        + struct.pack('>I', 9)
        + b'IDAT'
    )


@pytest.fixture(scope='module')
def ready(tmp_path_factory):
    """Folders data (two classes of four pictures, one each held out) and out (networks, token files)."""
    folder = tmp_path_factory.mktemp('ready')
    data, out = folder / 'data', folder / 'out'
    for split, count in (('train', 4), ('val', 1)):
        for name in ('cat', 'dog'):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                photo().save(data / split / name / f'{i}.png')
    torch.manual_seed(0)
    structure, alias = build_tokenizers(STAGE1)
    student = build_student(STAGE2, structure, 2)
    checkpoint.save_checkpoint(
        out / 'tokenizer.pt',
        {
            'kind': 'tokenizer',
            'config': STAGE1 | {'data': str(data)},
            'step': 7,
            'structure': structure.state_dict(),
            'alias': alias.state_dict(),
        },
    )
    checkpoint.save_checkpoint(
        out / 'student.pt',
        {
            'kind': 'student',
            'config': STAGE2,
            'step': 9,
            'classes': ['cat', 'dog'],
            'tokenizer': checkpoint.digest(structure.state_dict()),
            'student': student.state_dict(),
        },
    )
    assert start('encode', out, data)[0] == 0
    return SimpleNamespace(data=data, out=out)


def start(script, out, data, *arguments):
    """Runs a script in this process as a command line does: (exit status, stderr without progress bars)."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        patch.setattr(sys, 'argv', [f'{script}.py', f'--out_dir={out}', '--device=cpu', '--dtype=float32',
                                    *ARGUMENTS[script].format(data=data).split(), *arguments])
        patch.setattr(sys, 'stdout', io.StringIO())
        patch.setattr(sys, 'stderr', errors := io.StringIO())
        try:
            runpy.run_path(str(HERE / f'{script}.py'), run_name='__main__')
            status = 0
        except SystemExit as stop:
            status = stop.code
    return status, '\n'.join(
        line for line in errors.getvalue().splitlines() if line.strip() and '%|' not in line
    )


@pytest.fixture
def copies(ready, tmp_path):
    """Folders data and out, to be spoilt."""
    for name in ('data', 'out'):
        shutil.copytree(getattr(ready, name), tmp_path / name)
    saved = torch.load(tmp_path / 'out' / 'tokenizer.pt', weights_only=True)
    saved['config']['data'] = str(tmp_path / 'data')
    torch.save(saved, tmp_path / 'out' / 'tokenizer.pt')
    return SimpleNamespace(data=tmp_path / 'data', out=tmp_path / 'out')


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


# -----------------------------------------------------------------------------
# pictures

def write(content):
    return lambda path: Path(os.fsdecode(path)).write_bytes(content)


def transparent_palette():
    image = photo(mode='P')
    return encoded(image, 'PNG', transparency=3)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(), 'JPEG', exif=exif)


def unreadable(path):
    path.write_bytes(encoded(photo(), 'PNG'))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip('nothing is unreadable to root')


JPEG, PNG = encoded(photo(), 'JPEG'), encoded(photo(), 'PNG')
READABLE = {
    'CMYK': ('x.jpg', write(encoded(photo(mode='CMYK'), 'JPEG'))),
    'grey': ('x.jpg', write(encoded(photo(mode='L'), 'JPEG'))),
    'one bit': ('x.png', write(encoded(photo(mode='1'), 'PNG'))),
    '16 bits': (
        'x.png',
        write(encoded(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160), 'PNG')),
    ),
    'grey and transparent': ('x.png', write(encoded(photo(mode='LA'), 'PNG'))),
    'palette with transparency': ('x.png', write(transparent_palette())),
    'animated GIF that calls itself PNG': (
        'x.png',
        write(encoded(photo(), 'GIF', save_all=True, append_images=[photo(mode='L')])),
    ),
    'animated WebP': (
        'x.webp',
        write(encoded(photo(), 'WEBP', save_all=True, append_images=[photo(mode='L')])),
    ),
    'PNG that calls itself JPEG': ('x.jpg', write(PNG)),
    'JPEG that calls itself PNG': ('x.png', write(JPEG)),
    'progressive': ('x.jpeg', write(encoded(photo(), 'JPEG', progressive=True))),
    'extension in capitals': ('X.JPG', write(JPEG)),
    'EXIF rotation': ('x.jpg', write(turned())),
    'EXIF that is rubbish': ('x.jpg', write(encoded(photo(), 'JPEG', exif=b'Exif\0\0MM\0*rubbish'))),
    'bytes behind the end': ('x.jpg', write(JPEG + bytes(1000))),
    '1 × 1': ('x.png', write(encoded(photo(size=(1, 1)), 'PNG'))),
    '20000 × 2': ('x.png', write(encoded(photo(size=(20000, 2)), 'PNG'))),
    '2 × 20000': ('x.png', write(encoded(photo(size=(2, 20000)), 'PNG'))),
    'name with spaces': (' x y .png', write(PNG)),
    'name with a newline': ('x\ny.png', write(PNG)),
    'name that is no UTF-8': (b'\xff\xfe.png', write(PNG)),
    'name like an option': ('--steps=3.png', write(PNG)),
    'link to a picture': ('x.png', lambda path: path.symlink_to(path.with_name('0.png'))),
}
BROKEN = {
    '0 bytes': ('x.jpg', write(b'')),
    'truncated JPEG': ('x.jpg', write(JPEG[:len(JPEG) // 2])),
    'truncated PNG': ('x.png', write(PNG[:len(PNG) // 2])),
    'only a header': ('x.png', write(png_that_claims(20, 20))),
    'web page': ('x.jpg', write(b'<html>404 not found</html>')),
    'SVG': ('x.png', write(b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
    'decompression bomb': ('x.png', write(png_that_claims(60_000, 60_000))),
    'picture of no height': ('x.png', write(png_that_claims(20, 0))),
    'link in a circle': ('x.png', lambda path: path.symlink_to(path)),
    'link to nowhere': ('x.png', lambda path: path.symlink_to(path.with_name('nowhere.png'))),
    'pipe': ('x.png', lambda path: os.mkfifo(path)),
    'unreadable file': ('x.png', unreadable),
    'broken name that is no UTF-8': (b'\xff\xfe.png', write(b'')),
}


def place(data, name, make):
    """The file that a row of the tables asks for, in train/cat; skips what this file system cannot hold."""
    path = data / 'train' / 'cat' / os.fsdecode(name)
    try:
        make(path)
    except OSError as error:
        if error.errno in (errno.EILSEQ, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP):
            pytest.skip(f'this file system has no such file: {error}')
        raise
    return str(path)


@pytest.mark.parametrize('case', READABLE)
def test_an_odd_picture_is_read(copies, case):
    path = place(copies.data, *READABLE[case])
    dataset = ImageFolder(copies.data, 'train', 16)
    index = dataset.files.index(path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for key in (index, (index, 5)):
            assert dataset[key][0].shape == (3, 16, 16)
    assert not dataset.skipped.any()


@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_picture_is_skipped_named_and_counted(copies, case, capsys):
    path = place(copies.data, *BROKEN[case])
    dataset = ImageFolder(copies.data, 'train', 16)
    index = dataset.files.index(path)
    assert dataset[index][0].shape == (3, 16, 16)
    shown = capsys.readouterr().err
    assert shown.startswith(f'warning: skipped {path!a}: ') and shown.count('\n') == 1
    assert shown[:-1].isprintable()
    assert dataset.skipped.nonzero().tolist() == [[index]]


def test_every_broken_picture_at_once_is_left_out_of_the_tokens(copies, ready):
    broken = 0
    for i, (name, make) in enumerate(BROKEN.values()):
        try:
            make(copies.data / 'train' / 'cat' / f'broken {i}.png')
            broken += 1
        except pytest.skip.Exception:
            (copies.data / 'train' / 'cat' / f'broken {i}.png').unlink()
    assert start('encode', copies.out, copies.data, '--batch_size=3')[0] == 0
    assert json.loads((copies.out / 'tokens' / 'train.json').read_text())['rows'] == 8
    assert not list((copies.out / 'tokens').glob('*partial*')) and broken > 10


# -----------------------------------------------------------------------------
# data folders, token files, checkpoints, options

def meta(**changes):
    """Changes tokens/train.json; a value of None removes the name."""
    def change(at):
        file = at.out / 'tokens' / 'train.json'
        old = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in old.items() if value is not None}))
    return change


def saved(name, **changes):
    """Changes a checkpoint; a value of None removes the name, a dictionary is merged."""
    def change(at):
        old = torch.load(at.out / name, weights_only=True)
        new = old | {
            key: old[key] | value if isinstance(value, dict) else value for key, value in changes.items()
        }
        new = {
            key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
            for key, value in new.items()
        }
        torch.save({key: value for key, value in new.items() if value is not None}, at.out / name)
    return change


def content(name, what):
    return lambda at: (at.out / name).write_bytes(what)


class Code:
    def __reduce__(self):
        return os.system, ('touch sprung',)


def with_code(at):
    torch.save({'kind': 'student', 'student': Code()}, at.out / 'student.pt')


def remove(*names):
    return lambda at: [
        shutil.rmtree(path) if path.is_dir() else path.unlink() for path in (at.data / name for name in names)
    ]


def only_loose_files(at):
    for file in (at.data / 'train').rglob('*.png'):
        file.rename(at.data / 'train' / f'{file.parent.name}{file.name}')
    remove('train/cat', 'train/dog')(at)


def folder_instead(path):
    def change(at):
        file = at.out / path
        file.unlink()
        file.mkdir()
    return change


BAD = {
    # data folders
    'no pictures at all': ('train_tokenizer', '', remove('train', 'val'), "/train': no such folder"),
    'no classes': ('train_tokenizer', '', only_loose_files, 'has no class folders'),
    'class that only val has': (
        'train_tokenizer',
        '',
        lambda at: shutil.move(at.data / 'train' / 'cat', at.data / 'train' / 'cow'),
        "class 'cat' of",
    ),
    'empty class': ('train_tokenizer', '', lambda at: (at.data / 'train' / 'emu').mkdir(), "class 'emu' of"),
    'class of other files': (
        'train_tokenizer',
        '',
        lambda at: [file.rename(file.with_suffix('.heic')) for file in (at.data / 'train' / 'cat').iterdir()],
        "class 'cat' of",
    ),
    'file as data': (
        'train_tokenizer',
        '--data=/dev/null',
        None,
        "'/dev/null/train': no such folder, or it has no class folders; data must be 'charts' or",
    ),
    'data gone since stage 1': ('encode', '', lambda at: shutil.rmtree(at.data), 'no such folder'),
    'data with a newline': (
        'train_tokenizer',
        '--data=no\nwhere',
        None,
        r"'no\nwhere/train': no such folder",
    ),
    # token files
    'short tokens': (
        'train_fvar',
        '',
        lambda at: os.truncate(at.out / 'tokens' / 'train.bin', 10),
        'damaged or from different runs; run encode.py',
    ),
    'tokens of nobody': ('train_fvar', '', meta(tokenizer=None), 'these tokens come from another tokenizer'),
    'tokens of another': (
        'train_fvar',
        '',
        meta(tokenizer='0123456789abcdef'),
        'these tokens come from another tokenizer',
    ),
    'tokens of other maps': ('train_fvar', '', meta(patch_nums=[1, 2, 3]), 'damaged or from different runs'),
    'description cut short': (
        'train_fvar',
        '',
        content('tokens/train.json', b'{"rows": 8,'),
        'missing, damaged',
    ),
    'description of another kind': (
        'train_fvar',
        '',
        content('tokens/train.json', b'[1, 2]'),
        'missing, damaged',
    ),
    'description that is no UTF-8': (
        'train_fvar',
        '',
        content('tokens/train.json', b'\xff\xfe'),
        'missing, damaged',
    ),
    'negative rows': ('train_fvar', '', meta(rows=-1), 'missing, damaged'),
    'folder for tokens': (
        'train_fvar',
        '',
        folder_instead('tokens/train.bin'),
        'tokens/train.bin: Is a directory',
    ),
    # checkpoints
    'code in a checkpoint': (
        'sample',
        '',
        with_code,
        'student.pt cannot be read (truncated, not a checkpoint, or with code in it, which is never run)',
    ),
    'half a checkpoint': (
        'sample',
        '',
        lambda at: os.truncate(at.out / 'student.pt', 3000),
        'student.pt cannot be read (truncated',
    ),
    'empty checkpoint': ('sample', '', content('student.pt', b''), 'student.pt cannot be read (truncated'),
    'web page as checkpoint': (
        'encode',
        '',
        content('tokenizer.pt', b'<html>404</html>'),
        'tokenizer.pt cannot be read (truncated',
    ),
    'folder as checkpoint': ('sample', '', folder_instead('student.pt'), 'student.pt: no such checkpoint'),
    'checkpoint of something else': (
        'sample',
        '',
        saved('student.pt', kind='cnn'),
        'student.pt holds cnn, not student',
    ),
    'checkpoint of no kind': (
        'sample',
        '',
        saved('student.pt', kind=None),
        'student.pt holds something else, not student',
    ),
    'checkpoint without weights': (
        'sample',
        '',
        saved('student.pt', student=None),
        "student.pt has no 'student'",
    ),
    'checkpoint without a setting': (
        'sample',
        '',
        saved('student.pt', config={'depth': None}),
        "student.pt has no 'depth'",
    ),
    'other depth': (
        'sample',
        '',
        saved('student.pt', config={'depth': 2}),
        'student.pt does not fit this model',
    ),
    'other classes': (
        'sample',
        '',
        saved('student.pt', classes=['cat']),
        'student.pt does not fit this model',
    ),
    'other tokenizer': (
        'sample',
        '',
        saved('student.pt', tokenizer='0123456789abcdef'),
        'trained on the tokens of another tokenizer',
    ),
    'weights that are not finite': (
        'sample',
        '',
        saved('student.pt', student={'head.bias': torch.full((32,), float('nan'))}),
        'student.pt has non-finite numbers in head.bias',
    ),
    # options
    'unknown option': (
        'encode',
        '--speed=9',
        None,
        "--speed=9: unknown setting 'speed'; did you mean 'seed'?",
    ),
    'option of another script': ('encode', '--depth=3', None, "--depth=3: unknown setting 'depth'"),
    'option without a value': ('encode', '--seed', None, '--seed: write --seed=VALUE (now 0)'),
    'word for a number': ('encode', '--crops=few', None, "--crops takes int (default 1); got 'few'"),
    'fraction for a number': ('encode', '--crops=1.5', None, '--crops takes int (default 1); got 1.5'),
    'code for a number': (
        'encode',
        '--crops=__import__("os").getpid()',
        None,
        '--crops takes int (default 1); got ',
    ),
    'argument that is none': (
        'encode',
        'charts',
        None,
        'charts: expected a config file (something.py) or --name=value',
    ),
    'config that is missing': ('encode', 'nowhere.py', None, 'nowhere.py: no such config file'),
    'negative rate': ('train_fvar', '--lr=-1', None, '--lr=-1.0: must be at least 0'),
    'infinite rate': ('train_fvar', '--lr=1e999', None, '--lr=inf: must be at least 0 and less than 2^63'),
    'negative width': ('train_fvar', '--embed_dim=-32', None, '--embed_dim=-32: must be at least 0'),
    'negative seed': ('sample', '--seed=-1', None, '--seed=-1: must be at least 0'),
    'huge seed': ('sample', f'--seed={10**30}', None, 'must be at least 0 and less than 2^63'),
    'huge batch': (
        'train_fvar',
        '--batch_size=1000000000000',
        None,
        'batch_size=1000000000000 must be a multiple of 1 ranks × grad_accum_steps=1, and at most 1048576',
    ),
    'three betas': ('train_fvar', '--betas=0.9,0.9,0.9', None, 'betas=(0.9, 0.9, 0.9): give two numbers'),
    'beta beyond one': ('train_tokenizer', '--betas=0.9,1.5', None, 'betas=(0.9, 1.5): give two numbers'),
    'share beyond one': (
        'train_fvar',
        '--class_dropout=1.5',
        None,
        'class_dropout=1.5: must be at most 1',
    ),
    'heads that do not divide': (
        'train_fvar',
        '--num_heads=3',
        None,
        'embed_dim=16 is not a multiple of num_heads=3',
    ),
    'no blocks': ('train_fvar', '--depth=0', None, 'depth=0'),
    'no pixels': ('train_tokenizer', '--image_size=0', None, 'image_size=0: must be at least 1'),
    'no codes': ('train_tokenizer', '--vocab_size=0', None, 'vocab_size=0: must be at least 1'),
    'no channels': (
        'train_tokenizer',
        '--channel_mult=0,0,0',
        None,
        'channel_mult=(0, 0, 0): give numbers of at least 1',
    ),
    'one token map': (
        'train_tokenizer',
        '--patch_nums=4',
        None,
        'patch_nums=(4,): give at least two token maps',
    ),
    'unknown schedule': ('train_tokenizer', '--focus_schedule=linear', None, "focus_schedule='linear'"),
    'unknown writer': ('train_fvar', '--log_to=excel', None, '--log_to=excel: choose tensorboard or wandb'),
    # output
    'no output folder': ('train_tokenizer', '--out_dir=', None, '--out_dir=: give a folder'),
    'output that cannot be made': (
        'train_tokenizer',
        '--out_dir=/proc/fvar',
        None,
        '/proc/fvar: No such file or directory',
    ),
    'file as output folder': ('train_fvar', '--out_dir=/dev/null', None, 'error: /dev/null'),
    'name too long': ('train_tokenizer', f'--out_dir={"x" * 300}', None, 'File name too long'),
    'link in a circle as output': (
        'train_tokenizer',
        '--out_dir={out}/circle',
        lambda at: (at.out / 'circle').symlink_to(at.out / 'circle'),
        'circle',
    ),
}


@pytest.mark.parametrize('case', BAD)
def test_a_mistake_is_one_line_and_status_2_and_leaves_everything_as_it_was(
    copies, case, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    script, argument, spoil, message = BAD[case]
    if '/proc' in argument and not os.path.isdir('/proc/self'):
        pytest.skip('no /proc, in which nothing can be made')
    if spoil:
        spoil(copies)
    before = contents(copies.out)
    status, shown = start(
        script, copies.out, copies.data, *([argument.format(out=copies.out)] if argument else [])
    )
    assert status == 2 and shown.startswith('error: ') and message in shown and '\n' not in shown
    assert contents(copies.out) == before and set(os.listdir(tmp_path)) <= {'data', 'out'}


# -----------------------------------------------------------------------------
# faults of the machine

def fails(error):
    def fail(*arguments, **named):
        raise error
    return fail


FAULTS = {
    'full disk': ('encode', OSError(errno.ENOSPC, 'No space left on device')),
    'quota': ('encode', OSError(errno.EDQUOT, 'Disk quota exceeded')),
    'full disk at the end': ('train_tokenizer', OSError(errno.ENOSPC, 'No space left on device')),
}


@pytest.mark.parametrize('case', FAULTS)
def test_a_full_disk_is_one_line_and_status_1(copies, monkeypatch, case):
    script, error = FAULTS[case]
    before = contents(copies.out)
    monkeypatch.setattr(os, 'fsync', fails(error))
    status, shown = start(script, copies.out, copies.data, *(['--seed=1'] if script == 'encode' else []))
    assert status == 1 and shown.startswith('error: disk full while writing ') and '\n' not in shown
    assert contents(copies.out) == before


@pytest.mark.parametrize(
    'script, error',
    [
        ('train_tokenizer', torch.OutOfMemoryError('tried')),
        ('train_fvar', RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: you tried')),
        ('sample', torch.OutOfMemoryError('tried')),
        ('encode', MemoryError()),
    ],
    ids=str,
)
def test_out_of_memory_says_which_setting_to_lower(copies, monkeypatch, script, error):
    name = 'linear' if script in ('train_fvar', 'sample') else 'conv2d'
    computes = getattr(torch.nn.functional, name)
    monkeypatch.setattr(
        torch.nn.functional,
        name,
        lambda x, *more, **named: (  # operations are counted on meta, without memory
            computes if x.is_meta else fails(error)
        )(x, *more, **named),
    )
    status, shown = start(script, copies.out, copies.data, *(['--seed=1'] if script == 'encode' else []))
    assert status == 1 and 'error: out of memory: lower --batch_size' in shown.splitlines()[-1]
