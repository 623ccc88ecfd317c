"""Times every stage on this machine.

    python -m experiments.bench             # the demo's networks on a CPU, the paper's on a GPU
    python -m experiments.bench --stage1=config/tokenizer_256.py --stage2=config/d16.py --parts=train,sample

pyramid    the focused views of a batch at 256 px, against blurring whole pictures before sampling them
tokenizer  encoding into structure tokens and alias tokens, and decoding
encode     images to token files
train      a step of stage 2 on given tokens, without and with a teacher
sample     one picture and a batch
depths     d12 … d24 relative to d12 (Table 1, column Time): all tokens of one picture, without decoder

Weights are random, which does not affect the time. Each row prints the median time of a call ± half the range
of its repeats, images per second, the time per image relative to the first row of the part, FLOPs per image
(matrix products, convolutions and attention as executed), and the fraction of peak FLOP/s. The peak is what a
large matrix product reaches in the same run. Writes bench.json.
"""
import copy
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import train_fvar
import train_tokenizer
from configurator import UserError, configure, read_config_file
from data import normalize
from model import FVAR, Teacher, build_student, compile_sampling
from pyramid import decimate, defocus, defocus_decimate, focus_radii
from tokenizer import build_tokenizers
from util import runtime, training
from util.charts import Charts
from util.checkpoint import write_json

out_dir = 'out'                 # folder for bench.json
parts = 'pyramid,tokenizer,encode,train,sample,depths'  # what to time
stage1 = ''                     # config file of the tokenizers (default: charts, on a GPU tokenizer_256)
stage2 = ''                     # config file of student and teacher (default: charts, on a GPU d16)
batch_size = 0                  # pictures per training step (default: that of stage2, on a GPU 32)
sample_batch = 64               # pictures per sampled batch
repeats = 5                     # repetitions of everything
compiled = False                # also time compiled blocks (compiling takes minutes on a CPU)
device = 'auto'                 # auto | cpu | cuda
dtype = 'auto'                  # auto | float32 | bfloat16 | float16
seed = 0                        # seed of weights and samples
config = configure(globals())


# -----------------------------------------------------------------------------
# measuring

def timed(functions):
    """(median seconds, range of the repeats relative to it) per function, after two warm-up calls each.

    The functions take turns, so that a busy machine affects all of them alike.
    """
    seconds = []
    for _ in range(repeats + 2):                            # the second call records compiled functions
        for function in functions:
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds.append(time.perf_counter() - start)
    seconds = np.reshape(seconds, (repeats + 2, -1))[2:]
    median = np.median(seconds, 0)
    return list(zip(median.tolist(), (np.ptp(seconds, 0) / median).tolist()))


def synchronize():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure(part, groups, tokens, peak):
    """Prints and returns one row per job. groups: (images per call, {name: function}). tokens: per image."""
    rows = []
    for count, jobs in groups:
        for (name, function), (seconds, variation) in zip(jobs.items(), timed(jobs.values())):
            if 'compiled' not in name:                      # else as in the row before
                flops = training.count_flops(function) / count
            rate = count / seconds
            row = {'part': part, 'what': name, 'seconds': seconds, 'variation': variation}
            row |= {'images_per_second': rate, 'flops_per_image': flops, 'mfu': rate * flops / peak}
            rows.append(row)
            runtime.say(
                f'{part:9} {name:22} {1000 * seconds:9.1f} ms ±{50 * variation:3.0f} %  {rate:9.2f} images/s'
                f'  {rows[0]["images_per_second"] / rate:5.2f} ×  {flops / 1e9:8.3f} GFLOP/image'
                f'  {row["mfu"]:4.0%} of peak'
                + (f'  {rate * tokens:.0f} tokens/s' if part in ('train', 'sample') else '')
            )
        jobs.clear()                                        # frees a network before the next one is built
    return rows


# -----------------------------------------------------------------------------
# parts: generators of groups of jobs

def settings(script, file):
    """The settings of a training script with a config file."""
    return script.config | read_config_file(file, Path(script.__file__).stem, script.config)


def set_up(stage1, stage2, num_classes, count, dev, autocast, scaler):
    """Random networks with the settings of both stages, and `count` pictures with their tokens."""
    b = SimpleNamespace(dev=dev, autocast=autocast, scaler=scaler, count=count, optimizer=stage2['optimizer'])
    with dev:
        structure, alias = build_tokenizers(stage1)
        b.student = build_student(stage2, structure, num_classes)
        how = (stage2[name] for name in ('alias_scales', 'teacher_blocks', 'shared_blocks'))
        b.teacher = Teacher(b.student, alias.vocab_size, *how)
    b.structure = structure.to(memory_format=torch.channels_last).eval()
    b.alias = alias.to(memory_format=torch.channels_last).eval()
    images = normalize(Charts('val', stage1['image_size'], count).images.to(dev))
    b.images = images.contiguous(memory_format=torch.channels_last)
    b.tokens = inference(b, b.structure.encode, b.images)
    b.alias_tokens = inference(b, b.alias.encode, b.images)
    return b


