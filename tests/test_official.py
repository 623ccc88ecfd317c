"""Weights pass to and from the published VAR: what its own code computed, and what its names and shapes must be.

The fixture holds a tiny tokenizer and transformer of the published architecture with random weights, and what the
published code makes of them. It has QK-norm and an AdaLN per block; the options it lacks are compared with
reference_logits, a plain reading of the published state dict which is itself held against the fixture.
"""
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import UserError
from conftest import pictures, save_pictures
from model import VAR, filter_logits, map_of_position
from published import load_official, published_patch_nums, to_official
from util.pictures import picture_grid, save_png
from tokenizer import MultiScaleQuantizer, StructureTokenizer, area

FIXTURE = Path(__file__).resolve().parents[2] / 'shared' / 'fixtures' / 'official_var_tiny.pt'
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

OPTIONS = {                                                 # heads, depth and width that no rule of thumb gives
    'as at 256 px': dict(depth=2, embed_dim=12, num_heads=3, shared_aln=False, qk_norm=True),
    'as at 512 px': dict(depth=3, embed_dim=12, num_heads=2, shared_aln=True, qk_norm=True),
    'no QK-norm': dict(depth=3, embed_dim=12, num_heads=2, shared_aln=False, qk_norm=False),
    'shared AdaLN, no QK-norm, narrow MLP': dict(depth=5, embed_dim=16, num_heads=4, shared_aln=True, qk_norm=False, mlp_ratio=2.0),
}


def agree(ours, published, tolerance=1e-4):
    assert ours.shape == published.shape
    assert (ours - published).abs().max() <= tolerance * published.abs().max()


def same_tokens(ours, published):
    assert [t.tolist() for t in ours] == [t.tolist() for t in published]


def same_weights(ours, theirs):
    """Names, shapes, types and every bit."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


def random_weights(module, seed=0):
    """Every weight and statistic as if trained: none zero, none so small that it would not show in a logit."""
    generator = torch.Generator().manual_seed(seed)
    for value in module.state_dict().values():
        value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return module.eval()


def pair(patch_nums=(1, 2, 3, 5), vocab_size=24, codebook_dim=6, channels=4, num_classes=7, seed=0, **student):
    """A tokenizer and a student of VAR's architecture, with weights that nothing has initialised to zero."""
    tokenizer = StructureTokenizer(16 * patch_nums[-1], patch_nums, vocab_size, codebook_dim, channels, pyramid='scale')
    student = VAR(patch_nums, vocab_size, codebook_dim, num_classes, **student)
    return random_weights(tokenizer, seed), random_weights(student, seed + 1)


def token_inputs(tokenizer, batch=2, seed=0):
    """Teacher-forcing inputs of random tokens."""
    vocab_size, generator = tokenizer.quantizer.codebook.num_embeddings, torch.Generator().manual_seed(seed)
    return tokenizer.token_inputs([torch.randint(vocab_size, (batch, p * p), generator=generator) for p in tokenizer.patch_nums])


# -----------------------------------------------------------------------------
# what the published code computed

@pytest.fixture(scope='module')
def published():
    if not FIXTURE.is_file():
        pytest.skip(f'what the published VAR computed is not here: {FIXTURE}')
    return torch.load(FIXTURE, weights_only=True)


@pytest.fixture(scope='module')
def loaded(published):
    config = published['config']
    return load_official(published['vae_state_dict'], published['var_state_dict'], config['patch_nums'], config['num_heads'])


def test_features_tokens_and_partial_sums_are_the_published_ones(published, loaded):
    tokenizer, _ = loaded
    assert tokenizer.image_size == published['config']['image_size'] and not any(tokenizer.radii)
    with torch.no_grad():
        agree(tokenizer.features(published['image']), published['features'])
        tokens, states, _ = tokenizer.quantizer([area(f, p) for f, p in zip(
            tokenizer.state_features(published['image']), tokenizer.patch_nums)])
    same_tokens(tokens, published['tokens'])
    same_tokens(tokenizer.encode(published['image']), published['tokens'])
    for ours, theirs in zip(states, published['f_hats'], strict=True):
        agree(ours, theirs)


