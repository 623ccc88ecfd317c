"""What a GPU would see, without one: where tensors are, when the CPU waits, what is held. fakegpu.py stands in for it.

Networks are tiny here, tests/test_gpu_memory.py has the real ones.
"""
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing

import growth
import editing
import pyramid
import encode
import evaluate
from util import checkpoint, runtime, training
import sample
import tokenizer
import train_fvar
import train_tokenizer
from chaos import draw_data
from configurator import HERE
from data import TokenDataset, sample_generators
from fakegpu import FakeGPU
from model import VAR, build_student, compile_sampling, pictures_at_once
from test_training import GAN, STAGE1, STAGE2, run, settings_of
from tokenizer import build_tokenizers
from util.charts import Charts

CUDA = dict(device='cuda', dtype='bfloat16')
CHARTS = str(HERE / 'config' / 'charts.py')


@pytest.fixture
def gpu():
    with FakeGPU() as gpu:
        yield gpu


@pytest.fixture
def configured(monkeypatch):
    """Gives an imported training script these settings."""
    def configured(script, **settings):
        config = settings_of(script, settings)
        for name, value in (config | {'config': config}).items():
            monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(train_tokenizer, 'load_lpips', growth.stand_in_lpips)
    return configured


# -----------------------------------------------------------------------------
# the stand-in itself

def test_the_stand_in_tells_a_cpu_from_a_gpu(gpu):
    on_gpu = torch.ones(3, device='cuda')
    with pytest.raises(RuntimeError, match='same device'):
        on_gpu + torch.ones(3)
    assert (on_gpu + 1).device == gpu.device and not gpu.waits


@pytest.mark.parametrize('wait, name', [
    (lambda x: x.sum().item(), '_local_scalar_dense'), (lambda x: x.cpu(), 'download'), (lambda x: torch.bincount(x.long()), 'bincount'),
    (lambda x: x.copy_(torch.zeros(3)), 'upload'), (lambda x: torch.tensor([1.0, 2.0], device=x.device), 'upload')])
def test_the_stand_in_counts_what_waits(gpu, wait, name):
    try:
        wait(torch.ones(3, device='cuda'))
    except Exception:                                       # how long a histogram is depends on data that is not there
        assert name == 'bincount'
    assert dict(gpu.waits) == {name: 1}


def test_the_stand_in_counts_bytes_as_they_come_and_go(gpu):
    x = torch.empty(2 ** 20, device='cuda')
    y = x + 1
    del x, y
    assert (gpu.live, gpu.peak) == (0, 2 * 4 * 2 ** 20)


def test_the_stand_in_multiplies_in_bfloat16_and_differentiates(gpu):
    weight = torch.nn.Parameter(torch.empty(8, 8, device='cuda'))
    with torch.autocast('cuda', dtype=torch.bfloat16):
        y = weight @ weight
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.shape == (8, 8) and gpu.flops == 3 * 2 * 8 ** 3


# -----------------------------------------------------------------------------
# training

def set_up(script, gpu, num_classes):
    """The namespace of a training script; stage 2 with new tokenizers."""
    if script is train_tokenizer:
        return script.set_up(gpu.device)
    structure, alias = build_tokenizers(settings_of(train_tokenizer, STAGE1))
    return script.set_up(gpu.device, structure, alias, build_student(script.config, structure, num_classes))


def stage1_steps(gpu, configured, steps, **settings):
    """(bytes at the peak, waits) of some steps of stage 1, given by their numbers."""
    configured(train_tokenizer, **STAGE1 | CUDA | settings)
    with gpu.building():
        run = train_tokenizer.set_up(gpu.device)
    growth.begin(run.optimizer, run.gan_optimizer)
    shape = train_tokenizer.batch_size, 3, train_tokenizer.image_size, train_tokenizer.image_size
    images = torch.zeros(shape, dtype=torch.uint8, device=gpu.device)
    for step in steps:
        gpu.start()
        train_tokenizer.train_step(run, step, images)
        yield gpu.peak, dict(+gpu.waits)


@pytest.mark.parametrize('settings', [
    {}, GAN | dict(lambda_lpips=1.0, grad_accum_steps=2, grad_checkpoint=True), dict(dual=False, focus_input='view'),
    dict(pyramid='scale', dtype='float16')], ids=lambda settings: ' '.join(settings) or 'plain')
