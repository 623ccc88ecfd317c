"""The student is exactly VAR, the teacher only ever adds to what it knows, and sampling does what its options say."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from util import checkpoint
import train_fvar
from configurator import UserError
from model import (FVAR, VAR, Teacher, block_causal_attention, block_causal_mask, build_student, distillation_loss,
                   filter_logits, load_student, sample_tokens)
from tokenizer import StructureTokenizer, build_tokenizers

PATCH_NUMS, LENGTHS, L = (1, 2, 3, 4), [1, 4, 9, 16], 30
VOCAB, ALIAS_VOCAB, CLASSES = 16, 6, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trained_like(module, seed=0):
    """Weights among which none is zero: at its start a student ignores nearly everything."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def small_student(**changes):
    torch.manual_seed(0)
    return VAR(PATCH_NUMS, VOCAB, codebook_dim=4, **dict(num_classes=CLASSES, depth=3, embed_dim=16, num_heads=2) | changes)


@pytest.fixture(scope='module')
def tokenizer():
    torch.manual_seed(0)
    tokenizer = StructureTokenizer(16, PATCH_NUMS, VOCAB, 4, 12, (1, 1, 1), 1)
    nn.init.normal_(tokenizer.decoder.conv_out.weight)      # loud enough for pictures to be clamped
    return trained_like(tokenizer)


@pytest.fixture
def student():
    return trained_like(small_student())


def random_tokens(batch=3, seed=0, vocab=VOCAB, lengths=LENGTHS):
    return [torch.randint(vocab, (batch, n), generator=seeded(seed + n)) for n in lengths]


def one_batch(tokenizer, batch=3):
    """Labels (one dropped), inputs, structure tokens (B, L), alias tokens (B, La)."""
    tokens = random_tokens(batch)
    alias = random_tokens(batch, 50, ALIAS_VOCAB, LENGTHS[:-1])
    labels = torch.arange(batch) % CLASSES
    labels[-1] = CLASSES
    return labels, tokenizer.token_inputs(tokens), torch.cat(tokens, 1), torch.cat(alias, 1)


def logits_after(student, tokenizer, labels, tokens):
    """Logits of the map after some maps of tokens, by a pass over everything, without caches or guidance."""
    unknown = [torch.zeros(len(labels), n, dtype=torch.int64) for n in LENGTHS[len(tokens):]]
    with torch.no_grad():
        return student(labels, tokenizer.token_inputs([*tokens, *unknown])).split(LENGTHS, 1)[len(tokens)]


# -----------------------------------------------------------------------------
# the student

def test_logits_have_a_row_for_every_position(student, tokenizer):
    labels, inputs, _, _ = one_batch(tokenizer)
    logits = student(labels, inputs)
    assert inputs.shape == (3, L - 1, 4) and logits.shape == (3, L, VOCAB) and logits.dtype == torch.float32
    stream, condition = student.hidden(labels, inputs)
    assert len(stream) == 4 and all(x.shape == (3, L, 16) for x in stream)
    assert condition.embedding.shape == condition.blocks.shape == (3, 16)


def test_width_and_heads_follow_depth_unless_given():
    student = VAR((1, 2), 8, 4, depth=2)
    assert student.head.in_features == 128 and student.num_heads == 2 and student.class_embed.num_embeddings == 1001
    assert student.drop_path == pytest.approx(0.1 * 2 / 24) and VAR((1, 2), 8, 4, depth=1, embed_dim=8, drop_path=0.3).drop_path == 0.3
    with pytest.raises(UserError, match='embed_dim=16 is not a multiple of num_heads=3'):
        small_student(num_heads=3)


def test_a_first_map_of_several_tokens_starts_from_as_many():
    student = VAR((2, 3), VOCAB, 4, CLASSES, depth=1, embed_dim=8)
    assert student(torch.tensor([1]), torch.zeros(1, 9, 4)).shape == (1, 13, VOCAB) and student.start.shape == (1, 4, 8)


