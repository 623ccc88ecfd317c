"""Many samples for evaluate.py: every class equally often, the same pictures however the work is cut up or interrupted."""
import json
import os
import runpy
import socket
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import data
import evaluate
import published
from configurator import HERE, UserError
from data import balanced_labels, sample_generators
from model import VAR, build_student, filter_logits, sample_tokens, smooth_codes
from tokenizer import build_tokenizers
from util import checkpoint, runtime
from util.picture_sets import check_samples, read_samples

STAGE1 = dict(image_size=16, patch_nums=(1, 2, 4), vocab_size=64, codebook_dim=4, channels=8, channel_mult=(1, 1, 1), res_blocks=1,
              alias_vocab_size=8, alias_codebook_dim=4, alias_channels=4, alias_res_blocks=1, beta=0.25, dual=True, data='nowhere')
STAGE2 = dict(depth=2, embed_dim=32, num_heads=2, mlp_ratio=2.0, qk_norm=True, shared_aln=False, drop_path=0.0)
CLASSES = ['a', 'b', 'c']
COUNT = 30


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Folder with tokenizer.pt and student.pt: never trained, but of weights that make every token and class matter."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('trained')
    structure, alias = build_tokenizers(STAGE1)
    structure.quantizer.codebook.weight.data.normal_()
    structure.decoder.conv_out.weight.data.normal_(std=0.3)
    student = build_student(STAGE2, structure, len(CLASSES))
    for parameter in student.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    checkpoint.save_checkpoint(folder / 'tokenizer.pt', {'kind': 'tokenizer', 'config': STAGE1, 'step': 7,
                                                      'structure': structure.state_dict(), 'alias': alias.state_dict()})
    checkpoint.save_checkpoint(folder / 'student.pt', {
        'kind': 'student', 'config': STAGE2, 'step': 9, 'tokenizer': checkpoint.digest(structure.state_dict()), 'classes': CLASSES,
        'student': student.state_dict()})
    return folder


@pytest.fixture
def sample(trained, run_script):
    """Runs sample.py as a command line does, but in this process: (exit status, stdout, stderr)."""
    return lambda *arguments: run_script('sample', f'--out_dir={trained}', '--device=cpu', *arguments)


@pytest.fixture
def samples(sample, tmp_path):
    """The bytes of the .npz that a command writes."""
    def samples(*arguments):
        status, _, err = sample(f'--num_samples={COUNT}', f'--out={tmp_path}/new/samples.npz', *arguments)
        assert status == 0, err
        assert os.listdir(tmp_path / 'new') == ['samples.npz']          # and nothing is left beside it
        return (tmp_path / 'new' / 'samples.npz').read_bytes()
    return samples


@pytest.fixture(scope='module')
def whole(trained, tmp_path_factory):
    """The .npz of one process and the default batch size, in which all samples are one batch."""
    path = tmp_path_factory.mktemp('whole') / 'samples.npz'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['sample.py', f'--out_dir={trained}', '--device=cpu', f'--num_samples={COUNT}', f'--out={path}'])
        runpy.run_path(str(HERE / 'sample.py'), run_name='__main__')
    return path


# -----------------------------------------------------------------------------
# what is in the file