def test_pictures_of_every_scale_are_the_published_ones(published, loaded):
    tokenizer, _ = loaded
    agree(tokenizer.decode(published['tokens']), published['reconstruction'])
    for ours, theirs in zip(tokenizer.decode_states(published['tokens']), published['reconstructions_per_scale'], strict=True):
        agree(ours, theirs)


def test_inputs_and_logits_are_the_published_ones(published, loaded):
    tokenizer, student = loaded
    inputs, labels = tokenizer.token_inputs(published['tokens']), published['labels']
    agree(inputs, published['var_input'])
    with torch.no_grad():
        agree(student(labels, inputs), published['logits'])
        agree(student(torch.full_like(labels, student.num_classes), inputs), published['logits_uncond'])


@pytest.mark.parametrize('how', ['greedy', 'sampled'])
def test_generated_tokens_and_pictures_are_the_published_ones(published, loaded, how):
    tokenizer, student = loaded
    wanted = published[how]
    generator = torch.Generator().manual_seed(wanted.get('seed', 0))
    tokens, images = student.generate(tokenizer, published['labels'], wanted['cfg'], wanted['top_k'], wanted['top_p'],
                                      generator)
    same_tokens(tokens, wanted['tokens'])
    agree((images + 1) / 2, wanted['image'])                # the published code returns pictures in [0, 1]


def test_the_filter_keeps_the_published_set(published):
    case = published['filter']
    before = case['logits'].clone()
    filtered = filter_logits(case['logits'], case['top_k'], case['top_p'])
    assert torch.equal(filtered > -torch.inf, case['kept']) and torch.equal(filtered[case['kept']], before[case['kept']])
    assert torch.equal(case['logits'], before)              # it works on a copy


def test_the_published_weights_come_back_bit_for_bit(published, loaded):
    vae, var = to_official(*loaded)
    same_weights(vae, published['vae_state_dict'])
    same_weights(var, published['var_state_dict'])


def test_heads_are_read_off_the_published_temperatures(published):
    config = published['config']
    _, student = load_official(published['vae_state_dict'], published['var_state_dict'], config['patch_nums'])
    assert student.num_heads == config['num_heads'] != config['depth']


def test_loading_leaves_the_published_dicts_alone_and_makes_copies(published):
    vae = {name: value.clone() for name, value in published['vae_state_dict'].items()}
    vae['quantize.ema_vocab_hit_SV'] = torch.ones(9, 64)
    names = list(vae)
    tokenizer, _ = load_official(vae, published['var_state_dict'], published['config']['patch_nums'])
    assert list(vae) == names and vae['quantize.ema_vocab_hit_SV'].shape == (9, 64)
    tokenizer.encoder.conv_in.weight.data.zero_()
    assert torch.equal(vae['encoder.conv_in.weight'], published['vae_state_dict']['encoder.conv_in.weight'])


# -----------------------------------------------------------------------------
# published names and shapes

def layer(name, *weight):
    return {f'{name}.weight': weight, f'{name}.bias': weight[:1]}


def res_block(name, a, b):
    shapes = layer(f'{name}.norm1', a) | layer(f'{name}.conv1', b, a, 3, 3)
    shapes |= layer(f'{name}.norm2', b) | layer(f'{name}.conv2', b, b, 3, 3)
    return shapes if a == b else shapes | layer(f'{name}.nin_shortcut', b, a, 1, 1)


def attention(name, a):
    return layer(f'{name}.norm', a) | layer(f'{name}.qkv', 3 * a, a, 1, 1) | layer(f'{name}.proj_out', a, a, 1, 1)


def ends(name, deep, shallow, first, last):
    """What encoder and decoder have outside their levels: `deep` is the width in the middle, first and last are convolutions."""
    middle = (res_block(f'{name}.mid.block_1', deep, deep) | attention(f'{name}.mid.attn_1', deep)
              | res_block(f'{name}.mid.block_2', deep, deep))
    return (middle | layer(f'{name}.conv_in', *first, 3, 3) | layer(f'{name}.norm_out', shallow)
            | layer(f'{name}.conv_out', *last, 3, 3))