def test_a_position_sees_its_own_map_and_every_earlier_one(student, tokenizer):
    mask = block_causal_mask((1, 2))
    assert mask.tolist() == [[True] + 4 * [False]] + 4 * [5 * [True]]
    labels, inputs, _, _ = one_batch(tokenizer)
    changed = inputs.clone()
    changed[:, 4 + 3] += 1                                  # a position of the third map
    with torch.no_grad():
        moved = (student(labels, inputs) - student(labels, changed)).abs().amin((0, 2)) > 0
    assert not moved[:5].any() and moved[5:].all()


def test_no_class_is_a_class_of_its_own(student, tokenizer):
    """Dropped labels are num_classes: the last row of the class embedding, and no other, is learned from them."""
    labels, inputs, _, _ = one_batch(tokenizer)
    student(torch.full_like(labels, CLASSES), inputs).sum().backward()
    used = student.class_embed.weight.grad.abs().amax(1) > 0
    assert used.tolist() == [False] * CLASSES + [True]
    with torch.no_grad():
        assert (student(labels[:1], inputs[:1]) - student(torch.tensor([CLASSES]), inputs[:1])).abs().max() > 1e-3


@pytest.mark.parametrize('options', [{}, dict(shared_aln=True), dict(qk_norm=False)], ids=str)
def test_training_starts_from_a_uniform_distribution(tokenizer, options):
    student = small_student(depth=4, embed_dim=64, num_heads=4, **options)
    labels, inputs, tokens, _ = one_batch(tokenizer)
    logits = student(labels, inputs)
    assert 0 < logits.abs().max() < 0.1
    assert F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item() == pytest.approx(math.log(VOCAB), rel=0.01)


@pytest.mark.parametrize('options, change', [({}, 1e-3), (dict(qk_norm=False), 1e-3), (dict(shared_aln=True), 0.2)], ids=str)
def test_blocks_begin_near_the_identity(tokenizer, options, change):
    """Less near where one AdaLN serves all blocks: its own rows for γ are not made small, as they aren't in VAR."""
    stream, _ = small_student(depth=4, embed_dim=64, num_heads=4, **options).hidden(*one_batch(tokenizer)[:2])
    assert 0 < (stream[-1] - stream[0]).abs().max() < change * stream[0].abs().max()


def test_every_weight_of_the_student_learns(student, tokenizer):
    labels, inputs, tokens, _ = one_batch(tokenizer)
    FVAR(student)(labels, inputs, tokens, None)['total'].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


# -----------------------------------------------------------------------------
# stochastic depth

def test_drop_path_grows_from_nothing_in_the_first_block_to_its_rate_in_the_last():
    factors = small_student(drop_path=0.4).drop_path_mask(torch.rand(20000, 6, generator=seeded()))
    assert factors.shape == (20000, 6)
    for column, rate in enumerate((0, 0, 0.2, 0.2, 0.4, 0.4)):
        values = factors[:, column].unique()
        torch.testing.assert_close(values, torch.tensor([0, 1 / (1 - rate)] if rate else [1.0]))
        assert (factors[:, column] == 0).float().mean().item() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / 20000))
        assert factors[:, column].mean().item() == pytest.approx(1, abs=0.03)
    assert (factors[:, 4] != factors[:, 5]).any()           # the two branches of a block fall apart


def test_drop_path_is_a_function_of_its_numbers_picture_by_picture():
    student, (uniform, others) = small_student(drop_path=0.4), torch.rand(2, 50, 6, generator=seeded())
    first, again, other = (student.drop_path_mask(u) for u in (uniform, uniform.clone(), others))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.cat([student.drop_path_mask(part) for part in uniform.split(7)]), first)
    assert student.drop_path_mask(torch.zeros(1, 6)).tolist() == [[1, 1, 0, 0, 0, 0]]    # a rate of 0 drops nothing


def test_dropped_branches_leave_the_stream_alone_picture_by_picture(student, tokenizer):
    labels, inputs, _, _ = one_batch(tokenizer)
    keep = torch.ones(3, 6)
    keep[1, 2:4] = 0                                        # the second block for the second picture
    stream, _ = student.hidden(labels, inputs, keep)
    whole, _ = student.hidden(labels, inputs)
    assert torch.equal(stream[2][1], stream[1][1]) and not torch.equal(whole[2][1], whole[1][1])
    torch.testing.assert_close(stream[3][[0, 2]], whole[3][[0, 2]])