def test_no_step_of_stage_1_waits(gpu, configured, settings):
    """In the warm start, and with codes of which dead ones start anew."""
    assert [waits for _, waits in stage1_steps(gpu, configured, (0, 7), **settings)] == [{}, {}]


def test_counting_flops_leaves_no_kernel_without_data(configured, counted):
    """They are counted on the meta device before the first step; the step would copy its cached kernels to the GPU."""
    pyramid.psf.cache_clear()
    configured(train_tokenizer, **STAGE1 | dict(max_radius=64.0))
    assert train_tokenizer.flops_per_image() > 0
    for radius in (0.0, 0.5, *pyramid.focus_radii(STAGE1['patch_nums'], STAGE1['image_size'], 64.0)):
        assert pyramid.psf(radius, 'disk').sum().item() == pytest.approx(1)


def test_one_codebook_for_both_tokenizers_counts_the_use_of_both(configured):
    configured(train_tokenizer, **STAGE1 | dict(dual=False, device='cpu', dtype='float32', warm_start=0, batch_size=8))
    run = train_tokenizer.set_up(torch.device('cpu'))
    images = Charts('val', train_tokenizer.image_size, 8).images
    train_tokenizer.train_step(run, 1, images)
    maps = sum(p * p for p in run.structure.patch_nums), sum(p * p for p in run.alias.patch_nums)
    assert run.alias.codebook.usage.sum().item() == pytest.approx(0.01 * len(images) * sum(maps), rel=1e-4)


def test_checkpoints_save_memory_with_the_gan_on(gpu, configured, monkeypatch):
    """The adaptive weight asks for the gradient of the last convolution alone: nothing is computed again for it, and kept."""
    large = GAN | dict(image_size=96, patch_nums=(2, 3, 6), channels=32, channel_mult=(1, 1, 1, 1, 1), res_blocks=1, batch_size=8,
                       warm_start=0, gan_start=5)
    monkeypatch.setattr(tokenizer, 'PIXELS_PER_PART', 4 * 96 ** 2)
    (with_gan, _), = stage1_steps(gpu, configured, (5,), **large, grad_checkpoint=True)
    (kept, _), = stage1_steps(gpu, configured, (5,), **large, grad_checkpoint=False)
    assert with_gan < 0.5 * kept


@pytest.mark.parametrize('settings', [{}, dict(distill=False), dict(grad_accum_steps=2), dict(grad_checkpoint=True), dict(alias_scales=1)],
                         ids=lambda settings: ' '.join(settings) or 'plain')
def test_no_step_of_stage_2_waits(gpu, configured, settings):
    configured(train_fvar, **STAGE2 | CUDA | settings)
    with gpu.building():
        run = set_up(train_fvar, gpu, num_classes=4)
    batch = [torch.zeros(8, *size, dtype=torch.int64, device=gpu.device) for size in ((49,), (13,), ())]
    gpu.start()
    terms, norm = train_fvar.train_step(run, 0, batch)
    assert not +gpu.waits and {t.device.type for t in (*terms.values(), norm)} == {'cuda'}


@pytest.mark.parametrize('script, settings', [(train_tokenizer, STAGE1 | GAN), (train_fvar, STAGE2)], ids=['stage 1', 'stage 2'])
def test_nothing_of_a_checkpoint_is_held_after_resuming(configured, tmp_path, monkeypatch, script, settings):
    settings, data = settings | dict(out_dir=str(tmp_path), steps=4), str(tmp_path / 'data')
    draw_data(tmp_path / 'data')
    if script is train_fvar:
        run(train_tokenizer, **STAGE1 | dict(data=data, out_dir=str(tmp_path), steps=4))
        run(encode, data=data, out_dir=str(tmp_path), dtype='float32', device='cpu')
    else:
        settings['data'] = data
    run(script, **settings)
    alive = []

    def watched(*arguments, load=checkpoint.load_checkpoint, **named):
        checkpoint = load(*arguments, **named)
        alive.extend(weakref.ref(t.untyped_storage()) for t in torch.utils._pytree.tree_leaves(checkpoint) if isinstance(t, torch.Tensor))
        return checkpoint

    with FakeGPU() as gpu:
        configured(script, **settings | CUDA | dict(dtype='float32'))
        with gpu.building():
            ready = set_up(script, gpu, num_classes=4)
        growth.begin(ready.optimizer, *([ready.gan_optimizer] if script is train_tokenizer else []))
        before = gpu.live
        monkeypatch.setattr(script, 'load_checkpoint', watched)
        if script is train_fvar:
            step, _ = script.resume(ready, str(tmp_path / 'fvar_state.pt'), TokenDataset(tmp_path / 'tokens', 'train'))
        else:
            step, _ = script.resume(ready, str(tmp_path / 'tokenizer_state.pt'))
        gc.collect()
        assert step == 4 and len(alive) > 20 and not [ref for ref in alive if ref() is not None]
        assert gpu.live <= before + 4096                    # the counts of steps


