"""Shared by all scripts: ranks, device, precision, random numbers, optimizer steps, signals, errors.

Nothing here knows about images or tokens. Each process is one rank; without torchrun there is only one.
"""
import errno
import hashlib
import math
import os
import re
import signal
import sys
import time
import timeit
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from configurator import UserError


# -----------------------------------------------------------------------------
# ranks

def rank():
    return int(os.environ.get('RANK', 0))


def world_size():
    return int(os.environ.get('WORLD_SIZE', 1))


def all_reduce(tensor, average=False):
    """Sums (or averages) a tensor over all ranks, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        if average:
            tensor /= world_size()
    return tensor


def all_reduce_max(tensor):
    """Takes the elementwise maximum of a CPU tensor over all ranks, in place, without waiting for a GPU."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=cpu_group)
    return tensor


def gather(tensor):
    """Concatenates the ranks' tensors, which have equal shapes, along the first dimension."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


cpu_group = None                # all ranks, communicating through CPU memory; join_ranks() creates it


def barrier():
    """Waits for all ranks, even if one saves for hours. Other collectives time out after minutes."""
    if dist.is_initialized():
        dist.barrier(group=cpu_group)


def from_rank_0(value):
    """Returns rank 0's value on every rank. It is pickled, and may be long in coming."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, group=cpu_group)
    return values[0]


def share_of_batch(batch_size, grad_accum_steps=1):
    """Samples per rank and forward pass. Raises UserError if the global batch does not divide evenly."""
    passes = world_size() * grad_accum_steps
    if not 0 < batch_size <= 2 ** 20 or grad_accum_steps < 1 or batch_size % passes:
        raise UserError(f'batch_size={batch_size} must be a multiple of {world_size()} ranks × '
                        f'grad_accum_steps={grad_accum_steps}, and at most {2 ** 20}')
    return batch_size // passes


def require_positive(settings, *names):
    """Raises UserError if one of these settings is below 1."""
    for name in names:
        if settings[name] < 1:
            raise UserError(f'{name}={settings[name]}: must be at least 1')


@torch.no_grad()
def broadcast_weights(module):
    """Copies rank 0's parameters to every rank."""
    if dist.is_initialized():
        for parameter in module.parameters():
            dist.broadcast(parameter, 0)


def average_gradients(module):
    """Averages .grad over the ranks. DDP cannot: the losses have several backward passes."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            all_reduce(parameter.grad, average=True)


def mean_terms(terms):
    """The loss terms averaged over the ranks, as {name: float, or list of floats}. Overwrites the tensors."""
    return {name: all_reduce(value.float(), average=True).tolist() for name, value in terms.items()}


def parallel(module):
    """Wraps a module in DDP. With a single rank, or if the module is sharded, returns it as it is."""
    if not dist.is_initialized() or is_sharded(module):
        return module
    return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(module, parts, device, dtype):
    """Shards a module's weights over the ranks (FSDP2), in place. Each part is gathered only while it runs.

    dtype: the one autocast uses. Parts are gathered in it; gradients are summed in float32, and activations
    keep their own type.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if not dist.is_initialized():
        raise UserError('--fsdp needs several ranks: start with torchrun --nproc_per_node=N')
    mesh = dist.device_mesh.init_device_mesh(device.type, (world_size(),))
    broadcast_weights(module)
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh)


def is_sharded(module):
    return hasattr(module, 'set_requires_gradient_sync')


@contextmanager
def gathered(module):
    """Inside, every rank holds all weights of a module that shard() has split. Others stay as they are."""
    parts = [part for part in module.modules() if is_sharded(part)]
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.reshard()


def sync_gradients(module, on):
    """Whether backward passes average gradients over the ranks, or only accumulate those of this rank."""
    if is_sharded(module):
        module.set_requires_gradient_sync(on)
    else:
        module.require_backward_grad_sync = on              # of DDP; others ignore it


# -----------------------------------------------------------------------------
# device and precision

def start(device='auto', seed=0):
    """Joins the process group if torchrun started this process, seeds torch, and returns the torch.device.

    device: 'auto' (a GPU if there is one), 'cpu', 'cuda', 'mps', … Raises UserError if it is not available.
    """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cuda':
        device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
        if device.type == 'cuda':
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'--device={device}: {reason}; use --device=auto') from None
    if 'WORLD_SIZE' in os.environ:
        join_ranks('nccl' if device.type == 'cuda' else 'gloo')
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(seed)
    return device