@pytest.mark.parametrize('column, branch', [(2, 'mlp'), (3, 'attention')])
def test_the_two_branches_of_a_block_are_dropped_apart(student, tokenizer, column, branch):
    labels, inputs, _, _ = one_batch(tokenizer)
    keep = torch.ones(3, 6)
    keep[:, column] = 0
    stream, _ = student.hidden(labels, inputs, keep)
    nn.init.zeros_(student.blocks[1].attention.proj.weight if branch == 'mlp' else student.blocks[1].mlp.fc2.weight)
    nn.init.zeros_(student.blocks[1].attention.proj.bias if branch == 'mlp' else student.blocks[1].mlp.fc2.bias)
    silent, _ = student.hidden(labels, inputs)
    torch.testing.assert_close(stream[3], silent[3])
    assert not torch.equal(stream[2], stream[1])


# -----------------------------------------------------------------------------
# filtering and drawing

def kept_by_hand(logits, top_k, top_p):
    """Which codes stay, one position at a time and by sorting, in float64."""
    kept = np.zeros(logits.shape, bool)
    for position in np.ndindex(logits.shape[:-1]):
        row = logits[position].double().numpy()
        order = np.argsort(-row)[:top_k or len(row)]
        share = np.exp(row[order] - row.max())
        share /= share.sum()
        count = np.searchsorted(share.cumsum(), top_p) + 1 if 0 < top_p < 1 else len(order)
        kept[position + (order[:count],)] = True
    return torch.from_numpy(kept)


@pytest.mark.parametrize('top_k, top_p', [(0, 0), (0, 1), (1, 0), (7, 0), (50, 0), (500, 0), (0, 0.5), (0, 0.96),
                                          (7, 0.5), (20, 0.9), (7, 1e-6)])
@pytest.mark.parametrize('spread', [0.1, 1, 4])
def test_filter_keeps_the_top_k_and_of_these_the_smallest_set_of_probability_top_p(top_k, top_p, spread):
    logits = spread * torch.randn(3, 20, 50, generator=seeded())
    before = logits.clone()
    filtered = filter_logits(logits, top_k, top_p)
    kept = filtered > -torch.inf
    assert torch.equal(kept, kept_by_hand(logits, top_k, top_p)) and torch.equal(filtered[kept], logits[kept])
    assert torch.equal(logits, before)


def test_filter_by_numbers():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert (filter_logits(logits, 3, 0) > -torch.inf).tolist() == [True, False, True, True]
    assert (filter_logits(logits, 0, 0.69) > -torch.inf).tolist() == [True, False, True, False]    # 0.4 + 0.3
    assert (filter_logits(logits, 0, 0.71) > -torch.inf).tolist() == [True, False, True, True]
    assert (filter_logits(logits, 2, 0.6) > -torch.inf).tolist() == [True, False, True, False]     # of 0.7: 4/7 is too little
    assert (filter_logits(logits, 2, 0.5) > -torch.inf).tolist() == [True, False, False, False]    # but enough for a half


def test_the_most_likely_code_always_stays():
    for logits in (torch.tensor([[0.0, 100.0, 0.0]]), torch.arange(9.0)[None]):
        for top_p in (1e-9, 0.05):
            kept = filter_logits(logits, 0, top_p) > -torch.inf
            assert kept.sum() == 1 and logits[kept] == logits.max()


@pytest.mark.parametrize('top_k, top_p', [(2, 0), (0, 0.3), (3, 0.5)])
def test_equal_logits_stay_or_go_together(top_k, top_p):
    kept = filter_logits(torch.tensor([3.0, 1.0, 3.0, 3.0, 0.0, 3.0]), top_k, top_p) > -torch.inf
    assert kept.tolist() == [True, False, True, True, False, True]


def exponential(*shape, seed=0):
    return torch.empty(shape).exponential_(generator=seeded(seed))


def test_draw_gives_the_tokens_of_multinomial():
    logits = filter_logits(2 * torch.randn(3, 40, 50, generator=seeded(1)), 20, 0.9)
    wanted = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=seeded(2)).view(3, 40)
    assert torch.equal(sample_tokens(logits, exponential(120, 50, seed=2).view(3, 40, 50)), wanted)


