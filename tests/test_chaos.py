"""A kill of every long stage; `make chaos` has more of them, and two ranks."""
import os
import subprocess
import sys

import pytest

from configurator import HERE


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='tests/chaos.py forks')
def test_a_killed_stage_given_the_same_command_ends_as_if_nothing_had_happened():
    done = subprocess.run([sys.executable, 'tests/chaos.py', '--kills=1'], cwd=HERE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.endswith('4 kills, nothing lost\n'), done.stdout + done.stderr
