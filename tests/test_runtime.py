"""runtime.py: files that survive crashes, runs that survive bad steps, and mistakes said in one line."""
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from util import checkpoint as files, runtime, training
from configurator import HERE, UserError
from util.checkpoint import (
    Log, atomic_write, check_resumed, digest, load_checkpoint, locked, load_weights, read_log, read_weights,
    save_checkpoint, write_json)
from util.runtime import precision, share_of_batch
from util.training import MuonWithAdamW, SafeStep, adamw, learning_rate, orthogonalize

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank, whatever started the tests."""
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)


def one_line(error):
    return '\n' not in str(error.value)


# -----------------------------------------------------------------------------
# ranks

def test_a_batch_is_shared_evenly(monkeypatch):
    assert share_of_batch(12) == 12 and share_of_batch(12, grad_accum_steps=3) == 4
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert share_of_batch(24) == 6 and share_of_batch(24, grad_accum_steps=2) == 3


@pytest.mark.parametrize('ranks, batch_size, grad_accum_steps', [
    (4, 10, 1), (2, 4, 4), (1, 9, 2), (1, 0, 1), (1, 4, 0), (1, -4, 1), (1, 2 ** 21, 1)])
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, ranks, batch_size, grad_accum_steps):
    monkeypatch.setenv('WORLD_SIZE', str(ranks))
    message = (f'batch_size={batch_size} must be a multiple of {ranks} ranks × '
               f'grad_accum_steps={grad_accum_steps}, and at most 1048576')
    with pytest.raises(UserError, match=message) as error:
        share_of_batch(batch_size, grad_accum_steps)
    assert one_line(error)


def of_all_ranks(monkeypatch, ranks, call):
    """What a call gives on every rank."""
    with monkeypatch.context() as patch:
        patch.setenv('WORLD_SIZE', str(ranks))
        return [(patch.setenv('RANK', str(rank)), call())[1] for rank in range(ranks)]


def test_ranks_take_the_samples_and_see_the_noise_that_one_rank_would(monkeypatch):
    def noise():
        numbers = runtime.sample_numbers(3, 6)
        return runtime.noise_of(numbers, CPU, 0, 1)((len(numbers), 3, 2, 2), 4)

    numbers, whole = runtime.sample_numbers(3, 6), noise()
    assert list(numbers) == [18, 19, 20, 21, 22, 23]
    assert sum(map(list, of_all_ranks(monkeypatch, 3, lambda: runtime.sample_numbers(3, 6))), []) == list(
        numbers
    )
    assert (
        torch.equal(torch.cat(of_all_ranks(monkeypatch, 3, noise)), whole)
        and len(torch.unique(whole)) == 6 * 12
    )


@pytest.mark.parametrize('distribution', [torch.rand, torch.randn])
def test_a_part_of_a_batch_draws_the_same_as_the_whole(distribution):
    whole = runtime.random_numbers(distribution, (2, 5), range(7), CPU, 3, 1)
    assert whole.shape == (7, 2, 5) and len(torch.unique(whole)) == 70
    parts = [
        runtime.random_numbers(distribution, (2, 5), numbers, CPU, 3, 1)
        for numbers in (range(1), range(1, 5), [6, 5])
    ]
    assert torch.equal(torch.cat(parts), whole[[0, 1, 2, 3, 4, 6, 5]])


def test_what_is_drawn_is_a_function_of_the_stream_and_the_sample():
    def numbers(*stream, k=0):
        return tuple(runtime.noise_of(range(2), CPU, *stream)((2, 3), k).flatten().tolist())

    assert numbers(0, 1) == numbers(0, 1) == numbers(torch.tensor(0), 1)
    assert len({numbers(0, 1), numbers(0, 2), numbers(1, 1), numbers(0), numbers(0, 1, k=1)}) == 5
    torch.manual_seed(1)
    before = torch.get_rng_state()
    numbers(0, 1)
    assert torch.equal(torch.get_rng_state(), before)       # nobody else's numbers change by it


def test_what_is_drawn_is_distributed_as_asked_for():
    uniform, normal = (
        runtime.random_numbers(distribution, (50,), range(1000), CPU, 7)
        for distribution in (torch.rand, torch.randn)
    )
    assert 0 <= uniform.min() and uniform.max() < 1 and uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert normal.mean().item() == pytest.approx(0, abs=0.02) and normal.std().item() == pytest.approx(
        1, abs=0.02
    )


def test_gradients_are_averaged_where_there_are_any(monkeypatch):
    module = nn.ModuleList([nn.Linear(3, 2), nn.Linear(1, 1)])
    module[0].weight.grad, module[0].bias.grad = torch.arange(6.0).view(2, 3), torch.tensor([6.0, 7.0])
    monkeypatch.setattr(runtime.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(runtime.dist, 'all_reduce', lambda gradient: gradient.mul_(4))
    monkeypatch.setenv('WORLD_SIZE', '2')
    runtime.average_gradients(module)
    assert module[1].weight.grad is None
    assert [p.grad.tolist() for p in module[0].parameters()] == [[[0, 2, 4], [6, 8, 10]], [12, 14]]


def test_collectives_do_nothing_on_one_rank():
    x, module = torch.arange(3.0), nn.Linear(1, 1)
    for same in (runtime.all_reduce(x), runtime.all_reduce(x, average=True), runtime.gather(x)):
        assert same is x and x.tolist() == [0, 1, 2]
    module(torch.ones(1)).backward()
    before = [t.clone() for p in module.parameters() for t in (p, p.grad)]
    runtime.broadcast_weights(module), runtime.average_gradients(module)
    assert all(map(torch.equal, before, [t for p in module.parameters() for t in (p, p.grad)]))
    assert runtime.parallel(module) is module
    assert runtime.mean_terms({'ce': torch.tensor(2.0), 'kl': torch.tensor(0.5)}) == {'ce': 2.0, 'kl': 0.5}


# -----------------------------------------------------------------------------
# device, precision, reproducibility

def test_start_seeds_torch_and_returns_the_device():
    assert runtime.start('cpu', seed=5) == CPU
    first = torch.rand(3)
    runtime.start('cpu', seed=5)
    assert torch.equal(torch.rand(3), first)
    runtime.start('cpu', seed=6)
    assert not torch.equal(torch.rand(3), first)


@pytest.mark.parametrize('device', ['toaster', 'cuda:99', ''])
def test_a_device_that_is_not_there_is_refused_in_one_line(device):
    with pytest.raises(UserError, match=f'--device={device}: .*; use --device=auto') as error:
        runtime.start(device)
    assert one_line(error)


@pytest.mark.parametrize('capability, answer', [('avx512_bf16', True), ('amx_bf16', True), ('avx2', False)])
def test_a_cpu_is_fast_in_bfloat16_if_it_has_the_instructions(monkeypatch, capability, answer):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {capability: True, 'amx_tile': False})
    assert runtime.has_fast_bfloat16(CPU) is answer
    assert runtime.has_fast_bfloat16(torch.device('meta')) is False


@pytest.mark.parametrize(
    'dtype, fast, got',
    [
        ('float32', True, torch.float32),
        ('bfloat16', False, torch.bfloat16),
        ('auto', False, torch.float32),
        ('auto', True, torch.bfloat16),
    ],
)
def test_precision_is_what_matrices_are_multiplied_in(monkeypatch, dtype, fast, got):
    monkeypatch.setattr(runtime, 'has_fast_bfloat16', lambda device: fast)
    autocast, scaler = precision(dtype, CPU)
    for _ in range(2):                                      # a factory: every step opens a new one
        with autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == got
    assert not scaler.is_enabled()


@pytest.mark.parametrize(
    'dtype, message',
    [
        ('float64', 'choose auto, float32, bfloat16 or float16'),
        ('', 'choose auto'),
        ('float16', 'needs a GPU'),
    ],
)
def test_a_precision_that_will_not_do_is_refused_in_one_line(dtype, message):
    with pytest.raises(UserError, match=f'--dtype={dtype} ?.*{message}') as error:
        precision(dtype, CPU)
    assert one_line(error)


def test_a_generator_is_a_function_of_its_key():
    def draw(*numbers):
        return torch.rand(4, generator=runtime.generator(*numbers)).tolist()

    assert draw(0, 7) == draw(0, 7) == draw(torch.tensor(0), 7)
    different = [(0, 7), (7, 0), (0, 8), (1, 7), (0,), (7,), (0, 7, 0), (), (-1,), (2 ** 70,), (0, '7'), (0, 'seven')]
    assert len({tuple(draw(*numbers)) for numbers in different}) == len(different)


def test_a_generator_is_the_same_on_every_machine():
    assert runtime.generator(0, 7).initial_seed() == 239_435_918_000_331_489


# -----------------------------------------------------------------------------
# optimisation

def test_learning_rate_warms_up_in_a_line_then_falls_to_a_tenth():
    rates = [learning_rate(step, 1000, 2.0, warmup=10) for step in range(1001)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == max(rates) == 2.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert rates[505] == pytest.approx(2.0 * (0.1 + 0.9 / 2))                   # half way down a cosine
    assert rates[999] == pytest.approx(0.2, rel=1e-3) and rates[1000] == pytest.approx(0.2)


def test_learning_rate_without_warm_up_or_decay():
    assert learning_rate(0, 100, 3.0, warmup=0) == 3.0
    assert learning_rate(5, 5, 3.0, warmup=5) == 3.0                            # nothing left to fall in


class Zoo(nn.Module):
    """One parameter of every kind."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.table = nn.Conv2d(2, 3, 3), nn.LayerNorm(4), nn.Embedding(5, 4)
        self.one_row = nn.Parameter(torch.ones(1, 1, 4))
        self.temperatures = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def weight_decay_of(zoo):
    """Name of every parameter that is trained → its weight decay."""
    groups = adamw(zoo, lr=0.1, betas=(0.8, 0.9), weight_decay=0.5).param_groups
    decay = {parameter: group['weight_decay'] for group in groups for parameter in group['params']}
    return {name: decay[parameter] for name, parameter in zoo.named_parameters() if parameter in decay}


