"""What the two tokenizers promise: every prefix of tokens decodes to a focus state, and codes are the nearest ones."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tokenizer
from configurator import UserError
from data import normalize
from util.charts import Charts
from pyramid import build_pyramid, defocus, focus_radii
from util.training import adamw
from tokenizer import (AliasTokenizer, Codebook, MultiScaleQuantizer, StructureTokenizer, area, group_norm,
                       straight_through, vq_loss)

TINY = dict(image_size=32, patch_nums=(1, 2, 3, 4, 6, 8), vocab_size=24, codebook_dim=6, channels=12, channel_mult=(1, 1, 1),
            res_blocks=1, max_radius=48.0)                  # radii of 6 … 0 pixels at 32 pixels


def trained_like(module, seed=0):
    """No weight is zero, no bias without effect, and codes are as large as what they have to stand for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def structure_tokenizer(**changes):
    torch.manual_seed(0)
    return trained_like(StructureTokenizer(**TINY | changes))


def pictures(count=2, side=32, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def targets_of(tokenizer, images, generator=None):
    """e_1 … e_K, what is quantized."""
    features = tokenizer.state_features(images, generator)
    return [area(f, p) for f, p in zip(features, tokenizer.patch_nums, strict=True)]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def nearest_by_hand(vectors, codes):
    """(B, C, p, p), (V, C) → (B, p²): every distance, in float64."""
    z = vectors.double().flatten(2).transpose(1, 2)
    return (z[:, :, None] - codes.double()).square().sum(-1).argmin(-1)


def seen_by(module):
    """A list that fills with what a module is given from now on."""
    inputs = []
    module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    return inputs


# -----------------------------------------------------------------------------
# Q_L: pictures to tokens

def test_tokens_are_int64_maps_of_the_patch_nums():
    tokens = structure_tokenizer().encode(pictures(3))
    assert [t.shape for t in tokens] == [(3, p * p) for p in TINY['patch_nums']]
    assert all(t.dtype == torch.int64 and 0 <= t.min() and t.max() < 24 for t in tokens)
    assert len(torch.cat(tokens, 1).unique()) > 5


@pytest.mark.parametrize('schedule, encoded', [('states', 4), ('cosine', 6), ('matched', 6)])
def test_each_distinct_radius_is_encoded_once(schedule, encoded):
    """'states' costs four encodings for six token maps, one for each of the paper's K = 4 states."""
    tokenizer = structure_tokenizer(focus_schedule=schedule)
    inputs = seen_by(tokenizer.encoder)
    tokenizer.encode(pictures(3))
    assert sum(len(x) for x in inputs) == 3 * encoded


def test_radii_below_half_a_pixel_count_as_one():
    tokenizer = structure_tokenizer(max_radius=3.0)         # 0.375 pixels at 32
    inputs = seen_by(tokenizer.encoder)
    tokenizer.encode(pictures())
    assert torch.equal(torch.cat(inputs), pictures())


def test_scale_pyramid_has_no_blur_and_one_encoding():
    tokenizer = structure_tokenizer(pyramid='scale', noise=(0.5, 0.5))
    inputs = seen_by(tokenizer.encoder)
    targets = targets_of(tokenizer, pictures(), seeded())
    assert tokenizer.radii == [0.0] * 6 and torch.equal(torch.cat(inputs), pictures())      # nor noise
    whole = tokenizer.features(pictures())
    for target, p in zip(targets, TINY['patch_nums'], strict=True):
        torch.testing.assert_close(target, F.interpolate(whole, (p, p), mode='area'))


@pytest.mark.parametrize('schedule', ['states', 'matched'])
def test_image_input_pools_the_features_of_the_defocused_picture(schedule):
    tokenizer = structure_tokenizer(focus_schedule=schedule)
    radii = focus_radii(TINY['patch_nums'], 32, 48.0, schedule)
    assert tokenizer.radii == radii and radii[0] == 6 and radii[-1] == 0
    for target, radius, p in zip(targets_of(tokenizer, pictures()), radii, TINY['patch_nums'], strict=True):
        alone = tokenizer.features(defocus(pictures(), radius))
        torch.testing.assert_close(target, F.interpolate(alone, (p, p), mode='area'), atol=1e-5, rtol=1e-4)


def test_view_input_encodes_the_small_view_itself():
    tokenizer = structure_tokenizer(focus_input='view')
    focused, _, _ = build_pyramid(pictures(), TINY['patch_nums'], tokenizer.radii)
    for target, view in zip(targets_of(tokenizer, pictures()), focused, strict=True):
        assert torch.equal(target, tokenizer.features(view))


def test_the_kernel_of_plain_next_scale_prediction_has_no_radii():
    assert structure_tokenizer(kernel='none').radii == [0.0] * 6


@pytest.mark.parametrize('focus_input', ['image', 'view'])
def test_noise_is_reproducible_by_its_generator_and_absent_without_one(focus_input):
    tokenizer = structure_tokenizer(focus_input=focus_input, noise=(0.1, 0.2))
    first, again, other, none, still = (targets_of(tokenizer, pictures(), g) for g in (seeded(1), seeded(1), seeded(2), None, None))
    assert same(first, again) and same(none, still)
    assert not any(torch.equal(a, b) or torch.equal(a, c) for a, b, c in zip(first, other, none))


@pytest.mark.parametrize('focus_input', ['image', 'view'])
def test_noise_grows_from_the_first_level_to_the_last(focus_input):
    tokenizer = structure_tokenizer(focus_input=focus_input, noise=(0.01, 0.06))
    inputs = seen_by(tokenizer.encoder)
    targets_of(tokenizer, pictures(8), seeded()), targets_of(tokenizer, pictures(8))
    inputs = [part for x in inputs for part in x.split(8)]  # 'image' encodes all radii in one batch
    spread = [(noisy - clean).std().item() for noisy, clean in zip(inputs[:6], inputs[6:], strict=True)]
    assert spread == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05, 0.06], rel=0.1)


