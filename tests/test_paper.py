"""What the paper claims, equation by equation, as this code reads it. Where the printed form does not hold, a test shows
both: what is printed, and what is true."""
import math

import pytest
import torch
import torch.nn.functional as F

import model
from model import FVAR, VAR, AliasGateCrossAttention, Teacher
from pyramid import build_pyramid, decimate, defocus, disk_kernel, focus_radii
from tokenizer import AliasTokenizer, StructureTokenizer

MAPS = (1, 2, 3, 4)
LENGTHS = [p * p for p in MAPS]
LAST = sum(LENGTHS[:-1])                                    # where the last map begins


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def differ(a, b):
    return (a - b).abs().max().item()


def energy(x):
    return x.abs().square().sum().item()


# -----------------------------------------------------------------------------
# Eq. 1 and 2: the focus states

def grating(cycles, side):
    """A cosine across the picture which goes on unchanged where the border reflects, and its pixels a cycle."""
    position = torch.arange(side, dtype=torch.float64)
    return torch.cos(math.pi * cycles * position / (side - 1)).expand(1, 1, side, side), 2 * (side - 1) / cycles


def contrast_kept(radius, pixels_a_cycle):
    """The frequency response of the disk: what defocus leaves of a grating's contrast."""
    weight = disk_kernel(radius).double().sum(0)
    offset = torch.arange(len(weight)) - len(weight) // 2
    return (weight * torch.cos(2 * math.pi * offset / pixels_a_cycle)).sum().item()


@pytest.mark.parametrize('radius', [0, 3, 9, 12])
def test_eq_1_a_focus_state_is_a_convolution_with_the_disk(radius):
    """So each grating comes through as itself, its contrast that of the disk's frequency response."""
    for cycles in (1, 7, 20, 64):
        x, pixels_a_cycle = grating(cycles, 65)
        assert differ(defocus(x, radius), contrast_kept(radius, pixels_a_cycle) * x) < 1e-6


def test_eq_2_the_blur_radius_falls_to_zero_instead_of_growing_as_printed():
    def printed(k, K):
        return 12 * (1 - math.cos(math.pi * (k - 1) / (K - 1))) / 2

    assert [printed(k, 4) for k in (1, 2, 3, 4)] == pytest.approx([0, 3, 9, 12])
    assert focus_radii(MAPS, 256, 12.0, 'cosine') == pytest.approx([12, 9, 3, 0])
    assert focus_radii(MAPS, 256, 12.0, 'states') == pytest.approx([12, 9, 3, 0])
    ten = focus_radii(tuple(range(1, 11)), 256, 12.0, 'cosine')
    assert ten == pytest.approx([printed(11 - k, 10) for k in range(1, 11)])
    assert all(now > following for now, following in zip(ten, ten[1:])) and ten[-1] == 0


# -----------------------------------------------------------------------------
# Eq. 3 and 4: the views

@pytest.fixture(scope='module')
def views():
    """Sixteen pictures, their pyramid with noise from 1e-3 to 1e-2, and the noise ε it was given."""
    images, noise, source = normal(16, 3, 32, 32), [], generator(1)

    def remembered(shape, k):
        assert k == len(noise)
        noise.append(torch.randn(shape, generator=source, dtype=torch.float64))
        return noise[-1]

    radii = focus_radii(MAPS, 256, 12.0, 'states')
    return images, radii, build_pyramid(images, MAPS, radii, (1e-3, 1e-2), generator=remembered), noise


BETAS = (1e-3, 4e-3, 7e-3, 1e-2)                            # linear over k


def test_eq_3_a_focused_view_is_blurred_then_sampled_then_noisy(views):
    images, radii, (focused, _, _), noise = views
    for L, radius, beta, epsilon in zip(focused, radii, BETAS, noise):
        blurred_and_sampled = decimate(defocus(images, radius), L.shape[-1])
        assert differ(L, blurred_and_sampled + beta * epsilon) < 1e-5 < beta / 10


