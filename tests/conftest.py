"""Tests run on one thread, and so do the processes they start: their networks are too small to share, and sums come out
the same on every machine."""
import os

import torch

os.environ['OMP_NUM_THREADS'] = '1'
torch.set_num_threads(1)