# -----------------------------------------------------------------------------
# Q_L: the quantizer

def test_codes_are_the_nearest_ones():
    codebook = Codebook(200, 7, 1)
    nn.init.normal_(codebook.weight)
    vectors = torch.randn(3, 7, 9, 9, generator=seeded())
    assert torch.equal(codebook.nearest(vectors), nearest_by_hand(vectors, codebook.weight))
    assert torch.equal(codebook.lookup(codebook.nearest(vectors))[1, :, 2, 5], codebook.weight[codebook.nearest(vectors)[1, 23]])


def test_a_new_codebook_is_searched_as_well_as_a_trained_one():
    """Its codes lie within 1/V of the origin, far from what they are compared with."""
    codebook, vectors = Codebook(512, 16, 1), torch.randn(4, 16, 8, 8, generator=seeded())
    distance = (vectors.flatten(2).transpose(1, 2)[:, :, None] - codebook.weight).double().square().sum(-1)
    chosen = distance.gather(2, codebook.nearest(vectors)[..., None])[..., 0]
    assert (chosen - distance.amin(-1)).max() < 1e-4 * (distance.amax(-1) - distance.amin(-1)).min()


def test_autocast_does_not_change_which_code_is_nearest():
    codebook = Codebook(200, 7, 1)
    nn.init.normal_(codebook.weight)
    vectors = torch.randn(3, 7, 9, 9, generator=seeded())
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(codebook.nearest(vectors), nearest_by_hand(vectors, codebook.weight))


def test_each_map_quantizes_what_the_maps_before_it_left_over():
    """f̂_k = f̂_{k−1} + φ_k(bicubic(code)), and r_k is nearest to e_k − area(f̂_{k−1} → p_k)."""
    quantizer = structure_tokenizer().quantizer
    targets = [torch.randn(2, 6, p, p, generator=seeded(p)) for p in TINY['patch_nums']]
    with torch.no_grad():
        tokens, states, residuals = quantizer(targets)
        before = torch.zeros(2, 6, 8, 8)
        for k, p in enumerate(TINY['patch_nums']):
            left = targets[k] - F.interpolate(before, (p, p), mode='area')
            torch.testing.assert_close(residuals[k], left)
            assert torch.equal(tokens[k], nearest_by_hand(left, quantizer.codebook.weight))
            code = quantizer.codebook.weight[tokens[k]].transpose(1, 2).reshape(2, 6, p, p)
            h = code if p == 8 else F.interpolate(code, (8, 8), mode='bicubic')
            phi = quantizer.phi[quantizer.phi_of_map[k]]
            before = before + 0.5 * h + 0.5 * F.conv2d(h, phi.weight, phi.bias, padding=1)
            torch.testing.assert_close(states[k], before)
    for state, again in zip(states, quantizer.accumulate(tokens), strict=True):
        torch.testing.assert_close(state, again)


