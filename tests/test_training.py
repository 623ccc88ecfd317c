"""The promises about training: any number of ranks, any interruption, any number of passes a step give the same run."""
import ctypes
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import encode
import model
from util import checkpoint, runtime, training
import train_fvar
import train_tokenizer
from chaos import draw_data, without_counting
from configurator import HERE, UserError, read_config_file
from model import build_student
from tokenizer import StructureTokenizer, load_tokenizers

CHARTS_CONFIG = HERE / 'config' / 'charts.py'
# the demo with smaller pictures, three token maps and networks of a few thousand weights
STAGE1 = dict(image_size=24, patch_nums=(2, 3, 6), channels=8, channel_mult=(1, 1, 1), vocab_size=32, codebook_dim=8,
              alias_vocab_size=16, alias_codebook_dim=4, steps=12, warm_start=3, batch_size=4, warmup=2, reseed_every=4,
              eval_images=8, log_every=1, optimizer='adamw', dtype='float32', device='cpu')
STAGE2 = dict(depth=2, embed_dim=32, num_heads=2, drop_path=0.2, lambda_feat=0.7, distill_warmup=4, steps=12, batch_size=8, warmup=2,
              eval_pictures=20, log_every=1, optimizer='adamw', dtype='float32', device='cpu')
GAN = dict(lambda_gan=0.5, gan_start=2, gan_channels=8)


def settings_of(script, settings):
    return script.config | read_config_file(CHARTS_CONFIG, script.__name__, script.config) | settings


def run(script, **settings):
    """main() of an imported script with config/charts.py and these settings."""
    config = settings_of(script, settings)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (config | {'config': config}).items():
            patch.setattr(script, name, value)
        for name in ('flops_per_image', 'plot_losses'):     # they take half of the time of a short run
            patch.setattr(script, name, lambda *_: 1, raising=False)
        script.main()