def test_adamw_decays_kernels_but_no_vectors_and_no_tables():
    decay = weight_decay_of(Zoo())
    assert decay['conv.weight'] == 0.5 and decay['table.weight'] == 0
    assert {decay[name] for name in ('conv.bias', 'norm.weight', 'norm.bias', 'one_row', 'temperatures')} == {
        0
    }
    assert 'frozen' not in decay and len(decay) == 7


def test_adamw_passes_on_its_settings():
    assert all(group['lr'] == 0.1 and group['betas'] == (0.8, 0.9)
               for group in adamw(Zoo(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.5).param_groups)


def test_muon_trains_its_matrices_and_adamw_the_rest_at_one_rate():
    network = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 2))
    matrix = network[0].weight
    optimizer = MuonWithAdamW([matrix], network, 0.1, (0.9, 0.95), 0.0)
    others = {p for group in optimizer.adamw.param_groups for p in group['params']}
    assert others == set(network.parameters()) - {matrix} and not any(optimizer.state.values())
    safe_step = SafeStep(optimizer, precision('float32', CPU)[1], grad_clip=1.0)
    before = [p.clone() for p in network.parameters()]
    network(torch.ones(3, 6)).square().sum().backward()
    safe_step([network.parameters()], lr=0.01)
    assert {group['lr'] for group in optimizer.param_groups} == {0.01}
    assert not any(map(torch.equal, before, network.parameters()))