def test_neighbouring_maps_share_a_phi():
    """The ten maps of a 256-pixel picture, four φ with ticks at 1/12, 13/36, 23/36, 11/12."""
    quantizer = MultiScaleQuantizer((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocab_size=4, codebook_dim=2)
    assert [quantizer.phi_of_map[k] for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [MultiScaleQuantizer(range(1, 5), 4, 2).phi_of_map[k] for k in range(4)] == [0, 1, 2, 3]
    assert [MultiScaleQuantizer(range(1, 5), 4, 2, phis=1).phi_of_map[k] for k in range(4)] == [0] * 4
    assert MultiScaleQuantizer((4,), 4, 2).phi_of_map[0] == 0


# -----------------------------------------------------------------------------
# Q_L: tokens to pictures

def test_decoding_gives_pictures_in_minus_one_to_one():
    tokenizer = structure_tokenizer()
    nn.init.normal_(tokenizer.decoder.conv_out.weight)      # loud enough to be clamped
    tokens = tokenizer.encode(pictures())
    images, states = tokenizer.decode(tokens), tokenizer.decode_states(tokens)
    assert images.shape == (2, 3, 32, 32) and len(states) == 6 and all(s.shape == images.shape for s in states)
    assert all(s.min() == -1 and s.max() == 1 for s in states)
    assert torch.equal(images, states[-1])
    assert all(not torch.equal(a, b) for a, b in zip(states, states[1:]))


def test_a_prefix_of_the_tokens_decodes_to_a_prefix_of_the_states():
    tokenizer = structure_tokenizer()
    tokens = tokenizer.encode(pictures())
    assert same(tokenizer.decode_states(tokens[:3]), tokenizer.decode_states(tokens)[:3])
    assert torch.equal(tokenizer.decode(tokens[:2]), tokenizer.decode_states(tokens)[1])


def test_token_inputs_are_the_partial_sums_pooled_to_the_next_map():
    tokenizer = structure_tokenizer(patch_nums=(2, 3, 8))
    tokens = tokenizer.encode(pictures())
    inputs = tokenizer.token_inputs(tokens)
    assert inputs.shape == (2, 9 + 64, 6)                   # L − p_1²
    first, second = tokenizer.quantizer.accumulate(tokens[:2])
    torch.testing.assert_close(inputs[:, :9].transpose(1, 2).reshape(2, 6, 3, 3), F.interpolate(first, (3, 3), mode='area'))
    assert torch.equal(inputs[:, 9:].transpose(1, 2).reshape(2, 6, 8, 8), second)
    assert torch.equal(tokenizer.token_inputs(tokens[:2] + [torch.zeros_like(tokens[2])]), inputs)   # the last map is no input


# -----------------------------------------------------------------------------
# Q_L: training

@pytest.mark.parametrize('focus_input', ['image', 'view'])
def test_a_training_pass_decodes_the_picture_and_one_focus_state(focus_input):
    tokenizer = structure_tokenizer(focus_input=focus_input)
    out = tokenizer(pictures(), None, 2)
    wanted = [tokenizer.decode_features(f_hat) for f_hat in tokenizer.quantizer.accumulate(out.tokens)]
    torch.testing.assert_close(out.picture, wanted[-1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(out.state_picture, wanted[2], atol=1e-4, rtol=1e-3)
    assert same(out.tokens, tokenizer.encode(pictures()))
    assert [r.shape[-1] for r in out.residuals] == list(TINY['patch_nums'])
    assert tokenizer(pictures(), None).state_picture is None


@pytest.mark.parametrize('focus_input', ['image', 'view'])
def test_the_encoder_learns_through_the_codes(focus_input):
    """Codes have no gradient of their own: what reaches the encoder passed straight through them."""
    tokenizer = structure_tokenizer(focus_input=focus_input)
    tokenizer(pictures(), None, 0).picture.square().sum().backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().max() > 0
    assert tokenizer.quantizer.codebook.weight.grad is None


def test_the_focus_term_trains_the_decoder_alone():
    tokenizer = structure_tokenizer()
    tokenizer(pictures(), None, 0).state_picture.square().sum().backward()
    learning = {name.split('.')[0] for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {'decoder', 'post_quant'}


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    quantized, features = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    out = straight_through(quantized, features)
    (out * torch.arange(5.0)).sum().backward()
    torch.testing.assert_close(out, quantized)
    assert torch.equal(features.grad, torch.arange(5.0).expand(2, 5)) and quantized.grad is None


def test_vq_loss_moves_codes_by_one_and_features_by_beta():
    codes, features = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.0, 0.0], requires_grad=True)
    loss = vq_loss(codes, features, 0.25)
    loss.backward()
    assert loss.item() == pytest.approx(1.25 * 5)
    assert codes.grad.tolist() == [1, 3] and features.grad.tolist() == [-0.25, -0.75]


@pytest.mark.parametrize('pyramid', ['focus', 'scale'])
def test_the_vq_loss_compares_at_the_map_or_as_var_does_at_full_size(pyramid):
    tokenizer = structure_tokenizer(pyramid=pyramid)
    out = tokenizer(pictures(), None)
    targets, whole, by_hand = targets_of(tokenizer, pictures()), tokenizer.features(pictures()), 0
    for f_hat, target, p in zip(tokenizer.quantizer.accumulate(out.tokens), targets, TINY['patch_nums']):
        error = f_hat - whole if pyramid == 'scale' else F.interpolate(f_hat, (p, p), mode='area') - target
        weight = 1 / 6 if pyramid == 'scale' else p / sum(TINY['patch_nums'])
        by_hand += weight * 1.25 * error.square().mean().item()
    assert out.vq.item() == pytest.approx(by_hand, rel=1e-4)


def test_sixty_steps_on_eight_charts_lower_the_squared_error_fourfold():
    torch.manual_seed(0)
    images, generator = normalize(Charts('train', 16, 8).images), seeded()
    tokenizer = StructureTokenizer(16, (1, 2, 4, 8), 64, 8, 16, (1, 1), 1, max_radius=48.0)
    codebook = tokenizer.quantizer.codebook
    optimizer = adamw(tokenizer, 2e-3, (0.9, 0.95), weight_decay=0.0)

    def error():
        return F.mse_loss(tokenizer.decode(tokenizer.encode(images)), images).item()

    before = error()
    for step in range(60):
        out = tokenizer(images, generator)
        optimizer.zero_grad()
        (F.mse_loss(out.picture, images) + out.vq).backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        codebook.count(codebook.histogram(out.tokens), decay=0.9)
        if step % 10 == 0:
            codebook.reseed([r.flatten(2).transpose(1, 2).flatten(0, 1) for r in out.residuals], generator, 0.03)
    assert error() < before / 4 and error() < images.var() / 3
    assert len(torch.cat(out.tokens, 1).unique()) > 20


# -----------------------------------------------------------------------------
# codebook health

def test_use_is_a_running_average_of_hits_summed_over_the_ranks():
    codebook = Codebook(4, 2, 2)
    of_one_rank = codebook.histogram([torch.tensor([[1], [1]]), torch.tensor([[0, 1], [3, 3]])])
    codebook.count(2 * of_one_rank, decay=0.75)
    assert codebook.usage.tolist() == [[0, 1, 0, 0], [0.5, 0.5, 0, 1]]
    codebook.count(codebook.histogram([torch.tensor([[0], [1]]), torch.tensor([[2, 2], [2, 2]])]), decay=0.5)
    assert codebook.usage.tolist() == [[0.5, 1, 0, 0], [0.25, 0.25, 2, 0.5]]


def test_a_histogram_counts_every_code_of_every_map():
    codebook, tokens = Codebook(9, 2, 2), [torch.randint(9, (3, n), generator=seeded(n)) for n in (4, 25)]
    hits = codebook.histogram(tokens)
    assert hits.dtype == torch.float32 and hits.tolist() == [t.flatten().bincount(minlength=9).tolist() for t in tokens]


@pytest.mark.parametrize('finite', [False, torch.tensor(False)], ids=repr)
def test_a_step_that_is_not_finite_changes_no_codebook_and_no_scale(finite):
    codebook, vectors = unused_codes()
    before = codebook.usage.clone(), codebook.weight.detach().clone()
    codebook.count(codebook.histogram(2 * [torch.arange(8)[None]]), finite)
    assert codebook.reseed(vectors, seeded(), 0.03, finite) == 0
    assert torch.equal(codebook.usage, before[0]) and torch.equal(codebook.weight, before[1])
    alias = AliasTokenizer(structure_tokenizer(), channels=12, channel_mult=(1, 1, 1))
    for scale in (torch.zeros(5), torch.arange(1.0, 6.0)):
        alias.scale.copy_(scale)
        alias.track_scale(torch.full((5,), 9.0), finite)
        assert torch.equal(alias.scale, scale)


def test_perplexity_is_the_vocabulary_for_even_use_and_one_for_a_single_code():
    codebook = Codebook(8, 2, 3)
    codebook.count(codebook.histogram([torch.arange(8)[None].repeat(2, 3), torch.full((2, 9), 5), torch.tensor([[0, 1, 0, 1]])]))
    assert codebook.perplexity().tolist() == pytest.approx([8, 1, 2], rel=1e-5)


def unused_codes(dead=(1, 4, 6)):
    """A codebook of eight codes of which some were never taken, and vectors for two maps that lie far from all codes."""
    codebook = Codebook(8, 3, 2)
    alive = [code for code in range(8) if code not in dead]
    codebook.count(100 * codebook.histogram([torch.tensor([alive]), torch.tensor([alive])]))
    return codebook, [torch.full((4, 3), 10.0) + torch.eye(4, 3), torch.full((400, 3), -10.0)]


def test_dead_codes_move_onto_given_vectors_and_live_ones_stay():
    codebook, vectors = unused_codes()
    before, dead = codebook.weight.clone(), [1, 4, 6]
    assert codebook.reseed(vectors, seeded(), threshold=0.03) == 3
    assert torch.equal(codebook.weight[[0, 2, 3, 5, 7]], before[[0, 2, 3, 5, 7]])
    apart = torch.cdist(codebook.weight[dead].detach(), torch.cat(vectors)).amin(1)
    assert (apart > 0).all() and (apart < 1).all()          # onto them, but for a jitter that tells equal ones apart
    assert len(torch.unique(codebook.weight[dead], dim=0)) == 3


def test_reseeding_is_a_function_of_its_generator():
    weights = []
    for i, seed in enumerate((3, 3, 4)):
        torch.manual_seed(0)
        codebook, vectors = unused_codes()
        torch.manual_seed(i)                                # of no consequence
        codebook.reseed(vectors, seeded(seed), 0.03)
        weights.append(codebook.weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_few_vectors_of_a_coarse_map_are_drawn_as_often_as_many_of_a_fine_one():
    codebook = Codebook(400, 3, 2)
    codebook.count(codebook.histogram([torch.tensor([[0]]), torch.tensor([[0]])]))
    assert codebook.reseed([torch.full((1, 3), 10.0), torch.full((500, 3), -10.0)], seeded(), 0.03) == 399
    assert 150 < (codebook.weight[1:, 0] > 0).sum() < 250


def test_a_reseeded_code_is_not_dead_again_at_once():
    codebook, vectors = unused_codes()
    assert codebook.reseed(vectors, seeded(), 0.03) == 3 and codebook.reseed(vectors, seeded(), 0.03) == 0


def test_nothing_is_dead_before_anything_was_counted():
    codebook = Codebook(8, 3, 2)
    before = codebook.weight.clone()
    assert codebook.reseed([torch.ones(4, 3)], seeded(), 0.03) == 0 and torch.equal(codebook.weight, before)


# -----------------------------------------------------------------------------
# Q_A

def alias_tokenizer(structure=None, **changes):
    torch.manual_seed(1)
    settings = dict(vocab_size=12, codebook_dim=5, channels=12, channel_mult=(1, 1, 1)) | changes
    alias = trained_like(AliasTokenizer(structure or structure_tokenizer(), **settings))
    alias.track_scale(energies(alias.views(pictures())))
    return alias


def energies(views):
    return torch.stack([view.square().mean() for view in views])


def test_alias_tokens_are_maps_of_all_scales_but_the_last():
    alias = alias_tokenizer()
    tokens = alias.encode(pictures(3))
    assert [t.shape for t in tokens] == [(3, p * p) for p in (1, 2, 3, 4, 6)] and alias.vocab_size == 12
    assert all(t.dtype == torch.int64 and 0 <= t.min() and t.max() < 12 for t in tokens)
    assert [v.shape for v in alias.decode(tokens)] == [(3, 3, 4 * p, 4 * p) for p in (1, 2, 3, 4, 6)]


def test_alias_views_are_what_the_blur_removed():
    alias, structure = alias_tokenizer(), structure_tokenizer()
    _, _, wanted = build_pyramid(pictures(), TINY['patch_nums'], structure.radii)
    assert same(alias.views(pictures()), wanted[:-1])
    assert not any(v.any() for v in alias_tokenizer(structure_tokenizer(pyramid='scale')).views(pictures(), seeded()))


def test_alias_maps_are_looked_up_one_by_one():
    """No residual chain: the code of a place is nearest to its own features, whatever the maps before it hold."""
    alias = alias_tokenizer()
    for k, (view, tokens) in enumerate(zip(alias.views(pictures()), alias.encode(pictures()), strict=True)):
        features = alias.encoder(view / alias.scale[k])
        assert torch.equal(tokens, nearest_by_hand(features, alias.own_codebook.weight))


def test_alias_scale_follows_the_standard_deviation_of_every_view():
    alias = AliasTokenizer(structure_tokenizer(), channels=12, channel_mult=(1, 1, 1))
    views = [torch.full((2, 3, 4, 4), s) for s in (1.0, 2.0, 3.0, 4.0, 5.0)]
    alias.track_scale(energies(views))
    assert alias.scale.tolist() == [1, 2, 3, 4, 5]          # the first step is taken whole
    alias.track_scale(energies([v * 2 for v in views]), decay=0.75)
    assert alias.scale.tolist() == [1.25, 2.5, 3.75, 5, 6.25]


def test_before_anything_was_tracked_a_view_is_divided_by_its_own_deviation():
    alias = AliasTokenizer(structure_tokenizer(), channels=12, channel_mult=(1, 1, 1))
    views = alias.views(pictures())
    first = alias.normalised(views, energies(views))
    assert all(view.square().mean().item() == pytest.approx(1, rel=1e-4) for view in first)
    alias.track_scale(energies(views))                      # from now on it is the running one, whatever the batch holds
    assert same(alias.normalised(views, 4 * energies(views)), first) and same(alias.normalised(views), first)


def test_alias_scale_divides_before_and_multiplies_after_and_is_saved():
    alias = alias_tokenizer()
    assert torch.equal(alias.state_dict()['scale'], alias.scale) and (alias.scale > 0).all()
    for view in alias.normalised(alias.views(pictures())):
        assert view.square().mean().item() == pytest.approx(1, rel=1e-4)
    tokens = alias.encode(pictures())
    before = alias.decode(tokens)
    other = alias_tokenizer()
    other.load_state_dict(alias.state_dict() | {'scale': 2 * alias.scale})
    for twice, once in zip(other.decode(tokens), before, strict=True):
        torch.testing.assert_close(twice, 2 * once)
    assert not same(other.encode(pictures()), tokens)


def test_an_alias_training_pass_gives_gradients_to_all_of_its_own_weights():
    alias = alias_tokenizer()
    out = alias(alias.normalised(alias.views(pictures())))
    (out.l2 + out.vq).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in alias.parameters())
    assert same(out.tokens, alias.encode(pictures()))
    assert [f.shape for f in out.features] == [(2, 5, p, p) for p in (1, 2, 3, 4, 6)]


def test_without_dual_tokenizers_alias_has_no_weights_of_its_own():
    structure = structure_tokenizer()
    alias = alias_tokenizer(structure, dual=False)
    assert list(alias.state_dict()) == ['scale'] and not list(alias.parameters())
    assert alias.codebook is structure.quantizer.codebook and alias.vocab_size == 24
    for k, (view, tokens) in enumerate(zip(alias.views(pictures()), alias.encode(pictures()), strict=True)):
        assert torch.equal(tokens, nearest_by_hand(structure.features(view / alias.scale[k]), structure.quantizer.codebook.weight))


def test_an_alias_tokenizer_does_not_save_the_structure_tokenizer():
    names = list(alias_tokenizer().state_dict())
    assert not any('structure' in name for name in names) and len(names) == len(set(names))
    assert {name.split('.')[0] for name in names} == {'scale', 'encoder', 'decoder', 'own_codebook'}


def test_alias_noise_is_reproducible_by_its_generator():
    alias = alias_tokenizer(structure_tokenizer(noise=(0.1, 0.1)))
    first, again, none = (alias.views(pictures(), g) for g in (seeded(1), seeded(1), None))
    assert same(first, again) and not torch.equal(first[0], none[0])


# -----------------------------------------------------------------------------
# sizes that do not fit, and norms

@pytest.mark.parametrize('changes, message', [
    (dict(image_size=33), 'image_size must be 32'),
    (dict(channel_mult=(1, 1)), 'reduces by 2, so image_size must be 16'),
    (dict(patch_nums=(1, 3, 2, 8)), 'must grow'),
    (dict(patch_nums=(1, 2, 2, 8)), 'must grow'),
    (dict(patch_nums=(0, 2, 8)), 'must grow'),
    (dict(pyramid='laplace'), 'choose focus or scale'),
    (dict(focus_input='pixels'), 'image or view'),
    (dict(focus_schedule='linear'), 'choose matched, states or cosine'),
])
def test_a_mistaken_setting_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        StructureTokenizer(**TINY | changes)
    assert '\n' not in str(error.value)


def test_an_alias_tokenizer_of_another_reduction_is_refused():
    with pytest.raises(UserError, match='image_size must be 16'):
        AliasTokenizer(structure_tokenizer(), channels=12, channel_mult=(1, 1))


@pytest.mark.parametrize('width', [2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 72, 80, 96, 144, 400])
def test_a_group_of_a_norm_is_a_single_channel_only_at_width_thirty_two(width):
    """VQGAN has 32 groups wherever 32 divides the width, and published weights need the same."""
    norm = group_norm(width)
    assert width % norm.num_groups == 0 and norm.eps == 1e-6
    assert (width == norm.num_groups) == (width == 32)


def test_widths_of_thirty_two_have_the_groups_of_the_published_tokenizer():
    assert [group_norm(width).num_groups for width in (32, 160, 320, 640)] == [32] * 4


def test_many_pictures_go_through_the_networks_part_by_part(monkeypatch):
    structure, sizes = StructureTokenizer(16, (1, 2, 4), 16, 4, 8, (1, 1, 1), 1), []
    images, f_hat = torch.randn(5, 3, 16, 16, generator=seeded()), torch.randn(5, 4, 4, 4, generator=seeded())
    with torch.no_grad():
        whole = structure.features(images), structure.decode_features(f_hat)
        for network in (structure.encoder, structure.decoder):
            network.register_forward_hook(lambda *call: sizes.append(len(call[1][0])))
        monkeypatch.setattr(tokenizer, 'PIXELS_PER_PART', 2 * 16 * 16)
        parts = structure.features(images), structure.decode_features(f_hat)
    assert sizes == [2, 2, 1] * 2 and all(torch.allclose(*pair, atol=1e-5) for pair in zip(whole, parts))


def test_checkpointing_changes_no_gradient_and_keeps_less(monkeypatch):
    monkeypatch.setattr(tokenizer, 'PIXELS_PER_PART', 2 * 16 * 16)
    images, found = torch.randn(4, 3, 16, 16, generator=seeded()), {}
    for grad_checkpoint in (False, True):
        torch.manual_seed(0)
        structure = StructureTokenizer(16, (1, 2, 4), 16, 4, 8, (1, 1, 1), 1, max_radius=60.0)
        structure.grad_checkpoint, kept = grad_checkpoint, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            out = structure(images, seeded(), 1)
        (F.mse_loss(out.picture, images) + out.state_picture.square().mean() + out.vq).backward()
        found[grad_checkpoint] = torch.cat([p.grad.flatten() for p in structure.parameters() if p.grad is not None]), sum(kept)
    (plain, all_kept), (again, few_kept) = found[False], found[True]
    assert plain.shape == again.shape and (plain - again).abs().max() < 1e-5 * plain.abs().max() and few_kept < 0.2 * all_kept