def run_on_two_ranks(script, **settings):
    """The same as two processes. They are forked from one that has imported what takes seconds."""
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(['train_tokenizer', 'train_fvar', 'torch._dynamo', 'torch.distributed.fsdp'])
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    ranks = [processes.Process(target=run_as_rank, args=(rank, port, script.__name__, settings)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    assert [process.exitcode for process in ranks] == [0, 0]


def run_as_rank(rank, port, script, settings):
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2',
                   'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    torch.set_num_threads(1)
    without_counting()
    run(sys.modules[script], **settings)
    torch.distributed.destroy_process_group()


def run_with_an_interruption(script, at, **settings):
    """The same, stopped in step `at` and resumed from the last checkpoint before it."""
    def schedule(step, *arguments, rate=training.learning_rate):
        if step == at:
            raise KeyboardInterrupt
        return rate(step, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, 'learning_rate', schedule)
        run(script, **settings)
    run(script, **settings | {'init_from': 'resume'})


SPEED = {'images_per_second', 'mfu'}                        # of training steps: all of the log that the clock decides


def log_of(out, name):
    """(records of the training steps, records of the validations), without the speed, which is no two runs' the same."""
    records = checkpoint.read_log(out / f'{name}.jsonl')
    steps = [r for r in records if 'grad_norm' in r]
    for record, speed in itertools.product(steps, SPEED):
        del record[speed]                                   # a KeyError if it is not there
    return steps, [r for r in records if 'grad_norm' not in r]


def log_lines(out, name):
    """All records of a log in their order, names in theirs; of the steps without the speed."""
    records = [json.loads(line) for line in (out / f'{name}.jsonl').read_text().splitlines()]
    return [json.dumps({name: value for name, value in record.items() if name not in SPEED}) for record in records]


def tensors(value, path=''):
    """{path: tensor} of everything in nested dictionaries and lists; numbers become tensors."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: t for key, item in items for name, t in tensors(item, f'{path}/{key}').items()}
    return {path: torch.as_tensor(value)} if isinstance(value, (torch.Tensor, int, float)) else {}


def state_of(file, *parts):
    state = torch.load(file, weights_only=True)
    return tensors({part: state[part] for part in parts} if parts else {k: v for k, v in state.items() if k != 'config'})


def differing(a, b):
    """Names of tensors that are not equal bit for bit."""
    assert a.keys() == b.keys() and len(a) > 10
    return [name for name in a if not torch.equal(a[name], b[name])]


def assert_close(a, b, **tolerance):
    """Two lists of records have the same names and nearly the same numbers."""
    assert len(a) == len(b) and a
    for one, other in zip(a, b):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], **tolerance), f'{name} of step {one["step"]}'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Charts of four classes as a folder of pictures, 12 each to train on and 5 held out."""
    folder = tmp_path_factory.mktemp('data')
    draw_data(folder)
    return str(folder)


@pytest.fixture(scope='module')
def stage1(tmp_path_factory, data):
    """Folder with a trained tokenizer.pt and the token files it gives. Not to be written to."""
    out = tmp_path_factory.mktemp('stage1')
    run(train_tokenizer, **STAGE1, data=data, out_dir=str(out))
    run(encode, data=data, out_dir=str(out), dtype='float32', device='cpu')
    return out


@pytest.fixture(scope='module')
def stage2(tmp_path_factory, stage1):
    """Folder of a finished run of train_fvar.py. Not to be written to."""
    out = tmp_path_factory.mktemp('stage2')
    run(train_fvar, **STAGE2, tokenizer=str(stage1 / 'tokenizer.pt'), out_dir=str(out), save_every=6)
    return out


@pytest.fixture
def train(stage1, tmp_path):
    """Runs train_fvar.py into tmp_path, with settings that differ from stage2's."""
    return lambda **settings: run(train_fvar, **STAGE2 | dict(tokenizer=str(stage1 / 'tokenizer.pt'), out_dir=str(tmp_path)) | settings)


@pytest.fixture
def train_stage1(data, tmp_path):
    """Runs train_tokenizer.py into tmp_path, with settings that differ from stage1's."""
    return lambda **settings: run(train_tokenizer, **STAGE1 | dict(data=data, out_dir=str(tmp_path)) | settings)


# -----------------------------------------------------------------------------
# ranks and passes

def test_two_ranks_train_the_student_that_one_would(stage1, stage2, tmp_path):
    run_on_two_ranks(train_fvar, **STAGE2, tokenizer=str(stage1 / 'tokenizer.pt'), out_dir=str(tmp_path))
    for one, two in zip(log_of(stage2, 'fvar'), log_of(tmp_path, 'fvar')):
        assert_close(one, two, rel=1e-3, abs=1e-6)
    assert len(log_of(tmp_path, 'fvar')[0]) == 12


def test_two_ranks_train_the_tokenizers_that_one_would(data, tmp_path):
    """Past the warm start and three searches for dead codes, with a discriminator, and noise on the views."""
    settings = STAGE1 | GAN | dict(data=data, steps=14, batch_size=8, lr=1e-4)      # slowly: rounding grows with the rate
    run(train_tokenizer, **settings, out_dir=str(tmp_path / 'one'))
    run_on_two_ranks(train_tokenizer, **settings, out_dir=str(tmp_path / 'two'))
    one, two = (log_of(tmp_path / out, 'tokenizer') for out in ('one', 'two'))
    assert len(one[0]) == 14
    assert_close(one[0][:10], two[0][:10], rel=1e-3, abs=1e-5)
    for one_log, other in zip(one, two):                    # later a code may have a twin that is as near
        assert_close(one_log, other, rel=0.02, abs=1e-5)
    one, two = (state_of(tmp_path / out / 'tokenizer.pt', 'structure', 'alias') for out in ('one', 'two'))
    for name in ('/structure/quantizer.codebook', '/alias/own_codebook'):
        assert (one[f'{name}.weight'] - two[f'{name}.weight']).abs().max() < 0.01 < one[f'{name}.weight'].std()
        assert (one[f'{name}.usage'] - two[f'{name}.usage']).abs().max() < 0.03 < one[f'{name}.usage'].max()


def test_the_alias_tokenizer_has_no_say_in_how_the_structure_tokenizer_learns(data, tmp_path):
    """Without quantizer a focus and a scale pyramid train the same autoencoder, though only the one has alias to learn beside it."""
    for pyramid in ('focus', 'scale'):
        run(train_tokenizer, **STAGE1 | dict(data=data, out_dir=str(tmp_path / pyramid), pyramid=pyramid, steps=4, warm_start=4,
                                             grad_clip=0.1))
    focus, scale = (state_of(tmp_path / pyramid / 'tokenizer.pt', 'structure', 'alias') for pyramid in ('focus', 'scale'))
    changed = differing(focus, scale)
    assert changed and all(name.startswith('/alias/') for name in changed)


def test_a_teacher_that_teaches_nothing_leaves_the_student_as_it_is(train, tmp_path):
    students = []
    for settings in (dict(distill=False), dict(lambda_feat=0.0, lambda_logit=0.0)):
        train(**settings, grad_clip=0.1)
        students.append(state_of(tmp_path / 'student.pt', 'student'))
    assert not differing(*students)


def record_batches(monkeypatch, network):
    """The list to which every training pass through a class of networks adds its number of pictures."""
    sizes, forward = [], network.forward

    def counted(self, batch, *rest, **named):
        if self.training:
            sizes.append(len(batch))
        return forward(self, batch, *rest, **named)
    monkeypatch.setattr(network, 'forward', counted)
    return sizes


def test_two_passes_per_step_are_one(train, stage2, tmp_path, monkeypatch):
    sizes = record_batches(monkeypatch, model.FVAR)
    train(grad_accum_steps=2)
    assert sizes == 24 * [4]
    for two, one in zip(log_of(tmp_path, 'fvar'), log_of(stage2, 'fvar')):
        assert_close(two, one, rel=1e-5, abs=1e-6)


def test_two_passes_per_step_train_the_structure_tokenizer_that_one_would(train_stage1, stage1, tmp_path, monkeypatch):
    """The alias tokenizer but nearly: until its scale is known, each pass divides the views by its own."""
    sizes = record_batches(monkeypatch, StructureTokenizer)
    train_stage1(grad_accum_steps=2)
    assert sizes == 18 * [2]                                # the three steps of the warm start have no codes
    for two, one in zip(log_of(tmp_path, 'tokenizer')[0], log_of(stage1, 'tokenizer')[0], strict=True):
        assert two.keys() == one.keys()
        for name in two.keys() & {'l1', 'l2', 'focus', 'vq', 'lr', 'skipped'}:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), f'{name} of step {one["step"]}'


def test_checkpointed_blocks_give_the_same_run(train, stage2, tmp_path):
    train(grad_checkpoint=True)
    for two, one in zip(log_of(tmp_path, 'fvar'), log_of(stage2, 'fvar')):
        assert_close(two, one, rel=1e-5, abs=1e-6)


def test_checkpointed_blocks_keep_less_for_the_backward_pass(stage1):
    """Bytes that autograd saves of one picture: a fraction with grad_checkpoint."""
    structure, alias, _ = load_tokenizers(stage1 / 'tokenizer.pt')
    student = build_student(settings_of(train_fvar, STAGE2), structure, 4)
    network, tokens = model.FVAR(student, model.Teacher(student, 16, 1, 1)), torch.zeros(1, sum(student.lengths), dtype=torch.int64)
    sizes = []
    for grad_checkpoint in (False, True):
        network.student.grad_checkpoint = network.teacher.grad_checkpoint = grad_checkpoint
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.update({t.data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
            network(torch.zeros(1, dtype=torch.int64), structure.token_inputs(tokens.split(student.lengths, 1)), tokens, tokens[:, :13])
        weights = {p.data_ptr() for p in network.parameters()}
        sizes.append(sum(size for pointer, size in kept.items() if pointer not in weights))
    assert sizes[1] < 0.5 * sizes[0]


def test_sharded_weights_train_the_student_that_one_rank_would(stage1, tmp_path):
    """FSDP2 on two ranks, interrupted in between; the deployed file is whole."""
    settings = STAGE2 | dict(tokenizer=str(stage1 / 'tokenizer.pt'), steps=6, grad_accum_steps=2)
    run(train_fvar, **settings, out_dir=str(tmp_path / 'one'), save_every=3)
    shared = settings | dict(fsdp=True, grad_checkpoint=True, out_dir=str(tmp_path / 'two'))
    run_on_two_ranks(train_fvar, **shared | dict(save_every=3))
    for one, two in zip(log_of(tmp_path / 'one', 'fvar'), log_of(tmp_path / 'two', 'fvar')):
        assert_close(one, two, rel=1e-3, abs=1e-6)
    one, two = (state_of(tmp_path / out / 'student.pt', 'student') for out in ('one', 'two'))
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)

    whole, file = state_of(tmp_path / 'two' / 'fvar_state.pt'), tmp_path / 'two' / 'fvar_state.pt'
    file.with_name('fvar_state.pt.previous').replace(file)  # as if it had stopped after three steps
    assert state_of(file)['/step'] == 3
    half = file.read_bytes()
    run_on_two_ranks(train_fvar, **shared | dict(init_from='resume'))
    assert not differing(state_of(file), whole)

    file.write_bytes(half)                                  # by one rank with whole weights
    run(train_fvar, **settings, out_dir=str(tmp_path / 'two'), init_from='resume')
    again = state_of(tmp_path / 'two' / 'student.pt', 'student')
    assert all(torch.allclose(one[name], again[name], atol=1e-4) for name in one)
    shutil.copy(tmp_path / 'one' / 'fvar_state.pt.previous', file)      # and the other way round
    assert state_of(file)['/step'] == 3
    run_on_two_ranks(train_fvar, **shared | dict(init_from='resume'))
    again = state_of(tmp_path / 'two' / 'student.pt', 'student')
    assert all(torch.allclose(one[name], again[name], atol=1e-4) for name in one)


def test_sharding_needs_several_ranks(train):
    with pytest.raises(UserError, match='--fsdp needs several ranks: start with torchrun'):
        train(fsdp=True)


def test_compiled_blocks_give_the_same_run(train, tmp_path, monkeypatch):
    """The graphs of torch.compile, without the C++ that it would make of them, which takes minutes on a slow machine."""
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda module: compiled.append(module) or compile_module(module, backend='aot_eager'))
    small = dict(steps=2, drop_path=0.0, depth=1, distill=False)
    train(**small)
    eager = log_of(tmp_path, 'fvar')
    assert not compiled
    train(**small, compile=True)
    assert [type(module) for module in compiled] == [model.Block]
    for one, two in zip(eager, log_of(tmp_path, 'fvar')):
        assert_close(one, two, rel=1e-3, abs=1e-5)


def test_the_structure_tokenizer_is_compiled_only_if_asked_for(train_stage1, monkeypatch):
    compiled = []
    monkeypatch.setattr(train_tokenizer, 'compile_convolutions', compiled.append)
    train_stage1(steps=1)
    assert not compiled
    train_stage1(steps=1, compile=True)
    assert [type(tokenizer) for tokenizer in compiled] == [StructureTokenizer]


# -----------------------------------------------------------------------------
# resuming

def test_a_resumed_student_is_the_uninterrupted_one_bit_for_bit(stage1, stage2, tmp_path):
    run_with_an_interruption(train_fvar, at=8, **STAGE2, tokenizer=str(stage1 / 'tokenizer.pt'), out_dir=str(tmp_path), save_every=6)
    assert not differing(state_of(tmp_path / 'fvar_state.pt'), state_of(stage2 / 'fvar_state.pt'))
    assert not differing(state_of(tmp_path / 'student.pt'), state_of(stage2 / 'student.pt'))
    assert log_lines(tmp_path, 'fvar') == log_lines(stage2, 'fvar')
    assert [record['step'] for record in log_of(tmp_path, 'fvar')[0]] == list(range(12))


def test_a_student_resumed_under_muon_is_the_uninterrupted_one_bit_for_bit(stage1, tmp_path):
    settings = STAGE2 | dict(tokenizer=str(stage1 / 'tokenizer.pt'), optimizer='muon', save_every=6)
    run(train_fvar, **settings, out_dir=str(tmp_path / 'whole'))
    run_with_an_interruption(train_fvar, at=8, **settings, out_dir=str(tmp_path / 'parts'))
    for name in ('fvar_state.pt', 'student.pt'):
        assert not differing(state_of(tmp_path / 'whole' / name), state_of(tmp_path / 'parts' / name))
    states = state_of(tmp_path / 'whole' / 'fvar_state.pt')
    assert any(name.endswith('momentum_buffer') for name in states)
    assert any(name.endswith('exp_avg') for name in states)


@pytest.mark.parametrize('extra, message', [
    (dict(optimizer='sgd'), '--optimizer=sgd: choose adamw or muon'),
    (dict(optimizer='muon', fsdp=True), '--optimizer=muon needs whole matrices: use --fsdp=False'),
])
def test_an_impossible_optimizer_is_refused_in_one_line(train, extra, message, monkeypatch):
    monkeypatch.setattr(runtime, 'shard', lambda *_: None)
    with pytest.raises(UserError, match=message):
        train(**extra)


@pytest.mark.parametrize('extra', [{}, GAN], ids=['plain', 'gan'])
def test_resumed_tokenizers_are_the_uninterrupted_ones_bit_for_bit(data, stage1, tmp_path, extra):
    settings, whole = STAGE1 | extra | dict(data=data, save_every=6), stage1
    if extra:
        run(train_tokenizer, **settings, out_dir=str(whole := tmp_path / 'whole'))
    run_with_an_interruption(train_tokenizer, at=9, **settings, out_dir=str(tmp_path / 'parts'))
    states = [state_of(out / 'tokenizer_state.pt') for out in (whole, tmp_path / 'parts')]
    assert not differing(*states)
    assert any(name.startswith('/optimizers/1/state') for name in states[0]) == bool(extra)
    logs = [log_lines(out, 'tokenizer') for out in (whole, tmp_path / 'parts')]
    assert logs[0] == logs[1] and [r['step'] for r in log_of(tmp_path / 'parts', 'tokenizer')[0]] == list(range(12))


def test_tokenizers_resumed_under_muon_are_the_uninterrupted_ones_bit_for_bit(data, tmp_path):
    settings = STAGE1 | dict(data=data, save_every=6, optimizer='muon')
    run(train_tokenizer, **settings, out_dir=str(tmp_path / 'whole'))
    run_with_an_interruption(train_tokenizer, at=9, **settings, out_dir=str(tmp_path / 'parts'))
    states = [state_of(tmp_path / out / 'tokenizer_state.pt') for out in ('whole', 'parts')]
    assert not differing(*states) and any(name.endswith('momentum_buffer') for name in states[0])


# -----------------------------------------------------------------------------
# what validations show

def test_every_validation_adds_a_row_to_the_progress_picture(stage1, tmp_path):
    settings = STAGE2 | dict(tokenizer=str(stage1 / 'tokenizer.pt'), eval_every=4, save_every=4)
    run(train_fvar, **settings, out_dir=str(tmp_path / 'whole'))
    run_with_an_interruption(train_fvar, at=10, **settings, out_dir=str(tmp_path / 'parts'))
    whole, parts = (np.asarray(Image.open(tmp_path / out / 'progress.png')) for out in ('whole', 'parts'))
    rows = [whole[top:top + 72, -100:] for top in range(0, len(whole), 74)]
    assert len(whole) == 3 * 74 - 2 and np.array_equal(whole, parts)
    assert not np.array_equal(rows[0], rows[2])             # the student has learned


def test_a_rise_of_the_held_out_loss_is_said_once_and_the_best_student_is_kept(stage1, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.5, 2.25, 1.5, 1.75])
    measured = train_fvar.held_out_loss
    monkeypatch.setattr(train_fvar, 'held_out_loss', lambda *args: measured(*args) | {'ce': next(losses)})
    run(train_fvar, **STAGE2 | dict(tokenizer=str(stage1 / 'tokenizer.pt'), out_dir=str(tmp_path), eval_every=2,
                                    keep_best=True))
    printed = capsys.readouterr().out
    assert printed.count('note: it was 2.000 and is now rising') == printed.count('note: it was') == 1
    best, last = (torch.load(tmp_path / f'{name}.pt', weights_only=True) for name in ('student_best', 'student'))
    assert (best['step'], best['metrics']['ce'], last['step']) == (10, 1.5, 12)
    assert model.load_student(tmp_path / 'student_best.pt', load_tokenizers(stage1 / 'tokenizer.pt')[0])


