"""What every script shares and no reader of the method needs: device, ranks, precision, checkpoints, logs.

Nothing here knows about pictures or tokens. One process is one rank; without torchrun there is one.
"""
import errno
import hashlib
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

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
    """Sums (or averages) a tensor over all ranks, in place; returns it. One without data stays as it is."""
    if dist.is_initialized() and not tensor.is_meta:
        dist.all_reduce(tensor)
        if average:
            tensor /= world_size()
    return tensor


def all_reduce_max(tensor):
    """The largest of each number over all ranks, in place, for a tensor on the CPU: no rank waits for its GPU. Returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=on_cpu)
    return tensor


def gather(tensor):
    """Concatenates a tensor of one shape on every rank along its first dimension."""
    if not dist.is_initialized():
        return tensor
    pieces = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(pieces, tensor.contiguous())
    return torch.cat(pieces)


on_cpu = None                   # the ranks as a group that talks through CPU memory and waits for days; join_ranks makes it


def barrier():
    """Waits for all ranks, however long one of them saves or encodes: the limit of other collectives is ten minutes."""
    if dist.is_initialized():
        dist.barrier(group=on_cpu)


def share_of_batch(batch_size, grad_accum_steps=1):
    """How many samples of the global batch one rank takes at a time; UserError if it does not divide, or fits no memory."""
    if batch_size < 1 or grad_accum_steps < 1 or batch_size % (world_size() * grad_accum_steps):
        raise UserError(f'batch_size={batch_size} is not a multiple of {world_size()} ranks × '
                        f'grad_accum_steps={grad_accum_steps}')
    if batch_size > 2 ** 20:
        raise UserError(f'batch_size={batch_size}: must be at most {2 ** 20}')
    return batch_size // (world_size() * grad_accum_steps)


def require_positive(settings, *names):
    """UserError for the first of these settings that is below 1."""
    for name in names:
        if settings[name] < 1:
            raise UserError(f'{name}={settings[name]}: must be at least 1')


def require_shares(settings, *names):
    """UserError for the first of these settings that is above 1."""
    for name in names:
        if settings[name] > 1:
            raise UserError(f'{name}={settings[name]}: is a share, at most 1')


def in_one_piece(tensors, collective):
    """Runs an in-place collective over many tensors of one type as over a single one: one call instead of hundreds."""
    flat = torch.cat([t.flatten() for t in tensors])
    collective(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def broadcast_weights(module):
    """Gives every rank rank 0's parameters."""
    if dist.is_initialized():
        in_one_piece(list(module.parameters()), lambda flat: dist.broadcast(flat, 0))


def average_gradients(module):
    """Averages .grad over the ranks after backward: for losses made of several backward passes, which DDP's hooks miss."""
    if dist.is_initialized():
        in_one_piece([p.grad for p in module.parameters() if p.grad is not None], lambda flat: all_reduce(flat, average=True))


def mean_terms(terms):
    """{name: float}, the scalar loss terms averaged over the ranks."""
    values = all_reduce(torch.stack([terms[name].detach().float() for name in terms]), average=True)
    return dict(zip(terms, values.tolist()))


def parallel(module, device):
    """A module whose gradients are averaged over ranks; the module itself when there is one rank or it is sharded."""
    if not dist.is_initialized() or is_sharded(module):
        return module
    return DistributedDataParallel(module, [device] if device.type == 'cuda' else None, broadcast_buffers=False,
                                   gradient_as_bucket_view=True)


def shard(module, parts, device, dtype):
    """Shares the weights of a module out over the ranks (FSDP2), in place: every part is gathered only while it computes.

    dtype: that of autocast. Parts are gathered in it; gradients are summed in float32, and the residual stream stays as it is.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if not dist.is_initialized():
        raise UserError('--fsdp shares weights out over several ranks: start with torchrun --nproc_per_node=N')
    mesh = dist.device_mesh.init_device_mesh(device.type, (world_size(),))
    broadcast_weights(module)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh)


def is_sharded(module):
    return hasattr(module, 'set_requires_gradient_sync')


@contextmanager
def without_sync(module):
    """Backward passes inside only add to this rank's gradients; the next one outside averages them over the ranks."""
    if is_sharded(module):
        module.set_requires_gradient_sync(False)
        yield
        module.set_requires_gradient_sync(True)
    elif isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


