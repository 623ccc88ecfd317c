"""Files that survive crashes: checkpoints, JSON, logs."""
import hashlib
import json
import math
import os
import re
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from configurator import UserError
from util.runtime import is_sharded, rank


@contextmanager
def atomic_write(path, mode='wb'):
    """A file that appears whole or not at all: written beside `path`, flushed to disk, renamed.

    What a kill leaves beside it is overwritten by the next attempt.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with atomic_write(path, 'w') as file:
        json.dump(value, file, indent=1)
        file.write('\n')


def read_json(path):
    """What a JSON file holds; None if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except (FileNotFoundError, ValueError):
        return None


def save_checkpoint(path, checkpoint):
    """Writes a dictionary of tensors and plain values; the file it replaces is kept as PATH.previous."""
    path = Path(path)
    with atomic_write(path) as file:
        write_weights(file, checkpoint)
        file.flush()
        os.fsync(file.fileno())                             # only now may the old one step aside
        if path.exists():
            os.replace(path, previous(path))


def write_weights(file, weights):
    """torch.save, but an OSError when the disk is full, which torch's own complaint hides."""
    try:
        torch.save(weights, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error


def previous(path):
    return Path(path).with_name(Path(path).name + '.previous')


def resumes(init_from, state_file):
    """Whether a run goes on from state_file: 'resume' says so, 'auto' if there is one, or the one before it."""
    return init_from == 'resume' or init_from == 'auto' and any(path.is_file() for path in (Path(state_file), previous(state_file)))


@contextmanager
def blame(path):
    """UserError for a name that is missing from a checkpoint, inside: the file's fault."""
    try:
        yield
    except KeyError as error:
        raise UserError(f'{path} holds no {error}: it was made by another version of this code') from None


def load_checkpoint(path, kind, made_by='', shared=False):
    """Reads what save_checkpoint wrote, its tensors on the CPU; checkpoint['kind'] must equal kind.

    Falls back to PATH.previous, with a warning, when the newest is truncated or gone. Never runs code from the
    file. Raises UserError naming the file: missing (then `made_by` says which script writes it), unreadable,
    or of another kind. shared: see read_weights.
    """
    candidates = [file for file in (Path(path), previous(path)) if file.is_file()]
    if not candidates:
        raise UserError(f'{path}: no such checkpoint' + (f'; {made_by} writes it' if made_by else ''))
    if candidates[0] != Path(path):
        print(f'warning: {path} is gone; going back to {candidates[0]}', file=sys.stderr)
    for file in candidates:
        checkpoint = read_weights(file, candidates[-1] == file, shared)
        if checkpoint is not None:
            break
        print(f'warning: {file} is damaged; going back to {candidates[-1]}', file=sys.stderr)
    found = checkpoint.get('kind') if isinstance(checkpoint, dict) else None
    if found != kind:
        raise UserError(f'{file} holds {found or "something else"}, not {kind}')
    return checkpoint


def read_weights(path, errors=True, shared=False):
    """torch.load of tensors and plain values only, on the CPU. A damaged file: UserError, or None if errors=False.

    shared: the file is mapped into memory, so that all ranks of a machine have one copy of it; nobody may write into it then.
    """
    try:
        if whole := zipfile.is_zipfile(path):               # torch writes checksums, but does not look at them
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile
        return torch.load(path, map_location='cpu', weights_only=True, mmap=whole and shared)
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except Exception as error:                 # zip, pickle and torch each raise their own kinds
        if not errors:
            return None
        if isinstance(error, PermissionError):
            raise
        code = re.search(r'GLOBAL (\S+)', str(error), re.IGNORECASE)
        reason = f'it holds code, which is never run: {code[1]}' if code else 'truncated or not a checkpoint'
        raise UserError(f'{path}: can not be read ({reason})') from None


def load_weights(module, state_dict, name):
    """load_state_dict, with one line instead of a page when the shapes differ; UserError for NaN and infinities too."""
    for key, weight in state_dict.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise UserError(f'{name} holds numbers that are not finite, in {key}: take an older one')
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(f'{name} does not fit this model: {lines[0][:200]} ({len(lines)} differences in all); '
                        f'was it made with another config?') from None


def check_same(saved, now, keys, path):
    """UserError if a resumed run was started with other settings than the checkpoint's."""
    for key in keys:
        if key in saved and saved[key] != now[key]:
            raise UserError(f'{path} was made with {key}={saved[key]!r}, this run has {now[key]!r}: '
                            f'use the same config, or another --out_dir')


def digest(state_dict):
    """A short fingerprint of weights, the same on every machine: ties token files to their tokenizer."""
    sha = hashlib.sha256()
    for name in sorted(state_dict):
        sha.update(name.encode())
        sha.update(state_dict[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def training_state(module, optimizer):
    """(state dict, optimizer's state dict), whole on every rank that asks; all ranks must ask."""
    if not is_sharded(module):
        return module.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    return get_state_dict(module, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_training_state(module, optimizer, weights, optimizer_state, name):
    """Takes up what training_state gave."""
    if not is_sharded(module):
        load_weights(module, weights, name)
        load_optimizer(optimizer, optimizer_state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
    set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state,
                   options=StateDictOptions(full_state_dict=True))


def load_optimizer(optimizer, state_dict):
    """load_state_dict, but nothing of state_dict is held: on a CPU the optimizer would take over its very tensors."""
    optimizer.load_state_dict(state_dict)
    for state in optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items()})


class Log:
    """JSON lines, one a record, written by rank 0; a resumed run drops the lines from its first step on.

    A number that is not finite is null. to: 'tensorboard' or 'wandb' shows the numbers there too (UserError if it isn't installed).
    """

    def __init__(self, path, first_step=0, to='', config={}):
        self.file = None
        if rank() != 0:
            return
        path = Path(path)
        self.show = open_writer(to, path, first_step, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(path) if line['step'] < first_step]
        with atomic_write(path, 'w') as file:
            file.writelines(json.dumps(record) + '\n' for record in kept)
        self.file = open(path, 'a', encoding='utf-8')

    def __call__(self, **record):
        if self.file:
            self.file.write(json.dumps(finite(record)) + '\n')
            self.file.flush()
            self.show(record['step'], flat(record))


def finite(value):
    """NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(record):
    """{name: number} of a record; item i of a list is name/i."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in record.items() if name != 'step'}
    return {f'{name}/{i}' if isinstance(record[name], list) else name: v for name, values in lists.items() for i, v in enumerate(values)}


def open_writer(to, path, first_step, config):
    """A function (step, {name: number}) that shows them in TensorBoard (tensorboard/ beside the log) or Weights & Biases."""
    if to not in ('', 'tensorboard', 'wandb'):
        raise UserError(f'--log_to={to}: choose tensorboard or wandb, or leave it out')
    try:
        if to == 'tensorboard':
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(path.parent / 'tensorboard' / path.stem, purge_step=first_step)
            return lambda step, numbers: [writer.add_scalar(name, number, step) for name, number in numbers.items()]
        if to == 'wandb':
            import wandb
            run = wandb.init(project='fvar', name=f'{path.parent.name} {path.stem}', dir=path.parent, config=config)
            return lambda step, numbers: run.log(numbers | {'step': step})
    except ImportError:
        raise UserError(f'--log_to={to} needs a package that is not installed: pip install {to}') from None
    return lambda step, numbers: None


def read_log(path):
    """The records of a log, leaving out a line that a crash cut short or filled with something else."""
    records = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                pass
    return [record for record in records if isinstance(record, dict) and isinstance(record.get('step'), int)]