@torch.no_grad()
def inference(b, function, *arguments):
    with b.autocast():
        return function(*arguments)


def bench_pyramid(b):
    x = torch.rand(4, 3, 256, 256, device=b.dev) * 2 - 1
    patch_nums = train_tokenizer.patch_nums
    views = [(radius, 16 * p) for radius, p in zip(focus_radii(patch_nums, 256), patch_nums)]
    yield len(x), {
        'cheapest route': lambda: [defocus_decimate(x, radius, size) for radius, size in views],
        'blur all, then sample': lambda: [decimate(defocus(x, radius), size) for radius, size in views]
    }


def bench_tokenizer(b):
    yield b.count, {
        'structure tokens': partial(inference, b, b.structure.encode, b.images),
        'alias tokens': partial(inference, b, b.alias.encode, b.images),
        'decoding': partial(inference, b, b.structure.decode, b.tokens)
    }


def bench_encode(b):
    def write():
        tokens = inference(b, b.structure.encode, b.images) + inference(b, b.alias.encode, b.images)
        torch.cat(tokens, 1).cpu().numpy().astype(np.uint16).tofile(file)

    with tempfile.TemporaryFile() as file:
        yield b.count, {'images to token file': write}


def bench_train(b):
    labels = torch.arange(b.count, device=b.dev) % b.student.num_classes

    def step_of(network):
        matrices = train_fvar.muon_weights(network)
        optimizer = training.build_optimizer(b.optimizer, matrices, network, 1e-9, (0.9, 0.95), 0.0)
        safe_step = training.SafeStep(optimizer, b.scaler, 2.0)

        def step():
            inputs = b.structure.token_inputs(b.tokens)
            with b.autocast():
                terms = network(labels, inputs, torch.cat(b.tokens, 1), torch.cat(b.alias_tokens, 1))
            b.scaler.scale(terms['total']).backward()
            safe_step([network.parameters()], 1e-9)
        return step

    network = FVAR(b.student, b.teacher)
    jobs = {'student alone': step_of(FVAR(b.student)), 'student and teacher': step_of(network)}
    if compiled:
        twin = copy.deepcopy(network)
        for block in (*twin.student.blocks, *twin.teacher.blocks):
            block.compile()
        jobs['both, compiled'] = step_of(twin)
    yield b.count, jobs


def bench_sample(b):
    def sample(student, labels):
        with b.autocast():
            student.generate(b.structure, labels, generator=torch.Generator(b.dev).manual_seed(seed))

    students = {'student': b.student.eval()}
    if compiled:
        students['compiled'] = copy.deepcopy(b.student)
        compile_sampling(students['compiled'], b.dev)
    for count in (1, sample_batch):
        labels = torch.arange(count, device=b.dev) % b.student.num_classes
        jobs = {name: partial(sample, each, labels) for name, each in students.items()}
        yield count, {f'{name}, batch {count}': job for name, job in jobs.items()}


def bench_depths(b):
    def forward_of(name):
        first = settings(train_tokenizer, 'config/tokenizer_256.py')
        d = set_up(first, settings(train_fvar, f'config/{name}.py'), 1000, 1, b.dev, b.autocast, b.scaler)
        label = torch.zeros(1, dtype=torch.int64, device=b.dev)
        return partial(inference, b, d.student.eval(), label, d.structure.token_inputs(d.tokens))

    for name in ('d12', 'd16', 'd20', 'd24'):
        yield 1, {name: forward_of(name)}


PARTS = {
    'pyramid': bench_pyramid,
    'tokenizer': bench_tokenizer,
    'encode': bench_encode,
    'train': bench_train,
    'sample': bench_sample,
    'depths': bench_depths
}


def main():
    dev = runtime.start(device, seed)
    autocast, scaler = runtime.precision(dtype, dev)
    runtime.require_positive(config, 'repeats', 'sample_batch')
    chosen = parts.split(',')
    for part in chosen:
        if part not in PARTS:
            raise UserError(f'--parts={parts}: unknown part {part!r}; choose from {",".join(PARTS)}')
    gpu = dev.type == 'cuda'
    first = settings(train_tokenizer, stage1 or f'config/{"tokenizer_256" if gpu else "charts"}.py')
    second = settings(train_fvar, stage2 or f'config/{"d16" if gpu else "charts"}.py')
    count = batch_size or (32 if gpu else second['batch_size'])
    b = set_up(first, second, 10, count, dev, autocast, scaler)
    name = torch.cuda.get_device_name() if gpu else f'{torch.get_num_threads()} CPU threads'
    peak = training.measured_peak(dev, autocast)
    runtime.say(f'{name}, torch {torch.__version__}, peak {peak / 1e12:.3f} TFLOP/s')
    results = {'config': config, 'machine': name, 'torch': torch.__version__, 'peak': peak, 'rows': []}
    for part in chosen:
        results['rows'] += measure(part, PARTS[part](b), sum(b.student.lengths), peak)
    write_json(f'{out_dir}/bench.json', results)


if __name__ == '__main__':
    runtime.run(main)