# -----------------------------------------------------------------------------
# device, precision, reproducibility

def start(device='auto', seed=0):
    """Joins the process group if torchrun started us, picks and returns the torch.device, seeds torch.

    device: 'auto' (a GPU if there is one), 'cpu', 'cuda', 'mps', ... Raises UserError if it isn't there.
    """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(device)
        if device.type == 'cuda':
            if device.index is None:
                device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device={device}: {str(error).splitlines()[0]}; --device=auto takes what is there') from None
    if 'WORLD_SIZE' in os.environ and not dist.is_initialized():
        join_ranks('nccl' if device.type == 'cuda' else 'gloo')
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(seed)
    return device


def join_ranks(backend):
    """The process group that torchrun's environment describes.

    torchrun keeps one store over its restarts (pytorch issue 135712), and a rank that starts sooner than another would find the
    address of the dead one there: so each start has names of its own. Its number is the same on all ranks of one machine only.
    """
    global on_cpu
    of, where = os.environ.get, {}
    if of('TORCHELASTIC_USE_AGENT_STORE') == 'True' and of('LOCAL_WORLD_SIZE') == of('WORLD_SIZE'):
        store, *where_we_are = next(dist.rendezvous('env://'))
        store = dist.PrefixStore(f'start {of("TORCHELASTIC_RESTART_COUNT")}', store)
        where = dict(zip(('store', 'rank', 'world_size'), (store, *where_we_are)))
    dist.init_process_group(backend, **where)
    on_cpu = dist.new_group(backend='gloo', timeout=timedelta(days=7))


def dtype_of(autocast):
    """What matrices are multiplied in under a context of precision()."""
    with autocast() as context:
        return context.fast_dtype if context else torch.float32


def has_fast_bfloat16(device):
    """bfloat16 pays on GPUs since Ampere and on CPUs with AVX512-BF16 or AMX; elsewhere it is emulated."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == 'cpu' and any(torch.cpu.get_capabilities().get(name, False)
                                        for name in ('avx512_bf16', 'amx_bf16', 'amx_tile'))


def precision(dtype, device):
    """(autocast context factory, gradient scaler) for dtype = 'auto', 'float32', 'bfloat16' or 'float16'.

    The scaler does nothing unless dtype is float16. Raises UserError for another name.
    """
    if dtype == 'auto':
        dtype = 'bfloat16' if has_fast_bfloat16(device) else 'float32'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f'--dtype={dtype}: choose auto, float32, bfloat16 or float16')
    if dtype == 'float16' and device.type != 'cuda':
        raise UserError('--dtype=float16 needs a GPU; choose bfloat16 or float32')
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
    if dtype == 'float32':
        return nullcontext, scaler
    return lambda: torch.autocast(device.type, dtype=getattr(torch, dtype)), scaler


def to_device(tensor, device):
    """The tensor on the device. A GPU fetches it while the CPU goes on, which takes page-locked memory."""
    if torch.device(device).type == 'cuda' and tensor.device.type == 'cpu':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def count_flops(function):
    """Floating-point operations of the matrix products, convolutions and attention that a call executes."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):      # others are not counted on every device
        function()
    return counter.get_total_flops()


PEAK = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12}    # FLOP/s in bfloat16 without sparsity, from NVIDIA's data sheets


