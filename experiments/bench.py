"""How fast every stage is on this machine, in one run, everything compared within it.

    python -m experiments.bench                                             # the demo's networks on a CPU, the paper's on a GPU
    python -m experiments.bench --baseline                                  # beside a plain transcription of the method
    python -m experiments.bench --stage1=config/tokenizer_256.py --stage2=config/d16.py --batch_size=32 --parts=train,sample

pyramid    the focused views of a batch at 256 px, against direct convolution and FFT of the whole picture
tokenizer  encoding into both kinds of tokens, decoding
encode     images to token files: the share of the time that both encoders take
train      a step of stage 2 from token files; without teacher; compiled
sample     latency of one picture and of a batch; without KV cache; compiled
depths     time of d12 … d24 relative to d12 (Table 1, column Time)

The baseline computes tokens at every step, attends under one dense mask, concatenates its KV cache, sorts all codes and
steps parameter by parameter. Weights are random, which changes no time. FLOPs are those of matrix products, convolutions
and attention as executed; peak is what a large matrix product reaches in the same run. Prints tables; writes bench.json.
"""
import copy
import statistics
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import model
from util import runtime
from util.checkpoint import write_json
import train_fvar
import train_tokenizer
from configurator import UserError, configure, read_config_file
from data import normalize
from util.charts import Charts
from model import FVAR, Teacher, build_student
from pyramid import convolve, convolve_fft, decimate, defocus_decimate, focus_radii, psf
from tokenizer import build_tokenizers

out_dir = 'out'                 # where bench.json goes
parts = 'pyramid,tokenizer,encode,train,sample,depths'  # what to time
baseline = False                # beside it a plain transcription of the method
stage1 = ''                     # config file of the tokenizers (default: config/charts.py, on a GPU config/tokenizer_256.py)
stage2 = ''                     # config file of student and teacher (default: config/charts.py, on a GPU config/d16.py)
batch_size = 0                  # pictures a training step (default: the demo's 8, on a GPU 32)
sample_batch = 0                # pictures of a sampled batch (default: 64)
repeats = 5                     # times everything is repeated, in turn
compiled = False                # also time compiled blocks (minutes to compile on a CPU)
device = 'auto'                 # auto | cpu | cuda
dtype = 'auto'                  # auto | float32 | bfloat16 | float16
seed = 0                        # of weights and tokens
config = configure(globals())


# -----------------------------------------------------------------------------
# measuring

def timed(dev, *functions):
    """(median seconds, spread) of each function, called in turn `repeats` times after one warm-up.

    spread: largest minus smallest, relative to the median. In turn, so that a busy machine is busy for all of them.
    """
    times = [[] for _ in functions]
    for i in range(repeats + 1):
        for function, seconds in zip(functions, times):
            if dev.type == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if dev.type == 'cuda':
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    medians = [statistics.median(seconds[1:]) for seconds in times]
    return [(m, (max(seconds[1:]) - min(seconds[1:])) / m) for m, seconds in zip(medians, times)]


ROWS = []


def row(part, what, seconds, note=''):
    """Prints and keeps one line of the table; seconds as timed() gives them."""
    median, spread = seconds
    ROWS.append({'part': part, 'what': what, 'seconds': median, 'spread': spread, 'note': note})
    runtime.say(f'{part:10} {what:42} {1000 * median:10.1f} ms ±{50 * spread:3.0f} %   {note}')


# -----------------------------------------------------------------------------
# the plain transcription

def dense_attention(q, k, v, maps, scale):
    """All maps under one mask."""
    of_map = torch.repeat_interleave(torch.arange(len(maps[0]), device=q.device), torch.tensor(maps[0], device=q.device))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=of_map[:, None] >= of_map[None, :], scale=scale)


class ConcatenatedCache:
    def __init__(self, *_):
        self.k = self.v = None

    def extend(self, k, v):
        self.k = k if self.k is None else torch.cat([self.k, k], 2)
        self.v = v if self.v is None else torch.cat([self.v, v], 2)
        return self.k, self.v


def filter_by_sorting(logits, top_k, top_p):
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values.amin(-1, keepdim=True), -torch.inf)
    if top_p:
        ascending, order = logits.sort(dim=-1)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[..., -1] = False
        logits = logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
    return logits


@contextmanager
def plainly():
    """Runs model.py as the transcription would."""
    with mock.patch.multiple(model, block_causal_attention=dense_attention, KVCache=ConcatenatedCache, filter_logits=filter_by_sorting):
        yield


# -----------------------------------------------------------------------------
# the stages

def settings(script, file):
    """The settings of a training script under a config file."""
    return script.config | read_config_file(file, Path(script.__file__).stem, script.config)


def networks(first, second, num_classes, dev):
    """(structure, alias, FVAR) with random weights, from the settings of both stages."""
    with torch.device(dev):
        structure, alias = build_tokenizers(first)
        student = build_student(second, structure, num_classes)
        teacher = Teacher(student, alias.vocab_size, second['alias_scales'], second['teacher_blocks'], second['shared_blocks'])
    structure, alias = (network.to(memory_format=torch.channels_last).eval() for network in (structure, alias))
    return structure, alias, FVAR(student, teacher)


