"""Shared by both training stages: the loop, optimizers, skipping non-finite steps, saving, speed."""
import math
import signal
import time
import timeit

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configurator import UserError
from util.checkpoint import Log
from util.runtime import (
    STOP_SIGNALS, all_reduce_max, barrier, check_ranks_agree, dtype_of, has_fast_bfloat16, mean_terms,
    progress, say, world_size)


def train(run, config, name, step, metrics, flops_per_image, train_step, validate, save, validate_after=0):
    """Trains from `step` to the last one, with logs, validations, checkpoints and a progress bar.

    train_step(step) → (loss terms by name, gradient norm), all tensors; validate(step) → metrics;
    save(step, metrics). train_step() and the log number the steps from 0; elsewhere `step` is how many are
    done. run: a namespace with dev, autocast, optimizer and safe_step. name: the log is OUT_DIR/NAME.jsonl.
    metrics: those of the last validation. flops_per_image() is called only if there is a step to take.
    validate_after: no validation up to this step.
    Raises UserError if the ranks do not start from the same step.
    """
    check_ranks_agree(
        f'{name}: settings, dtype and the step to continue from', (config, str(dtype_of(run.autocast)), step))
    steps, batch_size = config['steps'], config['batch_size']
    log = Log(f'{config["out_dir"]}/{name}.jsonl', step, config['log_to'], config)
    if step >= steps:
        return
    bar = progress(steps, step, name, images_per_step=batch_size)
    saving = Saving(config['save_every'], config['save_seconds'])
    speed = Speed(batch_size, flops_per_image(), peak_flops(run.dev, run.autocast))
    speed.start(step)
    while step < steps:
        terms, norm = train_step(step)
        step += 1
        bar.update()
        if step % config['log_every'] == 0 or step == steps:
            means = mean_terms(terms)
            log(step=step - 1, **means, grad_norm=norm.item(), skipped=run.safe_step.check(means),
                lr=run.optimizer.param_groups[0]['lr'], **speed.report(step))
            first = next(iter(means))
            bar.set_postfix({'step': step, first: means[first]})
        if (step % config['eval_every'] == 0 and step > validate_after) or step == steps:
            metrics = validate(step)
            log(step=step - 1, **{f'val_{key}': value for key, value in metrics.items()})
            speed.start(step)
        if saving.due(step, steps):
            save(step, metrics)
            barrier()
            saving.stop_if_asked(step)
            speed.start(step)
    bar.close()


# -----------------------------------------------------------------------------
# optimisation

def learning_rate(step, steps, peak, warmup):
    """Linear warm-up to `peak`, then a cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t)))


def adamw(module, lr, betas, weight_decay, without=()):
    """AdamW that decays only weights of linear layers and convolutions. Raises UserError for bad betas.

    without: a set of parameters that another optimizer trains.
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f'betas={betas}: give two numbers, each at least 0 and less than 1')
    kernels = {part.weight for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    ours = [p for p in module.parameters() if p.requires_grad and p not in without]
    groups = [{'params': [p for p in ours if (p in kernels) == decays],
               'weight_decay': weight_decay * decays} for decays in (True, False)]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def orthogonalize(matrix, dtype):
    """The matrix with all singular values near 1, by five Newton–Schulz steps (Jordan et al. 2024)."""
    x = matrix.to(dtype)
    if len(x) > x.shape[1]:
        return orthogonalize(matrix.T, dtype).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some weights and AdamW for all other parameters, as one optimizer.

    weights: of linear layers and of convolutions, which count as matrices with a row per output channel.
    Learning rates are AdamW's: Muon's updates are scaled to the same size (Liu et al. 2025). torch.optim.Muon
    does the same, but always in bfloat16, which is slow on many CPUs. Muon has no fused kernel that skips
    non-finite steps, so each step waits for the device.
    """

    def __init__(self, weights, module, lr, betas, weight_decay):
        self.adamw = adamw(module, lr, betas, weight_decay, without=set(weights))
        muon = {'params': weights, 'weight_decay': weight_decay}
        super().__init__([muon, *self.adamw.param_groups], {'lr': lr})
        self.adamw.state = self.state                       # shared
        self.dtype = torch.bfloat16 if has_fast_bfloat16(weights[0].device) else torch.float32

    @torch.no_grad()
    def step(self):
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        if self.found_inf:
            return
        muon = self.param_groups[0]
        for weight in muon['params']:
            if weight.grad is None:                         # some learn only after the warm start
                continue
            gradient = weight.grad.movedim(1, -1)
            rows, state = gradient.flatten(1), self.state[weight]
            if not state:
                state['momentum_buffer'] = torch.zeros_like(rows)
            momentum = state['momentum_buffer'].lerp_(rows, 0.05)
            update = orthogonalize(rows.lerp(momentum, 0.95), self.dtype)
            weight.mul_(1 - muon['lr'] * muon['weight_decay'])
            weight.add_(update.view_as(gradient).movedim(-1, 1),
                        alpha=-0.2 * muon['lr'] * math.sqrt(max(rows.shape)))


def build_optimizer(name, muon_weights, module, lr, betas, weight_decay):
    """The optimizer of a module: 'adamw', or 'muon' for muon_weights and AdamW for the rest.

    Raises UserError for another name.
    """
    if name == 'adamw':
        return adamw(module, lr, betas, weight_decay)
    if name == 'muon':
        return MuonWithAdamW(muon_weights, module, lr, betas, weight_decay)
    raise UserError(f'--optimizer={name}: choose adamw or muon')


class SafeStep:
    """Optimizer steps that skip non-finite gradients, without waiting for the device (except with Muon).

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

        networks: the parameters of each network. Each is clipped separately, so that spikes in one do not
        shorten the steps of another. A non-finite loss has non-finite gradients, and gradients are averaged
        over the ranks, so all ranks skip the same steps.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        self.scaler.unscale_(self.optimizer)
        most = self.grad_clip or math.inf
        norms = [torch.nn.utils.clip_grad_norm_(parameters, most) for parameters in networks]
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
            bad = [name for name, value in terms.items() if not torch.tensor(value).isfinite().all()]
            raise FloatingPointError(
                f'{in_a_row} steps in a row had a non-finite {" and ".join(bad) or "gradient"}; the last '
                'checkpoint is intact: continue from it with --init_from=auto and a lower --lr or '
                '--grad_clip, or with --dtype=float32')
        return self.skipped.item()


# -----------------------------------------------------------------------------
# saving and stopping

class Saving:
    """Decides when to save a run: every so many steps, or seconds (0: never), at its end and before it stops.

    Once it exists, SIGTERM, SIGINT and SIGHUP only set a flag, so that the current step is finished and
    saved; a second SIGINT in a row stops at once. A signal to any rank stops all.
    """

    def __init__(self, every, seconds):
        self.every, self.seconds = every, seconds
        self.received = self.agreed = 0                     # signal numbers: of this rank, of all ranks
        self.saved_at = time.monotonic()
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.note)

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
# speed

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
    dtype = dtype_of(autocast)
    n = 8192 if device.type == 'cuda' else 1536
    if dtype != torch.float32 and not has_fast_bfloat16(device):
        n //= 4                                             # emulation would take half a minute
    matrix = torch.rand(n, n, device=device).to(dtype)
    # .item() waits for the device
    seconds = timeit.repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1, repeat=4)
    return 2 * n ** 3 / min(seconds)
