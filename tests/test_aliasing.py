"""aliasing.py: every measure on a signal whose answer is known in closed form."""
import json
import math

import numpy as np
import pytest
import torch

from configurator import UserError
from experiments import aliasing
from experiments.aliasing import (
    band_limit, fade, folding, radial_power, sample_positions, spectrum_distance, view, zone_contrast, zone_plate)
from pyramid import build_pyramid
from tokenizer import build_tokenizers
from util import checkpoint

SIDE = 128


def wave(*cycles, side=SIDE, amplitudes=None):
    """A sum of sinusoids across, of so many cycles a side: (1, 1, side, side)."""
    t = torch.arange(side, dtype=torch.float64) / side
    waves = [a * torch.cos(2 * math.pi * c * t + c) for a, c in zip(amplitudes or [1] * len(cycles), cycles)]
    return sum(waves).expand(1, 1, side, side)


def white(count, side, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, side, side, generator=generator, dtype=torch.float64)
    return noise - noise.mean((-1, -2), keepdim=True)


def disk_mtf(f, radius):
    """2·J₁(x)/x, x = 2πρf: of a disk of radius ρ pixels at f cycles a pixel."""
    x = 2 * math.pi * radius * torch.as_tensor(f, dtype=torch.float64).clamp(min=1e-9)
    return 2 * torch.special.bessel_j1(x) / x


def gaussian_mtf(f, sigma):
    return torch.exp(-2 * (math.pi * sigma * torch.as_tensor(f, dtype=torch.float64)) ** 2)


# -----------------------------------------------------------------------------
# the ideal low-pass

@pytest.mark.parametrize('side', [16, 15])
def test_the_ideal_low_pass_of_all_samples_changes_nothing(side):
    noise = white(2, side)
    assert (band_limit(noise, side, torch.arange(side)) - noise).abs().max() < 1e-12


def test_the_ideal_low_pass_keeps_what_is_below_nyquist_and_nothing_else():
    at = torch.arange(SIDE)
    assert (band_limit(wave(15), 32, at) - wave(15)).abs().max() < 1e-12
    for cycles in (16, 17, 40, 63):
        assert band_limit(wave(cycles), 32, at).abs().max() < 1e-12


def test_it_reads_between_the_pixels():
    at, picture = torch.tensor([0.0, 0.3, 77.9]), wave(5)
    read = band_limit(picture.mT, 32, at)[0, 0, :, 0]                       # down
    assert (read - torch.cos(2 * math.pi * 5 * at.double() / SIDE + 5)).abs().max() < 1e-6


# -----------------------------------------------------------------------------
# views