def test_eq_3_sampling_before_blurring_would_be_another_view(views):
    images, radii, (focused, _, _), _ = views
    assert differ(focused[0], defocus(decimate(images, 8), radii[0] / 4)) > 0.5


def test_eq_3_the_noise_is_standard_normal_and_independent():
    black = torch.zeros(40, 3, 32, 32)
    focused = build_pyramid(black, MAPS, [6.0, 3.0, 1.0, 0.0], (1e-3, 1e-2), generator=generator())[0]
    noise = [L / beta for L, beta in zip(focused, BETAS)]
    for epsilon in noise:
        assert epsilon.mean().abs() < 0.03 and epsilon.std().item() == pytest.approx(1, abs=0.03)
        assert epsilon.pow(4).mean().item() == pytest.approx(3, abs=0.25)       # a normal one's; a uniform one's is 1.8
        assert (epsilon[:-1] * epsilon[1:]).mean().abs() < 0.03
    assert (noise[0] * noise[3][..., :8, :8]).mean().abs() < 0.03


def test_eq_4_alias_is_downsampled_minus_focused(views):
    images, _, (focused, downsampled, alias), _ = views
    for L, D, A in zip(focused, downsampled, alias):
        assert torch.equal(A, D - L) and torch.equal(D, decimate(images, D.shape[-1]))


def test_eq_4_the_last_alias_is_noise_and_no_other_is(views):
    _, _, (_, _, alias), noise = views
    for k, (A, beta, epsilon) in enumerate(zip(alias, BETAS, noise)):
        removed_by_blur = (A + beta * epsilon).std().item()
        assert removed_by_blur < 1e-12 if k == 3 else removed_by_blur > 0.5
    assert AliasTokenizer(tiny_tokenizer(), 16, 4, 4, (1, 1, 1)).patch_nums == MAPS[:-1]    # so it gets no tokens


# -----------------------------------------------------------------------------
# Eq. 6, 7, 8: the spectrum of the alias, by FFT. Sides of 33·s pixels, so that no frequency lies on the edge of the band

def sample_row(x, s):
    """x↓s of signals (B, N), as rows of pictures. Eq. 6 counts from the first sample, so that is moved to pixel 0."""
    N = x.shape[-1]
    return sample_picture(x[:, None, None].expand(-1, 1, N, N), s)[:, 0, 0]


