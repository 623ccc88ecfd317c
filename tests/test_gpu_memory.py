"""Every configuration fits eight GPUs of 80 GB as it is, and no training step waits for its GPU.

Whole steps run at the real size on a GPU that does not exist (fakegpu.py). `make growth` runs all sizes and
prints the numbers.
"""
import json
import os

import pytest

import growth
import tokenizer
import train_fvar
from configurator import HERE
from fakegpu import FakeGPU

GIB, FITS = 2 ** 30, 72         # of 80 GB; the CUDA context, NCCL and fragmentation take the rest


@pytest.fixture(scope='module', autouse=True)
def again():
    """A step of stage 2 is computed once, whoever asks for it, but by the function that this yields."""
    compute, computed = growth.stage2_on_a_gpu, {}

    def once(gpu, *files):
        if files not in computed:
            computed[files] = compute(gpu, *files)
        return computed[files]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, 'stage2_on_a_gpu', once)
        yield compute


@pytest.mark.parametrize('name', growth.STAGE_1)
def test_stage_1_fits_with_the_gan_and_never_waits(name, monkeypatch):
    if 'EVERY_SIZE' not in os.environ:
        if name != 'tokenizer_256':
            pytest.skip('a minute; make growth runs it')
        # parts of twice the size hold more, and take fewer seconds here
        monkeypatch.setattr(tokenizer, 'PIXELS_PER_PART', 2 * tokenizer.PIXELS_PER_PART)
    with FakeGPU() as gpu:
        _, train, validation, _ = growth.stage1_on_a_gpu(gpu, f'config/{name}.py')
    assert 2 * GIB < train['bytes'] < FITS * GIB and validation['bytes'] < FITS * GIB
    assert not train['waits']


@pytest.mark.parametrize('name', growth.STAGE_2)
def test_stage_2_fits_and_never_waits(name):
    if name in ('d12', 'd20', 'd24') and 'EVERY_SIZE' not in os.environ:
        pytest.skip('lies between others; make growth runs it')
    files = f'config/{growth.STAGE_2[name]}.py', f'config/{name}.py'
    with FakeGPU() as gpu:
        _, train, validation, _ = growth.stage2_on_a_gpu(gpu, *files)
    assert 2 * GIB < train['bytes'] < FITS * GIB and validation['bytes'] < FITS * GIB
    assert not train['waits']


def test_what_is_computed_grows_with_the_depth(monkeypatch, capsys):
    monkeypatch.setattr(growth, 'STAGE_1', ())
    monkeypatch.setattr(growth, 'STAGE_2', {name: 'tokenizer_256' for name in ('d12', 'd16')})
    d12, d16 = growth.growth()
    assert d12['tokens'] == 680 and 370 < d16['millions'] < 380
    for name in ('millions', 'tflop_per_image', 'hours', 'gib', 'gib_validation', 'disk_gb'):
        assert d12[name] < d16[name]
    saved = {row.pop('config'): row for row in json.loads((HERE / 'results' / 'memory.json').read_text())}
    for row in (d12, d16):                                  # else the documents' tables are out of date
        assert saved[row.pop('config')] == pytest.approx(row, rel=0.01)
    assert 'computed, not measured' in capsys.readouterr().out


def test_memory_shrinks_with_checkpointing_and_with_fsdp(again, monkeypatch):
    settings, files = growth.settings, ('config/tokenizer_256.py', 'config/d16.py')
    with FakeGPU() as gpu:
        _, plain, _, _ = growth.stage2_on_a_gpu(gpu, *files)
    changes = {'grad_checkpoint': True, 'fsdp': True}
    monkeypatch.setattr(growth, 'settings', lambda script, file: settings(script, file) | (changes if script is train_fvar else {}))
    with FakeGPU() as gpu:
        _, small, _, _ = again(gpu, *files)
    assert GIB < small['bytes'] < 0.5 * plain['bytes']