# -----------------------------------------------------------------------------
# what a trained model is used for

@pytest.fixture
def models(gpu):
    """(StructureTokenizer, AliasTokenizer, VAR) on the GPU."""
    settings = settings_of(train_tokenizer, STAGE1)
    with gpu.building():
        structure, alias = build_tokenizers(settings)
        student = VAR(structure.patch_nums, 32, 8, 4, depth=2, embed_dim=32, num_heads=2)
    gpu.start()
    return structure.eval(), alias.eval(), student.eval()


@pytest.mark.parametrize('one_each, options', [
    (False, {}), (False, dict(cfg=0)), (False, dict(smooth=True)), (False, dict(top_k=0, top_p=0)), (False, dict(top_k=1)),
    (True, {}), (True, dict(smooth=True))], ids=str)
def test_sampling_never_waits(gpu, models, one_each, options):
    """one_each: a generator for each picture."""
    structure, _, student = models
    generator = sample_generators(0, range(3)) if one_each else torch.Generator('cuda').manual_seed(0)
    with torch.autocast('cuda', dtype=torch.bfloat16):
        tokens, images = student.generate(structure, torch.zeros(3, dtype=torch.int64, device='cuda'), generator=generator, **options)
    assert not +gpu.waits and images.device == tokens[0].device == gpu.device


def test_editing_and_refocusing_never_wait(gpu, models):
    structure, _, student = models
    photo, mask = torch.empty(1, 3, 24, 24, device='cuda'), torch.zeros(24, 24, device='cuda')
    labels = torch.zeros(2, dtype=torch.int64, device='cuda')
    generator = torch.Generator('cuda').manual_seed(0)
    edited = editing.edit(student, structure, photo, mask, labels, generator=generator)
    refocused = editing.refocus(student, structure, photo.expand(2, -1, -1, -1), structure.radii[0], labels, generator=generator)
    assert not +gpu.waits and edited.shape == refocused.shape == (2, 3, 24, 24)


def test_encoding_waits_once_per_batch_for_its_rows(gpu, models, tmp_path, monkeypatch):
    structure, alias, _ = models
    for name, value in dict(out_dir=str(tmp_path), data='charts:12', batch_size=4, crops=1).items():
        monkeypatch.setattr(encode, name, value)
    monkeypatch.setattr(encode, 'digest', lambda state: '')
    autocast, _ = runtime.precision('float32', gpu.device)
    encode.encode_split('train', structure, alias, {'config': {'data': ''}}, gpu.device, autocast)
    assert dict(+gpu.waits) == {'download': 3} and (tmp_path / 'tokens' / 'train.bin').stat().st_size == 12 * (49 + 13 + 1) * 2


def test_evaluation_waits_for_its_figures_alone(gpu, models, monkeypatch):
    structure, _, student = models
    monkeypatch.setattr(evaluate, 'batch_size', 5)

    class Tokens(list):
        def batch(self, rows):
            return [torch.zeros(len(rows), *size, dtype=torch.int64) for size in ((49,), (13,), ())]

    evaluate.student_metrics(student, structure, Tokens(range(10)), nullcontext)
    assert dict(+gpu.waits) == {'_local_scalar_dense': 3 + 2}       # three maps and two terms, after the last batch
    gpu.start()
    evaluate.tokenizer_metrics(structure, torch.zeros(10, 3, 24, 24, dtype=torch.uint8), nullcontext)
    # of every batch PSNR, both pictures for SSIM and the reconstructions; then the perplexity of three maps
    assert dict(+gpu.waits) == {'download': 2 * 3, '_local_scalar_dense': 2 + 3}


