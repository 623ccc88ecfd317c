"""Editing and refocusing: what stays is the photo's, what is drawn is the student's, and blurs are undone as optics says."""
import math

import pytest
import torch

from configurator import UserError
from data import normalize
from editing import consistent, edit, feather, known_states, painted_tokens, refocus, wiener
from experiments.refocus import unsharp
from model import VAR
from pyramid import defocus
from tokenizer import StructureTokenizer
from util.charts import Charts
from util.metrics import psnr

PATCH_NUMS = (1, 2, 4, 8)
RADII = [4.0, 2.0, 1.0, 0.0]


@pytest.fixture(scope='module')
def networks():
    """An untrained tokenizer of four focus states (radii 4, 2, 1, 0 of 32 pixels) and a student with opinions of its own."""
    torch.manual_seed(0)
    tokenizer = StructureTokenizer(32, PATCH_NUMS, 64, 8, 8, (1, 1, 2), 1, max_radius=32.0).eval()
    student = VAR(PATCH_NUMS, 64, 8, num_classes=3, depth=2, embed_dim=32, num_heads=2).eval()
    for parameter in [*tokenizer.quantizer.codebook.parameters(), *student.parameters()]:
        parameter.data += 0.3 * torch.randn_like(parameter)
    assert tokenizer.radii == RADII
    return tokenizer, student


@pytest.fixture(scope='module')
def photo():
    return normalize(Charts('val', 32, 8).images[[7]])


def box(left, top, right, bottom):
    mask = torch.zeros(32, 32)
    mask[top:bottom, left:right] = 1
    return mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -----------------------------------------------------------------------------
# tokens that are given

def test_given_tokens_stay_and_the_others_are_drawn(networks, photo):
    tokenizer, student = networks
    own = tokenizer.encode(photo)
    given = [own[0], own[1].clone(), own[2].clone()]
    given[1][0, 3] = given[2][0, 5] = -1
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    tokens, _ = student.generate(tokenizer, labels, given=given, generator=seeded())
    assert (tokens[0] == own[0]).all() and (tokens[1][:, :3] == own[1][:, :3]).all()
    assert (tokens[2][:, :5] == own[2][:, :5]).all() and (tokens[2][:, 6:] == own[2][:, 6:]).all()
    for drawn in (tokens[1][:, 3], tokens[2][:, 5], tokens[3]):
        assert drawn.min() >= 0 and len(drawn.unique()) > 1


@pytest.mark.parametrize('smooth', [False, True])
def test_a_picture_given_whole_is_decoded_as_it_is(networks, photo, smooth):
    tokenizer, student = networks
    own = tokenizer.encode(photo)
    tokens, images = student.generate(tokenizer, torch.tensor([1]), given=own, smooth=smooth, generator=seeded())
    assert all(map(torch.equal, tokens, own)) and torch.allclose(images, tokenizer.decode(own), atol=1e-5)


def test_what_is_drawn_depends_on_what_is_given(networks, photo):
    tokenizer, student = networks
    own = tokenizer.encode(photo)[:2]
    other = [t.flip(1).roll(1, 1) + 1 for t in own]
    last = [student.generate(tokenizer, torch.tensor([1]), given=given, top_k=1)[0][-1] for given in (own, other)]
    assert not torch.equal(*last)


# -----------------------------------------------------------------------------
# masks

def test_a_token_is_painted_if_half_of_its_cell_is():
    right_half, one, two, four, eight = box(16, 0, 32, 32), *painted_tokens(box(16, 0, 32, 32), PATCH_NUMS)
    assert two.tolist() == [[False, True, False, True]]
    assert four.view(4, 4).tolist() == 4 * [[False, False, True, True]]
    assert not one.any(), 'the first map holds the tone of the whole'
    assert torch.equal(eight.view(8, 8).float(), right_half[2::4, 2::4])
    assert [cells.sum().item() for cells in painted_tokens(box(0, 0, 8, 8), PATCH_NUMS)] == [0, 0, 1, 4]
    assert [cells.sum().item() for cells in painted_tokens(box(0, 0, 8, 5), (1, 4, 4))] == [0, 1, 1]
    assert [cells.sum().item() for cells in painted_tokens(box(0, 0, 8, 3), (1, 4, 4))] == [0, 0, 1]


THIN = {'line': box(15, 0, 16, 32), 'dot': box(5, 5, 6, 6), 'slash': torch.eye(32), 'frame': 1 - box(1, 1, 31, 31)}