def bench_pyramid(dev):
    count = 16 if dev.type == 'cuda' else 2
    x = torch.rand(count, 3, 256, 256, device=dev) * 2 - 1
    maps = train_tokenizer.patch_nums
    radii = focus_radii(maps, 256)
    sizes = [16 * p for p in maps]

    def ours():
        return [defocus_decimate(x, r, s) for r, s in zip(radii, sizes)]

    def direct():
        return [decimate(convolve(x, psf(r, 'disk')), s) for r, s in zip(radii, sizes)]

    def by_fft():
        return [decimate(convolve_fft(x, psf(r, 'disk')), s) for r, s in zip(radii, sizes)]

    times = timed(dev, ours, direct, by_fft)
    for what, t in zip(('ours: strided or FFT, whichever is cheaper', 'direct convolution', 'FFT'), times):
        row('pyramid', what, t, f'{count / t[0]:.1f} images/s; ours is {t[0] / times[0][0]:.1f} × as fast')


def bench_tokenizer(structure, alias, x, dev, autocast):
    def run(function):
        def call():
            with torch.no_grad(), autocast():
                return function()
        return call
    tokens = run(lambda: structure.encode(x))()
    jobs = {'structure tokens': lambda: structure.encode(x), 'alias tokens': lambda: alias.encode(x),
            'decoding': lambda: structure.decode(tokens)}
    for (what, function), t in zip(jobs.items(), timed(dev, *map(run, jobs.values()))):
        row('tokenizer', what, t, f'{len(x) / t[0]:.1f} images/s; {runtime.count_flops(run(function)) / len(x) / 1e9:.2f} GFLOP an image')


def bench_encode(structure, alias, images, dev, autocast):
    """As encode.py does it: uint8 pictures to rows of a memory map."""
    columns = sum(p * p for p in structure.patch_nums) + sum(p * p for p in alias.patch_nums) + 1
    with tempfile.TemporaryDirectory() as folder:
        table = np.memmap(Path(folder, 'tokens.bin'), np.uint16, 'w+', shape=(len(images), columns))
        labels = torch.zeros(len(images), 1, dtype=torch.int64, device=dev)
        inside = normalize(images.to(dev)).contiguous(memory_format=torch.channels_last)

        def encoders():
            with torch.no_grad(), autocast():
                return structure.encode(inside) + alias.encode(inside)

        def everything():
            x = normalize(images.to(dev)).contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), autocast():
                maps = structure.encode(x) + alias.encode(x)
            table[:] = torch.cat([*maps, labels], 1).cpu().numpy()
            table.flush()
        inner, outer = timed(dev, encoders, everything)
        row('encode', 'images to token files', outer,
            f'{len(images) / outer[0]:.1f} images/s; encoders {min(1, inner[0] / outer[0]):.0%} of it')
        del table