def vae_shapes(ch, V, C, maps, mult=(1, 1, 2, 2, 4), res_blocks=2, phis=4):
    """The published VQ-VAE's state dict. Both encoder and decoder number their levels from the full-size picture inwards."""
    widths = [ch * m for m in mult]
    deepest = len(widths) - 1
    shapes = ends('encoder', widths[-1], widths[-1], (ch, 3), (C, widths[-1]))
    shapes |= ends('decoder', widths[-1], ch, (widths[-1], C), (3, ch))
    for i, width in enumerate(widths):
        before, below = widths[max(0, i - 1)], widths[min(deepest, i + 1)]
        for side, count, entering in (('encoder.down', res_blocks, before), ('decoder.up', res_blocks + 1, below)):
            for j in range(count):
                shapes |= res_block(f'{side}.{i}.block.{j}', width if j else entering, width)
                if i == deepest:
                    shapes |= attention(f'{side}.{i}.attn.{j}', width)
        if i < deepest:
            shapes |= layer(f'encoder.down.{i}.downsample.conv', width, width, 3, 3)
        if i > 0:
            shapes |= layer(f'decoder.up.{i}.upsample.conv', width, width, 3, 3)
    for i in range(phis):
        shapes |= layer(f'quantize.quant_resi.qresi_ls.{i}', C, C, 3, 3)
    return shapes | layer('quant_conv', C, C, 3, 3) | layer('post_quant_conv', C, C, 3, 3) | {
        'quantize.embedding.weight': (V, C), 'quantize.ema_vocab_hit_SV': (maps, V)}


def var_shapes(patch_nums, V, C, classes, depth, embed_dim, num_heads, shared_aln, qk_norm, mlp_ratio=4.0):
    """The published transformer's state dict."""
    W, L = embed_dim, sum(p * p for p in patch_nums)
    shapes = {'pos_start': (1, patch_nums[0] ** 2, W), 'pos_1LC': (1, L, W), 'lvl_1L': (1, L), 'attn_bias_for_masking': (1, 1, L, L),
              'class_emb.weight': (classes + 1, W), 'lvl_embed.weight': (len(patch_nums), W)}
    shapes |= layer('word_embed', W, C) | layer('head_nm.ada_lin.1', 2 * W, W) | layer('head', V, W)
    if shared_aln:
        shapes |= layer('shared_ada_lin.1', 6 * W, W)
    for i in range(depth):
        block, hidden = f'blocks.{i}', round(W * mlp_ratio)
        shapes |= {f'{block}.attn.{name}': (W,) for name in ('q_bias', 'v_bias', 'zero_k_bias')}
        shapes |= {f'{block}.attn.mat_qkv.weight': (3 * W, W)}
        shapes |= layer(f'{block}.attn.proj', W, W) | layer(f'{block}.ffn.fc1', hidden, W) | layer(f'{block}.ffn.fc2', W, hidden)
        shapes |= {f'{block}.ada_gss': (1, 1, 6, W)} if shared_aln else layer(f'{block}.ada_lin.1', 6 * W, W)
        if qk_norm:
            shapes[f'{block}.attn.scale_mul_1H11'] = (1, num_heads, 1, 1)
    return shapes


def shapes_of(state_dict):
    return {name: tuple(value.shape) for name, value in state_dict.items()}


def test_the_names_and_shapes_written_here_are_the_published_ones(published):
    c = published['config']
    assert shapes_of(published['vae_state_dict']) == vae_shapes(c['ch'], c['vocab_size'], c['z_channels'], len(c['patch_nums']))
    assert shapes_of(published['var_state_dict']) == var_shapes(
        c['patch_nums'], c['vocab_size'], c['z_channels'], c['num_classes'], c['depth'], c['embed_dim'], c['num_heads'],
        c['shared_aln'], c['attn_l2_norm'])


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('patch_nums', [(1, 2, 3, 5), (2, 3, 4)], ids=['from one token', 'from four'])
def test_what_we_export_has_the_published_names_and_shapes(options, patch_nums):
    vae, var = to_official(*pair(patch_nums, **options))
    assert shapes_of(vae) == vae_shapes(4, 24, 6, len(patch_nums)) and shapes_of(var) == var_shapes(patch_nums, 24, 6, 7, **options)