def test_a_signal_in_mid_step_saves_that_step_and_nothing_is_lost(stage1, stage2, tmp_path, monkeypatch, capsys):
    settings = STAGE2 | dict(tokenizer=str(stage1 / 'tokenizer.pt'), out_dir=str(tmp_path), save_every=6, init_from='auto')
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match='143'):
        patch.setattr(training, 'learning_rate', lambda step, *rest, rate=training.learning_rate: (
            os.kill(os.getpid(), signal.SIGTERM) if step == 8 else None, rate(step, *rest))[1])
        run(train_fvar, **settings)
    assert 'stopped by SIGTERM after step 9 and saved' in capsys.readouterr().out
    assert state_of(tmp_path / 'fvar_state.pt')['/step'] == state_of(tmp_path / 'student.pt')['/step'] == 9
    assert log_of(tmp_path, 'fvar')[0] == log_of(stage2, 'fvar')[0][:9]
    run(train_fvar, **settings)
    for name in ('fvar_state.pt', 'student.pt'):
        assert not differing(state_of(tmp_path / name), state_of(stage2 / name))
    assert log_lines(tmp_path, 'fvar') == log_lines(stage2, 'fvar')


def test_a_signal_in_mid_step_saves_the_tokenizers(train_stage1, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match='143'):
        patch.setattr(training, 'learning_rate', lambda step, *rest, rate=training.learning_rate: (
            os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None, rate(step, *rest))[1])
        train_stage1(init_from='auto')
    assert state_of(tmp_path / 'tokenizer_state.pt')['/step'] == state_of(tmp_path / 'tokenizer.pt')['/step'] == 5


