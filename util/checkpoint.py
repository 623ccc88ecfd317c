"""Files that survive crashes: checkpoints, JSON and logs."""
import hashlib
import json
import os
import platform
import re
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from configurator import UserError
from util.runtime import OUT_OF_MEMORY, from_rank_0, rank, say


@contextmanager
def atomic_write(path, mode='wb', keep_previous=False):
    """Opens a file that appears under `path` complete or not at all; what was there may become PATH.previous.

    It is written next to `path`, flushed to disk, then renamed. The next write overwrites what a kill left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            path.replace(previous(path))
        temporary.replace(path)
    except RuntimeError as error:                           # torch.save hides the OSError of a full disk
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with atomic_write(path, 'w') as file:
        file.write(json.dumps(value, indent=1) + '\n')


def read_json(path):
    """The content of a JSON file, or None if it is missing or damaged."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads(Path(path).read_text(encoding='utf-8'))


# -----------------------------------------------------------------------------
# locks

@contextmanager
def locked(path):
    """Keeps other runs out of the same files: while active, rank 0 holds a lock file. UserError if another
    run does.

    The operating system frees the lock of a process that ends, however it does. Windows and some network file
    systems have no such locks; there nothing is checked.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a+') if rank() == 0 else nullcontext() as file:
        problem = from_rank_0(file and take_lock(file))
        if problem:
            raise UserError(problem)
        try:
            yield
        finally:
            if file:
                with suppress(PermissionError):             # fails while open on Windows
                    path.unlink(missing_ok=True)


def take_lock(file):
    """Locks an open file and writes this process into it, or returns a line that says who holds it."""
    try:
        import fcntl                                        # Windows has none
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        print(f'process {os.getpid()} on {platform.node()}', end='', file=file, flush=True)
    except BlockingIOError:
        file.seek(0)
        return f'{file.name} is held by {file.read() or "another run"}: wait until it ends, or stop it'
    except (ImportError, OSError):
        pass


# -----------------------------------------------------------------------------
# checkpoints

def save_checkpoint(path, checkpoint):
    """Writes a dictionary of tensors and plain values. The file it replaces is kept as PATH.previous."""
    with atomic_write(path, keep_previous=True) as file:
        torch.save(checkpoint, file)


def previous(path):
    return Path(f'{path}.previous')


def candidates(path):
    """The newest checkpoint and the one before it, if they exist."""
    return [file for file in (Path(path), previous(path)) if file.is_file()]


def resumes(init_from, state_file):
    """Whether a run continues from state_file: always for 'resume', if possible for 'auto'."""
    return init_from == 'resume' or init_from == 'auto' and bool(candidates(state_file))


@contextmanager
def blame(path):
    """Turns a KeyError inside, from a name that the checkpoint lacks, into a UserError."""
    try:
        yield
    except KeyError as error:
        raise UserError(f'{path} has no {error}: it was written by another version of this code') from None


def load_checkpoint(path, kind, made_by='the script that writes it', shared=False):
    """Reads a file of save_checkpoint() to the CPU; checkpoint['kind'] must equal kind.

    If the newest file is damaged or missing, falls back to PATH.previous with a warning. Raises UserError if
    there is none, if it cannot be read, or if it is of another kind. shared: see read_weights().
    """
    problem = f'{path}: no such checkpoint; run {made_by} first'
    for file in candidates(path):
        try:
            checkpoint = read_weights(file, shared)
        except UserError as error:
            problem = error
            continue
        if file != Path(path):
            say(f'warning: {path} is missing or damaged; falling back to {file}')
        found = checkpoint.get('kind') if isinstance(checkpoint, dict) else None
        if found != kind:
            raise UserError(f'{file} holds {found or "something else"}, not {kind}')
        return checkpoint
    raise UserError(problem)


def read_weights(path, shared=False):
    """Loads tensors and plain values to the CPU and never runs code. Raises UserError for a damaged file,
    FileNotFoundError and PermissionError as they are.

    shared: maps the file into memory, so that the ranks of a machine share one copy: do not write to it.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:                                          # torch writes checksums, but does not check them
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile
        return torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip and shared)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:                              # zip, pickle and torch all raise their own kinds
        if re.search(OUT_OF_MEMORY, repr(error)):
            raise
        raise UserError(f'{path} cannot be read (truncated, not a checkpoint, or with code in it, which is '
                        'never run)') from None