def test_levels_are_numbered_from_the_picture_inwards_in_both_directions():
    tokenizer, student = pair(**OPTIONS['as at 256 px'])
    vae, _ = to_official(tokenizer, student)
    assert torch.equal(vae['decoder.up.4.block.0.conv1.weight'], tokenizer.decoder.levels[0].blocks[0].conv1.weight)
    assert torch.equal(vae['decoder.up.4.upsample.conv.weight'], tokenizer.decoder.samplers[0][1].weight)
    assert torch.equal(vae['decoder.up.1.upsample.conv.weight'], tokenizer.decoder.samplers[3][1].weight)
    assert torch.equal(vae['encoder.down.3.downsample.conv.weight'], tokenizer.encoder.samplers[3][1].weight)


def test_constants_are_the_map_of_a_position_the_mask_and_a_key_bias_of_zero():
    _, var = to_official(*pair((1, 2), depth=1, embed_dim=4))
    assert var['lvl_1L'].tolist() == [[0, 1, 1, 1, 1]] and var['lvl_1L'].dtype == torch.int64
    row, inf = [0.0] * 5, float('inf')
    assert var['attn_bias_for_masking'].tolist() == [[[[0.0] + 4 * [-inf], row, row, row, row]]]
    assert var['blocks.0.attn.zero_k_bias'].tolist() == [0.0] * 4


# -----------------------------------------------------------------------------
# the options that the fixture lacks

def reference_logits(weights, heads, labels, inputs):
    """Logits by the facts of the published model, straight from a published state dict: one line per fact, nothing shared."""
    def linear(x, name, bias=None):
        return x @ weights[f'{name}.weight'].T + (weights[f'{name}.bias'] if bias is None else bias)

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    width = weights['head.weight'].shape[1]
    head_width = width // heads
    label = weights['class_emb.weight'][labels]
    condition = label * torch.sigmoid(label)
    x = torch.cat([label[:, None] + weights['pos_start'], linear(inputs, 'word_embed')], 1)
    x = x + weights['pos_1LC'] + weights['lvl_embed.weight'][weights['lvl_1L'][0]]
    for i in range(len({name.split('.')[1] for name in weights if name.startswith('blocks.')})):
        block = f'blocks.{i}.'
        if block + 'ada_gss' in weights:
            six = weights[block + 'ada_gss'] + linear(condition, 'shared_ada_lin.1').view(-1, 1, 6, width)
        else:
            six = linear(condition, block + 'ada_lin.1').view(-1, 1, 6, width)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (six[:, :, j] for j in range(6))
        bias = torch.cat([weights[block + 'attn.' + name] for name in ('q_bias', 'zero_k_bias', 'v_bias')])
        qkv = linear(norm(x) * (1 + scale1) + shift1, block + 'attn.mat_qkv', bias)
        q, k, v = (part.unflatten(2, (heads, head_width)).transpose(1, 2) for part in qkv.split(width, 2))
        if block + 'attn.scale_mul_1H11' in weights:
            q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
            temperature = weights[block + 'attn.scale_mul_1H11'].exp().clamp(max=100)
        else:
            temperature = 0.25 / head_width ** 0.5
        attended = (temperature * q @ k.transpose(2, 3) + weights['attn_bias_for_masking']).softmax(-1) @ v
        x = x + gamma1 * linear(attended.transpose(1, 2).flatten(2), block + 'attn.proj')
        hidden = linear(norm(x) * (1 + scale2) + shift2, block + 'ffn.fc1')
        gelu = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden ** 3)))
        x = x + gamma2 * linear(gelu, block + 'ffn.fc2')
    scale, shift = linear(condition, 'head_nm.ada_lin.1').view(-1, 1, 2, width).unbind(2)
    return linear(norm(x) * (1 + scale) + shift, 'head')


