"""What every configuration of config/ needs on eight A100-80G: memory, FLOPs, hours and disk. Computed, not measured.

    make growth

Whole training steps run at their real size on a GPU that is not there (fakegpu.py).
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
from experiments.bench import settings
from fakegpu import FakeGPU
from model import held_out_loss
from tokenizer import build_tokenizers
from util import runtime

A100 = 312e12                   # FLOP/s in bfloat16, from NVIDIA's data sheet
GPUS = 8
STAGE_1 = ('tokenizer_256', 'tokenizer_512', 'tokenizer_1024')
STAGE_2 = {'d12': 'tokenizer_256', 'd16': 'tokenizer_256', 'd20': 'tokenizer_256', 'd24': 'tokenizer_256',
           'd36_512': 'tokenizer_512', 'd16_1024': 'tokenizer_1024'}
SHARE = 0.4                     # of the peak, as the hours suppose


@contextmanager
def configured(script, file, **changes):
    """An imported training script, one of eight ranks, with the settings of a configuration; yields these.

    A step has one pass: begin() leaves gradients as if there had been others before it.
    """
    values = settings(script, file) | changes
    values |= {'batch_size': values['batch_size'] // values['grad_accum_steps'], 'grad_accum_steps': 1}
    with mock.patch.multiple(script, **values, config=values), mock.patch.dict('os.environ', {'RANK': '0', 'WORLD_SIZE': str(GPUS)}):
        yield SimpleNamespace(**values)


def stand_in_lpips(dev):
    """The real LPIPS network without its published weights."""
    from torch_fidelity import sample_similarity_lpips as lpips
    from torchvision.models import vgg16
    with (mock.patch.object(lpips, 'load_state_dict_from_url', lambda *_, **__: {}),
          mock.patch.object(lpips, 'torchvision_load_pretrained_vgg16', vgg16),
          mock.patch.object(lpips.SampleSimilarityLPIPS, 'load_state_dict', lambda *_: None),
          mock.patch.object(train_tokenizer.os.path, 'isfile', lambda path: True)):
        return LOAD_LPIPS(dev)


LOAD_LPIPS = train_tokenizer.load_lpips


def begin(*optimizers):
    """Gives optimizers the state that they have from their first step on, and their weights gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group['params']:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def stage1_on_a_gpu(gpu, file, **changes):
    """(run, what a step of stage 1 with all terms of its loss needs, what a validation needs, pictures at a time)."""
    with configured(train_tokenizer, file, **changes) as c, mock.patch.object(train_tokenizer, 'load_lpips', stand_in_lpips):
        with gpu.building():
            run = train_tokenizer.set_up(gpu.device)
        begin(*filter(None, (run.optimizer, run.gan_optimizer)))
        share = runtime.share_of_batch(c.batch_size)
        images = torch.empty(share, 3, c.image_size, c.image_size, device=gpu.device).contiguous(memory_format=torch.channels_last)
        train = observed(gpu, lambda: train_tokenizer.train_step(run, c.gan_start, images))
        images = None                                       # or its memory would count below
        held_out = torch.zeros(share, 3, c.image_size, c.image_size, dtype=torch.uint8)
        validation = observed(gpu, lambda: train_tokenizer.validate(run.structure, run.alias, held_out, share, gpu.device))
        return run, train, validation, share


def stage2_on_a_gpu(gpu, first, file, **changes):
    """The same of stage 2. With fsdp everything is computed whole, and then what other ranks would hold is taken off."""
    with configured(train_fvar, file, **{'fsdp': False} | changes) as c:
        with gpu.building():
            structure, alias = build_tokenizers(settings(train_tokenizer, first))
            run = train_fvar.set_up(gpu.device, structure.requires_grad_(False), alias, num_classes=1000)
        begin(run.optimizer)
        share = runtime.share_of_batch(c.batch_size)
        sizes = (sum(run.student.lengths),), (sum(run.student.lengths[:-1]),), ()
        batch = [torch.zeros(share, *size, dtype=torch.int64, device=gpu.device) for size in sizes]
        train = observed(gpu, lambda: train_fvar.train_step(run, run.network, 0, batch))
        held_out = [torch.zeros(share, *size, dtype=torch.int64) for size in sizes]
        validation = observed(gpu, lambda: held_out_loss(run.network, structure, [held_out], gpu.device, run.autocast))
        if settings(train_fvar, file)['fsdp']:
            block = max(map(train_fvar.count_parameters, train_fvar.blocks_of(run.network))) * 1e6
            # 16 bytes a parameter for weights, gradients and Adam; two blocks are whole at a time, weights in 16 bits, gradients in 32
            spared = 16 * train_fvar.count_parameters(run.network) * 1e6 * (GPUS - 1) / GPUS - 2 * (2 + 4) * block
            train['bytes'] -= spared
            validation['bytes'] -= spared
        return run, train, validation, share


def observed(gpu, function):
    """Bytes at the peak, FLOPs and waits of a call."""
    gpu.start()
    function()
    return {'bytes': gpu.peak, 'flops': gpu.flops, 'waits': dict(+gpu.waits)}


def growth():
    """Prints what every configuration of config/ needs on eight A100-80G, from whole training steps on a GPU that is not there."""
    runtime.say(f'computed, not measured: {GPUS} × A100-80G at {SHARE:.0%} of their peak, the batch and the steps of the configuration\n'
                f'{"":14} {"params":>7} {"tokens":>6} {"GiB per GPU":>12} {"validating":>11} {"TFLOP/image":>12} '
                f'{"hours":>6} {"disk, GB":>9}')
    table = []
    for name in STAGE_1 + tuple(STAGE_2):
        gpu = FakeGPU()
        with gpu:
            file, first = f'config/{name}.py', f'config/{STAGE_2.get(name)}.py'
            if name in STAGE_1:
                run, train, validation, images = stage1_on_a_gpu(gpu, file)
                values, network = settings(train_tokenizer, file), run.networks
                disk = 1_281_167 * settings(encode, file)['crops'] * 2 * (1 + sum(2 * p * p for p in values['patch_nums'])
                                                                          - values['patch_nums'][-1] ** 2)
            else:
                run, train, validation, images = stage2_on_a_gpu(gpu, first, file)
                values, network, disk = settings(train_fvar, file), run.network, 0
            parameters = sum(p.numel() for p in network.parameters())
            disk += 2 * (12 + 4) * parameters               # weights alone and with both averages, each with the one before it
            hours = train['flops'] / images * values['batch_size'] * values['steps'] / (GPUS * A100 * SHARE) / 3600
            row = {'config': name, 'parameters': parameters, 'tokens': sum(p * p for p in run.structure.patch_nums),
                   'gib': train['bytes'] / 2 ** 30, 'gib_validation': validation['bytes'] / 2 ** 30,
                   'tflop_per_image': train['flops'] / images / 1e12, 'hours': hours, 'disk_gb': disk / 1e9}
            del run, network
        table.append(row)
        runtime.say(f'{name:14} {row["parameters"] / 1e6:6.0f}M {row["tokens"]:6} {row["gib"]:12.1f} {row["gib_validation"]:11.1f} '
                    f'{row["tflop_per_image"]:12.2f} {hours:6.0f} {row["disk_gb"]:9.1f}')
    return table


if __name__ == '__main__':
    growth()
