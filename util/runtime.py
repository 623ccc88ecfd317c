"""Shared by all scripts: ranks, device, precision, random numbers, progress, errors.

Nothing here knows about networks. Each process is one rank; without torchrun there is only one.
"""
import errno
import hashlib
import os
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import UserError


# what tells a run to stop; Windows has no SIGHUP
STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP') if hasattr(signal, name)]


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
    tensor = tensor.contiguous()                            # and so the parts
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


cpu_group = None                # all ranks, communicating through CPU memory; join_ranks() creates it


def barrier():
    """Waits for all ranks, even if one saves for hours. Other collectives time out after minutes."""
    if dist.is_initialized():
        dist.barrier(group=cpu_group)


def from_rank_0(value):
    """Returns rank 0's value on every rank, which waits as long as it takes. The value is pickled."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, group=cpu_group)
    return values[0]


def check_ranks_agree(what, value):
    """Returns a hash of a value of plain Python types. UserError on every rank unless all have the same."""
    number = seed_of(repr(value))
    most, least = all_reduce_max(torch.tensor([number, -number])).tolist()
    if most != -least:
        raise UserError(f'{what}: not the same on every rank; give all machines the same files')
    return number


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
    """Averages .grad over the ranks. DDP cannot: the discriminator gets gradients in two backward passes."""
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


# -----------------------------------------------------------------------------
# device and precision

def start(device, seed=0):
    """Joins the process group if torchrun started this process, seeds torch, and returns the torch.device.

    device: 'auto' (a GPU if there is one), 'cpu' or 'cuda'. Raises UserError if it is not available.
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


def leave_ranks():
    """Leaves the process group. With NCCL this waits until all ranks do."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
    strings) and its number, so they are the same for any number of ranks or passes. Results differ between
    device types.
    """
    rng = torch.Generator(device)
    return torch.stack([distribution(shape, generator=rng.manual_seed(seed_of(*stream, n)), device=device)
                        for n in numbers])


def noise_of(numbers, device, *stream):
    """A function (shape, k) → standard normal noise for token map k of these samples."""
    return lambda shape, k: random_numbers(torch.randn, shape[1:], numbers, device, *stream, k)


# -----------------------------------------------------------------------------
# progress

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


# -----------------------------------------------------------------------------
# errors

OUT_OF_MEMORY = ('MemoryError|out of memory|not enough memory|allocate memory|ALLOC_FAILED'
                 r'|DataLoader worker \(pid')   # usually means out of memory


def run(main):
    """Runs a script's main(). Expected errors become one line: status 2 for a user's mistake, otherwise 1."""
    began = time.time()
    try:
        main()
        leave_ranks()
        say(f'{os.path.basename(sys.argv[0])}: done in {time.time() - began:.0f} s')
    except SystemExit:                                      # all ranks stop together
        leave_ranks()
        raise
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
        fail('out of memory: lower --batch_size, --per_class or --workers; in training, raise '
             '--grad_accum_steps or set --grad_checkpoint=True', 1)
    finally:
        if dist.is_initialized():                           # failed, perhaps alone: do not wait for others
            error = sys.exc_info()[1]
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            os._exit(getattr(error, 'code', 1))


def fail(message, status):
    """Prints a message above any progress bar, and exits."""
    tqdm.write(f'error: {message}', file=sys.stderr)
    raise SystemExit(status)