def test_what_was_measured_last_is_not_forgotten_by_a_resumed_run(train, tmp_path):
    """A checkpoint carries the last validation's figures; nothing is measured between the resume and the next save."""
    train(steps=8, eval_every=5, save_every=6, init_from='auto')
    figures = state_of(checkpoint.previous(tmp_path / 'student.pt'), 'metrics')
    (tmp_path / 'fvar_state.pt').unlink()                   # back to step 6
    train(steps=8, eval_every=100, save_every=7, init_from='auto')
    assert state_of(checkpoint.previous(tmp_path / 'student.pt'))['/step'] == 7
    assert state_of(checkpoint.previous(tmp_path / 'student.pt'), 'metrics') == figures and figures


def test_a_run_is_saved_between_its_steps_when_save_seconds_have_passed(train, tmp_path):
    train(steps=3, save_every=100, save_seconds=1e-6, eval_every=100)
    assert [state_of(file)['/step'] for file in (tmp_path / 'fvar_state.pt', tmp_path / 'fvar_state.pt.previous')] == [3, 2]


@pytest.mark.parametrize('change', [
    {'batch_size': 4}, {'distill': False}, {'depth': 3}, {'seed': 1}, {'optimizer': 'muon'}], ids=str)
def test_a_student_is_not_resumed_with_other_shapes_or_other_batches(train, stage2, tmp_path, change):
    shutil.copytree(stage2, tmp_path, dirs_exist_ok=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f'fvar_state.pt was made with {"".join(change)}=.*scratch') as error:
        train(init_from='resume', **change)
    assert '\n' not in str(error.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize('change, message', [
    ({'vocab_size': 64}, 'was made with vocab_size='), ({'patch_nums': (2, 6)}, 'was made with patch_nums='),
    ({'lambda_gan': 0.5}, r'does not fit this model: Missing key\(s\) in state_dict: "discriminator')], ids=str)
def test_tokenizers_are_not_resumed_with_other_shapes(train_stage1, stage1, tmp_path, change, message):
    shutil.copy(stage1 / 'tokenizer_state.pt', tmp_path)
    with pytest.raises(UserError, match=f'tokenizer_state.pt {message}') as error:
        train_stage1(init_from='resume', **change)
    assert '\n' not in str(error.value) and [file.name for file in tmp_path.iterdir()] == ['tokenizer_state.pt']


def test_tokens_of_other_classes_in_train_and_val_are_refused(train, stage1, tmp_path):
    tokens = shutil.copytree(stage1 / 'tokens', tmp_path / 'tokens')
    meta = json.loads((tokens / 'val.json').read_text())
    (tokens / 'val.json').write_text(json.dumps(meta | {'classes': meta['classes'][::-1]}))
    with pytest.raises(UserError, match='tokens: train and val have different classes; run encode.py again'):
        train(tokens=str(tokens))


def test_a_student_is_not_resumed_on_the_tokens_of_another_tokenizer(train, stage2, tmp_path):
    saved = torch.load(stage2 / 'fvar_state.pt', weights_only=True)
    torch.save(saved | {'tokenizer': '0123456789abcdef'}, tmp_path / 'fvar_state.pt')
    with pytest.raises(UserError, match='fvar_state.pt was trained on the tokens of another tokenizer'):
        train(init_from='resume')


def test_a_student_resumed_on_other_token_files_says_so(train, stage2, tmp_path, capsys):
    shutil.copytree(stage2, tmp_path, dirs_exist_ok=True)
    saved = torch.load(stage2 / 'fvar_state.pt', weights_only=True)
    train(init_from='resume', steps=saved['step'])
    assert 'other token files' not in capsys.readouterr().out
    torch.save(saved | {'tokens': saved['tokens'] | {'crops': 3}}, tmp_path / 'fvar_state.pt')
    train(init_from='resume', steps=saved['step'])
    assert 'note: encode.py has written other token files since' in capsys.readouterr().out


def test_a_student_is_not_resumed_with_its_classes_in_another_order(train, stage2, tmp_path, capsys):
    shutil.copytree(stage2, tmp_path, dirs_exist_ok=True)
    saved = torch.load(stage2 / 'fvar_state.pt', weights_only=True)
    torch.save(saved | {'classes': saved['classes'][::-1]}, tmp_path / 'fvar_state.pt')
    with pytest.raises(UserError, match='or the same in another order; start anew with --init_from=') as error:
        train(init_from='resume')
    train(steps=1, init_from=str(error.value).split('--init_from=')[1].split(',')[0])       # as it says
    assert 'student.pt knows 4 of 4 classes by name' in capsys.readouterr().out


# every change that a message advises, and those that change neither shapes nor batches
TUNED = dict(lr=1e-5, dtype='bfloat16', grad_clip=0.5, betas=(0.8, 0.9), weight_decay=0.01, warmup=3)


def test_other_changes_at_a_resume_are_reported_and_applied(train, stage2, tmp_path, capsys):
    shutil.copytree(stage2, tmp_path, dirs_exist_ok=True)
    changes = TUNED | dict(lambda_feat=0.1, lambda_logit=0.1, drop_path=0.0, class_dropout=0.5, distill_warmup=1)
    train(init_from='resume', steps=14, **changes)
    said = next(line for line in capsys.readouterr().out.splitlines() if 'changed settings' in line)
    assert all(f'{name} ' in said and repr(value) in said for name, value in changes.items())
    saved = torch.load(tmp_path / 'fvar_state.pt', weights_only=True)
    assert saved['step'] == 14 and changes.items() <= saved['config'].items()
    groups = saved['optimizer']['param_groups']
    assert {group['weight_decay'] for group in groups} == {0, 0.01}
    assert {tuple(group['betas']) for group in groups} == {(0.8, 0.9)} and groups[0]['lr'] < 1e-5


def test_tokenizers_are_resumed_with_whatever_else_and_it_is_said(train_stage1, stage1, data, tmp_path, capsys):
    shutil.copy(stage1 / 'tokenizer_state.pt', tmp_path)
    moved = shutil.copytree(data, tmp_path / 'moved')
    changes = TUNED | dict(data=str(moved), reseed_until=0.9, lambda_focus=0.05, beta=0.5, max_radius=14.0)
    train_stage1(init_from='resume', steps=14, **changes)
    said = next(line for line in capsys.readouterr().out.splitlines() if 'changed settings' in line)
    assert all(f'{name} ' in said and repr(value) in said for name, value in changes.items())
    groups = torch.load(tmp_path / 'tokenizer_state.pt', weights_only=True)['optimizers'][0]['param_groups']
    assert {group['weight_decay'] for group in groups} == {0, 0.01}


def test_a_run_that_gave_up_goes_on_as_its_message_advises(train, tmp_path):
    """At a rate of 1e15 no step is finite."""
    train(steps=12)
    with pytest.raises(FloatingPointError, match='--init_from=auto and a lower --lr'):
        train(steps=60, init_from='auto', lr=1e15, save_every=100, eval_every=100)
    train(steps=60, init_from='auto', lr=1e-5, save_every=100, eval_every=100)
    records, _ = log_of(tmp_path, 'fvar')
    assert len(records) == 60 and all(math.isfinite(record['ce']) for record in records)


def test_a_finished_run_can_be_made_longer(train, stage2, tmp_path):
    shutil.copytree(stage2, tmp_path, dirs_exist_ok=True)
    train(init_from='resume', steps=14)
    assert [record['step'] for record in log_of(tmp_path, 'fvar')[0]] == list(range(14))
    assert torch.load(tmp_path / 'student.pt', weights_only=True)['step'] == 14


def test_tokenizers_can_start_from_their_own_weights(train_stage1, stage1, tmp_path, capsys):
    train_stage1(init_from=str(stage1 / 'tokenizer.pt'), lr=0.0, steps=1, warm_start=0, reseed_every=0)
    assert 'note' not in capsys.readouterr().out
    ours, theirs = (state_of(out / 'tokenizer.pt', 'structure', 'alias') for out in (tmp_path, stage1))
    assert all(name.endswith('usage') or 'scale' in name for name in differing(ours, theirs))
    with pytest.raises(UserError, match='tokenizer.pt does not fit this model'):
        train_stage1(init_from=str(stage1 / 'tokenizer.pt'), vocab_size=16)
    assert 'note: the first 3 steps train without codes; use --warm_start=0' in capsys.readouterr().out


@pytest.mark.parametrize('classes', [
    ['car', 'plane'], [1, 'emu'], ['ant', 'bee', 0], [3, 2, 1, 0, 'emu'], [0, 1, 2, 3], ['only']], ids=str)
def test_class_embeddings_are_matched_by_name(train, stage1, stage2, tmp_path, monkeypatch, capsys, classes):
    """classes: new names, or numbers of classes of stage 2."""
    saved = torch.load(stage2 / 'student.pt', weights_only=True)
    names = [saved['classes'][c] if isinstance(c, int) else str(c) for c in classes]
    tokens = shutil.copytree(stage1 / 'tokens', tmp_path / 'tokens')
    for split in ('train', 'val'):
        meta = json.loads((tokens / f'{split}.json').read_text())
        table = np.fromfile(tokens / f'{split}.bin', np.uint16).reshape(meta['rows'], -1)
        table[:, -1] %= len(names)
        table.tofile(tokens / f'{split}.bin')
        (tokens / f'{split}.json').write_text(json.dumps(meta | {'classes': names}))
    train(init_from=str(stage2 / 'student.pt'), tokens=str(tokens), lr=0.0, steps=1)
    known = sum(isinstance(c, int) for c in classes)
    assert (f'student.pt knows {known} of {len(names)} classes by name: they keep their embeddings, '
            'the others start anew') in capsys.readouterr().out
    old = saved['student']['class_embed.weight']
    new = torch.load(tmp_path / 'student.pt', weights_only=True)['student']['class_embed.weight']
    assert torch.equal(new[-1], old[-1])
    for i, c in enumerate(classes):
        same = [j for j, row in enumerate(old) if torch.equal(row, new[i])]
        assert same == ([c] if isinstance(c, int) else []), names[i]


def test_a_student_can_start_from_anothers_weights(train, stage2, tmp_path):
    """A rate of zero leaves it where it starts."""
    train(init_from=str(stage2 / 'student.pt'), lr=0.0, steps=1)
    assert not differing(state_of(tmp_path / 'student.pt', 'student'), state_of(stage2 / 'student.pt', 'student'))
    train(lr=0.0, steps=1)
    assert differing(state_of(tmp_path / 'student.pt', 'student'), state_of(stage2 / 'student.pt', 'student'))


# -----------------------------------------------------------------------------
# what is logged

def test_every_term_of_the_students_loss_is_logged(stage2):
    steps, validations = log_of(stage2, 'fvar')
    terms = {'ce', 'total', 'teacher_ce', 'feature', 'kl', 'per_map'}
    for record, weight in zip(steps, [0.25, 0.5, 0.75] + 9 * [1]):                           # distill_warmup=4
        assert record.keys() == terms | {'step', 'grad_norm', 'skipped', 'lr'} and len(record['per_map']) == 3
        passed_on = 0.7 * record['feature'] + 0.5 * record['kl']
        assert record['total'] == pytest.approx(record['ce'] + record['teacher_ce'] + weight * passed_on)
        assert record['ce'] == pytest.approx(sum(n * ce for n, ce in zip((4, 9, 36), record['per_map'])) / 49)
    assert steps[-1]['feature'] > 1e-5 and steps[-1]['kl'] > 1e-5
    peak = settings_of(train_fvar, STAGE2)['lr']
    assert [record['lr'] for record in steps] == [training.learning_rate(step, 12, peak, warmup=2) for step in range(12)]
    assert validations[-1].keys() == {'step', 'val_bits_per_image', 'val_ce_per_map'} | {f'val_{t}' for t in terms - {'per_map'}}
    assert steps[-1]['ce'] < steps[0]['ce'] < 1.05 * math.log(32)


def test_every_term_of_the_tokenizers_loss_is_logged(stage1):
    steps, validations = log_of(stage1, 'tokenizer')
    common = {'step', 'l1', 'l2', 'vq', 'alias_l2', 'alias_vq', 'grad_norm', 'skipped', 'lr'}
    assert [record.keys() == common for record in steps] == 3 * [True] + 9 * [False]        # no focus state in the warm start
    assert all(record.keys() == common | {'focus'} for record in steps[3:])
    assert all(len(validations[-1][f'val_{name}']) == 3 for name in ('psnr_states', 'perplexity', 'codes_used'))
    assert all(len(validations[-1][f'val_{name}']) == 2 for name in ('alias_perplexity', 'alias_missed'))
    assert steps[-1]['l1'] < steps[0]['l1']


def test_without_its_weight_no_focus_state_is_decoded(train_stage1, tmp_path):
    train_stage1(lambda_focus=0.0, steps=5)
    assert not any('focus' in record for record in log_of(tmp_path, 'tokenizer')[0])


def test_maps_whose_alias_is_empty_are_named_and_nothing_of_them_is_missed(train_stage1, tmp_path, capsys):
    note = 'note: blur of ≤ ½ pixel is no blur, so token maps [2] have no alias'
    train_stage1(max_radius=6.0, steps=4)                                                   # radii 0.56, 0.38 and 0 pixels
    assert note in capsys.readouterr().out
    of_first, of_second = log_of(tmp_path, 'tokenizer')[1][-1]['val_alias_missed']
    assert 0.01 < of_first < 100 and of_second == 0
    for other in (dict(max_radius=32.0), dict(kernel='none'), dict(pyramid='scale')):
        train_stage1(**other, steps=1)
        assert 'note' not in capsys.readouterr().out
    assert log_of(tmp_path, 'tokenizer')[1][-1]['val_alias_missed'] == [0, 0]               # of a VAR


# -----------------------------------------------------------------------------
# LPIPS and GAN

def test_the_discriminator_counts_from_gan_start_with_a_finite_weight(train_stage1, tmp_path, monkeypatch):
    weights, adaptive_weight = [], train_tokenizer.adaptive_weight
    monkeypatch.setattr(train_tokenizer, 'adaptive_weight', lambda *losses: weights.append(adaptive_weight(*losses)) or weights[-1])
    train_stage1(**GAN, steps=6)
    assert len(weights) == 4 and all(torch.isfinite(w) and w > 0 and not w.requires_grad for w in weights)
    assert ['discriminator' in record and 'gan' in record for record in log_of(tmp_path, 'tokenizer')[0]] == 2 * [False] + 4 * [True]


def discriminator_of(folder):
    weights = state_of(folder / 'tokenizer_state.pt', 'networks')
    return {name: weight for name, weight in weights.items() if 'discriminator' in name}


def test_the_discriminator_learns_and_the_decoder_learns_from_it(train_stage1, tmp_path):
    for name, extra in (('first', dict(steps=3)), ('later', dict(steps=6)), ('weaker', dict(steps=6, lambda_gan=0.1))):
        train_stage1(**GAN | extra | dict(out_dir=str(tmp_path / name)))
    first, later = (discriminator_of(tmp_path / name) for name in ('first', 'later'))
    # all but the last bias, to which the hinge loss gives nothing while real and fake logits lie within the margin
    assert len(differing(first, later)) >= len(first) - 1
    later, weaker = (state_of(tmp_path / name / 'tokenizer.pt', 'structure') for name in ('later', 'weaker'))
    assert '/structure/decoder.conv_out.weight' in differing(later, weaker)


@pytest.mark.parametrize('settings, fits', [
    (dict(image_size=16, patch_nums=(1, 2, 4), gan_start=1000), False), (dict(gan_channels=10), False),
    (dict(gan_channels=1), False), (dict(gan_channels=4), True)], ids=str)
def test_a_discriminator_that_cannot_be_is_one_line_at_the_start(train_stage1, tmp_path, settings, fits):
    if fits:
        return train_stage1(**GAN | settings | dict(steps=3))
    with pytest.raises(UserError, match='image_size=.*, gan_channels=.*: the discriminator needs') as error:
        train_stage1(**GAN | settings)
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


def test_lpips_of_tiny_images_is_one_line_at_the_start(train_stage1):
    with pytest.raises(UserError, match='image_size=8: LPIPS needs at least 16 pixels; use --lambda_lpips=0'):
        train_stage1(lambda_lpips=1.0, image_size=8, patch_nums=(1, 2))


def test_a_second_run_in_one_folder_is_told_so(train, train_stage1, stage1, tmp_path, data, monkeypatch):
    shutil.copy(stage1 / 'tokenizer.pt', tmp_path)
    (tmp_path / 'tokens').mkdir()
    monkeypatch.setattr(checkpoint, 'take_lock', lambda file: f'{file.name} is held by another run')
    for name, start in (('fvar', train), ('tokenizer', train_stage1),
                        ('tokens/encode', lambda: run(encode, data=data, out_dir=str(tmp_path), device='cpu'))):
        with pytest.raises(UserError, match=f'{name}.lock is held by another run'):
            start()
    assert sorted(file.name for file in tmp_path.rglob('*') if file.is_file()) == [
        'encode.lock', 'fvar.lock', 'tokenizer.lock', 'tokenizer.pt']


def test_lpips_without_its_weights_is_one_line_naming_files_and_folder(train_stage1, tmp_path, monkeypatch):
    pytest.importorskip('torch_fidelity')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: '/nowhere/hub')
    with pytest.raises(UserError, match=r'vgg.*\.pt.* and .*vgg16-397923af\.pth in /nowhere/hub/checkpoints') as error:
        train_stage1(lambda_lpips=1.0)
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