def bench_train(structure, alias, network, images, dev, autocast, top):
    batch, lengths = len(images), network.student.lengths
    labels = torch.arange(batch, device=dev) % network.student.num_classes
    x = normalize(images.to(dev)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        tokens, alias_tokens = torch.cat(structure.encode(x), 1), torch.cat(alias.encode(x), 1)

    def step_of(network, online=False, cast=autocast, fused=True):
        optimizer = runtime.adamw(network, 1e-9, (0.9, 0.95), 0.0)
        if not fused:
            optimizer = torch.optim.AdamW(network.parameters(), 1e-9, betas=(0.9, 0.95), foreach=False, fused=False)

        def step():
            target, side = tokens, alias_tokens
            if online:
                with torch.no_grad():
                    target, side = torch.cat(structure.encode(x), 1), torch.cat(alias.encode(x), 1)
            inputs = train_fvar.token_inputs(structure, target)
            with cast():
                loss = network(labels, inputs, target, side)['total']
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step

    ours, alone = step_of(network), step_of(FVAR(network.student))
    plain = step_of(network, online=True, cast=nullcontext, fused=False)

    def transcription():
        with plainly():
            plain()
    jobs = {'student and teacher': ours, 'student alone (distill=False)': alone}
    if baseline:
        jobs['plain transcription, float32'] = transcription
    if dev.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    times = dict(zip(jobs, timed(dev, *jobs.values())))
    work = {'student and teacher': runtime.count_flops(ours), 'student alone (distill=False)': runtime.count_flops(alone)}
    first = times['student and teacher'][0]
    for what, t in times.items():
        note = f'{batch / t[0]:.1f} images/s, {batch * sum(lengths) / t[0]:.0f} tokens/s'
        if what in work:
            note += f'; {work[what] / t[0] / top:.0%} of peak'
        note += f'; ours is {t[0] / first:.2f} × as fast' if what.startswith('plain') else ''
        row('train', what, t, note)
    plus = first / times['student alone (distill=False)'][0] - 1
    runtime.say(f'{"":10} the teacher adds {plus:.0%} to a step, '
                f'{work["student and teacher"] / work["student alone (distill=False)"] - 1:.0%} '
                'to its FLOPs' + (f'; peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB' if dev.type == 'cuda' else ''))
    if compiled:
        twin = copy.deepcopy(network)
        model.compile_blocks(train_fvar.blocks_of(twin))
        t = timed(dev, step_of(twin))[0]
        row('train', 'student and teacher, compiled', t, f'{batch / t[0]:.1f} images/s; {first / t[0]:.2f} × as fast as eager')


def bench_sample(structure, student, count, dev, autocast, top):
    student.eval()
    if compiled:
        twin = copy.deepcopy(student)
        model.compile_blocks(twin.blocks)
    for batch in (1, count):
        labels = torch.arange(batch, device=dev) % student.num_classes

        def draw(cast=autocast, student=student, **more):
            with cast():
                return student.generate(structure, labels, generator=torch.Generator(dev).manual_seed(seed), **more)

        def transcription():
            with plainly():
                return draw(nullcontext)
        jobs = {'with KV cache': draw, 'without': lambda: draw(kv_cache=False)}
        if baseline:
            jobs['plain transcription, float32'] = transcription
            if autocast is nullcontext and not all(map(torch.equal, draw()[0], transcription()[0])):
                runtime.say('warning: ours and the transcription sampled different tokens')
        if compiled:
            jobs['compiled'] = lambda: draw(student=twin)
        times = dict(zip(jobs, timed(dev, *jobs.values())))
        work, first = runtime.count_flops(draw), times['with KV cache'][0]
        for what, t in times.items():
            note = f'{batch / t[0]:.2f} images/s' + (f'; {work / t[0] / top:.0%} of peak' if what == 'with KV cache' else
                                                     f'; ours is {t[0] / first:.2f} × as fast')
            row('sample', f'{batch} picture{"s" * (batch > 1)}, {what}', t, note)


def bench_depths(dev, autocast):
    """One picture of each published size, without guidance; weights all the same number, and no decoder."""
    first, times = None, []
    for name in ('d12', 'd16', 'd20', 'd24'):
        second = settings(train_fvar, f'config/{name}.py')
        with torch.device('meta'):
            structure, _ = build_tokenizers(settings(train_tokenizer, 'config/tokenizer_256.py'))
            student = build_student(second, structure, 1000)
        inputs = torch.zeros(1, sum(student.lengths) - student.lengths[0], structure.quantizer.codebook.embedding_dim, device=dev)
        student = student.to_empty(device=dev).eval()
        for tensor in (*student.parameters(), *student.buffers()):
            tensor.data.fill_(0.01) if tensor.is_floating_point() else tensor.data.fill_(1 if tensor.dtype == torch.bool else 0)

        def run():
            with torch.no_grad(), autocast():
                student(torch.zeros(1, dtype=torch.int64, device=dev), inputs)
        times.append(timed(dev, run)[0])
        first = first or times[0][0]
        row('depths', f'{name}, all tokens of one picture', times[-1], f'{times[-1][0] / first:.1f} × d12')
        del student


# -----------------------------------------------------------------------------
# the run

def main():
    dev = runtime.start(device, seed)
    autocast, _ = runtime.precision(dtype, dev)
    runtime.require_positive(config, 'repeats')
    chosen = parts.split(',')
    for part in chosen:
        if part not in ('pyramid', 'tokenizer', 'encode', 'train', 'sample', 'depths'):
            raise UserError(f'--parts={parts}: {part!r} is no part; give some of pyramid,tokenizer,encode,train,sample,depths')
    gpu = dev.type == 'cuda'
    first = settings(train_tokenizer, stage1 or ('config/tokenizer_256.py' if gpu else 'config/charts.py'))
    second = settings(train_fvar, stage2 or ('config/d16.py' if gpu else 'config/charts.py'))
    name = torch.cuda.get_device_name() if gpu else f'{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}'
    results = {'config': config, 'machine': name, 'torch': torch.__version__, 'rows': ROWS}
    top = runtime.measured_peak(dev, autocast)
    results['peak'] = top
    runtime.say(f'{name}, torch {torch.__version__}; a large matrix product reaches {top / 1e12:.3f} TFLOP/s')
    images = Charts('val', first['image_size'], batch_size or (32 if gpu else second['batch_size'])).images
    if chosen != ['pyramid']:
        structure, alias, network = networks(first, second, 1000 if gpu else 10, dev)
    x = normalize(images.to(dev)).contiguous(memory_format=torch.channels_last)
    if 'pyramid' in chosen:
        bench_pyramid(dev)
    if 'tokenizer' in chosen:
        bench_tokenizer(structure, alias, x, dev, autocast)
    if 'encode' in chosen:
        bench_encode(structure, alias, images, dev, autocast)
    if 'train' in chosen:
        bench_train(structure, alias, network, images, dev, autocast, top)
    if 'sample' in chosen:
        bench_sample(structure, network.student, sample_batch or 64, dev, autocast, top)
    if 'depths' in chosen:
        bench_depths(dev, autocast)
    write_json(f'{out_dir}/bench.json', results)


if __name__ == '__main__':
    runtime.run(main)
