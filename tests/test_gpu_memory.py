"""Every configuration of config/ fits eight GPUs of 80 GB as it stands, and no step of training waits for its GPU.

Whole steps at the real size, on a GPU that is not there (fakegpu.py); `make growth` runs those that take long as well, and
prints the figures.
"""
import os

import pytest

import bench
from fakegpu import FakeGPU

GIB, FITS = 2 ** 30, 72         # of 80 GB; the CUDA context, NCCL and fragmentation take the rest


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[] if name == 'tokenizer_256' or 'EVERY_SIZE' in os.environ else pytest.mark.skip('a minute; make growth'))
    for name in bench.STAGE_1])
def test_stage_1_fits_with_the_gan_and_never_waits(name):
    with FakeGPU() as gpu:
        _, train, validation, _ = bench.stage1_on_a_gpu(gpu, f'config/{name}.py')
    assert 2 * GIB < train['bytes'] < FITS * GIB and validation['bytes'] < FITS * GIB
    assert not train['waits']


@pytest.mark.parametrize('name', bench.STAGE_2)
def test_stage_2_fits_and_never_waits(name):
    with FakeGPU() as gpu:
        _, train, validation, _ = bench.stage2_on_a_gpu(gpu, f'config/{bench.STAGE_2[name]}.py', f'config/{name}.py')
    assert 2 * GIB < train['bytes'] < FITS * GIB and validation['bytes'] < FITS * GIB
    assert not train['waits']
