"""Tests run on one thread, and so do the processes they start: their networks are too small to share, and sums come out
the same on every machine."""
import os
import runpy
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from util import training
from configurator import HERE
from util.runtime import STOP_SIGNALS

os.environ['OMP_NUM_THREADS'] = '1'
torch.set_num_threads(1)


signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell ignores it for what it starts in the background
HANDLERS = {number: signal.getsignal(number) for number in STOP_SIGNALS}
COUNT_FLOPS, MEASURED_PEAK = training.count_flops, training.measured_peak
LONGEST = ['test_training', 'test_chaos', 'test_gpu_memory', 'test_end_to_end', 'test_gpu']


def pytest_collection_modifyitems(items):
    """The longest files first: `make test` hands files to two processes, and neither must be left alone with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope='session')
def flops_are_not_counted():
    """Counting and measuring take seconds at the start of every run; tests of them ask for `counted`.

    Drawing the loss curves takes half a second at its end; the test of the whole demo has them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('util.pictures.plot_losses', lambda *arguments: None)
        patch.setattr(training, 'count_flops', lambda function: 1)
        patch.setattr(training, 'measured_peak', lambda device, autocast: 1e12)
        yield


@pytest.fixture(autouse=True)
def signals_interrupt_the_tests():
    """A training run leaves its handlers behind; Ctrl-C must end the tests nevertheless."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(training, 'count_flops', COUNT_FLOPS)
    monkeypatch.setattr(training, 'measured_peak', MEASURED_PEAK)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs a script in this process, otherwise as a command line would: (exit status, stdout, stderr)."""
    def run_script(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{script}.py', *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(HERE / f'{script}.py'), run_name='__main__')
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run_script


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(labels, side=16, seed=0):
    """Noise, dark for label 0 and light for label 1: uint8 (N, 3, side, side)."""
    noise = torch.randint(0, 100, (len(labels), 3, side, side), generator=torch.Generator().manual_seed(seed))
    return (noise + 140 * labels[:, None, None, None]).to(torch.uint8)


def save_pictures(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f'{i}.png')


def statistics_file(path, **others):
    np.savez(path, **{'mu': np.zeros(2048), 'sigma': np.eye(2048, dtype=np.float32)} | others)
    return str(path)