def join_ranks(backend):
    """Creates the process group that torchrun's environment describes.

    torchrun keeps its store when it restarts the ranks (pytorch issue 135712), so a rank that starts early
    would find the address of a dead one there. Each start therefore gets a prefix of its own. The restart
    count is only known to agree between the ranks of one machine.
    """
    global cpu_group
    store, number, count = next(dist.rendezvous('env://'))
    if os.environ.get('LOCAL_WORLD_SIZE') == os.environ['WORLD_SIZE']:
        store = dist.PrefixStore(f'start {os.environ.get("TORCHELASTIC_RESTART_COUNT")}', store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    cpu_group = dist.new_group(backend='gloo', timeout=timedelta(days=7))


def has_fast_bfloat16(device):
    """True for GPUs since Ampere and CPUs with AVX512-BF16 or AMX. Others emulate bfloat16, slowly."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = torch.cpu.get_capabilities()
    return device.type == 'cpu' and any(supported.get(name) for name in ('avx512_bf16', 'amx_bf16'))


def precision(dtype, device):
    """Returns (autocast context factory, gradient scaler) for 'auto', 'float32', 'bfloat16' or 'float16'.

    The scaler does nothing unless dtype is float16. Raises UserError for other names.
    """
    if dtype == 'auto':
        dtype = 'bfloat16' if has_fast_bfloat16(device) else 'float32'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f'--dtype={dtype}: choose auto, float32, bfloat16 or float16')
    if dtype == 'float16' and device.type != 'cuda':
        raise UserError('--dtype=float16 needs a GPU; choose bfloat16 or float32')
    autocast = partial(torch.autocast, device.type, getattr(torch, dtype), enabled=dtype != 'float32')
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == 'float16')


def dtype_of(autocast):
    """The dtype of matrix products under an autocast context factory of precision()."""
    return autocast().fast_dtype


def to_device(tensor, device):
    """Copies a tensor to the device. Copies to a GPU are asynchronous, which takes page-locked memory."""
    if torch.device(device).type == 'cuda' and tensor.device.type == 'cpu':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# -----------------------------------------------------------------------------
# random numbers

def seed_of(*key):
    """A seed computed from integers and strings."""
    key = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.sha256(repr(key).encode())
    return int.from_bytes(digest.digest()[:8], 'little') >> 1


def generator(*key):
    """A CPU generator seeded from integers and strings, for example (seed, 'order', step): each use has
    its own stream, and resuming needs no saved state."""
    return torch.Generator().manual_seed(seed_of(*key))


def sample_numbers(step, batch_size):
    """The numbers of the samples that this rank takes in a step, counted over the whole run."""
    per_rank = batch_size // world_size()
    start = step * batch_size + rank() * per_rank
    return range(start, start + per_rank)


def random_numbers(distribution, shape, numbers, device, *stream):
    """Random numbers (len(numbers), *shape) for the samples with these numbers, generated on the device.

    distribution: torch.rand or torch.randn. A sample's random numbers depend only on the stream (integers and
    strings) and its number, so they are the same for any number of ranks or passes. Device types differ.
    """
    rng = torch.Generator(device)
    return torch.stack([distribution(shape, generator=rng.manual_seed(seed_of(*stream, n)), device=device)
                        for n in numbers])


def noise_of(numbers, device, *stream):
    """A function (shape, k) → standard normal noise for token map k of these samples."""
    return lambda shape, k: random_numbers(torch.randn, shape[1:], numbers, device, *stream, k)


# -----------------------------------------------------------------------------
# optimisation

def learning_rate(step, steps, peak, warmup):
    """Linear warm-up to `peak`, then a cosine down to a tenth of it at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(module, lr, betas, weight_decay, without=()):
    """AdamW that decays only weights of linear layers and convolutions. Raises UserError for bad betas.

    without: a set of parameters that another optimizer trains, or a dictionary of them.
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f'betas={betas}: give two numbers, each at least 0 and less than 1')
    kernels = {part.weight for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    ours = [p for p in module.parameters() if p.requires_grad and p not in without]
    groups = [{'params': [p for p in ours if (p in kernels) == decays],
               'weight_decay': weight_decay * decays} for decays in (True, False)]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for some weights and AdamW for all other parameters, as one optimizer.

    weights: of linear layers, and of convolutions in channels-last memory, which count as matrices with a row
    per output channel. Learning rates are AdamW's: Muon's updates are scaled to the same size (Liu et al.
    2025). Muon has no fused kernel that skips non-finite steps, so each step waits for the device.
    """

    def __init__(self, weights, module, lr, betas, weight_decay):
        self.matrices = {weight: nn.Parameter(weight.data.movedim(1, -1).view(len(weight), -1))
                         for weight in weights}             # views of the weights' memory
        self.muon = torch.optim.Muon(self.matrices.values(), lr, weight_decay, adjust_lr_fn='match_rms_adamw')
        self.adamw = adamw(module, lr, betas, weight_decay, without=self.matrices)
        super().__init__([{'params': weights}, *self.adamw.param_groups], {'lr': lr})
        self.adamw.state = self.state                       # one state, in which a weight's is its matrix's
        for weight, matrix in self.matrices.items():
            self.muon.state[matrix] = self.state[weight]

    def step(self):
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        if not self.found_inf:
            for weight, matrix in self.matrices.items():
                if weight.grad is not None:                 # some learn only after the warm start
                    matrix.grad = weight.grad.movedim(1, -1).flatten(1)
            self.muon.param_groups[0]['lr'] = self.param_groups[0]['lr']
            self.muon.step()
            self.muon.zero_grad()