def load_weights(module, state_dict, name):
    """load_state_dict() that raises a one-line UserError for weights that do not fit or are not finite.

    The weights are whole, even if the module is sharded.
    """
    for key, weight in state_dict.items():
        if not weight.isfinite().all():
            raise UserError(f'{name} has non-finite numbers in {key}: use an older checkpoint')
    now = module.state_dict()
    try:
        module.load_state_dict({key: sharded_like(now.get(key), w) for key, w in state_dict.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]
        raise UserError(f'{name} does not fit this model: {reason}; is it from another config?') from None


def check_resumed(saved, config, fixed, path):
    """Says what a resumed run changes. UserError if it is one of the `fixed` settings.

    saved: the checkpoint. config: this run's settings.
    """
    old = saved['config']
    changed = [name for name, value in config.items()
               if old.get(name, value) != value and name not in ('init_from', 'out_dir')]
    for name in changed:
        if name in fixed:
            raise UserError(f'{path} was made with {name}={old[name]!r}, which a resumed run cannot change '
                            f'to {config[name]!r}: give the old value, or start anew with '
                            '--init_from=scratch')
    if changed:
        say('resumed with changed settings: '
            + ', '.join(f'{name} {old[name]!r} → {config[name]!r}' for name in changed))


def digest(state_dict):
    """A short fingerprint of weights, the same on every machine. It ties token files to their tokenizer."""
    sha = hashlib.sha256()
    for name, weight in sorted(state_dict.items()):
        sha.update(name.encode())
        sha.update(weight.numpy(force=True).tobytes())
    return sha.hexdigest()[:16]


def training_state(module, optimizer):
    """(module's state dict, optimizer's state dict), whole on rank 0. All ranks must call this.

    Other ranks get None for what a sharded module has split.
    """
    def whole(value):
        if not hasattr(value, 'full_tensor'):
            return value
        value = value.full_tensor()
        return value.cpu() if rank() == 0 else None

    return tree_map(whole, (module.state_dict(), optimizer.state_dict()))


def sharded_like(parameter, tensor):
    """A whole tensor, which every rank has, split over the ranks if the parameter is."""
    if not hasattr(parameter, 'full_tensor') or tensor.ndim == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def load_optimizer(optimizer, saved):
    """Restores moments from a state dict. Learning rate, betas and weight decay stay those of this run."""
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    for number, values in saved['state'].items():
        p = parameters[number]
        optimizer.state[p].update({name: sharded_like(p, value).to(p.device, copy=True)
                                   for name, value in values.items()})


# -----------------------------------------------------------------------------
# logs

class Log:
    """One JSON object per line, written by rank 0. A resumed run drops the lines from its first step on.

    Non-finite numbers become null. to: 'tensorboard' or 'wandb' gets the numbers too; raises UserError if
    the package is not installed.
    """

    def __init__(self, path, first_step=0, to='', config={}):
        self.path = Path(path)
        if rank() == 0:
            self.show = open_writer(to, self.path, first_step, config)
            kept = [record for record in read_log(path) if record['step'] < first_step]
            with atomic_write(path, 'w') as file:
                file.writelines(json.dumps(record) + '\n' for record in kept)

    def __call__(self, **record):
        if rank() == 0:
            finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
            with open(self.path, 'a') as file:
                file.write(json.dumps(finite) + '\n')
            self.show(record.pop('step'), flat(record))


def flat(record):
    """{name: number} of a record. Item i of a list becomes name/i."""
    numbers = {}
    for name, value in record.items():
        if isinstance(value, list):
            numbers |= {f'{name}/{i}': item for i, item in enumerate(value)}
        else:
            numbers[name] = value
    return numbers


def open_writer(to, path, first_step, config):
    """A function (step, {name: number}) that writes to TensorBoard (tensorboard/ next to the log) or W&B."""
    try:
        if to == 'tensorboard':
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(path.parent / to / path.stem, purge_step=first_step)
            return lambda step, numbers: [writer.add_scalar(name, n, step) for name, n in numbers.items()]
        if to == 'wandb':
            import wandb
            name = f'{path.parent.name} {path.stem}'
            run = wandb.init(project='fvar', name=name, dir=path.parent, config=config)
            return lambda step, numbers: run.log(numbers | {'step': step})
    except ImportError:
        raise UserError(f'--log_to={to} needs a package that is not installed: pip install {to}') from None
    if to:
        raise UserError(f'--log_to={to}: choose tensorboard or wandb, or leave it out')
    return lambda step, numbers: None


def read_log(path):
    """The records of a log, without lines that a crash damaged."""
    records, path = [], Path(path)
    if path.is_file():
        for line in path.read_text(errors='replace').splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
    return records