def peak_flops(device, autocast):
    """FLOP/s of one device at best: of a known GPU in 16 bits as its maker says, else what a large matrix product reaches."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    sixteen_bits = torch.finfo(dtype_of(autocast)).bits == 16
    known = [peak for model, peak in PEAK.items() if model in name and sixteen_bits]
    return known[0] if known else measured_peak(device, autocast)


def measured_peak(device, autocast):
    """FLOP/s of a large matrix product, the best of three."""
    n = 8192 if device.type == 'cuda' else 1536
    a, b, seconds = *torch.ones(2, n, n, device=device), []
    for _ in range(4):
        began = time.perf_counter()
        with autocast():
            (a @ b)[0, 0].item()                            # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds[1:])


# -----------------------------------------------------------------------------
# random numbers

def seed_of(*numbers):
    """A seed that is a function of some integers."""
    digest = hashlib.sha256(repr(tuple(int(n) for n in numbers)).encode()).digest()
    return int.from_bytes(digest[:8], 'little') >> 1


def generator(*numbers):
    """A CPU generator that is a function of some integers, e.g. (seed, step): resuming needs no saved state."""
    return torch.Generator().manual_seed(seed_of(*numbers))


def sample_numbers(step, batch_size):
    """Numbers of the samples this rank takes in a step, counted over the whole run."""
    share = batch_size // world_size()
    first = step * batch_size + rank() * share
    return range(first, first + share)


def draw(distribution, shape, numbers, device, *stream):
    """Random numbers (len(numbers), *shape), made on the device that needs them, for the samples of this rank alone.

    distribution: torch.rand or torch.randn. Those of a sample are a function of (stream, its number), integers: any number of
    ranks and any division into passes draw the same. Another kind of device draws others.
    """
    generator = torch.Generator(device)
    return torch.stack([distribution(shape, generator=generator.manual_seed(seed_of(*stream, number)), device=device)
                        for number in numbers])


def noise_of(numbers, device, *stream):
    """A function (shape, k) → standard normal noise of token map k for these samples, as draw() makes it."""
    return lambda shape, k: draw(torch.randn, shape[1:], numbers, device, *stream, k)


# -----------------------------------------------------------------------------
# optimisation

def learning_rate(step, steps, peak, warmup, final=0.1):
    """Linear warm-up to `peak`, then a cosine down to final·peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(module, lr, betas, weight_decay):
    """AdamW that decays the weights of linear layers and convolutions: no bias, gain, embedding or position. UserError for odd betas."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f'betas={betas}: give two numbers of at least 0 and less than 1')
    kernels = {part.weight for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed, others = ([p for p in parameters if (p in kernels) == kind] for kind in (True, False))
    groups = [{'params': decayed, 'weight_decay': weight_decay}, {'params': others, 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


class SafeStep:
    """Optimizer steps that skip gradients which are not finite, and never wait for the device.

    The counts stay on the device; check() fetches them, and gives up after ten bad steps in a row.
    """

    def __init__(self, optimizer, scaler, grad_clip):
        self.optimizer, self.scaler, self.grad_clip = optimizer, scaler, grad_clip
        device = next(parameter for group in optimizer.param_groups for parameter in group['params']).device
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)      # taken, skipped, bad in a row, first step of these
        self.names, self.first_terms = [], torch.zeros(0, device=device)    # the loss terms of that first step

    def state_dict(self):
        return {'counts': self.counts.tolist(), 'names': self.names, 'first_terms': self.first_terms.tolist()}

    def load_state_dict(self, state):
        self.names = state['names']
        self.counts, self.first_terms = (torch.tensor(state[name], dtype=now.dtype, device=now.device)
                                         for name, now in (('counts', self.counts), ('first_terms', self.first_terms)))

    def __call__(self, networks, lr, terms={}):
        """Clips, steps unless the gradient norm is not finite, clears the gradients. Returns (norm, whether it is finite): tensors.

        networks: a list of lists of parameters, each of which is clipped on its own, lest the spikes of one shorten the steps
        of another: clipped together with its alias tokenizer, a structure tokenizer was 0.3 to 0.6 dB worse.
        Every rank sees the same averaged gradients, so all of them skip together. Non-finite losses give
        non-finite gradients, so this one check covers both. terms: the loss terms by name, to say which went first.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        self.scaler.unscale_(self.optimizer)
        norms = [torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip) for parameters in networks]
        norm = torch.stack([norm.full_tensor() if hasattr(norm, 'full_tensor') else norm for norm in norms]).norm()
        finite = norm.isfinite()
        self.optimizer.found_inf = (~finite).float()        # fused optimizers look at it and leave everything as it was
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.count(finite, terms)
        return norm, finite

    def count(self, finite, terms):
        taken, skipped, in_a_row, first_step = self.counts.unbind()
        first = ~finite & (in_a_row == 0)
        new = [name for name in terms if name not in self.names]        # some terms begin in mid-run
        self.names = self.names + new
        self.first_terms = torch.cat([self.first_terms, self.first_terms.new_zeros(len(new))])
        zero = self.first_terms.new_zeros(())
        now = [terms[name].detach().float().mean() if name in terms else zero for name in self.names]
        now = torch.stack(now) if now else self.first_terms
        self.first_terms = torch.where(first, now, self.first_terms)
        self.counts = torch.stack([taken + finite, skipped + ~finite, (in_a_row + 1) * ~finite,
                                   torch.where(first, taken + skipped, first_step)])

    def check(self):
        """Waits for the device; returns how many steps were skipped so far. All ranks must ask.

        Raises FloatingPointError, naming the loss terms that went first, if the last ten steps or more were skipped.
        """
        _, skipped, in_a_row, first_step = self.counts.tolist()
        # a float16 scaler starts too high on purpose and skips its way down: not an alarm
        if in_a_row >= 10 and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            bad = all_reduce(1 - self.first_terms.isfinite().float()).tolist()
            culprits = ', '.join(name for name, count in zip(self.names, bad) if count) or 'a gradient'
            raise FloatingPointError(f'{in_a_row} steps in a row had a loss or gradient that is not finite, first {culprits} in step '
                                     f'{first_step}; the last checkpoint is intact: lower --lr, or use --dtype=float32')
        return skipped


