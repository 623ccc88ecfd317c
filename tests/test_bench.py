"""bench.py: every part runs, and what it counts is counted right."""
import json

import pytest
import torch

from configurator import UserError
from experiments import bench
from util import training

STAGE_1 = '''
if script == 'train_tokenizer':
    image_size, patch_nums, channels, channel_mult, res_blocks = 16, (1, 2, 4, 8), 8, (1, 1), 1
    vocab_size, codebook_dim, alias_vocab_size, alias_codebook_dim, alias_channels = 32, 4, 16, 4, 8
    max_radius = 64.0
'''
STAGE_2 = '''
if script == 'train_fvar':
    depth, embed_dim, num_heads, teacher_blocks = 2, 32, 2, 1
'''


def test_a_matrix_product_has_two_operations_per_multiplication(counted):
    a, b = torch.zeros(5, 7), torch.zeros(7, 11, requires_grad=True)
    assert training.count_flops(lambda: a @ b) == 2 * 5 * 7 * 11
    assert training.count_flops(lambda: (a @ b).sum().backward()) == 2 * 2 * 5 * 7 * 11


def test_times_are_medians_of_repeats_after_a_warm_up(monkeypatch):
    monkeypatch.setattr(bench, 'repeats', 3)
    # start and end of two functions that take turns
    seconds = iter([0, 100, 0, 50, 0, 70, 0, 60, 0, 1, 0, 8, 0, 4, 0, 8, 0, 2, 0, 8])
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: next(seconds))
    assert bench.timed([lambda: None, lambda: None]) == [(2, 1.5), (8, 0)]


def test_rates_and_mfu_follow_from_time_and_flops(monkeypatch, capsys):
    monkeypatch.setattr(bench, 'timed', lambda functions: [(2.0, 0.1), (1.0, 0.1)])
    monkeypatch.setattr(training, 'count_flops', lambda function: 600)
    jobs = {'eager': lambda: None, 'compiled': lambda: None}
    rows = bench.measure('train', [(6, jobs)], tokens=10, peak=1000)
    assert [row['images_per_second'] for row in rows] == [3, 6] and [row['mfu'] for row in rows] == [0.3, 0.6]
    first, second = capsys.readouterr().out.splitlines()
    assert '30 tokens/s' in first and '30% of peak' in first and '0.50 ×' in second


def test_every_part_runs_and_the_rows_are_kept(tmp_path, run_script, counted):
    for name, text in (('one.py', STAGE_1), ('two.py', STAGE_2)):
        (tmp_path / name).write_text(text)
    status, out, err = run_script(
        'experiments/bench', f'--stage1={tmp_path}/one.py', f'--stage2={tmp_path}/two.py',
        f'--out_dir={tmp_path}', '--repeats=1', '--parts=tokenizer,encode,train,sample', '--batch_size=2', '--sample_batch=2',
        '--device=cpu', '--dtype=float32')
    assert status == 0, err
    rows = json.loads((tmp_path / 'bench.json').read_text())['rows']
    assert {row['part'] for row in rows} == {'tokenizer', 'encode', 'train', 'sample'}
    assert all(row['seconds'] > 0 for row in rows)
    flops = {row['what']: row['flops_per_image'] for row in rows}
    assert flops['images to token file'] == flops['structure tokens'] + flops['alias tokens']
    assert min(flops.values()) > 0 and flops['student alone'] < flops['student and teacher']
    assert 'student and teacher' in out and 'tokens/s' in out


def test_an_unknown_part_is_named(monkeypatch):
    monkeypatch.setattr(bench, 'parts', 'train,smaple')
    with pytest.raises(UserError, match="unknown part 'smaple'"):
        bench.main()