def test_lpips_enters_the_loss_in_the_units_it_was_made_for(train_stage1, tmp_path, monkeypatch):
    """A stand-in for the network: a random convolution of pictures in 0 … 255."""
    seen = []

    class StandIn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 4, 3).requires_grad_(False)

        def forward(self, a, b):
            if a.device.type != 'meta':                     # there only operations are counted
                seen.extend((a.detach(), b))
            return (self.convolution(a / 255) - self.convolution(b / 255)).square().mean((1, 2, 3))

    stand_in = StandIn()                                    # the same for both weights
    monkeypatch.setattr(train_tokenizer, 'load_lpips', lambda dev: stand_in)
    gradients = []
    for weight in (1e4, 2e4):                               # so much that little else counts
        train_stage1(lambda_lpips=weight, steps=4)
        records = log_of(tmp_path, 'tokenizer')[0]
        assert all(record['lpips'] > 0 for record in records)
        gradients.append(records[0]['grad_norm'])
    assert gradients[1] == pytest.approx(2 * gradients[0], rel=0.05)
    assert all(0 <= x.min() and 100 < x.max() <= 255 for x in seen)


# -----------------------------------------------------------------------------
# precision, and what is not finite

def test_bfloat16_trains_the_student_nearly_alike(train, stage2, tmp_path):
    train(dtype='bfloat16', steps=3)
    half, full = ([record['total'] for record in log_of(out, 'fvar')[0][:3]] for out in (tmp_path, stage2))
    assert half == pytest.approx(full, rel=0.02) and half != full
    assert all(math.isfinite(record['total']) and record['skipped'] == 0 for record in log_of(tmp_path, 'fvar')[0])