# -----------------------------------------------------------------------------
# when to save, and when to stop

class Stopped(Exception):
    """A signal asked the run to stop, and it has been saved. number: of the signal."""

    def __init__(self, number, step):
        super().__init__(f'stopped by {signal.Signals(number).name} after step {step} and saved; --init_from=resume goes on')
        self.number = number


class Saving:
    """When a run is saved: every so many steps, every so many seconds (0: never mind), at the end, and before it stops.

    From its making to its end, SIGTERM and SIGINT are noted, not obeyed: the step under way is finished and saved first.
    A second SIGINT stops at once. One rank that was signalled is enough, and the seconds are those of rank 0.
    """

    def __init__(self, every, seconds):
        self.every, self.seconds = every, seconds
        self.asked = self.number = 0                        # the signal this rank was sent, and the one all ranks know of
        self.saved_at = time.monotonic()
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        if number == self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def due(self, step, steps):
        """Whether to save now, after `step` of `steps` steps; the same answer on every rank. All ranks must ask, every step."""
        late = self.seconds > 0 and rank() == 0 and time.monotonic() - self.saved_at >= self.seconds
        self.number, late = all_reduce_max(torch.tensor([self.asked, int(late)])).tolist()
        due = bool(late or self.number or step % self.every == 0 or step == steps)
        self.saved_at = time.monotonic() if due else self.saved_at
        return due

    def stop_if_asked(self, step):
        """After the save: raises Stopped if a signal came. Otherwise nothing."""
        if self.number:
            self.end()
            raise Stopped(self.number, step)

    def end(self):
        """Signals do again what they did before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# files


# -----------------------------------------------------------------------------
# logs


class progress(tqdm):
    """A bar over steps on rank 0 that shows time left and images a second (`scale` images a step)."""

    def __init__(self, total, initial=0, label='', unit='img', scale=1):
        self.scale = scale
        super().__init__(total=total, initial=initial, desc=label, unit=unit, disable=rank() != 0, dynamic_ncols=True,
                         mininterval=0.5 if sys.stderr.isatty() else 30.0, file=sys.stderr,
                         bar_format='{desc}: {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {images}]{postfix}')

    @property
    def format_dict(self):
        values = super().format_dict
        rate = values['rate'] or (values['n'] - values['initial']) / max(values['elapsed'], 1e-9)
        return values | {'images': f'{rate * self.scale:.0f} {self.unit}/s'}


class Waiting:
    """An iterator that knows which share of the time since its first item its user has waited for items."""

    def __init__(self, items):
        self.items, self.waited, self.began = iter(items), 0.0, None

    def __next__(self):
        asked = time.perf_counter()
        item = next(self.items)
        given = time.perf_counter()
        if self.began is None:                              # what starts only once is no waiting
            self.began = given
        else:
            self.waited += given - asked
        return item

    def share(self):
        return self.waited / max(1e-9, time.perf_counter() - self.began) if self.began else 0.0


class Speed:
    """Images per second since the last report, and MFU: the share of the devices' peak FLOP/s that the model itself needs for them.

    What is computed twice to save memory does not count as needed. flops_per_image: forwards and backwards.
    """

    def __init__(self, images_per_step, flops_per_image, peak):
        self.images_per_step, self.flops, self.peak = images_per_step, flops_per_image, peak * world_size()
        self.start(0)

    def start(self, step):
        """Begins to measure after this step."""
        self.step, self.began = step, time.perf_counter()

    def report(self, step):
        """To be asked when the device is known to be done with this step."""
        rate = (step - self.step) * self.images_per_step / (time.perf_counter() - self.began)
        self.start(step)
        return {'images_per_second': rate, 'mfu': rate * self.flops / self.peak}


def say(*words):
    """Prints on rank 0 without breaking a progress bar."""
    if rank() == 0:
        tqdm.write(' '.join(str(word) for word in words), file=sys.stdout)
        sys.stdout.flush()


# -----------------------------------------------------------------------------
# the outermost frame

def run(main):
    """Runs a script's main(): a user's mistake is one line and status 2, a fault of the machine one line and status 1.

    A run that saved itself because of a signal has status 128 + its number (SIGTERM 143, SIGINT 130), as a shell would say.
    """
    began = time.time()
    try:
        main()
        say(f'{Path(sys.argv[0]).name}: done in {time.time() - began:.0f} s')
    except UserError as error:
        fail(error, 2)
    except FloatingPointError as error:
        fail(error, 1)
    except Stopped as stop:
        if rank() == 0:
            fail(stop, 128 + stop.number)
        raise SystemExit(128 + stop.number) from None
    except torch.OutOfMemoryError:
        fail(f'out of GPU memory: {less_memory(main)}', 1)
    except MemoryError:
        fail(f'out of memory: {less_memory(main)}', 1)
    except RuntimeError as error:
        if any(words in str(error) for words in ('not enough memory', 'out of memory', "can't allocate memory", 'ALLOC_FAILED')):
            fail(f'out of memory: {less_memory(main)}', 1)
        if str(error).startswith('DataLoader worker'):
            fail(f'a process that decodes images died ({str(error).splitlines()[0]}): lower --workers, out of memory they are killed', 1)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail(f'disk full while writing {error.filename or "a file"}: free some space; what was there before is intact', 1)
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            fail(f'{error.filename}: a file where a folder should be, or the other way round: choose another --out_dir', 2)
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            fail(f'no permission for {error.filename}: change its rights, or choose another --out_dir', 2)
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EFBIG):
            fail(f'{error.filename or "a file"}: {os.strerror(error.errno)}', 2)
        raise
    except KeyboardInterrupt:
        fail('interrupted', 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def less_memory(main):
    """Which of the script's settings to lower."""
    settings = main.__globals__
    if 'grad_accum_steps' in settings:
        mend = f'raise --grad_accum_steps (now {settings["grad_accum_steps"]})'
    else:
        mend = 'lower --batch_size' + ''.join(f' or --{name}' for name in ('image_size', 'num_samples') if name in settings)
    return mend + (' or set --grad_checkpoint=True, which changes nothing that is learnt' if 'grad_checkpoint' in settings else '')


def fail(message, status):
    for bar in list(getattr(tqdm, '_instances', ())):       # or the message would stand behind a progress bar
        bar.close()
    print(f'error: {message}', file=sys.stderr, flush=True)
    raise SystemExit(status)