def build_optimizer(name, muon_weights, module, lr, betas, weight_decay):
    """The optimizer of a module: 'adamw', or 'muon' for muon_weights and AdamW for the rest.

    Raises UserError for another name. Convolutions among muon_weights are in channels-last memory.
    """
    if name == 'adamw':
        return adamw(module, lr, betas, weight_decay)
    if name == 'muon':
        return MuonWithAdamW(muon_weights, module, lr, betas, weight_decay)
    raise UserError(f'--optimizer={name}: choose adamw or muon')


class SafeStep:
    """Optimizer steps that skip non-finite gradients without ever waiting for the device.

    The counts stay on the device. check() fetches them, and raises after ten skipped steps in a row.
    """

    def __init__(self, optimizer, scaler, grad_clip):
        self.optimizer, self.scaler, self.grad_clip = optimizer, scaler, grad_clip
        device = optimizer.param_groups[0]['params'][0].device
        self.skipped, self.in_a_row = torch.zeros(2, dtype=torch.int64, device=device)

    def state_dict(self):
        return {'skipped': self.skipped.item(), 'in_a_row': self.in_a_row.item(),
                'scaler': self.scaler.state_dict()}

    def load_state_dict(self, state):
        self.skipped.fill_(state['skipped'])
        self.in_a_row.fill_(state['in_a_row'])
        if state['scaler']:                                 # empty unless that run was in float16
            self.scaler.load_state_dict(state['scaler'])

    def __call__(self, networks, lr):
        """Clips, steps, clears the gradients. Returns (gradient norm, whether it is finite), both tensors.

        networks: lists of parameters. Each list is clipped separately, so that spikes in one network do not
        shorten the steps of another. A non-finite loss has non-finite gradients, and gradients are averaged
        over the ranks, so all ranks skip the same steps.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        self.scaler.unscale_(self.optimizer)
        norms = [torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip) for parameters in networks]
        norms = [norm.full_tensor() if hasattr(norm, 'full_tensor') else norm for norm in norms]
        norm = torch.stack(norms).norm()
        finite = norm.isfinite()
        self.optimizer.found_inf = (~finite).float()        # makes fused optimizers skip the step
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += ~finite
        self.in_a_row = (self.in_a_row + 1) * ~finite
        return norm, finite

    def check(self, terms={}):
        """Waits for the device and returns the number of steps skipped so far.

        Raises FloatingPointError if the last ten steps or more were skipped. terms: the loss terms of the
        last one, as mean_terms() gives them; those that are not finite are named.
        """
        in_a_row = self.in_a_row.item()
        # float16 scalers start too high on purpose and skip steps on their way down
        if in_a_row >= 10 and self.scaler.get_scale() <= 1:
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            raise FloatingPointError(
                f'{in_a_row} steps in a row had a non-finite {" and ".join(bad) or "gradient"}; the last '
                'checkpoint is intact: continue from it with --init_from=auto and a lower --lr or '
                '--grad_clip, or with --dtype=float32')
        return self.skipped.item()


# -----------------------------------------------------------------------------
# saving and stopping

class Saving:
    """Decides when to save a run: every so many steps or seconds (0: never), at its end and before it stops.

    From then on, SIGTERM and SIGINT only set a flag, so that the current step is finished and saved; a second
    SIGINT stops at once. A signal to any rank stops all.
    """

    def __init__(self, every, seconds):
        self.every, self.seconds = every, seconds
        self.received = self.agreed = 0                     # signal numbers: of this rank, of all ranks
        self.saved_at = time.monotonic()
        signal.signal(signal.SIGTERM, self.note)
        signal.signal(signal.SIGINT, self.note)

    def note(self, number, frame):
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def due(self, step, steps):
        """Whether to save now, after `step` of `steps` steps. All ranks must ask, and get the same answer."""
        late = 0 < self.seconds <= time.monotonic() - self.saved_at
        self.agreed, late = all_reduce_max(torch.tensor([self.received, late])).tolist()
        due = late or self.agreed or step % self.every == 0 or step == steps
        if due:
            self.saved_at = time.monotonic()
        return due

    def stop_if_asked(self, step):
        """Call after saving. After a signal, exits with status 128 + its number, as in a shell."""
        if self.agreed:
            say(f'stopped by {signal.Signals(self.agreed).name} after step {step} and saved; continue with '
                '--init_from=resume')
            raise SystemExit(128 + self.agreed)


# -----------------------------------------------------------------------------
# progress and speed

def say(message):
    """Prints on rank 0 without breaking a progress bar."""
    if rank() == 0:
        tqdm.write(message)
        sys.stdout.flush()


def millions(module):
    """The number of parameters as text, for example '1.25M'."""
    return f'{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M'


class LogLines:
    """Where a progress bar writes if stderr is not a terminal: one line per update, through say()."""

    def write(self, text):
        if text.strip():
            say(' '.join(text.split()))

    def flush(self):
        pass


def progress(total, initial=0, label='', images_per_step=1):
    """A progress bar over steps that shows images and images per second. Only rank 0 draws it.

    Without a terminal it becomes a line every 30 seconds and at each set_postfix(), for a log file.
    """
    options = {}
    if not sys.stderr.isatty():
        line = '{desc} {percentage:.1f} %, {n_fmt}/{total_fmt} images, {remaining} left, {rate_fmt}{postfix}'
        options = dict(file=LogLines(), bar_format=line, leave=False, mininterval=30, maxinterval=30)
    return tqdm(total=total, initial=initial, desc=label, unit='img', unit_scale=images_per_step,
                disable=rank() != 0, delay=1, **options)


class Speed:
    """Images per second, and MFU: the fraction of the devices' peak FLOP/s that the model needs for them.

    flops_per_image: of a forward and backward pass, without recomputation. peak: FLOP/s of one device.
    """

    def __init__(self, images_per_step, flops_per_image, peak):
        self.images_per_step, self.mfu_per_rate = images_per_step, flops_per_image / (peak * world_size())

    def start(self, step):
        """Starts measuring after this step."""
        self.step, self.began = step, time.perf_counter()

    def report(self, step):
        """Call when the device has finished this step."""
        rate = (step - self.step) * self.images_per_step / (time.perf_counter() - self.began)
        self.start(step)
        return {'images_per_second': rate, 'mfu': rate * self.mfu_per_rate}


def count_flops(function):
    """Floating-point operations of the matrix products, convolutions and attention in a call."""
    # only this attention backend is counted on every device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


PEAK = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12}     # dense bfloat16 FLOP/s, from NVIDIA's data sheets


def peak_flops(device, autocast):
    """Peak FLOP/s of one device: the data sheet's for a known GPU in 16 bits, otherwise measured."""
    if device.type == 'cuda' and dtype_of(autocast) != torch.float32:
        for model, peak in PEAK.items():
            if model in torch.cuda.get_device_name(device):
                return peak
    return measured_peak(device, autocast)