def test_muon_trains_a_convolution_as_a_matrix_with_a_row_per_output_channel():
    conv = torch.nn.Conv2d(6, 4, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = MuonWithAdamW([conv.weight], conv, 0.1, (0.9, 0.95), 0.0)
    before = conv.weight.clone()
    conv(torch.randn(2, 6, 5, 5)).square().sum().backward()
    SafeStep(optimizer, precision('float32', CPU)[1], grad_clip=1.0)([conv.parameters()], lr=0.01)
    update = (conv.weight - before).detach().flatten(1)
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.5 * singular.max()            # orthogonal, as far as five iterations go


@pytest.mark.parametrize('shape', [(6, 6), (3, 8), (8, 3)])
def test_muon_in_bfloat16_is_that_of_torch_to_the_bit(shape):
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(*shape, bias=False), torch.nn.Linear(*shape, bias=False)
    theirs.load_state_dict(ours.state_dict())
    optimizer = MuonWithAdamW([ours.weight], ours, 0.1, (0.9, 0.95), 0.05)
    optimizer.dtype, optimizer.found_inf = torch.bfloat16, torch.tensor(0.0)
    reference = torch.optim.Muon(theirs.parameters(), 0.1, 0.05, adjust_lr_fn='match_rms_adamw')
    for _ in range(3):
        theirs.weight.grad = ours.weight.grad = torch.randn_like(ours.weight)
        optimizer.step()
        reference.step()
        assert torch.equal(ours.weight, theirs.weight)


def test_muon_in_float32_differs_by_rounding_only():
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(matrix.double(), torch.float64)
    assert torch.allclose(orthogonalize(matrix, torch.float32).double(), exact, atol=1e-4)
    assert not torch.equal(orthogonalize(matrix, torch.bfloat16).double(), exact)


def test_muon_skips_a_step_that_is_not_finite_and_its_state_survives_a_copy():
    network = torch.nn.Linear(6, 6)
    optimizer = MuonWithAdamW([network.weight], network, 0.1, (0.9, 0.95), 0.0)
    safe_step = SafeStep(optimizer, precision('float32', CPU)[1], grad_clip=1.0)
    network(torch.ones(3, 6)).square().sum().backward()
    safe_step([network.parameters()], lr=0.1)
    before = [p.clone() for p in network.parameters()]
    momentum = optimizer.state[network.weight]['momentum_buffer'].clone()
    (network(torch.ones(3, 6)).sum() * math.nan).backward()
    _, finite = safe_step([network.parameters()], lr=0.1)
    assert not finite and all(map(torch.equal, before, network.parameters()))
    assert torch.equal(momentum, optimizer.state[network.weight]['momentum_buffer'])
    files.load_optimizer(optimizer, saved_state := optimizer.state_dict())
    assert {group['lr'] for group in optimizer.param_groups} == {0.1}
    assert torch.equal(momentum, optimizer.state[network.weight]['momentum_buffer'])
    assert momentum.data_ptr() != saved_state['state'][0]['momentum_buffer'].data_ptr()


def descent(grad_clip=1.0, scaler=None):
    """(parameter at the origin, a step along a given gradient by plain descent, the SafeStep)."""
    parameter = nn.Parameter(torch.zeros(2))
    safe_step = SafeStep(
        torch.optim.SGD([parameter], lr=123.0, fused=True), scaler or precision('float32', CPU)[1], grad_clip
    )

    def step(*gradient, lr=1.0):
        """The norm; the second result must agree with it."""
        parameter.grad = torch.tensor(gradient)
        norm, finite = safe_step([[parameter]], lr)
        assert finite.dtype == torch.bool and finite == math.isfinite(norm)
        return norm.item()
    return parameter, step, safe_step


def counted(safe_step):
    """(steps skipped, skipped in a row)."""
    return safe_step.skipped.item(), safe_step.in_a_row.item()


def test_a_step_goes_down_the_gradient_and_clears_it():
    parameter, step, safe_step = descent(grad_clip=100.0)
    assert step(3.0, 4.0, lr=0.5) == pytest.approx(5.0)
    assert (
        parameter.tolist() == pytest.approx([-1.5, -2.0])
        and parameter.grad is None
        and counted(safe_step) == (0, 0)
    )


def test_a_long_gradient_is_clipped_and_its_whole_norm_returned():
    parameter, step, _ = descent(grad_clip=1.0)
    assert step(3.0, 4.0) == pytest.approx(5.0)
    assert parameter.tolist() == pytest.approx([-0.6, -0.8], rel=1e-4)


def test_the_gradient_of_one_network_does_not_shorten_the_step_of_another():
    calm, wild = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    safe_step = SafeStep(
        torch.optim.SGD([calm, wild], lr=1.0, fused=True), precision('float32', CPU)[1], grad_clip=1.0
    )
    calm.grad, wild.grad = torch.tensor([0.3, 0.4]), torch.tensor([300.0, 400.0])
    norm, finite = safe_step([[calm], [wild]], 1.0)
    assert norm.item() == pytest.approx(math.hypot(0.5, 500)) and finite
    assert calm.tolist() == pytest.approx([-0.3, -0.4]) and wild.tolist() == pytest.approx([-0.6, -0.8])


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad):
    parameter, step, safe_step = descent()
    assert not math.isfinite(step(bad, 1.0))
    assert (
        parameter.tolist() == [0, 0]
        and parameter.grad is None
        and counted(safe_step) == (1, 1)
        and safe_step.check() == 1
    )


def test_a_step_that_is_skipped_leaves_adams_averages_as_they_were():
    weight = (network := nn.Linear(2, 1, bias=False)).weight
    optimizer = adamw(network, lr=0.1, betas=(0.8, 0.9), weight_decay=0.5)
    safe_step, seen = SafeStep(optimizer, precision('float32', CPU)[1], 1.0), []
    for gradient in (0.5, math.nan, math.inf, 0.5):
        weight.grad = torch.tensor([[gradient, 0.1]])
        safe_step([[weight]], 0.1)
        seen.append([t.clone() for t in (weight, *optimizer.state[weight].values())])
    assert len(seen[0]) == 4 and all(all(map(torch.equal, seen[0], bad)) for bad in seen[1:3])
    assert not any(map(torch.equal, seen[0], seen[3]))      # but a good step changes them again