def test_draw_follows_the_distribution():
    share = torch.tensor([0.5, 0.0, 0.3, 0.2])
    tokens = sample_tokens(share.log().expand(40, 1000, 4), exponential(40, 1000, 4))
    assert tokens.shape == (40, 1000) and tokens.dtype == torch.int64
    counts = torch.bincount(tokens.flatten(), minlength=4) / 40000
    assert counts[1] == 0 and (counts - share).abs().max() < 5 * math.sqrt(0.25 / 40000)


def test_draw_keeps_positions_apart():
    logits = torch.full((2, 3, 6), -torch.inf)
    wanted = torch.tensor([[0, 5, 2], [4, 1, 3]])
    logits.scatter_(2, wanted[..., None], 0.0)
    assert torch.equal(sample_tokens(logits, exponential(2, 3, 6)), wanted)
    assert torch.equal(sample_tokens(logits, torch.rand(2, 3, generator=seeded(), dtype=torch.float64)), wanted)


# -----------------------------------------------------------------------------
# sampling

@pytest.fixture
def filtered(monkeypatch):
    """A list that fills with the logits which generate() draws from, map by map, before they are filtered."""
    seen = []
    monkeypatch.setattr(model, 'filter_logits', lambda logits, *how: seen.append(logits) or filter_logits(logits, *how))
    return seen


def test_generate_gives_tokens_of_every_map_and_the_pictures_they_decode_to(student, tokenizer):
    tokens, images = student.generate(tokenizer, torch.tensor([0, 4, 2]), top_k=0, top_p=0, generator=seeded())
    assert [t.shape for t in tokens] == [(3, n) for n in LENGTHS]
    assert images.shape == (3, 3, 16, 16) and images.min() == -1 and images.max() == 1
    torch.testing.assert_close(images, tokenizer.decode(tokens), atol=1e-4, rtol=0)
    assert not images.requires_grad


@pytest.mark.parametrize('options', [{}, dict(shared_aln=True), dict(qk_norm=False)], ids=str)
@pytest.mark.parametrize('cfg', [0.0, 3.0])
def test_guidance_ramps_over_the_maps_from_nothing_to_cfg(tokenizer, filtered, options, cfg):
    """(1 + t)·with class − t·without, t = cfg·(k−1)/(K−1), each from a whole pass over the tokens drawn so far."""
    student, labels = trained_like(small_student(**options)), torch.tensor([1, 3])
    tokens, _ = student.generate(tokenizer, labels, cfg=cfg, top_k=5, top_p=0, generator=seeded())
    for k, logits in enumerate(filtered):
        given, without = (logits_after(student, tokenizer, c, tokens[:k]) for c in (labels, torch.full_like(labels, CLASSES)))
        t = cfg * k / 3
        torch.testing.assert_close(logits, (1 + t) * given - t * without, atol=1e-4, rtol=1e-4)
    assert len(filtered) == 4 and (given - without).abs().max() > 0.01


def test_without_guidance_only_the_class_is_computed(student, tokenizer):
    batches = []
    student.blocks[0].attention.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    student.generate(tokenizer, torch.tensor([1, 3, 0]), cfg=0)
    assert batches == [3] * 4
    student.generate(tokenizer, torch.tensor([1, 3, 0]), cfg=1)
    assert batches == [3] * 4 + [6] * 4


def test_top_k_of_one_is_greedy_whatever_the_generator(student, tokenizer, filtered):
    labels = torch.tensor([2, 0])
    first, second = (student.generate(tokenizer, labels, cfg=0, top_k=1, generator=seeded(s))[0] for s in (1, 2))
    for k in range(4):
        assert torch.equal(first[k], second[k])
        assert torch.equal(first[k], logits_after(student, tokenizer, labels, first[:k]).argmax(-1))


@pytest.mark.parametrize('smooth', [False, True])
def test_the_same_generator_gives_the_same_picture(student, tokenizer, smooth):
    def sample(seed):
        return student.generate(tokenizer, torch.tensor([2, 2]), 1.0, 0, 0, seeded(seed), smooth)
    (tokens, images), (again, same), (_, other) = sample(1), sample(1), sample(2)
    assert all(map(torch.equal, tokens, again))
    assert torch.equal(images, same) and not torch.equal(images, other)
    assert not torch.equal(images[0], images[1])            # two pictures of one class are two draws