@pytest.mark.parametrize('name, most', [('d12', 50), ('d16', 50), ('d24', 40), ('d36_512', 6), ('d16_1024', 5)])
def test_samples_are_drawn_as_many_at_a_time_as_fit(gpu, name, most):
    first = f'config/{growth.STAGE_2[name]}.py'
    with gpu.building():
        structure, _ = build_tokenizers(growth.settings(train_tokenizer, first))
        student = build_student(growth.settings(train_fvar, f'config/{name}.py'), structure, 1000).eval()
    at_once = pictures_at_once(student)
    assert 1 < at_once <= most and sample.batch_size == evaluate.batch_size == 0
    if name == 'd36_512':
        gpu.start()
        before, labels = gpu.live, torch.zeros(at_once, dtype=torch.int64, device='cuda')
        student.generate(structure, labels, generator=sample_generators(0, range(at_once)))         # in float32
        assert gpu.peak - before < 24 * 2 ** 30


# -----------------------------------------------------------------------------
# compiled

def small_student():
    structure, _ = build_tokenizers(settings_of(train_tokenizer, STAGE1))
    return structure.eval(), VAR(structure.patch_nums, 32, 8, 4, depth=1, embed_dim=16, num_heads=2).eval()


@pytest.mark.parametrize('options', [{}, dict(cfg=0), dict(smooth=True)], ids=lambda o: ' '.join(o) or 'plain')
def test_sampling_is_one_graph_and_no_other_but_for_another_number_of_pictures(options):
    structure, student = small_student()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    student.sample = torch.compile(student.sample, backend=counter, fullgraph=True, dynamic=False)
    for count, graphs in ((2, 1), (2, 1)) if options else ((2, 1), (2, 1), (3, 2), (2, 2)):
        student.generate(structure, torch.arange(count), generator=torch.Generator().manual_seed(0), **options)
        assert counter.frame_count == graphs


def test_a_gpu_samples_by_a_graph_that_is_replayed(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch, 'compile', lambda function, **options: asked.update(options) or function)
    compile_sampling(small_student()[1], torch.device('cuda'))
    assert asked == {'mode': 'reduce-overhead', 'dynamic': False}


def test_encoder_and_decoder_compile_whole(monkeypatch):
    compiled = torch.compile
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, 'compile', lambda function, **_: compiled(function, backend=counter, fullgraph=True))
    structure, _ = small_student()
    tokenizer.compile_convolutions(structure)
    structure.train().autoencode(torch.zeros(2, 3, 24, 24)).sum().backward()
    assert counter.frame_count == 2 and structure.encoder.conv_in.weight.grad.isfinite().all()


# -----------------------------------------------------------------------------
# MFU

def test_the_peak_is_the_data_sheets_for_a_known_gpu_in_16_bits_and_otherwise_measured(gpu, monkeypatch):
    def peak(dtype):
        return training.peak_flops(gpu.device, runtime.precision(dtype, gpu.device)[0])

    monkeypatch.setattr(training, 'measured_peak', lambda device, autocast: 7.0)
    assert [peak(dtype) for dtype in ('bfloat16', 'float16', 'float32')] == [312e12, 312e12, 7.0]
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *_: 'NVIDIA L4')
    assert peak('bfloat16') == 7.0


@pytest.mark.parametrize('script, settings', [(train_tokenizer, STAGE1), (train_fvar, STAGE2)], ids=['stage 1', 'stage 2'])
def test_operations_per_image_are_those_of_a_step(configured, counted, script, settings):
    """Counted on shapes alone, for the log's MFU; and counted as a step of one pass computes them."""
    with FakeGPU() as gpu:
        configured(script, **settings | CUDA | dict(warm_start=0) if script is train_tokenizer else settings | CUDA)
        with gpu.building():
            ready = set_up(script, gpu, num_classes=4)
        if script is train_fvar:
            batch = [torch.zeros(8, *size, dtype=torch.int64, device=gpu.device) for size in ((49,), (13,), ())]
            gpu.start()
            train_fvar.train_step(ready, 0, batch)
        else:
            gpu.start()
            train_tokenizer.train_step(ready, 5, torch.zeros(4, 3, 24, 24, dtype=torch.uint8, device=gpu.device))
        of_step = gpu.flops / script.batch_size
    arguments = [ready] if script is train_fvar else []
    assert script.flops_per_image(*arguments) == pytest.approx(of_step, rel=0.1)