def measured_peak(device, autocast):
    """FLOP/s of a large matrix product, the best of four."""
    n = 8192 if device.type == 'cuda' else 1536
    matrix = torch.ones(n, n, device=device)
    with autocast():                                        # .item() waits for the device
        seconds = timeit.repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1, repeat=4)
    return 2 * n ** 3 / min(seconds)


# -----------------------------------------------------------------------------
# errors

OUT_OF_MEMORY = ('MemoryError|out of memory|not enough memory|allocate memory|ALLOC_FAILED'
                 '|DataLoader worker')          # whose death is most often that


def run(main):
    """Runs a script's main(). Expected errors become one line: status 2 for a user's mistake, otherwise 1."""
    began = time.time()
    try:
        main()
        say(f'{os.path.basename(sys.argv[0])}: done in {time.time() - began:.0f} s')
    except UserError as error:
        fail(error, 2)
    except FloatingPointError as error:
        fail(error, 1)
    except KeyboardInterrupt:
        fail('interrupted', 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail(f'disk full while writing {error.filename or "a file"}: free some space; existing files are '
                 'intact', 1)
        if not error.filename:
            raise
        fail(f'{error.filename}: {error.strerror}; check the path and its permissions', 2)
    except (MemoryError, RuntimeError) as error:
        if not re.search(OUT_OF_MEMORY, repr(error)):
            raise
        fail('out of memory: lower --batch_size or --workers; in training, raise --grad_accum_steps or set '
             '--grad_checkpoint=True', 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(message, status):
    """Prints a message above any progress bar, and exits."""
    tqdm.write(f'error: {message}', file=sys.stderr)
    raise SystemExit(status)