@pytest.mark.parametrize('mask', THIN.values(), ids=THIN)
def test_a_thin_mask_is_painted_in_full_and_nothing_else_is(networks, photo, mask):
    tokenizer, student = networks
    inside = mask.bool()
    touched = torch.nn.functional.max_pool2d(mask[None], 4)[0].bool()
    *_, three, last = painted_tokens(mask, PATCH_NUMS)
    assert torch.equal(last.view(8, 8), touched) and not three.any()
    assert torch.equal(feather(mask, 2), mask), 'there is no room for a ramp'
    images = edit(student, tokenizer, photo, mask, torch.full((8,), 3), generator=seeded())
    assert torch.equal(images[..., ~inside], photo.expand_as(images)[..., ~inside])
    assert len(images.flatten(1).unique(dim=0)) > 1


def test_a_seam_in_a_narrow_mask_is_steeper():
    assert torch.allclose(feather(box(10, 0, 13, 32))[16, 9:14], torch.tensor([0, 0.5, 1, 0.5, 0]))
    assert torch.allclose(feather(box(10, 0, 15, 32))[16, 9:16], torch.tensor([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0]))


def test_the_seam_is_feathered_inside_the_mask_only():
    mask = box(16, 4, 32, 28)                               # touches the right border, where no seam is
    weight = feather(mask, 2)
    assert (weight[mask == 0] == 0).all()
    assert torch.allclose(weight[16, 14:22], torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1]))
    assert weight[16, 31] == 1 and torch.allclose(weight[3:8, 31], torch.tensor([0, 1 / 3, 2 / 3, 1, 1]))
    assert torch.equal(feather(mask, 0), mask)


@pytest.mark.parametrize('mask', [box(8, 8, 24, 24), box(0, 0, 16, 32), 1 - box(8, 8, 24, 24)], ids=['hole', 'half', 'frame'])
def test_outside_the_mask_every_pixel_is_the_photos_own_and_inside_none_is(networks, photo, mask):
    tokenizer, student = networks
    images = edit(student, tokenizer, photo, mask, torch.tensor([0, 1, 3]), generator=seeded())
    assert images.shape == (3, 3, 32, 32)
    inside = mask.bool()
    assert torch.equal(images[..., ~inside], photo.expand_as(images)[..., ~inside])
    assert ((images - photo).abs().amax(1)[:, feather(mask, 2) == 1] > 1e-3).float().mean() > 0.95