def sample_picture(x, s):
    """x↓s of pictures (B, C, N, N), moved in the same way."""
    return decimate(x.roll((s // 2, s // 2), (-2, -1)), x.shape[-1] // s)


def copies(X, s, dim=-1):
    """The s copies of a spectrum that fall on one another in sampling: (…, s, N/s, …), the base band the first."""
    return X.unflatten(dim, (s, X.shape[dim] // s))


def fold(X, s):
    return copies(X, s).sum(-2)


def fold2(X, s):
    """Over both axes: s² copies."""
    return copies(fold(X, s), s, dim=-2).sum(-3)


def passband(N, s):
    return torch.fft.fftfreq(N).abs() < 0.5 / s


def ideal(X, s, axes):
    """A spectrum behind the ideal anti-aliasing filter for x↓s."""
    band = passband(X.shape[-1], s)
    return X * band if axes == 1 else X * (band[:, None] & band)


def fft_row(x):
    return torch.fft.fft(x)


def test_eq_6_is_right_in_one_dimension_at_step_two():
    x = normal(5, 66)
    X = fft_row(x)
    printed = (X + X.roll(-33, -1)) / 2                     # ½ [X(ω) + X(ω + π)]
    assert differ(fft_row(sample_row(x, 2)), printed[:, :33]) < 1e-9


@pytest.mark.parametrize('s', [2, 3, 4, 8, 16])
def test_eq_6_the_weight_is_one_over_s_and_all_s_copies_fold(s):
    x = normal(5, 33 * s)
    D, X = fft_row(sample_row(x, s)), fft_row(x)
    assert differ(D, fold(X, s) / s) < 1e-9
    if s > 2:
        printed = (X + X.roll(-X.shape[-1] // 2, -1))[:, :33] / 2
        assert differ(D, printed) > 1


@pytest.mark.parametrize('s', [2, 3, 4, 8])
def test_eq_6_in_a_picture_the_weight_is_one_over_s_squared(s):
    x = normal(2, 3, 33 * s, 33 * s)
    D, X = torch.fft.fft2(sample_picture(x, s)), torch.fft.fft2(x)
    assert differ(D, fold2(X, s) / s ** 2) < 1e-8
    assert differ(D, fold2(X, s) / 2) > 10


@pytest.mark.parametrize('s', [2, 4, 8])
@pytest.mark.parametrize('axes', [1, 2])
def test_eq_7_alias_is_what_folds_and_structure_is_the_base_band_times_the_same_weight(s, axes):
    """The paper's L̂ = X lacks the weight; its U holds all shifts but zero, s − 1 of them or s² − 1."""
    fft, ifft, sample, fold_all = ((torch.fft.fft, torch.fft.ifft, sample_row, fold) if axes == 1 else
                                   (torch.fft.fft2, torch.fft.ifft2, sample_picture, fold2))
    x = normal(3, *[33 * s] * axes) if axes == 1 else normal(3, 1, *[33 * s] * axes)
    X = fft(x)
    L = sample(ifft(ideal(X, s, axes)).real, s)
    A = sample(x, s) - L
    band = passband(33 * s, s)
    base = X[..., band] if axes == 1 else X[..., band, :][..., band]
    assert differ(fft(L), base / s ** axes) < 1e-8 and differ(fft(L), base) > 1
    assert differ(fft(A), fold_all(X - ideal(X, s, axes), s) / s ** axes) < 1e-8


def alias_and_what_was_folded(x, s):
    """‖Â‖² behind an ideal filter, and ‖X‖² outside its band, of signals (B, N)."""
    X = fft_row(x)
    high = X - ideal(X, s, 1)
    return energy(fft_row(sample_row(torch.fft.ifft(high).real, s))), energy(high)


def test_eq_8_is_right_in_one_dimension_at_step_two():
    alias, folded = alias_and_what_was_folded(normal(4, 66), 2)
    assert alias == pytest.approx(folded / 4)


@pytest.mark.parametrize('s', [4, 8, 16])
def test_eq_8_is_off_by_half_the_step(s):
    """‖Â‖ is ‖X‖/s on average: the printed ½‖X‖ is too large by 2, 4, 8 for s = 4, 8, 16."""
    alias, folded = alias_and_what_was_folded(normal(64, 33 * s), s)
    assert math.sqrt(folded / 4 / alias) == pytest.approx(s / 2, rel=0.05)


def test_eq_8_in_a_picture_is_off_already_at_step_two():
    x = normal(16, 1, 66, 66)
    X = torch.fft.fft2(x)
    high = X - ideal(X, 2, 2)
    alias = energy(torch.fft.fft2(decimate(torch.fft.ifft2(high).real, 33)))
    assert alias / energy(high) == pytest.approx(1 / 2 ** 4, rel=0.05)


def test_eq_8_holds_only_on_average():
    """Two gratings that fold onto the same one, in step or against it: twice the mean energy, or nothing."""
    n, base = torch.arange(132, dtype=torch.float64), 5 / 132
    one, two = torch.cos(2 * math.pi * (base + 0.25) * n), torch.cos(2 * math.pi * (base + 0.5) * n)
    for sign, gain in ((1, 2), (-1, 0)):
        alias, folded = alias_and_what_was_folded((one + sign * two)[None], 4)
        assert alias == pytest.approx(gain * folded / 4 ** 2, abs=1e-9)


def test_a_disk_is_no_ideal_filter_because_its_first_side_lobe_is_negative():
    """A grating of 1.2 radii a cycle comes back with an eighth of its contrast, black for white."""
    x, pixels_a_cycle = grating(26, 193)
    assert pixels_a_cycle / 12 == pytest.approx(1 / 0.816, rel=0.01)
    assert ((defocus(x, 12) * x).sum() / x.square().sum()).item() == pytest.approx(-0.13, abs=0.005)
    lowest = min(contrast_kept(12, 1 / f) for f in torch.linspace(0.001, 0.5, 500).tolist())
    assert lowest == pytest.approx(-0.131, abs=0.001)


def test_a_disk_is_no_ideal_filter_for_alias_holds_in_band_loss():
    """A picture with nothing to fold: an ideal filter would leave A = 0. At ρ = 0.75·s a fifth of the energy is in it."""
    s, side = 4, 132
    x = torch.fft.ifft2(ideal(torch.fft.fft2(normal(8, 1, side, side)), s, 2)).real
    _, (D, _), (A, _) = build_pyramid(x, (1, 4), [0.75 * s, 0.0])
    inside = (..., slice(2, -2), slice(2, -2))              # away from the border, which reflects
    assert energy(A[inside]) / energy(D[inside]) == pytest.approx(0.19, abs=0.03)


# -----------------------------------------------------------------------------
# the networks

def tiny_tokenizer(**changes):
    torch.manual_seed(0)
    settings = dict(image_size=16, patch_nums=MAPS, vocab_size=32, codebook_dim=8, channels=8, channel_mult=(1, 1, 1), res_blocks=1,
                    max_radius=48.0)                        # 3 pixels of the 16
    structure = StructureTokenizer(**settings | changes).eval().requires_grad_(False)
    structure.quantizer.codebook.weight.normal_()
    return structure


@torch.no_grad()
def stir(module, seed=0):
    """Moves every weight away from where it starts, since a fresh network hardly attends, and a fresh teacher not at all."""
    source = generator(seed)
    for weight in module.parameters():
        weight.add_(0.2 * torch.randn(weight.shape, generator=source))
    return module


def tiny_student(**changes):
    torch.manual_seed(1)
    settings = dict(vocab_size=32, codebook_dim=8, num_classes=3, depth=3, embed_dim=32, num_heads=4)
    return stir(VAR(MAPS, **settings | changes)).eval()


@pytest.fixture(scope='module')
def structure():
    return tiny_tokenizer()


@pytest.fixture
def student():
    return tiny_student()


@pytest.fixture
def network(student):
    """Student and teacher some way into training."""
    return FVAR(student, stir(Teacher(student, alias_vocab_size=16), seed=2), lambda_feat=0.7, lambda_logit=0.3).eval()


@pytest.fixture(scope='module')
def batch(structure):
    """Labels, token inputs, structure tokens and alias tokens of two pictures, the second one's class dropped."""
    tokens = torch.randint(32, (2, sum(LENGTHS)), generator=generator(3))
    alias = torch.randint(16, (2, LAST), generator=generator(4))
    return torch.tensor([1, 3]), token_inputs(structure, tokens), tokens, alias


def token_inputs(structure, tokens):
    return structure.token_inputs(tokens.split(LENGTHS, 1))


def teach(teacher, student, batch):
    labels, inputs, _, alias = batch
    return teacher(*student.hidden(labels, inputs), alias)


def with_other_alias(batch, k):
    """The batch with every token of alias map k (from 0) changed."""
    labels, inputs, tokens, alias = batch
    parts = list(alias.split(LENGTHS[:-1], 1))
    parts[k] = (parts[k] + 1) % 16
    return labels, inputs, tokens, torch.cat(parts, 1)


# -----------------------------------------------------------------------------
# Eq. 9 and 10: Alias-Gate Cross-Attention

@pytest.mark.parametrize('shared_blocks', [-1, 0])
@pytest.mark.parametrize('shared_aln', [False, True])
def test_eq_9_a_teacher_starts_as_its_student(batch, shared_blocks, shared_aln):
    student = tiny_student(shared_aln=shared_aln)
    teacher = Teacher(student, 16, alias_scales=2, teacher_blocks=2, shared_blocks=shared_blocks).eval()
    logits, features = teach(teacher, student, batch)
    stream, _ = student.hidden(*batch[:2])
    first = sum(LENGTHS[:2])
    assert differ(logits, student(*batch[:2])[:, first:]) < 1e-5 and len(features) == 2
    assert all(differ(t, s[:, first:]) < 1e-5 for t, s in zip(features, stream[-2:]))


def test_eq_9_structure_queries_and_alias_is_key_and_value():
    """With one alias token attention has no choice: everything gets that token's value."""
    attention = stir(AliasGateCrossAttention(32, 4)).double()
    x, alias = normal(2, 5, 32), normal(2, 1, 32, seed=1)
    alpha = torch.sigmoid(attention.gate(F.layer_norm(x, (32,), eps=1e-6)))
    assert differ(attention(x, alias), x + alpha * attention.proj(attention.value(alias))) < 1e-12


def gate_of(attention, x, alias):
    """α itself: what comes out when the attended values are replaced by ones."""
    with torch.no_grad():
        attention.proj.weight.zero_()
        attention.proj.bias.fill_(1)
        return attention(x, alias) - x


def test_eq_10_the_gate_is_one_number_per_channel_between_zero_and_one_and_depends_on_the_data():
    attention = stir(AliasGateCrossAttention(32, 4)).double()
    x, alias = normal(2, 5, 32), normal(2, 7, 32, seed=1)
    alpha = gate_of(attention, x, alias)
    assert alpha.shape == (2, 5, 32) and alpha.min() > 0 and alpha.max() < 1
    assert alpha.std(-1).min() > 0.05 and alpha.std(1).min() > 0.01             # differs by channel, and by position
    assert torch.equal(alpha, gate_of(attention, x, -alias))                    # the structure decides, not the alias


def test_eq_10_a_closed_gate_lets_no_alias_through(network, batch):
    """α → 0 leaves X as it is: the teacher is then blind to alias tokens."""
    with torch.no_grad():
        for block in network.teacher.blocks:
            block.alias_attention.gate.bias.fill_(-1000)
    assert torch.equal(teach(network.teacher, network.student, batch)[0],
                       teach(network.teacher, network.student, with_other_alias(batch, 2))[0])


@pytest.mark.parametrize('alias_scales', [1, 2, 3])
def test_only_the_last_maps_look_at_alias_tokens(student, batch, alias_scales):
    teacher = stir(Teacher(student, 16, alias_scales)).eval()
    first = sum(LENGTHS[:-alias_scales])

    def whole_stream(batch):
        seen = []
        hooks = [block.register_forward_hook(lambda module, args, x: seen.append(x)) for block in teacher.blocks]
        teach(teacher, student, batch)
        for hook in hooks:
            hook.remove()
        return seen

    before = whole_stream(batch)
    for k in range(3):
        after = whole_stream(with_other_alias(batch, k))
        for old, new in zip(before, after):
            assert old.shape[1] == sum(LENGTHS) and torch.equal(old[:, :first], new[:, :first])
            moved = (old != new)[:, LAST:].any(-1)
            assert moved.all() if k >= 3 - alias_scales else not moved.any()    # only alias maps K−M … K−1 are read


@pytest.mark.parametrize('k', [0, 1, 2])
def test_an_alias_map_is_seen_by_its_own_and_later_maps(student, batch, k):
    teacher = stir(Teacher(student, 16, alias_scales=3)).eval()
    before, after = (teach(teacher, student, b)[0].split(LENGTHS[1:], 1) for b in (batch, with_other_alias(batch, k)))
    for query, (old, new) in enumerate(zip(before, after), start=1):
        assert (old != new).any(-1).all() if query >= k else torch.equal(old, new)


# -----------------------------------------------------------------------------
# Eq. 12: distillation

def gradients(loss, module):
    weights = list(module.parameters())
    return torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)


def test_eq_12_features_and_logits_teach_the_student_alone(network, batch):
    terms = network(*batch)
    for name in ('feature', 'kl'):
        assert terms[name] > 0.01
        assert all(g is None for g in gradients(terms[name], network.teacher))
        assert gradients(terms[name], network.student.blocks[0])[0].abs().max() > 0


def test_eq_12_the_teacher_has_a_cross_entropy_of_its_own_which_ends_at_the_student(network, batch):
    terms = network(*batch)
    assert all(g is None for g in gradients(terms['teacher_ce'], network.student))
    for name, g in zip(dict(network.teacher.named_parameters()), gradients(terms['teacher_ce'], network.teacher)):
        assert g is not None and (g.abs().max() > 0 or name.endswith('key.bias'))  # which softmax does not feel
    assert all(g is None for g in gradients(terms['ce'], network.teacher))


def test_eq_12_each_term_is_what_it_says(network, batch):
    """Cross-entropies and KL in nats per token; features normalised, squared, averaged over elements, positions, blocks."""
    labels, inputs, tokens, _ = batch
    terms, first = network(*batch), sum(LENGTHS[:2])
    stream, _ = network.student.hidden(labels, inputs)
    log_student = network.student(labels, inputs).log_softmax(-1)
    teacher_logits, features = teach(network.teacher, network.student, batch)
    log_teacher = teacher_logits.log_softmax(-1)

    def of_tokens(log_p, tokens):
        return -log_p.gather(-1, tokens[..., None]).mean().item()

    assert terms['ce'].item() == pytest.approx(of_tokens(log_student, tokens))
    assert terms['teacher_ce'].item() == pytest.approx(of_tokens(log_teacher, tokens[:, first:]))
    per_map = zip(log_student.split(LENGTHS, 1), tokens.split(LENGTHS, 1))
    assert terms['per_map'].tolist() == pytest.approx([of_tokens(*part) for part in per_map])
    kl = (log_teacher.exp() * (log_teacher - log_student[:, first:])).sum(-1).mean()        # KL(teacher ‖ student)
    assert terms['kl'].item() == pytest.approx(kl.item(), rel=1e-4)

    def seen(x):
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)

    feature = torch.stack([(seen(s[:, first:]) - seen(t)).square().mean() for s, t in zip(stream[-2:], features)]).mean()
    assert terms['feature'].item() == pytest.approx(feature.item(), rel=1e-4)


@pytest.mark.parametrize('distill_weight', [1.0, 0.25, 0.0])
def test_eq_12_the_total_is_the_weighted_sum(network, batch, distill_weight):
    terms = {name: value.item() for name, value in network(*batch, distill_weight=distill_weight).items() if name != 'per_map'}
    distilled = distill_weight * (0.7 * terms['feature'] + 0.3 * terms['kl'])
    assert terms['total'] == pytest.approx(terms['ce'] + terms['teacher_ce'] + distilled)
    assert len({round(value, 6) for value in terms.values()}) == 5      # no two of them are the same by accident


def test_eq_12_without_a_teacher_the_cross_entropy_is_all(student, batch):
    terms = FVAR(student)(*batch)
    assert set(terms) == {'ce', 'per_map', 'total'} and torch.equal(terms['total'], terms['ce'])


# -----------------------------------------------------------------------------
# next-focus prediction: each map from the maps before it

@pytest.mark.parametrize('k', [0, 1, 2, 3])
def test_a_token_moves_the_logits_of_later_maps_only(structure, student, batch, k):
    labels, inputs, tokens, _ = batch
    changed = tokens.clone()
    changed[:, sum(LENGTHS[:k + 1]) - 1] += 1
    changed %= 32
    before, after = (student(labels, x).split(LENGTHS, 1) for x in (inputs, token_inputs(structure, changed)))
    for later, (old, new) in enumerate(zip(before, after)):
        assert (old != new).any() if later > k else torch.equal(old, new)


@pytest.mark.parametrize('k', [1, 2, 3])
def test_no_map_is_seen_by_an_earlier_one_and_each_is_seen_by_itself_and_later_ones(student, batch, k):
    """In the transformer itself: of the inputs of map k one position is changed."""
    labels, inputs, _, _ = batch
    changed = inputs.clone()
    changed[:, sum(LENGTHS[:k]) - LENGTHS[0]] += 1
    before, after = (student(labels, x).split(LENGTHS, 1) for x in (inputs, changed))
    for other, (old, new) in enumerate(zip(before, after)):
        assert (old != new).any(-1).all() if other >= k else torch.equal(old, new)


def sampled(student, structure, monkeypatch, **options):
    """Tokens and pictures of two samples, and the logits each map was drawn from."""
    logits, real = [], model.filter_logits
    monkeypatch.setattr(model, 'filter_logits', lambda x, *limits: (logits.append(x), real(x, *limits))[1])
    tokens, images = student.generate(structure, torch.tensor([0, 2]), top_k=20, top_p=0.9, generator=generator(5), **options)
    monkeypatch.undo()
    return tokens, images, logits


@pytest.mark.parametrize('cfg', [0.0, 1.5])
@pytest.mark.parametrize('kind', [{}, {'shared_aln': True, 'qk_norm': False}])
def test_sampling_with_a_cache_is_the_full_forward_pass(structure, monkeypatch, cfg, kind):
    """The tokens of a sample, put through the pass that training uses, have the logits they were drawn from;
    guidance ramps from none at the first map to its full strength at the last."""
    student = tiny_student(**kind)
    tokens, images, logits = sampled(student, structure, monkeypatch, cfg=cfg)
    assert [t.shape for t in tokens] == [(2, length) for length in LENGTHS]
    known, unknown = (student(labels, structure.token_inputs(tokens)).split(LENGTHS, 1)
                      for labels in (torch.tensor([0, 2]), torch.full((2,), student.num_classes)))
    for k, (drawn_from, c, u) in enumerate(zip(logits, known, unknown)):
        assert differ(drawn_from, c + cfg * k / 3 * (c - u)) < 1e-4
    assert differ(images, structure.decode(tokens)) < 1e-5


# -----------------------------------------------------------------------------
# the student is a plain VAR

def test_alias_tokens_never_enter_the_student(network, batch):
    logits = []
    network.student.head.register_forward_hook(lambda module, args, out: logits.append(out.detach()))
    terms, other = network(*batch), network(*with_other_alias(batch, 2))
    assert torch.equal(*logits) and torch.equal(terms['per_map'], other['per_map'])
    assert terms['teacher_ce'] != other['teacher_ce']       # though the teacher saw the change


def test_a_teacher_leaves_no_trace_in_what_is_deployed(student):
    names = {name: weight.shape for name, weight in student.state_dict().items()}
    network = FVAR(student, Teacher(student, 16))
    assert {name: weight.shape for name, weight in network.student.state_dict().items()} == names
    assert not [name for name in names if 'alias' in name or 'teacher' in name]
    assert [name for name in network.state_dict() if 'alias' in name]


def test_the_student_alone_samples(structure, student):
    tokens, images = student.generate(structure, torch.tensor([0, 1, 2]), generator=generator())
    assert [t.shape for t in tokens] == [(3, length) for length in LENGTHS] and images.shape == (3, 3, 16, 16)


# -----------------------------------------------------------------------------
# Table 3, "w/o refocusing"

def alias_of(structure, images):
    torch.manual_seed(2)
    alias = AliasTokenizer(structure, vocab_size=16, codebook_dim=4, channels=24, channel_mult=(1, 1, 1)).eval()
    with torch.no_grad():
        alias.own_codebook.weight.normal_(std=0.3)
    return alias.views(images, generator()), alias.encode(images, generator())


@pytest.mark.parametrize('plain', [{'kernel': 'none'}, {'pyramid': 'scale'}])
def test_without_refocusing_alias_tokens_tell_nothing(structure, plain):
    images = normal(6, 3, 16, 16).float().clamp(-1, 1)
    views, tokens = alias_of(tiny_tokenizer(**plain), images)
    assert len(views) == len(tokens) == 3 and all((view == 0).all() for view in views)
    assert all((t == t[0]).all() for t in tokens)           # the same for every picture
    views, tokens = alias_of(structure, images)
    assert all(view.std() > 0.1 for view in views) and not any((t == t[0]).all() for t in tokens)