def test_bfloat16_trains_the_tokenizers_nearly_alike(train_stage1, stage1, tmp_path):
    train_stage1(dtype='bfloat16', steps=6, **GAN)
    half, full = (log_of(out, 'tokenizer')[0] for out in (tmp_path, stage1))
    assert half[0]['l1'] == pytest.approx(full[0]['l1'], rel=0.02) and half[0]['l1'] != full[0]['l1']
    assert all(math.isfinite(value) for record in half for value in record.values()) and half[-1]['skipped'] == 0


def poisoned(function, at, spoil):
    """The function, with what its call number `at` (from 0) returns spoilt; calls that only count operations are no calls."""
    calls = itertools.count()

    def call(*arguments, **named):
        result = function(*arguments, **named)
        only_counted = any(isinstance(x, torch.Tensor) and x.is_meta for x in arguments)
        return spoil(result) if not only_counted and next(calls) == at else result
    return call


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(train, tmp_path, monkeypatch):
    monkeypatch.setattr(model.FVAR, 'forward', poisoned(model.FVAR.forward, 3, lambda terms: terms | {'total': terms['total'] * math.nan}))
    train(steps=4, save_every=1, eval_every=100)
    assert [record['skipped'] for record in log_of(tmp_path, 'fvar')[0]] == [0, 0, 0, 1]
    parts = 'network', 'optimizer'
    before, after = (state_of(tmp_path / f'fvar_state.pt{suffix}', *parts) for suffix in ('.previous', ''))
    assert all(name.endswith('/lr') for name in differing(before, after))