def test_the_reference_of_this_file_gives_the_published_logits(published):
    weights, heads = published['var_state_dict'], published['config']['num_heads']
    logits = reference_logits(weights, heads, published['labels'], published['var_input'])
    agree(logits, published['logits'], 1e-5)


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_every_option_computes_what_the_published_one_does(options):
    tokenizer, student = pair(**options)
    _, var = to_official(tokenizer, student)
    labels, inputs = torch.tensor([3, 7]), token_inputs(tokenizer)              # a class, and none
    with torch.no_grad():
        logits = student(labels, inputs)
    agree(logits, reference_logits(var, options['num_heads'], labels, inputs), 1e-5)
    assert logits.std() > 0.1 and (logits[0] - logits[1]).abs().max() > 0.1


def test_temperatures_are_held_at_one_hundred():
    tokenizer, student = pair(**OPTIONS['as at 256 px'])
    labels, inputs = torch.tensor([1, 2]), token_inputs(tokenizer)
    outputs = []
    for log_scale in (np.log(100), 9.0, 3.0):
        for block in student.blocks:
            block.attention.log_scale.data.fill_(log_scale)
        with torch.no_grad():
            outputs.append(student(labels, inputs))
    agree(outputs[1], outputs[0], 1e-6)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-3


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_exported_weights_load_back_unchanged(options):
    tokenizer, student = pair(**options)
    vae, var = to_official(tokenizer, student)
    again_tokenizer, again = load_official(vae, var, tokenizer.patch_nums, options['num_heads'])
    same_weights(again_tokenizer.state_dict(), tokenizer.state_dict())
    same_weights(again.state_dict(), student.state_dict())
    for ours, theirs in zip(to_official(again_tokenizer, again), (vae, var)):
        same_weights(ours, theirs)
    labels, inputs = torch.tensor([0, 7]), token_inputs(tokenizer)
    with torch.no_grad():
        assert torch.equal(again(labels, inputs), student(labels, inputs))
    image = torch.rand(1, 3, 80, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same_tokens(again_tokenizer.encode(image), tokenizer.encode(image))
    tokens, images = (list(x) for x in zip(*(s.generate(t, labels[:1], top_k=5, generator=torch.Generator().manual_seed(3))
                                              for t, s in ((tokenizer, student), (again_tokenizer, again)))))
    same_tokens(*tokens)
    assert torch.equal(*images)


@pytest.mark.parametrize('name', ['shared AdaLN, no QK-norm, narrow MLP', 'as at 512 px'])
def test_greedy_sampling_of_every_option_follows_the_reference(name):
    """Each token is the most likely one under guided logits of the reference, given the tokens before it."""
    tokenizer, student = pair(**OPTIONS[name])
    _, var = to_official(tokenizer, student)
    labels = torch.tensor([1, 5])
    tokens, _ = student.generate(tokenizer, labels, cfg=2.0, top_k=1)
    inputs, none = tokenizer.token_inputs(tokens), torch.full_like(labels, 7)
    given, without = (reference_logits(var, student.num_heads, c, inputs).split(student.lengths, 1) for c in (labels, none))
    for k, (a, b) in enumerate(zip(given, without)):
        t = 2.0 * k / 3
        assert torch.equal(tokens[k], ((1 + t) * a - t * b).argmax(-1)), k


def test_a_focus_tokenizer_can_be_exported_and_decodes_the_same():
    """Radii are no weights: a tokenizer trained on focus states is, for those who only decode, one of VAR's."""
    focus = random_weights(StructureTokenizer(80, (1, 2, 3, 5), 24, 6, 4, max_radius=30.0))
    tokenizer, _ = load_official(*to_official(focus, pair(**OPTIONS['as at 256 px'])[1]), focus.patch_nums)
    assert any(focus.radii) and not any(tokenizer.radii)
    tokens = [torch.arange(p * p)[None] % 24 for p in focus.patch_nums]
    assert torch.equal(tokenizer.decode(tokens), focus.decode(tokens))


def test_heads_follow_depth_where_no_temperature_tells():
    options = dict(depth=3, embed_dim=12, num_heads=3, shared_aln=True, qk_norm=False)
    vae, var = to_official(*pair(**options))
    _, student = load_official(vae, var, (1, 2, 3, 5))
    assert student.num_heads == 3 and student.blocks[0].attention.num_heads == 3
    _, other = load_official(vae, var, (1, 2, 3, 5), num_heads=4)
    assert other.num_heads == 4


def test_the_512_pixel_model_has_ten_maps_and_2240_tokens():
    tokenizer, student = pair(PATCH_NUMS_512, channels=2, depth=1, embed_dim=8, num_heads=2, shared_aln=True)
    vae, var = to_official(tokenizer, student)
    again_tokenizer, again = load_official(vae, var, PATCH_NUMS_512)
    assert again_tokenizer.image_size == 512 and var['pos_1LC'].shape == (1, 2240, 8)
    inputs, labels = token_inputs(tokenizer, 1), torch.tensor([4])
    assert inputs.shape == (1, 2239, 6)
    with torch.no_grad():
        logits = again(labels, inputs)
    agree(logits, reference_logits(var, 2, labels, inputs), 1e-5)


def test_a_phi_serves_the_maps_nearest_to_its_tick():
    """Ties are the published ones too: of ten maps the third lies halfway between two φ."""
    for maps in range(2, 17):
        quantizer = MultiScaleQuantizer(range(1, maps + 1), vocab_size=4, codebook_dim=2)
        ticks = np.linspace(1 / 12, 11 / 12, 4)
        wanted = [int(np.abs(ticks - k / (maps - 1)).argmin()) for k in range(maps)]
        assert [quantizer.phi_of_map[k] for k in range(maps)] == wanted


def test_counts_of_other_maps_start_anew():
    """The published tokenizer serves every resolution: only its counts of use belong to certain token maps."""
    tokenizer, student = pair(**OPTIONS['as at 256 px'])
    vae, var = to_official(tokenizer, student)
    vae['quantize.ema_vocab_hit_SV'] = torch.ones(10, 24)
    again, _ = load_official(vae, var, tokenizer.patch_nums)
    assert again.quantizer.codebook.usage.shape == (4, 24) and not again.quantizer.codebook.usage.any()
    tokens = [torch.arange(p * p)[None] % 24 for p in tokenizer.patch_nums]
    assert torch.equal(again.decode(tokens), tokenizer.decode(tokens))


# -----------------------------------------------------------------------------
# wrong inputs

@pytest.fixture(scope='module')
def exported():
    return to_official(*pair(**OPTIONS['as at 256 px']))


def refused(vae, var, patch_nums=(1, 2, 3, 5), num_heads=0):
    with pytest.raises(UserError) as error:
        load_official(vae, var, patch_nums, num_heads)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_tokenizer_is_no_transformer_and_the_other_way_round(exported):
    vae, var = exported
    assert 'not a published VAR transformer' in refused(vae, vae) and 'var_d16.pth' in refused(vae, vae)
    assert 'not a published VAR tokenizer' in refused(var, var) and 'vae_ch160v4096z32.pth' in refused(var, vae)
    assert 'not a published VAR tokenizer' in refused({}, {})
    assert 'not a published VAR transformer' in refused(vae, {'trainer': {'vae_local': vae}})
    assert 'not a published VAR transformer' in refused(vae, {'trainer': [var]})


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_what_vars_own_trainer_saves_is_loaded(exported, prefix):
    def renamed(weights):
        return {prefix + name: weight for name, weight in weights.items()}

    vae, var = exported
    parts = {'var_wo_ddp': renamed(var), 'vae_local': renamed(vae), 'var_opt': {'state': {}}}
    saved = {'epoch': 3, 'iter': 0, 'trainer': parts, 'args': {'depth': 2}}             # ar-ckpt-last.pth
    for files in ((saved, saved), (renamed(vae), renamed(var))):
        for module, weights in zip(load_official(*files, (1, 2, 3, 5)), load_official(vae, var, (1, 2, 3, 5))):
            same_weights(module.state_dict(), weights.state_dict())


@pytest.mark.parametrize('patch_nums', [(1, 2, 3, 4), (1, 2, 5), (1, 2, 3, 4, 5), PATCH_NUMS_512, ()])
def test_other_patch_nums_are_refused(exported, patch_nums):
    assert f'patch_nums=(1, 2, 3, 5), not {patch_nums}' in refused(*exported, patch_nums)


def test_a_transformer_of_another_vocabulary_or_code_width_is_refused(exported):
    for changes in (dict(vocab_size=32), dict(codebook_dim=8)):
        _, other = to_official(*pair(**OPTIONS['as at 256 px'], **changes))
        assert 'do not belong together' in refused(exported[0], other)


@pytest.mark.parametrize('name', ['encoder.conv_in.weight', 'encoder.down.0.block.0.conv1.weight', 'encoder.down.4.attn.1.qkv.bias',
                                  'decoder.up.4.block.2.norm2.bias', 'quantize.quant_resi.qresi_ls.3.weight', 'quant_conv.bias',
                                  'quantize.ema_vocab_hit_SV', 'pos_start', 'pos_1LC', 'lvl_embed.weight', 'class_emb.weight',
                                  'blocks.0.ffn.fc1.weight', 'blocks.1.attn.q_bias', 'head.weight', 'head_nm.ada_lin.1.bias'])
def test_a_missing_weight_is_named(exported, name):
    without = [{key: value for key, value in part.items() if key != name} for part in exported]
    assert name in refused(*without)


@pytest.mark.parametrize('gone', [r'encoder\.down\.', r'encoder\.down\.2\.', r'encoder\.down\.4\.', r'decoder\.',
                                  r'quantize\.quant_resi\.', r'quantize\.quant_resi\.qresi_ls\.0',
                                  r'blocks\.', r'blocks\.0\.', r'blocks\.0\.attn\.scale'])
def test_half_a_file_is_refused(exported, gone):
    refused(*({key: value for key, value in part.items() if not re.match(gone, key)} for part in exported))


def test_an_unknown_weight_is_named(exported):
    vae, var = exported
    assert '"loss.logvar"' in refused(vae | {'loss.logvar': torch.zeros(1)}, var)
    assert '"blocks.0.ada_gss"' in refused(vae, var | {'blocks.0.ada_gss': torch.zeros(1, 1, 6, 12)})


def test_a_weight_of_another_shape_is_named(exported):
    vae, var = exported
    assert 'encoder.conv_out.weight' in refused(vae | {'encoder.conv_out.weight': torch.zeros(12, 16, 3, 3)}, var)


def test_heads_that_do_not_fit_are_refused(exported):
    vae, var = exported
    assert 'log_scale' in refused(vae, var, num_heads=4)
    bare = to_official(*pair(depth=5, embed_dim=12, num_heads=2, qk_norm=False))
    assert 'embed_dim=12 is not a multiple of num_heads=5' in refused(*bare)


# -----------------------------------------------------------------------------
# the command line

class Mischief:
    """Pickled into a file, it makes a folder when the file is opened by someone who runs what is in it."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def files(exported, tmp_path):
    """vae.pth and var.pth as VAR publishes them, and ways to spoil them."""
    for name, weights in zip(('vae.pth', 'var.pth'), exported):
        torch.save(weights, tmp_path / name)
    return tmp_path


@pytest.fixture
def sample(files, run_script):
    """sample.py on them, as a command line does: (exit status, stdout, stderr)."""
    def sample(*arguments, vae='vae.pth', var='var.pth', patch_nums='1,2,3,5'):
        return run_script('sample', f'--vae={files}/{vae}', f'--init_from={files}/{var}', f'--patch_nums={patch_nums}',
                          f'--out_dir={files}/out', '--per_class=2', '--device=cpu', *arguments)
    return sample


def test_published_files_are_sampled_as_they_are(sample, files, exported):
    status, _, err = sample('--classes=6,2', '--seed=3', '--smooth=True')
    assert status == 0, err
    tokenizer, student = load_official(*exported, (1, 2, 3, 5))
    tokenizer.to(memory_format=torch.channels_last)         # as sample.py has it; the last bits depend on it
    _, images = student.generate(tokenizer, torch.tensor([6, 6, 2, 2]), generator=torch.Generator().manual_seed(3), smooth=True)
    save_png(files / 'expected.png', picture_grid(images, 2, ['6', '2']))
    assert (files / 'out' / 'samples.png').read_bytes() == (files / 'expected.png').read_bytes()
    assert (files / 'out' / 'focus.gif').is_file()


def test_published_files_are_evaluated_on_data_that_is_named(files, run_script):
    """Seven classes, known by number: the names of the folders need not be those of the transformer."""
    for split, seed in (('train', 0), ('val', 7)):
        for c in range(7):
            save_pictures(files / 'data' / split / f'class {c}', pictures(torch.tensor([0, 1]), side=80, seed=seed + c))
    arguments = ('evaluate', f'--vae={files}/vae.pth', f'--init_from={files}/var.pth', f'--out_dir={files}/out', '--device=cpu',
                 '--parts=tokenizer,samples', '--per_class=2', '--distance=cnn', '--cnn_steps=2', '--cnn_batch=8')
    status, _, err = run_script(*arguments)
    assert status == 2 and 'give --data=DIR' in err and not (files / 'out').exists()
    status, _, err = run_script(*arguments, f'--data={files}/data')
    assert status == 0, err
    results = json.loads((files / 'out' / 'results.json').read_text())
    generated, _, _, real = results['distances']
    assert results['tokenizer']['images'] == generated['images'] == generated['against_images'] == 14
    assert generated['set'] == 'generated' and generated['fd_cnn'] > real['fd_cnn'], 'its weights are random'


@pytest.mark.parametrize('patch_nums', [(1, 2, 3, 5), PATCH_NUMS_512])
def test_token_maps_need_not_be_given(patch_nums):
    var = {'word_embed.weight': torch.empty(0), 'lvl_1L': map_of_position(patch_nums)[None]}
    assert published_patch_nums(var) == patch_nums


def spoil_pickle(files):
    torch.save({'word_embed.weight': Mischief(files / 'mischief')}, files / 'var.pth')


def spoil_vae_pickle(files):
    torch.save(Mischief(files / 'mischief'), files / 'vae.pth')


WRONG = {
    'tokenizer for transformer': (None, dict(var='vae.pth'), 'this is not a published VAR transformer'),
    'transformer for tokenizer': (None, dict(vae='var.pth'), 'this is not a published VAR tokenizer'),
    'other maps': (None, dict(patch_nums='1,2,3,4'), 'give the patch_nums it was trained with'),
    'maps that shrink': (None, dict(patch_nums='5,3,2,1'), 'give the patch_nums it was trained with'),
    'missing': (None, dict(var='elsewhere.pth'), 'elsewhere.pth: No such file'),
    'truncated': (lambda files: os.truncate(files / 'var.pth', 5000), {}, 'var.pth cannot be read (truncated, not a checkpoint'),
    'empty': (lambda files: os.truncate(files / 'vae.pth', 0), {}, 'vae.pth cannot be read (truncated, not a checkpoint'),
    'code in the transformer': (spoil_pickle, {}, 'var.pth cannot be read (truncated, not a checkpoint, or with code in it, which is never run'),
    'code in the tokenizer': (spoil_vae_pickle, {}, 'vae.pth cannot be read (truncated, not a checkpoint, or with code in it, which is never run'),
    'a list': (lambda files: torch.save([1, 2], files / 'var.pth'), {}, 'this is not a published VAR transformer'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_files_get_one_line_and_run_nothing(sample, files, case):
    spoil, names, message = WRONG[case]
    if spoil:
        spoil(files)
    status, out, err = sample(**names)
    assert status == 2 and out == '' and err.startswith('error: ') and message in err and err.count('\n') == 1
    assert not (files / 'out').exists() and not (files / 'mischief').exists()
