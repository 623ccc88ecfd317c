"""bench.py: what is compared is the same computation, what is counted is counted right, and every part runs."""
import json

import pytest
import torch

from experiments import bench
from util import runtime
from configurator import UserError

CPU = torch.device('cpu')
STAGE_1 = '''
if script == 'train_tokenizer':
    image_size, patch_nums, channels, channel_mult, res_blocks, vocab_size, codebook_dim = 16, (1, 2, 4, 8), 8, (1, 1), 1, 32, 4
    alias_vocab_size, alias_codebook_dim, alias_channels, max_radius = 16, 4, 8, 64.0
'''
STAGE_2 = '''
if script == 'train_fvar':
    depth, embed_dim, num_heads, teacher_blocks, batch_size = 2, 32, 2, 1, 4
'''


@pytest.fixture
def small(tmp_path):
    """(structure, alias, FVAR) with random weights that matter, and the paths of both configurations."""
    for name, text in (('one.py', STAGE_1), ('two.py', STAGE_2)):
        (tmp_path / name).write_text(text)
    torch.manual_seed(0)
    first, second = (bench.settings(script, str(tmp_path / name))
                     for script, name in ((bench.train_tokenizer, 'one.py'), (bench.train_fvar, 'two.py')))
    structure, alias, network = bench.networks(first, second, 10, CPU)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return structure, alias, network.eval(), tmp_path


def test_the_plain_transcription_trains_and_samples_the_same(small):
    structure, alias, network, _ = small
    labels, images = torch.arange(4), torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens, side = torch.cat(structure.encode(images), 1), torch.cat(alias.encode(images), 1)
    inputs = bench.train_fvar.token_inputs(structure, tokens)

    def both():
        terms = network(labels, inputs, tokens, side)
        drawn, _ = network.student.generate(structure, labels, top_k=20, top_p=0.8, generator=torch.Generator().manual_seed(2))
        return terms, drawn
    ours, ours_drawn = both()
    with bench.plainly():
        plain, plain_drawn = both()
    assert bench.model.KVCache is not bench.ConcatenatedCache       # and it is over afterwards
    assert all(torch.allclose(ours[name], plain[name], rtol=1e-4, atol=1e-6) for name in ours)
    assert all(map(torch.equal, ours_drawn, plain_drawn))


def test_a_matrix_product_has_two_operations_a_multiplication(counted):
    a, b = torch.zeros(5, 7), torch.zeros(7, 11, requires_grad=True)
    assert runtime.count_flops(lambda: a @ b) == 2 * 5 * 7 * 11
    assert runtime.count_flops(lambda: (a @ b).sum().backward()) == 2 * 2 * 5 * 7 * 11


def test_times_are_medians_of_repeats_after_a_warm_up(monkeypatch):
    monkeypatch.setattr(bench, 'repeats', 3)
    seconds = iter([0, 100, 0, 1, 0, 4, 0, 2])              # start and end of every call
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: next(seconds))
    assert bench.timed(CPU, lambda: None) == [(2, 1.5)]


def test_every_part_runs_and_the_table_is_kept(small, run_script):
    folder = small[-1]
    status, out, err = run_script('experiments/bench', f'--stage1={folder}/one.py', f'--stage2={folder}/two.py', f'--out_dir={folder}', '--repeats=1',
                                  '--parts=tokenizer,encode,train,sample', '--baseline=True', '--batch_size=2', '--sample_batch=2',
                                  '--device=cpu', '--dtype=float32')
    assert status == 0, err
    rows = json.loads((folder / 'bench.json').read_text())['rows']
    assert {row['part'] for row in rows} == {'tokenizer', 'encode', 'train', 'sample'} and all(row['seconds'] > 0 for row in rows)
    assert len([row for row in rows if row['what'].endswith('plain transcription, float32')]) == 3 and 'teacher adds' in out


def test_an_unknown_part_is_named(monkeypatch):
    monkeypatch.setattr(bench, 'parts', 'train,smaple')
    with pytest.raises(UserError, match="'smaple' is no part"):
        bench.main()
