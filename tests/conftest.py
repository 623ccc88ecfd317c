"""Tests run on one thread, and so do the processes they start: their networks are too small to share, and sums come out
the same on every machine."""
import os
import runpy
import sys

import pytest
import torch

from configurator import HERE

os.environ['OMP_NUM_THREADS'] = '1'
torch.set_num_threads(1)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs a script in this process, but for that as a command line does: (exit status, stdout, stderr)."""
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