def spoil_picture(result):
    result.picture = result.picture * math.nan
    return result


def spoil_residuals(result):
    result.residuals = [r * math.nan for r in result.residuals]
    return spoil_picture(result)


@pytest.mark.parametrize('extra, spoil', [({}, spoil_picture), (GAN, spoil_picture), ({}, spoil_residuals)],
                         ids=['picture', 'picture with gan', 'step that reseeds'])
def test_a_picture_that_is_not_finite_leaves_all_weights_finite(train_stage1, tmp_path, monkeypatch, extra, spoil):
    monkeypatch.setattr(StructureTokenizer, 'forward', poisoned(StructureTokenizer.forward, 0, spoil))  # step 3, the first with codes
    train_stage1(**extra, steps=6)
    assert [record['skipped'] for record in log_of(tmp_path, 'tokenizer')[0]] == [0, 0, 0, 1, 1, 1]
    weights = state_of(tmp_path / 'tokenizer_state.pt', 'networks')
    assert not [name for name, weight in weights.items() if not torch.isfinite(weight).all()]


# -----------------------------------------------------------------------------
# long runs

@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='no /proc')
def test_neither_memory_nor_open_files_grow(stage1, train, monkeypatch):
    """Over 120 steps, with a validation and a checkpoint every fourth."""
    def usage():
        ctypes.CDLL(None).malloc_trim(0)                    # what is freed, glibc would keep
        return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2 ** 20, len(os.listdir('/proc/self/fd'))

    seen, rate = {}, training.learning_rate
    monkeypatch.setattr(training, 'learning_rate', lambda step, *rest: (seen.update({step: usage()}), rate(step, *rest))[1])
    train(steps=121, depth=1, distill=False, log_every=10, eval_every=4, save_every=4)
    (early, files_early), (late, files_late) = seen[40], seen[120]
    assert late - early < 8 and files_late == files_early, f'{early:.0f} MiB, then {late:.0f}'