def test_smooth_pictures_are_mixtures_of_codes(student, tokenizer):
    labels = torch.tensor([1, 3])
    tokens, images = student.generate(tokenizer, labels, generator=seeded(), smooth=True)
    assert images.shape == (2, 3, 16, 16) and images.min() >= -1 and images.max() <= 1 and images.isfinite().all()
    assert [t.shape for t in tokens] == [(2, n) for n in LENGTHS]
    assert (images - tokenizer.decode(tokens)).abs().max() > 1e-3


def test_smooth_codes_harden_over_the_maps():
    logits, codes = torch.randn(1, 500, 8, generator=seeded()), torch.eye(8)
    early, late = (model.smooth_codes(logits, progress, codes, exponential(1, 500, 8, seed=1)) for progress in (0.0, 1.0))
    torch.testing.assert_close(late.sum(-1), torch.ones(1, 500))
    assert early.amax(-1).mean() < late.amax(-1).mean() and late.amax(-1).mean() > 0.98


def test_pictures_of_no_class(student, tokenizer, filtered):
    """Label num_classes: guidance then has nothing to push away from."""
    none = torch.full((2,), CLASSES)
    guided, _ = student.generate(tokenizer, none, cfg=4.0, generator=seeded())
    plain, _ = student.generate(tokenizer, none, cfg=0.0, generator=seeded())
    for a, b in zip(filtered[:4], filtered[4:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert [t.shape for t in guided] == [t.shape for t in plain] == [(2, n) for n in LENGTHS]


def test_a_single_map_can_be_sampled():
    torch.manual_seed(0)
    alone = StructureTokenizer(8, (2,), VOCAB, 4, 12, (1, 1, 1), 1).eval()
    tokens, images = VAR((2,), VOCAB, 4, CLASSES, depth=1, embed_dim=8).eval().generate(alone, torch.tensor([1]))
    assert [t.shape for t in tokens] == [(1, 4)] and images.shape == (1, 3, 8, 8)


# -----------------------------------------------------------------------------
# the teacher

def small_teacher(student, awake=False, **options):
    torch.manual_seed(1)
    teacher = Teacher(student, ALIAS_VOCAB, **options)
    return trained_like(teacher, 9) if awake else teacher


def taught(student, teacher, batch):
    """What the teacher says about a batch: (logits, features)."""
    labels, inputs, _, alias = batch
    return teacher(*student.hidden(labels, inputs), alias)


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('options', [{}, dict(shared_aln=True)], ids=str)
@pytest.mark.parametrize('shared_blocks', [-1, 0])
def test_the_teacher_starts_as_the_student(tokenizer, options, shared_blocks):
    student = trained_like(small_student(**options))
    batch = one_batch(tokenizer)
    teacher = small_teacher(student, shared_blocks=shared_blocks)
    logits, features = taught(student, teacher, batch)
    assert logits.shape == (3, 9 + 16, VOCAB) and [f.shape for f in features] == [(3, 25, 16)] * 2
    torch.testing.assert_close(logits, student(*batch[:2])[:, 5:], atol=1e-4, rtol=1e-4)
    terms = FVAR(student, teacher)(*batch)
    assert abs(terms['kl'].item()) < 1e-5 and terms['feature'].item() < 1e-8


def test_the_teacher_owns_its_last_blocks_and_a_head(student):
    block, head = parameter_count(student.blocks[0]), parameter_count(student.head) + parameter_count(student.head_ada)
    cross = 5 * (16 * 16 + 16)                              # queries, keys, values, gate, output
    seen = LENGTHS[1] + LENGTHS[2]                          # alias tokens of maps K−2 and K−1
    embeddings = 16 * (ALIAS_VOCAB + seen + 4)
    assert parameter_count(small_teacher(student)) == 2 * (block + cross) + head + embeddings
    assert parameter_count(small_teacher(student, teacher_blocks=1)) == block + cross + head + embeddings
    assert parameter_count(small_teacher(student, shared_blocks=0)) == 3 * block + 2 * cross + head + embeddings
    owned = {id(p) for p in small_teacher(student, shared_blocks=0).parameters()}
    assert not owned & {id(p) for p in student.parameters()}


@pytest.mark.parametrize('options, message', [
    (dict(teacher_blocks=0), 'teacher_blocks must be at least 1'),
    (dict(teacher_blocks=4), 'do not fit depth=3'),
    (dict(teacher_blocks=2, shared_blocks=2), 'teacher_blocks=2 and shared_blocks=2 do not fit depth=3'),
    (dict(alias_scales=0), '4 token maps allow 1 to 3'),
    (dict(alias_scales=4), 'alias_scales=4: 4 token maps allow 1 to 3'),
])
def test_a_mistaken_teacher_is_refused_in_one_line(student, options, message):
    with pytest.raises(UserError, match=message) as error:
        Teacher(student, ALIAS_VOCAB, **options)
    assert '\n' not in str(error.value)


def test_a_map_sees_alias_maps_up_to_its_own(student, tokenizer):
    """With M = 3 of K = 4: maps 2, 3, 4 query alias maps 1, 2, 3, and map 2 does not see alias map 3."""
    labels, inputs, tokens, alias = one_batch(tokenizer)
    teacher = small_teacher(student, awake=True, alias_scales=3)
    assert teacher.map_of_alias.tolist() == [0] + [1] * 4 + [2] * 9 and teacher.start == 1
    with torch.no_grad():
        before, _ = taught(student, teacher, (labels, inputs, tokens, alias))
        for alias_map, first_moved in ((0, 0), (1, 0), (2, 4)):                 # positions count from the second map on
            changed = alias.clone()
            changed[:, sum(LENGTHS[:alias_map])] += 1
            after, _ = taught(student, teacher, (labels, inputs, tokens, changed % ALIAS_VOCAB))
            moved = (after - before).abs().amax((0, 2)) > 0
            assert not moved[:first_moved].any() and moved[first_moved:].all()


def test_coarse_alias_maps_that_no_query_sees_are_left_out(student, tokenizer):
    labels, inputs, tokens, alias = one_batch(tokenizer)
    teacher = small_teacher(student, awake=True, alias_scales=1)
    assert teacher.start == 14 and teacher.map_of_alias.tolist() == [2] * 9
    with torch.no_grad():
        before, _ = taught(student, teacher, (labels, inputs, tokens, alias))
        after, _ = taught(student, teacher, (labels, inputs, tokens, torch.cat([(alias[:, :5] + 1) % ALIAS_VOCAB, alias[:, 5:]], 1)))
    assert before.shape == (3, 16, VOCAB) and torch.equal(before, after)


@pytest.mark.parametrize('shared_blocks', [-1, 0])
def test_the_teachers_loss_moves_only_the_teacher_and_distillation_only_the_student(student, tokenizer, shared_blocks):
    batch, teacher = one_batch(tokenizer), small_teacher(student, awake=True, shared_blocks=shared_blocks)
    network = FVAR(student, teacher)
    for names, learner, other in ((['teacher_ce'], teacher, student), (['feature', 'kl'], student, teacher)):
        network.zero_grad(set_to_none=True)
        terms = network(*batch)
        sum(terms[name] for name in names).backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in learner.parameters())
        assert all(p.grad is None or not p.grad.any() for p in other.parameters())
    network.zero_grad(set_to_none=True)
    network(*batch)['total'].backward()
    assert all(p.grad is not None and p.grad.any() for name, p in teacher.named_parameters() if 'alias_scale' not in name)


def test_the_gate_is_one_sigmoid_per_channel(student):
    layer = trained_like(model.AliasGateCrossAttention(16, 2))
    x, alias = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    with torch.no_grad():
        before = layer(x, alias) - x
        layer.gate.bias[7] = -1e4
        after = layer(x, alias) - x
    assert not after[..., 7].any() and torch.equal(after[..., :7], before[..., :7]) and before.all()


# -----------------------------------------------------------------------------
# the loss

def test_without_a_teacher_there_is_cross_entropy_and_nothing_else(student, tokenizer):
    labels, inputs, tokens, _ = one_batch(tokenizer)
    terms = FVAR(student)(labels, inputs, tokens, torch.zeros(3, 0, dtype=torch.int64))
    assert set(terms) == {'ce', 'per_map', 'total'} and torch.equal(terms['ce'], terms['total'])
    with torch.no_grad():
        share = student(labels, inputs).softmax(-1).gather(2, tokens[..., None])
    assert terms['ce'].item() == pytest.approx(-share.log().mean().item(), rel=1e-5)


def test_per_map_is_the_cross_entropy_of_every_map(student, tokenizer):
    labels, inputs, tokens, _ = one_batch(tokenizer)
    per_map = FVAR(student)(labels, inputs, tokens, None)['per_map']
    with torch.no_grad():
        logits = student(labels, inputs)
    for k, (first, last) in enumerate(((0, 1), (1, 5), (5, 14), (14, 30))):
        wanted = F.cross_entropy(logits[:, first:last].reshape(-1, VOCAB), tokens[:, first:last].flatten())
        assert per_map[k].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert per_map.shape == (4,) and not per_map.requires_grad


def test_the_total_is_the_weighted_sum_of_its_terms(student, tokenizer):
    batch, teacher = one_batch(tokenizer), small_teacher(student, awake=True)
    terms = FVAR(student, teacher, lambda_feat=0.3, lambda_logit=7.0)(*batch)
    assert set(terms) == {'ce', 'per_map', 'total', 'teacher_ce', 'feature', 'kl'}
    assert terms['total'].item() == pytest.approx(
        (terms['ce'] + terms['teacher_ce'] + 0.3 * terms['feature'] + 7 * terms['kl']).item(), rel=1e-5)
    logits, _ = taught(student, teacher, batch)
    wanted = F.cross_entropy(logits.flatten(0, 1), batch[2][:, 5:].flatten())   # the last two maps only
    assert terms['teacher_ce'].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert terms['feature'] > 0.01 and terms['kl'] > 0.01


def normal(x):
    """LayerNorm by hand, without weights of its own."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def test_features_are_compared_block_by_block_as_later_layers_see_them(student, tokenizer):
    batch, teacher = one_batch(tokenizer), small_teacher(student, awake=True)
    with torch.no_grad():
        stream, _ = student.hidden(*batch[:2])
        _, features = taught(student, teacher, batch)
        by_hand = sum((normal(stream[i][:, 5:]) - normal(f)).square().mean() for i, f in zip((2, 3), features, strict=True)) / 2
        assert FVAR(student, teacher)(*batch)['feature'].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_kl_is_from_the_teacher_to_the_student_per_position():
    student_logits, teacher_logits = torch.randn(2, 3, 5, generator=seeded(1)), torch.randn(2, 3, 5, generator=seeded(2))
    p, q = teacher_logits.softmax(-1), student_logits.softmax(-1)
    terms = distillation_loss(student_logits, teacher_logits, [torch.tensor([[[1.0, -1.0]]])], [torch.tensor([[[-3.0, 3.0]]])])
    assert terms['kl'].item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert terms['feature'].item() == pytest.approx(4)      # (1 − −1)², whatever the size of the streams


# -----------------------------------------------------------------------------
# files

STAGE1 = dict(image_size=16, patch_nums=PATCH_NUMS, vocab_size=VOCAB, codebook_dim=4, channels=12, channel_mult=(1, 1, 1), res_blocks=1,
              alias_vocab_size=ALIAS_VOCAB, alias_codebook_dim=4, alias_channels=12, alias_res_blocks=1, beta=0.25, dual=True)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """One step of train_fvar.py with a teacher, on token files of noise: (out_dir, structure tokenizer). Not to be written to."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp('trained')
    structure, alias = build_tokenizers(STAGE1)
    checkpoint.save_checkpoint(out / 'tokenizer.pt', {
        'kind': 'tokenizer', 'config': STAGE1 | {'data': 'charts'}, 'step': 0,
        'structure': structure.state_dict(), 'alias': alias.state_dict()})
    (out / 'tokens').mkdir()
    for split in ('train', 'val'):
        rows = np.random.default_rng(0).integers(0, [VOCAB] * 30 + [ALIAS_VOCAB] * 14 + [CLASSES], size=(8, 45)).astype('<u2')
        rows.tofile(out / 'tokens' / f'{split}.bin')
        checkpoint.write_json(out / 'tokens' / f'{split}.json', {
            'rows': 8, 'columns': 45, 'patch_nums': list(PATCH_NUMS), 'alias_patch_nums': list(PATCH_NUMS[:-1]), 'vocab_size': VOCAB,
            'alias_vocab_size': ALIAS_VOCAB, 'classes': [f'class {i}' for i in range(CLASSES)],
            'tokenizer': checkpoint.digest(structure.state_dict())})
    settings = dict(out_dir=str(out), depth=2, embed_dim=16, num_heads=2, steps=1, batch_size=4, eval_pictures=8,
                    device='cpu', dtype='float32')
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(train_fvar, name, value)
            patch.setitem(train_fvar.config, name, value)
        train_fvar.main()
    return out, structure


def test_what_is_deployed_holds_no_weight_of_the_teacher(trained):
    out, structure = trained
    saved = torch.load(out / 'student.pt', weights_only=True)
    student = build_student(saved['config'], structure, CLASSES)
    assert set(saved) == {'kind', 'config', 'step', 'tokenizer', 'classes', 'metrics', 'student'}
    assert {name: w.shape for name, w in saved['student'].items()} == {name: w.shape for name, w in student.state_dict().items()}
    taught = [name for name in torch.load(out / 'fvar_state.pt', weights_only=True)['network'] if name.startswith('teacher.')]
    assert any('alias' in name for name in taught) and not any('alias' in name for name in saved['student'])
    assert sum(w.numel() for w in saved['student'].values()) == parameter_count(student)


def test_a_saved_student_is_loaded_ready_to_sample(trained):
    out, structure = trained
    student, checkpoint = load_student(out / 'student.pt', structure)
    assert not student.training and student.num_classes == CLASSES and checkpoint['step'] == 1
    for name, weight in torch.load(out / 'student.pt', weights_only=True)['student'].items():
        assert torch.equal(student.state_dict()[name], weight)
    assert student.generate(structure.eval(), torch.tensor([1]))[1].shape == (1, 3, 16, 16)


def test_a_student_of_another_tokenizer_is_refused(trained):
    out, structure = trained
    other = copy.deepcopy(structure)
    with torch.no_grad():
        other.quantizer.codebook.weight[3, 1] += 1e-3
    with pytest.raises(UserError, match='student.pt was trained on the tokens of another tokenizer') as error:
        load_student(out / 'student.pt', other)
    assert '\n' not in str(error.value)


def test_a_missing_student_and_another_kind_of_file_are_named(trained):
    out, structure = trained
    with pytest.raises(UserError, match='nothing.pt: no such checkpoint; run train_fvar.py first'):
        load_student(out / 'nothing.pt', structure)
    with pytest.raises(UserError, match='holds tokenizer, not student'):
        load_student(out / 'tokenizer.pt', structure)


# -----------------------------------------------------------------------------
# nothing is computed that a mask would remove, and nothing is lost by it

@pytest.mark.parametrize('patch_nums', [(1, 2, 3, 5), (2, 3), (4,), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)])
def test_block_causal_attention_equals_attention_under_the_whole_mask(patch_nums):
    """Values and gradients."""
    lengths, mask = VAR(patch_nums, 16, 4, num_classes=3, depth=1, embed_dim=8, num_heads=2).layout()
    assert lengths == [p * p for p in patch_nums] and len(mask) == sum(lengths[:-2])
    q, k, v = torch.randn(3, 2, 2, sum(lengths), 4, generator=seeded()).requires_grad_().unbind(0)
    ours = block_causal_attention(q, k, v, lengths, mask, 0.7)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=block_causal_mask(patch_nums), scale=0.7)
    assert torch.allclose(ours, dense, atol=1e-5)
    weight = torch.randn(dense.shape, generator=seeded(1))
    gradients = (torch.autograd.grad((x * weight).sum(), (q, k, v), retain_graph=True) for x in (ours, dense))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))