@pytest.mark.parametrize('kernel', ['disk', 'gaussian', 'none'])
@pytest.mark.parametrize('size', [32, 48, 104])
def test_a_view_is_the_pyramids_but_for_the_border(kernel, size):
    """A picture that is grey at the border goes on alike by reflection and by repetition."""
    picture = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.float64)
    picture[..., 32:96, 32:96] = white(2, 64)
    focused = build_pyramid(picture, (size // 8, 16), [5.0, 0.0], kernel=kernel)[0][0]
    assert (view(picture, 5.0, size, kernel) - focused).abs().max() < 1e-6
    assert focused.abs().max() > 0.05


@pytest.mark.parametrize('size', [32, 48])
def test_sample_positions_are_where_the_pyramid_reads(size):
    """Below Nyquist plain decimation reads the wave itself (bicubic interpolation nearly)."""
    truth = torch.cos(2 * math.pi * 2 * sample_positions(SIDE, size) / SIDE + 2)
    assert (view(wave(2), 0.0, size, 'none')[0, 0, 0] - truth).abs().max() < 0.01
    assert (view(wave(2), 0.0, size, 'ideal')[0, 0, 0] - truth).abs().max() < 1e-9


@pytest.mark.parametrize('kernel', ['disk', 'gaussian', 'none', 'ideal'])
@pytest.mark.parametrize('size', [16, 48])
def test_a_view_has_no_border(kernel, size):
    noise = white(1, SIDE)
    period = SIDE // math.gcd(SIDE, size)
    moved = view(noise.roll((5 * period, 5 * period), (-1, -2)), 20.0, size, kernel)
    steps = 5 * period * size // SIDE
    still = view(noise, 20.0, size, kernel)                 # noise would show a border most
    assert torch.allclose(moved, still.roll((steps, steps), (-1, -2)), atol=1e-9)


def test_a_faded_picture_is_flat_at_the_border_and_has_no_mean():
    faded = fade(white(2, 64) + 0.7)
    assert faded.mean((-1, -2)).abs().max() < 1e-12
    assert faded[..., 0].std(-1).max() < 0.01 and faded.std() > 0.2


# -----------------------------------------------------------------------------
# folding

@pytest.mark.parametrize('kernel', ['disk', 'gaussian', 'none'])
def test_above_nyquist_all_is_alias_and_below_it_nothing(kernel):
    """A view of 32 of 128 pixels holds 16 cycles a side."""
    assert folding(wave(15), 1.5, 32, kernel)[0] < 1e-12
    for cycles in (17, 29, 40):
        assert folding(wave(15, cycles, amplitudes=[1e-9, 1]), 1.5, 32, kernel)[0] == pytest.approx(1)


def test_the_share_of_alias_is_that_of_the_energies_above_and_below():
    picture = wave(6, 22, amplitudes=[1.0, 0.5])
    assert folding(picture, 0.0, 32, 'none') == pytest.approx((0.25 / 1.25, 1))
    low, high = (gaussian_mtf(c / SIDE, 2.0).item() for c in (6, 22))       # σ = ρ/2
    alias, kept = folding(picture, 4.0, 32, 'gaussian')
    assert alias == pytest.approx(0.25 * high ** 2 / (low ** 2 + 0.25 * high ** 2), rel=0.05)
    assert kept == pytest.approx(low ** 2, rel=0.02)
    assert folding(picture, 4.0, 32, 'ideal') == pytest.approx((0, 1), abs=1e-12)


@pytest.mark.parametrize('size', [64, 32, 16])
def test_without_blur_white_noise_folds_by_the_count_of_its_frequencies(size):
    alias, kept = folding(white(32, SIDE), 0.0, size, 'none')
    below = ((size - 1) ** 2 - 1) / (SIDE ** 2 - 1)
    assert alias == pytest.approx(1 - below, rel=0.02) and kept == pytest.approx(1)


def test_a_disk_keeps_what_its_transfer_function_says():
    for cycles in (2, 5, 8, 14):
        kept = folding(wave(cycles), 8.0, 32, 'disk')[1]
        assert kept == pytest.approx(disk_mtf(cycles / SIDE, 8.0).item() ** 2, rel=0.02, abs=0.002)


def test_a_disk_has_its_first_zero_at_0_61_over_its_radius():
    radius = 0.6098 * SIDE / 10
    assert folding(wave(10), radius, 32, 'disk')[1] < 1e-4
    assert min(folding(wave(10), factor * radius, 32, 'disk')[1] for factor in (0.9, 1.12)) > 0.002


def test_blurring_all_away_removes_aliasing_and_the_picture_with_it():
    """Which is why there are two numbers."""
    little, much = (folding(wave(4, 20), radius, 32, 'gaussian') for radius in (3.0, 12.0))
    assert much[0] < little[0] / 10 and much[1] < little[1] / 2


# -----------------------------------------------------------------------------
# zone plate

def test_a_zone_plate_oscillates_at_the_frequency_of_its_place():
    plate = torch.complex(*zone_plate(256, 0.25))[0, 128]
    turns = (plate[1:] * plate[:-1].conj()).angle() / (2 * math.pi)     # cycles per pixel
    turn = turns[128:255]                                   # to the right of the centre
    assert (turn - 0.25 * (torch.arange(127) + 0.5) / 128).abs().max() < 1e-9


def test_plain_sampling_shows_all_of_a_zone_plate_and_the_ideal_low_pass_only_what_belongs():
    assert zone_contrast(128, 0.0, 32, 'none') == pytest.approx((1, 1), abs=1e-6)
    wanted, alias = zone_contrast(128, 0.0, 32, 'ideal')
    assert wanted == pytest.approx(1, abs=0.05) and alias < 0.15
    assert zone_contrast(128, 0.0, 128, 'none') == (pytest.approx(1), None)


@pytest.mark.parametrize('kernel, transfer', [
    ('disk', lambda f: disk_mtf(f, 3.0).abs()),
    ('gaussian', lambda f: gaussian_mtf(f, 1.5)),
])
def test_blur_takes_its_transfer_functions_share_of_the_contrast(kernel, transfer):
    t = torch.linspace(-0.25, 0.25, 501, dtype=torch.float64)   # at s = 4 Nyquist is 1/8 cycle per pixel
    f, along = torch.hypot(t[:, None], t), torch.maximum(t[:, None].abs(), t.abs())
    inside = f < 0.225
    wanted = transfer(f[inside & (along < 0.1125)]).mean().item()
    alias = transfer(f[inside & (along > 0.1375)]).mean().item()
    assert zone_contrast(128, 3.0, 32, kernel) == pytest.approx((wanted, alias), abs=0.02)


# -----------------------------------------------------------------------------
# spectrum

def test_white_noise_has_a_flat_spectrum():
    power = 10 * torch.log10(radial_power(white(200, 32)))
    assert power[1:].max() - power[1:].min() < 0.3
    assert power[1] - 1 < power[0] < power[1]               # a little of it goes with the mean


@pytest.mark.parametrize('side', [32, 64])
def test_a_wave_is_in_its_ring(side):
    power = radial_power(wave(side // 5, side=side))        # 0.19 cycles a pixel
    assert power.argmax() == 3 and power[3] > 5 * power[[0, 1, 5, 6, 7]].max()


def test_the_distance_is_signed_and_in_decibels():
    noise = white(100, 32, 3)
    assert spectrum_distance(3 * noise + 0.5, noise).tolist() == pytest.approx(8 * [20 * math.log10(3)])
    assert spectrum_distance(noise / 2, noise).tolist() == pytest.approx(8 * [-20 * math.log10(2)])
    assert spectrum_distance(white(100, 32, 3, seed=1), noise).abs().max() < 0.5    # other noise
    louder = spectrum_distance(noise + 4 * wave(6, side=32), noise)     # where ring 3 begins
    assert louder[3] > 3 and louder[[0, 5, 6, 7]].abs().max() < 0.5


def test_a_blur_is_a_distance_that_falls_with_frequency():
    noise = white(100, 32)
    distance = spectrum_distance(view(noise, 2.0, 32, 'gaussian'), noise)   # σ = 1
    centre = (torch.arange(8) + 0.5) / 16
    expected = 20 * torch.log10(gaussian_mtf(centre, 1.0))
    assert (distance - expected)[:5].abs().max() < 1 and (distance.diff() < 0).all()


# -----------------------------------------------------------------------------
# the command line

STAGE1 = dict(
    data='charts', image_size=32, patch_nums=(1, 2, 4, 8), vocab_size=16, codebook_dim=4, channels=4,
    channel_mult=(1, 1, 1), res_blocks=1, alias_vocab_size=8, alias_codebook_dim=4, alias_channels=4,
    alias_res_blocks=1, beta=0.25, dual=True,
)


def test_the_script_measures_views_reconstructions_and_samples(run_script, tmp_path):
    structure, alias = build_tokenizers(STAGE1)
    checkpoint.save_checkpoint(tmp_path / 'tokenizer.pt', {
        'kind': 'tokenizer', 'config': STAGE1, 'step': 0, 'structure': structure.state_dict(),
        'alias': alias.state_dict()})
    np.savez(tmp_path / 'samples.npz', np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8))
    status, _, err = run_script(
        'experiments/aliasing', f'--out_dir={tmp_path}/out', f'--tokenizer={tmp_path}/tokenizer.pt',
        f'--samples={tmp_path}/samples.npz', '--image_size=64', '--patch_nums=1,2,3,4', '--pictures=2',
        '--real_images=20', '--device=cpu')
    assert (status, err) == (0, '')
    found = json.loads((tmp_path / 'out' / 'aliasing.json').read_text(), parse_constant=pytest.fail)
    assert found['config']['patch_nums'] == [1, 2, 3, 4] and set(found['pyramid']) == set(aliasing.FILTERS)
    for name, rows in found['pyramid'].items():
        assert [row['step'] for row in rows] == pytest.approx([4, 2, 4 / 3, 1])
        assert rows[-1]['alias'] < 1e-12 and rows[-1]['kept'] == pytest.approx(1)
    plain, disk, ideal = (found['pyramid'][name][0] for name in ('none', 'disk matched', 'ideal'))
    assert plain['alias'] > disk['alias'] > ideal['alias']
    # uniform noise has far more of the high frequencies than charts have
    assert found['spectrum']['generated'][-1] > 10 and len(found['spectrum']['real, half/half']) == 8


def test_a_mistake_is_one_line_and_status_2(run_script, tmp_path):
    assert run_script('experiments/aliasing', '--tokenizer=nowhere.pt', f'--out_dir={tmp_path}/out') == (
        2, '', 'error: nowhere.pt: no such checkpoint; run train_tokenizer.py first\n')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('setting, value, complaint', [
    ('patch_nums', (4, 2), r'patch_nums=\(4, 2\) must grow'),
    ('patch_nums', (), r'patch_nums=\(\) must grow'),
    ('real_images', 1, 'real_images=1 must be at least 2'),
    ('image_size', 100, 'image_size=100 is not a multiple'),
    ('samples', 'nowhere.npz', 'nowhere.npz cannot be read: missing'),
])
def test_a_setting_that_makes_no_sense_is_refused(setting, value, complaint, monkeypatch, tmp_path):
    monkeypatch.setattr(aliasing, 'out_dir', str(tmp_path / 'out'))
    monkeypatch.setattr(aliasing, setting, value)
    with pytest.raises(UserError, match=complaint):
        aliasing.main()
    assert not (tmp_path / 'out').exists()