def test_only_masked_tokens_are_drawn(networks, photo, monkeypatch):
    """Fails if the mask were ignored, turned round or mirrored."""
    tokenizer, student = networks
    seen = {}
    generate = student.generate
    monkeypatch.setattr(student, 'generate', lambda *args, **more: seen.update(result=generate(*args, **more)) or seen['result'])
    edit(student, tokenizer, photo, box(16, 0, 32, 16), torch.tensor(12 * [2]), generator=seeded())
    for tokens, own, p in zip(seen['result'][0], tokenizer.encode(photo), PATCH_NUMS):
        same = (tokens == own).all(0).view(p, p)
        painted = torch.zeros(p, p, dtype=torch.bool)
        if p > 1:
            painted[:p // 2, p // 2:] = True
        assert torch.equal(same, ~painted)


def test_seed_and_class_change_the_painted_part_alone(networks, photo):
    tokenizer, student = networks
    first, again, seed, label = (
        edit(student, tokenizer, photo, box(8, 8, 24, 24), torch.tensor([c]), generator=seeded(s))
        for c, s in ((0, 0), (0, 0), (0, 1), (2, 0)))
    assert torch.equal(first, again)
    for other in (seed, label):
        changed = (first != other).any(1)[0]
        assert changed[10:22, 10:22].any() and not changed[:8].any() and not changed[:, 24:].any()


# -----------------------------------------------------------------------------
# refocusing

@pytest.mark.parametrize('radius, states', [(4, 1), (3, 1), (2.001, 1), (2, 2), (1.5, 2), (1, 3), (0.6, 3)])
def test_a_photo_tells_the_states_that_are_blurred_at_least_as_much(radius, states):
    assert known_states(RADII, radius) == RADII[:states]


@pytest.mark.parametrize('radius', [4.1, 0.5, 0.0, -1.0, math.nan])
def test_a_blur_outside_the_focus_states_is_refused(networks, photo, radius):
    tokenizer, student = networks
    with pytest.raises(UserError, match='at most 4, the blur of the first state'):
        refocus(student, tokenizer, photo, radius, torch.tensor([0]))


def test_next_scale_prediction_cannot_refocus(networks, photo):
    _, student = networks
    with pytest.raises(UserError, match='no focus states'):
        refocus(student, StructureTokenizer(32, PATCH_NUMS, 64, 8, 8, (1, 1, 2), 1, pyramid='scale'), photo, 2.0, torch.tensor([0]))


@pytest.mark.parametrize('focus_input', ['image', 'view'])
@pytest.mark.parametrize('state', [0, 1, 2])
def test_a_photo_in_a_focus_state_has_the_tokens_of_the_sharp_one_up_to_there(networks, photo, focus_input, state):
    """The maps before it see a disk twice instead of one wide disk, whose width is the same: a few tokens may differ."""
    tokenizer, student = networks
    other = StructureTokenizer(32, PATCH_NUMS, 64, 8, 8, (1, 1, 2), 1, max_radius=32.0, focus_input=focus_input).eval()
    other.load_state_dict(tokenizer.state_dict())
    blurred = defocus(photo, RADII[state])
    kept, further, encode = {}, [], other.encode
    other.encode = lambda images, radii=None: further.append(radii) or encode(images, radii=radii)

    def generate(tokenizer, labels, given, **_):
        kept['given'] = given
        return None, photo
    refocus(type('Student', (), {'generate': staticmethod(generate)}), other, blurred, RADII[state], torch.tensor([0]))
    assert len(kept['given']) == state + 1
    assert further == [pytest.approx([math.sqrt(radius ** 2 - RADII[state] ** 2) for radius in RADII[:state + 1]])]
    same = [(a == b).float().mean().item() for a, b in zip(kept['given'], other.encode(photo))]
    assert same[0] == 1 or state > 0
    assert sum(same) / len(same) > 0.7, same


def test_variances_of_blurs_add(photo):
    """What the maps before the photo's own state rest on: F_√(ρ²−r²)(F_r(x)) is nearly F_ρ(x)."""
    twice = defocus(defocus(photo, 2.0), math.sqrt(12))
    assert psnr(twice, defocus(photo, 4.0)) > psnr(defocus(photo, 2.0), defocus(photo, 4.0)) + 15


@pytest.mark.parametrize('radius', [1.0, 2.0, 4.0])
@pytest.mark.parametrize('kernel', ['disk', 'gaussian'])
def test_wiener_undoes_the_blur_up_to_the_borders(photo, radius, kernel):
    blurred = defocus(photo, radius, kernel)
    restored = wiener(blurred, radius, kernel, noise=1e-5)
    assert psnr(restored, photo) > psnr(blurred, photo) + 5
    if kernel == 'disk':                                    # a wide Gaussian leaves too little of the fine detail
        assert psnr(restored, photo) > psnr(blurred, photo) + 10
        border = torch.ones(32, 32, dtype=torch.bool)
        border[4:-4, 4:-4] = False
        assert (restored - photo)[..., border].square().mean() < 2 * (restored - photo)[..., ~border].square().mean() + 1e-4


def test_with_much_noise_wiener_returns_the_mean(photo):
    assert torch.allclose(wiener(photo, 2.0, noise=1e9), photo.mean((2, 3), keepdim=True).expand_as(photo), atol=1e-4)


def test_what_the_blur_left_is_taken_from_the_photo(photo):
    """Any guess, made consistent, blurs to the photo; the truth stays what it is."""
    blurred = defocus(photo, 2.0)
    assert torch.allclose(consistent(photo, blurred, 2.0), photo, atol=1e-5)
    guess = (photo.flip(-1) * 0.2).clamp(-1, 1)
    before, after = ((defocus(x, 2.0) - blurred).square().mean() for x in (guess, consistent(guess, blurred, 2.0)))
    assert after < 0.05 * before


def test_unsharp_masking_steepens_edges_and_keeps_flat_areas():
    step = torch.cat([torch.full((1, 3, 32, 16), -0.5), torch.full((1, 3, 32, 16), 0.5)], 3)
    sharper = unsharp(defocus(step, 2.0), 2.0)
    assert sharper[0, 0, 0, 15] < defocus(step, 2.0)[0, 0, 0, 15] and torch.allclose(sharper[..., :8], step[..., :8], atol=1e-5)


def test_refocused_pictures_follow_the_seed_and_stay_in_range(networks, photo):
    tokenizer, student = networks
    blurred = defocus(photo, 2.0).expand(2, -1, -1, -1)
    a, b, c = (refocus(student, tokenizer, blurred, 2.0, torch.tensor([3, 3]), noise=0, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.abs().max() <= 1