def test_ten_bad_steps_in_a_row_give_up():
    parameter, step, safe_step = descent()
    for _ in range(9):
        step(math.nan, 1.0)
    assert safe_step.check() == 9
    step(math.nan, 1.0)
    with pytest.raises(FloatingPointError, match='^10 steps in a row.*lower --lr') as error:
        safe_step.check()
    assert one_line(error) and parameter.tolist() == [0, 0] and counted(safe_step) == (10, 10)


def test_a_late_check_counts_all_bad_steps():
    _, step, safe_step = descent()
    for _ in range(23):                                     # as between two lines of the log
        step(math.nan, 1.0)
    with pytest.raises(FloatingPointError, match='^23 steps in a row'):
        safe_step.check()


def test_a_good_step_starts_the_count_again():
    parameter, step, safe_step = descent()
    for _ in range(3):
        for _ in range(9):
            step(math.inf, 1.0)
        assert safe_step.check() == safe_step.skipped
        step(0.1, 0.0)
        assert counted(safe_step)[1] == 0
    assert (
        counted(safe_step) == (27, 0)
        and safe_step.check() == 27
        and parameter.tolist() == pytest.approx([-0.3, 0])
    )


def test_a_float16_scaler_may_skip_its_way_down_to_one():
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 14)
    scaler.scale(torch.ones(1))
    parameter, step, safe_step = descent(scaler=scaler)
    for skipped in range(1, 14):
        step(math.inf, 1.0)
        assert safe_step.check() == skipped
    assert scaler.get_scale() == 2
    step(math.inf, 1.0)
    with pytest.raises(FloatingPointError):
        safe_step.check()
    assert parameter.tolist() == [0, 0]


@pytest.mark.parametrize('terms, named', [
    ({'ce': 2.0, 'kl': math.inf, 'total': math.nan}, 'kl and total'), ({'ce': 2.0}, 'gradient')], ids=str)
def test_the_terms_that_are_not_finite_are_named(terms, named):
    _, step, safe_step = descent()
    for _ in range(10):
        step(math.nan, 0.0)
    with pytest.raises(FloatingPointError, match=f'a non-finite {named}; the last checkpoint is intact') as error:
        safe_step.check(terms)
    assert one_line(error)


def test_a_resumed_run_goes_on_counting():
    _, step, one = descent()
    for norm in (1.0, 2.0, math.nan, 4.0, math.inf):
        step(norm, 0.0)
    _, again, other = descent()
    other.load_state_dict(torch.load(io.BytesIO(saved_bytes(one.state_dict())), weights_only=True))
    assert other.state_dict() == one.state_dict() and counted(other) == (2, 1)
    for _ in range(9):
        again(math.nan, 0.0)
    with pytest.raises(FloatingPointError, match='^10 steps in a row'):
        other.check()


def saved_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# -----------------------------------------------------------------------------
# when to save, and when to stop

@pytest.fixture
def saving():
    """Makes a Saving."""
    return lambda every=5, seconds=0.0: training.Saving(every, seconds)


def test_a_run_is_saved_every_so_many_steps_and_at_its_end(saving):
    one = saving(every=5)
    assert [step for step in range(1, 18) if one.due(step, 17)] == [5, 10, 15, 17]


