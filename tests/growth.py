"""Memory, FLOPs, hours and disk of every configuration on eight A100-80G. Computed, not measured.

    make growth         # also writes results/memory.json

Whole training steps run at their real size on a GPU that does not exist (fakegpu.py).
"""
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import encode
import train_fvar
import train_tokenizer
from configurator import HERE
from experiments.bench import settings
from fakegpu import FakeGPU
from model import build_student, held_out_loss
from tokenizer import build_tokenizers
from util import runtime
from util.checkpoint import write_json

A100 = 312e12                   # FLOP/s in bfloat16, from NVIDIA's data sheet
GPUS = 8
UTILIZATION = 0.4               # fraction of the peak that the hours assume
IMAGENET = 1_281_167            # training images
STAGE_1 = ('tokenizer_256', 'tokenizer_512', 'tokenizer_1024')
STAGE_2 = {
    'd12': 'tokenizer_256',
    'd16': 'tokenizer_256',
    'd20': 'tokenizer_256',
    'd24': 'tokenizer_256',
    'd36_512': 'tokenizer_512',
    'd16_1024': 'tokenizer_1024',
}


@contextmanager
def configured(script, file, **changes):
    """An imported training script as one of eight ranks, with the settings of a configuration; yields these.

    A step has a single pass. begin() leaves gradients behind, as earlier passes would.
    """
    values = settings(script, file) | changes
    values |= {'batch_size': values['batch_size'] // values['grad_accum_steps'], 'grad_accum_steps': 1}
    ranks = {'RANK': '0', 'WORLD_SIZE': str(GPUS)}
    with mock.patch.multiple(script, **values, config=values), mock.patch.dict('os.environ', ranks):
        yield SimpleNamespace(**values)


def stand_in_lpips(dev):
    """The real LPIPS network without its published weights."""
    from torch_fidelity import sample_similarity_lpips as lpips
    from torchvision.models import vgg16
    with (mock.patch.object(lpips, 'load_state_dict_from_url', lambda *_, **__: {}),
          mock.patch.object(lpips, 'torchvision_load_pretrained_vgg16', vgg16),
          mock.patch.object(lpips.SampleSimilarityLPIPS, 'load_state_dict', lambda *_: None),
          mock.patch.object(train_tokenizer.Path, 'is_file', lambda path: True)):
        return LOAD_LPIPS(dev)


LOAD_LPIPS = train_tokenizer.load_lpips


def begin(*optimizers):
    """Gives optimizers the state that they have after their first step, and their weights gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group['params']:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def stage1_on_a_gpu(gpu, file, **changes):
    """(run, cost of a step of stage 1 with all loss terms, cost of a validation, images per step and GPU)."""
    lpips = mock.patch.object(train_tokenizer, 'load_lpips', stand_in_lpips)
    with configured(train_tokenizer, file, **changes) as c, lpips:
        with gpu.building():
            run = train_tokenizer.set_up(gpu.device)
        begin(run.optimizer, run.gan_optimizer)
        batch = runtime.share_of_batch(c.batch_size)
        shape = batch, 3, c.image_size, c.image_size
        images = torch.zeros(shape, dtype=torch.uint8, device=gpu.device)
        train = observed(gpu, train_tokenizer.train_step, run, c.gan_start, images)
        images = None                                       # its memory would count below
        held_out = torch.zeros(shape, dtype=torch.uint8)
        validation = observed(gpu, train_tokenizer.validate, run, 0, held_out, batch)
        return run, train, validation, batch


def stage2_on_a_gpu(gpu, stage1_file, file, **changes):
    """The same for stage 2. With fsdp, all is computed whole; what other ranks hold is then subtracted."""
    with configured(train_fvar, file, **{'fsdp': False} | changes) as c:
        with gpu.building():
            structure, alias = build_tokenizers(settings(train_tokenizer, stage1_file))
            student = build_student(settings(train_fvar, file), structure, num_classes=1000)
            run = train_fvar.set_up(gpu.device, structure, alias, student)
        begin(run.optimizer)
        batch = runtime.share_of_batch(c.batch_size)
        lengths = run.network.student.lengths
        shapes = (batch, sum(lengths)), (batch, sum(lengths[:-1])), (batch,)
        tokens = [torch.zeros(shape, dtype=torch.int64, device=gpu.device) for shape in shapes]
        train = observed(gpu, train_fvar.train_step, run, 0, tokens)
        held_out = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
        validation = observed(
            gpu, held_out_loss, run.network, structure, [held_out], gpu.device, run.autocast)
        if settings(train_fvar, file)['fsdp']:
            # weights, gradients and Adam take 16 bytes per parameter; two blocks at a time are whole, with
            # weights in 16 bits and gradients in 32
            block = max(map(count_parameters, train_fvar.blocks_of(run.network)))
            spared = 16 * count_parameters(run.network) * (GPUS - 1) / GPUS - 2 * (2 + 4) * block
            train['bytes'] -= spared
            validation['bytes'] -= spared
        return run, train, validation, batch


def observed(gpu, function, *arguments):
    """Peak memory in bytes, FLOPs and waits of a call."""
    gpu.start()
    function(*arguments)
    return {'bytes': gpu.peak, 'flops': gpu.flops, 'waits': dict(+gpu.waits)}


def cost(name):
    """One row of the table."""
    file, disk = f'config/{name}.py', 0
    with FakeGPU() as gpu:
        if name in STAGE_1:
            run, train, validation, batch = stage1_on_a_gpu(gpu, file)
            values, network = settings(train_tokenizer, file), run.networks
            lengths = [p * p for p in values['patch_nums']]
            columns = 2 * sum(lengths) - lengths[-1] + 1    # structure tokens, alias tokens, label
            disk = IMAGENET * settings(encode, file)['crops'] * 2 * columns
        else:
            run, train, validation, batch = stage2_on_a_gpu(gpu, f'config/{STAGE_2[name]}.py', file)
            values, network = settings(train_fvar, file), run.network
        parameters = count_parameters(network)
        # a checkpoint of the weights and one with both of Adam's averages, each with the one before it
        disk += 2 * (12 + 4) * parameters
        flops_per_image = train['flops'] / batch
        images = values['batch_size'] * values['steps']
        return {
            'config': name,
            'millions': parameters / 1e6,
            'tokens': sum(p * p for p in run.structure.patch_nums),
            'gib': train['bytes'] / 2 ** 30,
            'gib_validation': validation['bytes'] / 2 ** 30,
            'tflop_per_image': flops_per_image / 1e12,
            'hours': flops_per_image * images / (GPUS * A100 * UTILIZATION) / 3600,
            'disk_gb': disk / 1e9,
        }


def growth():
    """Prints and returns the cost of every configuration."""
    runtime.say(
        f'computed, not measured: {GPUS} × A100-80G at {UTILIZATION:.0%} of their peak, batch and steps as '
        f'configured\n{"":14} {"params":>7} {"tokens":>6} {"GiB per GPU":>12} {"validating":>11} '
        f'{"TFLOP/image":>12} {"hours":>6} {"disk, GB":>9}')
    table = []
    for name in (*STAGE_1, *STAGE_2):
        row = cost(name)
        table.append(row)
        runtime.say(
            f'{name:14} {row["millions"]:6.0f}M {row["tokens"]:6} {row["gib"]:12.1f} '
            f'{row["gib_validation"]:11.1f} {row["tflop_per_image"]:12.2f} {row["hours"]:6.0f} '
            f'{row["disk_gb"]:9.1f}')
    return table


if __name__ == '__main__':
    write_json(HERE / 'results' / 'memory.json', growth())
