"""Every configuration of config/ fits eight GPUs of 80 GB as it stands, and no step of training waits for its GPU.

Whole steps at the real size, on a GPU that is not there (fakegpu.py); `make growth` runs those that take long as well, and
prints the figures.
"""
import os

import pytest

import growth
import train_fvar
import train_tokenizer
from fakegpu import FakeGPU

GIB, FITS = 2 ** 30, 72         # of 80 GB; the CUDA context, NCCL and fragmentation take the rest


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[] if name == 'tokenizer_256' or 'EVERY_SIZE' in os.environ else pytest.mark.skip('a minute; make growth'))
    for name in growth.STAGE_1])
def test_stage_1_fits_with_the_gan_and_never_waits(name):
    with FakeGPU() as gpu:
        _, train, validation, _ = growth.stage1_on_a_gpu(gpu, f'config/{name}.py')
    assert 2 * GIB < train['bytes'] < FITS * GIB and validation['bytes'] < FITS * GIB
    assert not train['waits']


@pytest.mark.parametrize('name', growth.STAGE_2)
def test_stage_2_fits_and_never_waits(name):
    with FakeGPU() as gpu:
        _, train, validation, _ = growth.stage2_on_a_gpu(gpu, f'config/{growth.STAGE_2[name]}.py', f'config/{name}.py')
    assert 2 * GIB < train['bytes'] < FITS * GIB and validation['bytes'] < FITS * GIB
    assert not train['waits']


def test_what_is_computed_grows_with_the_depth(monkeypatch, capsys):
    monkeypatch.setattr(growth, 'STAGE_1', ())
    monkeypatch.setattr(growth, 'STAGE_2', {name: 'tokenizer_256' for name in ('d12', 'd16')})
    d12, d16 = growth.growth()
    assert d12['tokens'] == 680 and 370e6 < d16['parameters'] < 380e6
    assert all(d12[name] < d16[name] for name in ('parameters', 'tflop_per_image', 'hours', 'gib', 'gib_validation', 'disk_gb'))
    assert 'computed, not measured' in capsys.readouterr().out


def test_memory_shrinks_with_checkpointing_and_with_fsdp(monkeypatch):
    settings, taken = growth.settings, []
    for changes in (dict(), dict(grad_checkpoint=True, fsdp=True)):
        of_stage = {train_tokenizer: {}, train_fvar: changes}
        monkeypatch.setattr(growth, 'settings', lambda script, file: settings(script, file) | of_stage[script])
        with FakeGPU() as gpu:
            taken.append(growth.stage2_on_a_gpu(gpu, 'config/tokenizer_256.py', 'config/d16.py')[1]['bytes'] / 2 ** 30)
    assert taken == sorted(taken, reverse=True) and taken[1] < 0.5 * taken[0] and taken[-1] > 1