def test_a_run_is_saved_every_so_many_seconds(saving, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    one, due = saving(every=6, seconds=30.0), []
    for step in range(1, 12):
        now[0] += 10
        due += [step] if one.due(step, 100) else []
    assert due == [3, 6, 9]  # the seconds count from the last save, whatever it was for


def test_all_ranks_save_when_save_seconds_have_passed_on_one(saving, monkeypatch):
    one = saving(every=100)
    assert not one.due(1, 100)
    monkeypatch.setattr(training, 'all_reduce_max', lambda tensor: torch.tensor([0, 1]))
    assert one.due(2, 100)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_then_the_run_is_saved_then_it_stops(saving, number, capsys):
    one = saving(every=100)
    assert not one.due(1, 100)
    os.kill(os.getpid(), number)
    assert one.due(2, 100)
    with pytest.raises(SystemExit) as stop:
        runtime.run(lambda: one.stop_if_asked(2))
    assert stop.value.code == 128 + number
    shown = f'stopped by {number.name} after step 2 and saved; continue with --init_from=resume\n'
    assert capsys.readouterr() == (shown, '')


@pytest.mark.parametrize('error, status, shown', [
    (UserError('no such thing'), 2, 'error: no such thing'), (RuntimeError('broken'), 1, 'RuntimeError: broken')])
def test_a_rank_that_fails_alone_does_not_wait_for_the_others(monkeypatch, capsys, error, status, shown):
    """To destroy an NCCL process group is to wait for all ranks, and these wait for this one."""
    destroyed, ended = [], []
    monkeypatch.setattr(runtime.dist, 'is_initialized', lambda: not destroyed)
    monkeypatch.setattr(runtime.dist, 'destroy_process_group', lambda: destroyed.append(True))
    monkeypatch.setattr(os, '_exit', ended.append)

    def fail():
        raise error

    with pytest.raises((SystemExit, RuntimeError)):
        runtime.run(fail)
    assert ended == [status] and not destroyed and shown in capsys.readouterr().err
    runtime.run(lambda: None)
    assert destroyed and ended == [status], 'together they leave'


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='Windows has no SIGHUP')
def test_a_closed_terminal_stops_a_run_unless_nohup_said_otherwise(saving):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        saving()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        one = saving(every=100)
        os.kill(os.getpid(), signal.SIGHUP)
        assert one.due(2, 100) and one.agreed == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_all_ranks_stop_when_one_was_signalled(saving, monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setattr(
        training, 'all_reduce_max', lambda tensor: torch.maximum(tensor, torch.tensor([15, 0]))
    )
    one = saving(every=100)
    assert one.due(7, 100)
    with pytest.raises(SystemExit) as stop:
        runtime.run(lambda: one.stop_if_asked(7))
    assert stop.value.code == 143 and capsys.readouterr() == ('', '')   # rank 0 says it


def test_a_second_interrupt_does_not_wait(saving):
    saving()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_without_a_signal_nothing_stops(saving):
    one = saving()
    one.due(5, 5)
    one.stop_if_asked(5)


def test_auto_resumes_what_there_is(tmp_path):
    file = tmp_path / 'state.pt'
    assert [files.resumes(start, file) for start in ('scratch', 'auto', 'resume', 'student.pt')] == [
        False,
        False,
        True,
        False,
    ]
    files.previous(file).touch()  # as a kill between two renames leaves it
    assert [files.resumes(start, file) for start in ('scratch', 'auto', 'resume', 'student.pt')] == [
        False,
        True,
        True,
        False,
    ]


# -----------------------------------------------------------------------------
# speed

def test_speed_is_that_of_the_steps_since_the_last_report_or_start(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(training.time, 'perf_counter', lambda: clock.now)
    monkeypatch.setenv('WORLD_SIZE', '2')
    speed = training.Speed(images_per_step=8, flops_per_image=1000, peak=20_000)
    speed.start(10)
    clock.now = 104.0
    assert speed.report(15) == {'images_per_second': 10, 'mfu': 0.25}           # of two devices
    clock.now = 105.0
    assert speed.report(17) == {'images_per_second': 16, 'mfu': 0.4}
    clock.now = 200.0                                       # after a validation, which must not count
    speed.start(17)
    clock.now = 202.0
    assert speed.report(18) == {'images_per_second': 4, 'mfu': 0.1}


# -----------------------------------------------------------------------------
# files

def test_what_a_kill_left_is_overwritten(tmp_path):
    (tmp_path / '.a.txt.tmp').write_text('half of something longer')
    with atomic_write(tmp_path / 'a.txt', 'w') as file:
        file.write('whole')
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a.txt', 'whole')]


def test_atomic_write_makes_folders_and_leaves_only_the_file(tmp_path):
    with atomic_write(tmp_path / 'new' / 'deep' / 'a.bin') as file:
        file.write(b'whole')
        assert not (tmp_path / 'new' / 'deep' / 'a.bin').exists()
    assert [(p.name, p.read_bytes()) for p in (tmp_path / 'new' / 'deep').iterdir()] == [('a.bin', b'whole')]


@pytest.mark.parametrize('existing', [[], ['a.txt']])
@pytest.mark.parametrize('failure', [ValueError, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_what_was_there_and_nothing_else(tmp_path, existing, failure):
    for name in existing:
        (tmp_path / name).write_text('old')
    with pytest.raises(failure):
        with atomic_write(tmp_path / 'a.txt', 'w') as file:
            file.write('ne')
            raise failure
    assert [p.name for p in tmp_path.iterdir()] == existing
    assert all((tmp_path / name).read_text() == 'old' for name in existing)


def hold(lock, taken):
    with locked(lock):
        taken.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock a.lock."""
    processes = multiprocessing.get_context('fork')
    taken = processes.Event()
    process = processes.Process(target=hold, args=(tmp_path / 'a.lock', taken))
    process.start()
    assert taken.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_told_who_holds_the_folder(tmp_path, holder):
    lock = tmp_path / 'a.lock'
    before = lock.read_text()
    with pytest.raises(UserError, match=f'a.lock is held by process {holder.pid} on {platform.node()}:') as error:
        with locked(lock):
            pass
    assert one_line(error) and lock.read_text() == before


def test_the_lock_of_a_killed_run_is_taken_over_at_once(tmp_path, holder):
    holder.kill()
    holder.join()
    began = time.monotonic()
    with locked(tmp_path / 'a.lock'):
        assert (tmp_path / 'a.lock').read_text() == f'process {os.getpid()} on {platform.node()}'
    assert not list(tmp_path.iterdir()) and time.monotonic() - began < 2


@pytest.mark.parametrize('error', [OSError(errno.ENOLCK, 'No locks available'), ImportError('no fcntl')], ids=repr)
def test_without_locks_a_run_goes_on(tmp_path, monkeypatch, error):
    import fcntl
    monkeypatch.setattr(fcntl, 'lockf', fails(error))
    with locked(tmp_path / 'a.lock'):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_goes_with_its_run_however_that_ends(tmp_path):
    for error in (KeyboardInterrupt, UserError, SystemExit):
        with pytest.raises(error), locked(tmp_path / 'new' / 'a.lock'):
            assert list(tmp_path.rglob('*.lock'))
            raise error
    assert not list(tmp_path.rglob('*.lock'))


def test_only_rank_0_takes_the_lock_and_all_hear_who_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    with locked(tmp_path / 'a.lock'):
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files, 'from_rank_0', lambda value: 'a.lock is held')
    with pytest.raises(UserError, match='a.lock is held'), locked(tmp_path / 'a.lock'):
        pass


def test_write_json_ends_with_a_newline_and_keeps_utf8(tmp_path):
    write_json(tmp_path / 'a.json', {'ρ': [1, 0.5], 'nothing': None})
    text = (tmp_path / 'a.json').read_text(encoding='utf-8')
    assert json.loads(text) == {'ρ': [1, 0.5], 'nothing': None} and text.endswith('}\n')


def saved(step):
    return {
        'kind': 'toy',
        'step': step,
        'weights': {'w': torch.full((3,), float(step))},
        'config': {'sizes': (1, 2), 'lr': 0.1},
    }


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint saved twice: step 2, and step 1 as its previous one."""
    path = tmp_path / 'toy.pt'
    save_checkpoint(path, saved(1))
    save_checkpoint(path, saved(2))
    return path


def test_a_checkpoint_comes_back_as_it_was(checkpoint):
    loaded = load_checkpoint(checkpoint, 'toy')
    assert torch.equal(loaded['weights'].pop('w'), torch.full((3,), 2.0))
    assert loaded == {'kind': 'toy', 'step': 2, 'weights': {}, 'config': {'sizes': (1, 2), 'lr': 0.1}}


def test_the_checkpoint_before_is_kept_and_no_other(checkpoint):
    save_checkpoint(checkpoint, saved(3))
    assert load_checkpoint(checkpoint, 'toy')['step'] == 3
    assert load_checkpoint(files.previous(checkpoint), 'toy')['step'] == 2
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ['toy.pt', 'toy.pt.previous']


def test_a_checkpoint_that_cannot_be_written_leaves_both_that_were_there(checkpoint):
    with pytest.raises(Exception, match='pickle|local object'):
        save_checkpoint(checkpoint, {'kind': 'toy', 'oops': lambda: None})
    assert load_checkpoint(checkpoint, 'toy')['step'] == 2
    assert load_checkpoint(files.previous(checkpoint), 'toy')['step'] == 1
    assert len(list(checkpoint.parent.iterdir())) == 2


@pytest.mark.parametrize('share', [0, 0.5, 0.99])
def test_a_truncated_checkpoint_falls_back_to_the_one_before_with_a_warning(checkpoint, capsys, share):
    os.truncate(checkpoint, int(share * checkpoint.stat().st_size))
    assert load_checkpoint(checkpoint, 'toy')['step'] == 1
    assert (
        capsys.readouterr().out
        == f'warning: {checkpoint} is missing or damaged; falling back to {checkpoint}.previous\n'
    )


def test_one_wrong_bit_falls_back_to_the_one_before(checkpoint, capsys):
    content = bytearray(checkpoint.read_bytes())
    content[content.index(struct.pack('<f', 2.0))] ^= 1
    checkpoint.write_bytes(content)
    assert load_checkpoint(checkpoint, 'toy')['step'] == 1
    assert 'damaged; falling back' in capsys.readouterr().out


def test_a_checkpoint_that_is_gone_falls_back_to_the_one_before_with_a_warning(checkpoint, capsys):
    checkpoint.unlink()
    assert load_checkpoint(checkpoint, 'toy')['step'] == 1
    assert str(checkpoint) in (warning := capsys.readouterr().out) and warning.startswith('warning: ')


def test_a_whole_checkpoint_gives_no_warning(checkpoint, capsys):
    load_checkpoint(checkpoint, 'toy')
    assert capsys.readouterr().out == ''


def test_two_damaged_checkpoints_are_an_error(checkpoint, capsys):
    for path in (checkpoint, files.previous(checkpoint)):
        os.truncate(path, 100)
    with pytest.raises(UserError, match='toy.pt.previous cannot be read') as error:
        load_checkpoint(checkpoint, 'toy')
    assert one_line(error)


def test_a_missing_checkpoint_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match='toy.pt: no such checkpoint; run train_toy.py first'):
        load_checkpoint(tmp_path / 'toy.pt', 'toy', made_by='train_toy.py')


@pytest.mark.parametrize(
    'content, message',
    [
        ({'kind': 'student'}, 'holds student, not toy'),
        ({}, 'holds something else, not toy'),
        ([1, 2], 'holds something else, not toy'),
        (torch.zeros(2), 'holds something else, not toy'),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / 'a.pt')
    with pytest.raises(UserError, match=f'a.pt {message}') as error:
        load_checkpoint(tmp_path / 'a.pt', 'toy')
    assert one_line(error)


class Trap:
    """Unpickled by someone careless, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    torch.save({'kind': 'toy', 'weights': Trap(tmp_path / 'sprung')}, tmp_path / 'a.pt')
    with pytest.raises(UserError, match='a.pt cannot be read .*code in it, which is never run') as error:
        load_checkpoint(tmp_path / 'a.pt', 'toy')
    assert one_line(error) and not (tmp_path / 'sprung').exists()
    torch.load(tmp_path / 'a.pt', weights_only=False)       # it would have been
    assert (tmp_path / 'sprung').exists()


@pytest.mark.parametrize(
    'content', [b'', b'no checkpoint', b'<html>404 not found</html>', bytes(1000), b'PK\x03']
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    (tmp_path / 'a.pt').write_bytes(content)
    with pytest.raises(UserError, match='a.pt cannot be read .truncated, not a checkpoint') as error:
        read_weights(tmp_path / 'a.pt')
    assert one_line(error)


def test_missing_weights_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        runtime.run(lambda: read_weights(tmp_path / 'a.pt'))
    assert stop.value.code == 2 and f'error: {tmp_path}/a.pt: No such file' in capsys.readouterr().err


@pytest.mark.parametrize(
    'other, difference',
    [
        (nn.Linear(2, 4), 'size mismatch for weight'),
        (nn.Bilinear(1, 2, 3), 'size mismatch'),
        (nn.Linear(2, 3, bias=False), 'Missing key.*bias'),
        (nn.Embedding(3, 2), 'Missing key'),
    ],
)
def test_weights_of_another_model_are_refused_in_one_line(other, difference):
    with pytest.raises(
        UserError, match=f'student.pt does not fit this model: {difference}.*another config'
    ) as error:
        load_weights(nn.Linear(2, 3), other.state_dict(), 'student.pt')
    assert one_line(error)


def test_weights_that_fit_are_loaded():
    a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    load_weights(a, b.state_dict(), 'student.pt')
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


OLD_RUN = {'depth': 4, 'lr': 0.1, 'steps': 100, 'warmup': 5, 'sizes': (1, 2), 'dtype': 'auto'}


def test_a_resumed_run_says_what_it_changes(capsys):
    old = {'config': OLD_RUN | {'out_dir': 'a', 'init_from': 'scratch'}, 'step': 50}
    now = OLD_RUN | {'out_dir': 'b', 'init_from': 'resume', 'new': 1}
    check_resumed(old, now, ['depth', 'sizes', 'new'], 'a.pt')
    assert capsys.readouterr().out == ''
    check_resumed(old, now | {'lr': 1e-5, 'dtype': 'float32'}, ['depth'], 'a.pt')
    shown = "resumed with changed settings: lr 0.1 → 1e-05, dtype 'auto' → 'float32'\n"
    assert capsys.readouterr().out == shown


def test_a_resumed_run_must_keep_its_shapes():
    with pytest.raises(UserError, match='a.pt was made with depth=4, which .* cannot change to 6') as error:
        check_resumed({'config': OLD_RUN, 'step': 50}, OLD_RUN | {'depth': 6}, ['sizes', 'depth'], 'a.pt')
    assert one_line(error) and '--init_from=scratch' in str(error.value)


def test_digest_follows_weights_and_names_and_nothing_else(tmp_path):
    def weights(last=4.0, name='b'):
        return {'a': torch.tensor([1, 2]), name: torch.tensor([3.0, last])}

    same = digest(weights())
    torch.save(weights(), tmp_path / 'a.pt')
    assert digest(dict(reversed(weights().items()))) == digest(torch.load(tmp_path / 'a.pt')) == same
    assert (
        digest({'a': weights()['a'], 'b': torch.tensor([[3.0, 0.0], [4.0, 0.0]])[:, 0].requires_grad_()})
        == same
    )
    assert len({same, digest(weights(last=4.0000005)), digest(weights(name='c')), digest({})}) == 4


def test_digest_is_the_same_on_every_machine():
    """The name, then the numbers as little-endian float32."""
    assert (
        digest({'w': torch.arange(4.0)})
        == hashlib.sha256(b'w' + struct.pack('<4f', 0, 1, 2, 3)).hexdigest()[:16]
    )


# -----------------------------------------------------------------------------
# logs

def test_a_log_is_json_lines(tmp_path):
    log = Log(tmp_path / 'new' / 'a.jsonl')
    log(step=0, loss=1.5, per_map=[1, 2])
    lines = (tmp_path / 'new' / 'a.jsonl').read_text().splitlines()  # readable while the run goes on
    assert [json.loads(line) for line in lines] == [{'step': 0, 'loss': 1.5, 'per_map': [1, 2]}]


def test_a_resumed_run_drops_what_it_will_log_again(tmp_path):
    log = Log(tmp_path / 'a.jsonl')
    for step in range(5):
        log(step=step, run=1)
    log = Log(tmp_path / 'a.jsonl', first_step=3)
    log(step=3, run=2)
    assert [(record['step'], record['run']) for record in read_log(tmp_path / 'a.jsonl')] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 2),
    ]


def test_a_new_run_starts_a_new_log(tmp_path):
    for run in (1, 2):
        Log(tmp_path / 'a.jsonl')(step=0, run=run)
    assert read_log(tmp_path / 'a.jsonl') == [{'step': 0, 'run': 2}]


def test_a_half_written_last_line_is_left_out(tmp_path):
    Log(tmp_path / 'a.jsonl')(step=0)
    with open(tmp_path / 'a.jsonl', 'a') as file:
        file.write('{"step": 1, "lo')
    assert read_log(tmp_path / 'a.jsonl') == [{'step': 0}]
    Log(tmp_path / 'a.jsonl', first_step=1)(step=1)
    assert (tmp_path / 'a.jsonl').read_text() == '{"step": 0}\n{"step": 1}\n'


def test_lines_that_are_no_json_are_left_out(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(
        b'{"step": 0}\n\x00\x00\xff\n{"step": 1}\n'
    )
    assert read_log(tmp_path / 'a.jsonl') == [{'step': 0}, {'step': 1}]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    Log(tmp_path / 'a.jsonl')(step=0, ce=math.nan, per_map=[1.0, math.inf], skipped=3)
    assert (
        tmp_path / 'a.jsonl'
    ).read_text() == '{"step": 0, "ce": null, "per_map": [1.0, null], "skipped": 3}\n'


@pytest.mark.parametrize('to', ['tensorboard', 'wandb'])
def test_a_writer_that_is_not_installed_names_its_package(tmp_path, monkeypatch, to):
    monkeypatch.setitem(sys.modules, {'tensorboard': 'torch.utils.tensorboard'}.get(to, to), None)
    with pytest.raises(
        UserError, match=f'--log_to={to} needs a package that is not installed: pip install {to}'
    ) as error:
        Log(tmp_path / 'a.jsonl', to=to)
    assert one_line(error) and not list(tmp_path.iterdir())


def test_an_unknown_writer_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match='--log_to=excel: choose tensorboard or wandb'):
        Log(tmp_path / 'a.jsonl', to='excel')


def test_writers_are_shown_every_number(tmp_path, monkeypatch):
    shown, made = [], []
    writer = SimpleNamespace(add_scalar=lambda name, value, step: shown.append((step, name, value)))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: made.append((folder, purge_step)) or writer))
    monkeypatch.setitem(
        sys.modules,
        'wandb',
        SimpleNamespace(
            init=lambda **named: (
                made.append(named) or SimpleNamespace(log=lambda numbers: shown.append(numbers))
            )
        ),
    )
    for to in ('tensorboard', 'wandb'):
        Log(tmp_path / 'out' / 'fvar.jsonl', 7, to, {'lr': 1})(step=7, ce=2.0, per_map=[1.0, 3.0])
    assert made[0] == (tmp_path / 'out' / 'tensorboard' / 'fvar', 7)
    assert made[1] == dict(project='fvar', name='out fvar', dir=tmp_path / 'out', config={'lr': 1})
    assert shown[:3] == [(7, 'ce', 2.0), (7, 'per_map/0', 1.0), (7, 'per_map/1', 3.0)]
    assert shown[3:] == [{'ce': 2.0, 'per_map/0': 1.0, 'per_map/1': 3.0, 'step': 7}]


def test_a_log_that_is_not_there_is_empty(tmp_path):
    assert read_log(tmp_path / 'a.jsonl') == []


def test_only_rank_0_logs_and_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    Log(tmp_path / 'a.jsonl')(step=0)
    runtime.say('hello')
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ''
    monkeypatch.setenv('RANK', '0')
    runtime.say('hello')
    assert capsys.readouterr().out == 'hello\n'


def test_without_a_terminal_a_bar_is_lines_for_a_log_file(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr('tqdm.std.time', lambda: now[0])
    with runtime.progress(100, 0, 'toy', images_per_step=4) as bar:
        bar._time = lambda: now[0]
        for step in range(1, 101):
            now[0] += 1
            bar.update()
            if step % 50 == 0:
                bar.set_postfix({'step': step, 'loss': '0.5'})
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith('toy')]     # not of another test's bar
    assert shown.err == '' and '\r' not in shown.out and max(map(len, lines)) < 100
    assert [line.split()[1] for line in lines] == ['30.0', '50.0', '60.0', '90.0', '100.0']
    assert lines[1].endswith('200/400 images, 00:50 left, 4.00img/s, step=50, loss=0.5')


def test_on_a_terminal_a_bar_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    with runtime.progress(2, 0, 'toy', images_per_step=4) as bar:
        bar.update()
        bar.set_postfix(step=1)
    shown = capsys.readouterr()
    assert shown.out == '' and '50%|' in shown.err and '4/8 [' in shown.err


# -----------------------------------------------------------------------------
# the outermost frame

def fails(error):
    def main(*arguments):
        raise error
    return main


@pytest.mark.parametrize(
    'error, status, message',
    [
        (UserError('--steps takes int'), 2, '--steps takes int'),
        (FloatingPointError('ten steps in a row'), 1, 'ten steps in a row'),
        (
            torch.OutOfMemoryError('CUDA out of memory. Tried\nto allocate'),
            1,
            'out of memory: lower --batch_size',
        ),
        (RuntimeError('CUDA error: out of memory\nCompile with'), 1, 'out of memory: lower --batch_size'),
        (
            RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 9'),
            1,
            'out of memory: lower --batch_size',
        ),
        (MemoryError('Unable to allocate 9 TiB'), 1, 'out of memory: lower --batch_size'),
        (
            RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '),
            1,
            'out of memory: lower --batch_size, --per_class or --workers',
        ),
        (OSError(errno.ENAMETOOLONG, 'File name too long', 'a' * 300), 2, 'a' * 300 + ': File name too long'),
        (OSError(errno.ENOSPC, 'No space left on device'), 1, 'disk full while writing a file'),
        (OSError(errno.EDQUOT, 'Disk quota exceeded', 'out/a.pt'), 1, 'disk full while writing out/a.pt'),
        (
            PermissionError(errno.EACCES, 'Permission denied', 'out/a.pt'),
            2,
            'out/a.pt: Permission denied; check the path and its permissions',
        ),
        (OSError(errno.EROFS, 'Read-only file system', 'out/a.pt'), 2, 'out/a.pt: Read-only file system'),
        (NotADirectoryError(errno.ENOTDIR, 'Not a directory', 'out/a.pt'), 2, 'out/a.pt: Not a directory'),
        (OSError(errno.EIO, 'Input/output error', 'out/a.pt'), 2, 'out/a.pt: Input/output error'),
        (KeyboardInterrupt(), 130, 'interrupted'),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_what_goes_wrong_is_one_line_and_a_status(capsys, error, status, message):
    with pytest.raises(SystemExit) as stop:
        runtime.run(fails(error))
    shown = capsys.readouterr()
    assert stop.value.code == status and shown.out == ''
    assert shown.err.startswith(f'error: {message}') and shown.err.count('\n') == 1


@pytest.mark.parametrize(
    'error', [ValueError('a bug'), RuntimeError('shapes'), OSError(errno.EIO, 'Input/output error')]
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised:
        runtime.run(fails(error))
    assert raised.value is error


def test_success_says_how_long_it_took(capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['somewhere/toy.py'])
    runtime.run(lambda: None)
    assert capsys.readouterr().out == 'toy.py: done in 0 s\n'


class FullDisk(io.BytesIO):
    def write(self, data):
        if self.tell() + len(data) > 500:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return super().write(data)


def test_a_disk_that_fills_while_a_checkpoint_is_written_is_reported_in_one_line(checkpoint, monkeypatch, capsys):
    """torch.save says "unexpected pos" and hides the cause."""
    def write():
        monkeypatch.setattr('builtins.open', lambda *_, **__: FullDisk())
        save_checkpoint(checkpoint, saved(3))

    with pytest.raises(SystemExit) as stop:
        runtime.run(write)
    monkeypatch.undo()
    assert stop.value.code == 1 and capsys.readouterr().err.startswith('error: disk full')
    assert load_checkpoint(checkpoint, 'toy')['step'] == 2


SLOW_RANK = """
import os, signal, time
import torch
from util import checkpoint as files, runtime, training

def main():
    first, slow = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0', os.environ['RANK'] == '1'
    time.sleep(slow)
    runtime.start('cpu', 0)
    both = runtime.all_reduce(torch.ones(1)).item()
    if first and slow:
        os.kill(os.getpid(), signal.SIGKILL)
    runtime.barrier()
    print(f'restarted {not first}, together {both:.0f}', flush=True)

runtime.run(main)       # leaves the process group, without which gloo may abort at exit
"""


def test_ranks_that_torchrun_restarts_do_not_look_for_the_dead_one(tmp_path):
    """The restarted rank is late here: the other one must wait for it, and not use its old address."""
    (tmp_path / 'job.py').write_text(SLOW_RANK)
    torchrun = [
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '--max-restarts=1',
        'job.py',
    ]
    done = subprocess.run(
        [sys.executable, *torchrun],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(HERE), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.count('restarted True, together 2') == 2, (
        done.stdout + done.stderr
    )