def test_every_class_comes_equally_often_in_an_order_of_the_seed(whole):
    images, labels = read_samples(str(whole), 16, CLASSES)
    assert images.shape == (COUNT, 3, 16, 16) and images.dtype == torch.uint8 and len(images.flatten(1).unique(dim=0)) == COUNT
    assert labels.bincount().tolist() == 3 * [COUNT // 3] and torch.equal(labels, balanced_labels(3, COUNT, seed=0))
    assert (labels.diff() < 0).any() and not torch.equal(labels, balanced_labels(3, COUNT, seed=1))
    assert check_samples(images, labels, 3) == []


def test_a_plain_npz_that_says_what_made_it(whole):
    with np.load(whole, allow_pickle=False) as file:
        assert set(file.files) == {'arr_0', 'arr_1', 'made_with'}
        assert file['arr_0'].shape == (COUNT, 16, 16, 3) and file['arr_0'].dtype == np.uint8 and file['arr_0'].flags.c_contiguous
        made_with = json.loads(str(file['made_with']))
    assert {name: made_with[name] for name in ('num_samples', 'seed', 'cfg', 'top_k', 'top_p', 'student_step')} == {
        'num_samples': COUNT, 'seed': 0, 'cfg': 1.5, 'top_k': 900, 'top_p': 0.96, 'student_step': 9}


def test_pictures_are_what_the_student_makes_of_their_class_and_number(whole, trained):
    structure, student, *_ = published.load_deployed(str(trained))
    images, labels = read_samples(str(whole), 16, CLASSES)
    _, wanted = student.generate(structure, labels[[4, 17]], generator=sample_generators(0, (4, 17)))
    assert torch.equal(data.to_uint8(wanted), images[[4, 17]])


def test_the_compiled_loop_is_one_graph_and_draws_the_same_pictures(samples, whole, monkeypatch):
    """Traced as it is to be compiled, without the C++ that would come of it, which takes half a minute or more."""
    compiled, compile_function = [], torch.compile
    monkeypatch.setattr(torch, 'compile', lambda function, mode, dynamic: (
        compiled.append(function.__name__), compile_function(function, backend='aot_eager', fullgraph=True, dynamic=dynamic))[1])
    assert samples('--compile=True') == whole.read_bytes() and compiled == ['sample']


def test_evaluate_samples_the_same_pictures_as_it_goes(whole, trained, monkeypatch):
    structure, student, *_ = published.load_deployed(str(trained))
    for name, value in dict(per_class=COUNT // 3, batch_size=7).items():
        monkeypatch.setattr(evaluate, name, value)
    found, wanted = evaluate.generate(student, structure, nullcontext), read_samples(str(whole), 16, CLASSES)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


# -----------------------------------------------------------------------------
# the same pictures

@pytest.mark.parametrize('batch_size', [1, 3, 7])
def test_the_batch_size_does_not_matter(samples, whole, batch_size):
    assert samples(f'--batch_size={batch_size}') == whole.read_bytes()


def two_ranks(rank):
    """What torchrun sets for one of two processes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    return {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}


def test_the_number_of_processes_does_not_matter(sample, whole, trained, tmp_path, monkeypatch):
    """One of two is this process."""
    generate, counts = VAR.generate, []
    monkeypatch.setattr(VAR, 'generate', lambda self, tokenizer, labels, **options: (
        counts.append(len(labels)), generate(self, tokenizer, labels, **options))[1])
    arguments = f'--num_samples={COUNT}', f'--out={tmp_path}/samples.npz', '--batch_size=4'
    for name, value in two_ranks(rank=0).items():
        monkeypatch.setenv(name, value)
    with subprocess.Popen([sys.executable, 'sample.py', f'--out_dir={trained}', '--device=cpu', *arguments], cwd=HERE,
                          env=os.environ | {'RANK': '1', 'LOCAL_RANK': '1'}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as other:
        status, out, err = sample(*arguments)
        assert other.communicate(timeout=600)[0] == b'' and other.returncode == status == 0, err
    assert (tmp_path / 'samples.npz').read_bytes() == whole.read_bytes() and os.listdir(tmp_path) == ['samples.npz']
    assert counts == [4, 4, 4, 4] and out.count('wrote ') == 1          # every second of eight batches


def test_smooth_pictures_do_not_depend_on_the_batch_either(samples):
    assert samples('--smooth=True', '--batch_size=4') == samples('--smooth=True', '--batch_size=30')


def test_another_seed_gives_other_pictures(samples, whole):
    (whole.parent / 'other.npz').write_bytes(samples('--seed=1'))
    ours, other = (read_samples(str(whole.parent / name), 16, CLASSES)[0] for name in ('samples.npz', 'other.npz'))
    assert (ours != other).flatten(1).any(1).all()


# -----------------------------------------------------------------------------
# one generator per picture

def uniform(seed, numbers, count):
    """What generate() draws codes by, of a list of generators."""
    return torch.stack([torch.rand(count, generator=g, dtype=torch.float64) for g in sample_generators(seed, numbers)])


def test_a_picture_of_its_own_generator_draws_the_same_in_any_batch():
    logits = filter_logits(3 * torch.randn(5, 40, 30, generator=runtime.generator(1)), 20, 0.9)
    together = sample_tokens(logits, uniform(0, range(5), 40))
    alone = [sample_tokens(logits[i:i + 1], uniform(0, [i], 40)) for i in range(5)]
    assert together.dtype == torch.int64 and torch.equal(together, torch.cat(alone))
    assert (logits.gather(2, together[..., None]) > -torch.inf).all()


def test_a_list_of_generators_draws_from_the_same_distribution_as_one():
    share = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    tokens = sample_tokens(share.log().expand(40, 1000, 6), uniform(3, range(40), 1000))
    counts = torch.bincount(tokens.flatten(), minlength=6) / 40_000
    assert (counts[share == 0] == 0).all() and (counts - share).abs().max() < 5 * (0.25 / 40_000) ** 0.5
    logits, codes = torch.randn(1, 2, 4, generator=runtime.generator(2)), torch.eye(4)
    numbers = torch.stack([torch.empty(2, 4).exponential_(generator=g) for g in sample_generators(4, range(4000))])
    mixed = smooth_codes(logits.expand(4000, 2, 4), 1.0, codes, numbers).mean(0)
    assert (mixed - (2 * logits[0]).softmax(-1)).abs().max() < 0.05     # hard at the end: the share of each code


@pytest.mark.parametrize('number, code', [(0.0, 1), (0.4999, 1), (0.5, 3), (0.7999, 3), (0.8001, 4), (1 - 2 ** -53, 4)])
def test_a_number_is_read_off_the_cumulative_distribution(number, code):
    """Codes of probability zero have no width, not even at the ends."""
    logits = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).log().view(1, 1, 6)
    assert sample_tokens(logits, torch.tensor([[number]], dtype=torch.float64)).tolist() == [[code]]


# -----------------------------------------------------------------------------
# interruptions

@pytest.fixture
def interrupted(sample, tmp_path, monkeypatch):
    """A folder in which sampling was stopped in its fourth batch of 4; the sizes of all batches from then on."""
    generate, sizes = VAR.generate, []

    def counted(self, tokenizer, labels, **options):
        sizes.append(len(labels))
        if sizes == 4 * [4]:
            raise KeyboardInterrupt
        return generate(self, tokenizer, labels, **options)

    monkeypatch.setattr(VAR, 'generate', counted)
    status, _, err = sample(f'--num_samples={COUNT}', f'--out={tmp_path}/new/samples.npz', '--batch_size=4')
    assert status == 130 and 'error: interrupted' in err
    assert set(os.listdir(tmp_path / 'new')) == {'samples.partial', 'samples.partial.json'}
    table = np.memmap(tmp_path / 'new' / 'samples.partial', np.uint8, 'r+', shape=(COUNT, 16 * 16 * 3 + 1))
    assert table[:, -1].tolist() == 12 * [1] + 18 * [0]
    table[9, :300], table[9, -1] = 0, 0                     # as a kill in the middle of a write leaves a row
    table.flush()
    sizes[:] = [0]                                          # stop no more
    return tmp_path / 'new', sizes


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(samples, whole, interrupted):
    assert samples('--batch_size=4') == whole.read_bytes()
    assert interrupted[1][1:] == 5 * [4] + [2]              # rows 8 to 11, and 12 to 29


def test_an_interrupted_run_may_go_on_with_another_batch_size(samples, whole, interrupted):
    assert samples('--batch_size=30') == whole.read_bytes()


def test_a_partial_file_of_other_settings_is_started_again_and_that_is_said(sample, whole, interrupted):
    folder, sizes = interrupted
    status, out, _ = sample(f'--num_samples={COUNT}', f'--out={folder}/samples.npz', '--batch_size=4', '--cfg=3')
    assert status == 0 and 'samples.partial was made with other settings (cfg): starting again' in out
    assert sum(sizes) == COUNT and (folder / 'samples.npz').read_bytes() != whole.read_bytes()


def test_a_partial_file_that_was_cut_short_is_not_trusted(samples, whole, interrupted):
    folder, sizes = interrupted
    os.truncate(folder / 'samples.partial', 5000)
    assert samples('--batch_size=4') == whole.read_bytes() and sum(sizes) == COUNT


# -----------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize('arguments, message', [
    (['--num_samples=31'], '31 samples cannot be split evenly over 3 classes: use a multiple of 3'),
    (['--num_samples=2'], '2 samples cannot be split evenly over 3 classes'),
    (['--num_samples=-3'], '--num_samples=-3: must be at least 0'),
    (['--num_samples=30', '--classes=1'], '--num_samples take no --classes'),
    (['--num_samples=30', '--export={folder}'], 'give only one of --edit, --refocus, --num_samples and --export'),
    (['--out={folder}/samples.npz'], 'samples.npz: needs --num_samples=NUMBER'),
    (['--num_samples=30', '--out={folder}'], 'a file name ending in .npz'),
    (['--num_samples=30', '--out={folder}/folder.npz'], 'folder.npz: needs --num_samples=NUMBER and a file name'),
    (['--num_samples=30', '--out={folder}/samples.png'], 'a file name ending in .npz'),
    (['--num_samples=30', '--out={folder}/file/samples.npz'], '/file: File exists; check the path'),
])
def test_bad_input_is_one_line_and_writes_nothing(sample, tmp_path, arguments, message):
    (tmp_path / 'folder.npz').mkdir()
    (tmp_path / 'file').touch()
    status, _, err = sample(*(argument.format(folder=tmp_path) for argument in arguments))
    assert status == 2 and err.startswith('error: ') and message in err and err.count('\n') == 1
    assert set(os.listdir(tmp_path)) == {'folder.npz', 'file'}


def test_pictures_to_look_at_are_drawn_by_one_process(sample, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    status, _, err = sample()
    assert status == 2 and 'not with torchrun' in err


def test_the_classes_that_are_sampled_are_named(sample, trained):
    status, out, err = sample('--classes=2,0', '--per_class=1')
    assert status == 0 and "samples.png (2 pictures)" in out and "class 2 ('c'), class 0 ('a')" in out, err
    status, out, err = sample('--edit=brick', '--mask=4,4,12,12', '--class=1', '--per_class=1')
    assert status == 0 and "edit-1.png … 1: class 1 ('b')" in out, err
    status, out, err = sample('--edit=brick', '--mask=4,4,12,12', '--per_class=1')
    assert status == 0 and out.splitlines()[-2].endswith("… 1: class 3 ('no class')"), err


def test_in_16_bits_pictures_are_still_float32_and_everything_can_be_drawn(sample, trained):
    structure, student, *_ = published.load_deployed(str(trained))
    for generator in (None, sample_generators(0, range(2))):
        with torch.autocast('cpu', torch.bfloat16):
            _, images = student.generate(structure, torch.tensor([0, 1]), generator=generator)
        assert images.dtype == torch.float32
    for arguments in ([], ['--edit=brick', '--mask=4,4,12,12'], ['--refocus=brick', '--radius=0.7']):
        status, _, err = sample('--dtype=bfloat16', '--per_class=1', *arguments)
        assert status == 0, err


def test_pictures_without_a_class(sample, trained):
    status, out, err = sample('--classes=none', '--per_class=3')
    assert status == 0 and 'samples.png (3 pictures)' in out and "focus.gif: class 3 ('no class')" in out, err
    without = (trained / 'samples.png').read_bytes()
    assert sample('--classes=none', '--per_class=3', '--cfg=7')[0] == 0
    assert (trained / 'samples.png').read_bytes() == without, 'there is nothing to guide towards'


@pytest.mark.parametrize('classes', ['3', '0,3', '-1', 'nobody', '0,none', '1.0', ','])
def test_a_class_that_does_not_exist_is_named(sample, classes):
    status, _, err = sample(f'--classes={classes}')
    assert status == 2 and 'take numbers from 0 to 2, or none; got [' in err


def test_numbers_of_samples_that_fit():
    for count in (3, 30):
        assert balanced_labels(3, count, 0).bincount().tolist() == 3 * [count // 3]
    with pytest.raises(UserError, match='multiple of 1000'):
        balanced_labels(1000, 50, 0)
