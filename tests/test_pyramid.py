"""pyramid.py: kernels, schedules, blur and sampling on cases whose answer is known, and the drawing."""
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from configurator import HERE, UserError
from data import normalize, to_uint8
from util.charts import Charts
from pyramid import (build_pyramid, decimate, defocus, defocus_decimate, disk_kernel, focus_radii, gaussian_kernel,
                     noise_levels, psf, view_sizes)

MAPS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
MAPS_1024 = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
SCHEDULES = ('states', 'cosine', 'matched')


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def differ(a, b):
    return (a - b).abs().max().item()


# -----------------------------------------------------------------------------
# kernels

@pytest.mark.parametrize('kernel', [disk_kernel, gaussian_kernel])
@pytest.mark.parametrize('size', [0, 0.3, 0.5, 0.51, 1, 2.7, 6.5, 12])
def test_a_kernel_is_odd_symmetric_and_sums_to_one(kernel, size):
    weight = kernel(size)
    assert weight.shape[0] == weight.shape[1] and weight.shape[0] % 2 == 1
    assert weight.sum().item() == pytest.approx(1, abs=1e-6) and weight.min() >= 0
    for same in (weight.flip(0), weight.flip(1), weight.T):
        assert torch.equal(weight, same)


def test_a_kernel_is_no_larger_than_it_must_be():
    for radius in (0.51, 1.5, 1.51, 2.7, 12, 12.5):
        weight = disk_kernel(radius)
        assert weight[len(weight) // 2, 0] > 0 and len(weight) // 2 + 1 >= radius + 0.5
    assert [len(disk_kernel(radius)) for radius in (1.5, 1.51, 12)] == [3, 5, 25]
    assert len(gaussian_kernel(2.0)) == 13                  # cut at 3 σ


@pytest.mark.parametrize('radius', [0, 0.2, 0.5])
def test_half_a_pixel_of_blur_is_none(radius):
    assert torch.equal(disk_kernel(radius), torch.ones(1, 1))
    images = normal(2, 3, 8, 8)
    for kernel in ('disk', 'gaussian', 'none'):
        assert torch.equal(defocus(images, radius, kernel), images)


def test_a_little_more_than_half_a_pixel_blurs():
    images = normal(2, 3, 8, 8)
    assert differ(defocus(images, 0.6), images) > 0.1
    assert 1e-6 < differ(defocus(images, 0.5001), images) < 0.01


def test_a_disk_is_flat_inside_and_nothing_outside():
    weight = disk_kernel(12)
    offset = torch.arange(-12, 13)
    r = torch.hypot(offset[:, None].float(), offset[None, :].float())
    assert weight[r < 11.5].unique().numel() == 1 and (weight[r >= 12.5] == 0).all()
    assert weight[12, 0] / weight[12, 12] == pytest.approx(0.5)                 # the rim is one pixel soft
    assert 1 / weight[12, 12].item() == pytest.approx(math.pi * 12 ** 2, rel=0.01)


def test_a_disk_grows_without_jumps():
    """A hard-edged disk would jump by one pixel's weight, 0.009 and more, at every one of these radii."""
    def padded(radius):
        weight = disk_kernel(radius)
        return F.pad(weight, ((15 - len(weight)) // 2,) * 4)
    for radius in (0.5, 1, 2 ** 0.5, 1.5, 2, 2.5, 5 ** 0.5, 3, 4.5, 5, 6, 6.5):
        assert 0 < differ(padded(radius - 1e-4), padded(radius + 1e-4)) < 1e-3


def spread(weight):
    """The variance of a kernel along one axis, in pixels²."""
    offset = torch.arange(len(weight)) - len(weight) // 2
    return (weight.sum(0) * offset ** 2).sum().item()


@pytest.mark.parametrize('radius', [3, 6, 12])
def test_a_gaussian_spreads_as_far_as_the_disk_it_stands_for(radius):
    assert spread(psf(radius, 'disk')) == pytest.approx(radius ** 2 / 4, rel=0.06)
    assert spread(psf(radius, 'gaussian')) == pytest.approx(radius ** 2 / 4, rel=0.06)


def test_an_unknown_kernel_is_named():
    with pytest.raises(UserError, match="kernel='box': choose disk, gaussian or none"):
        defocus(normal(1, 3, 8, 8), 2.0, 'box')


# -----------------------------------------------------------------------------
# focus schedule

@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('maps', [MAPS_256, MAPS_1024, (1, 2, 3, 4, 6, 8), (1, 2, 3), (1, 2)])
def test_the_blur_radius_falls_from_its_greatest_to_zero(schedule, maps):
    radii = focus_radii(maps, 256, 12.0, schedule)
    assert len(radii) == len(maps) and radii[0] == 12 and radii[-1] == 0
    assert all(now > 0 for now in radii[:-1])
    assert all(now >= following for now, following in zip(radii, radii[1:]))
    if schedule != 'states':
        assert len(set(radii)) == len(maps)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_a_single_map_is_in_focus(schedule):
    assert focus_radii((4,), 32, 12.0, schedule) == [0.0]


def test_ten_maps_share_the_four_states_of_the_paper():
    radii = focus_radii(MAPS_256, 256, 12.0, 'states')
    assert radii == pytest.approx([12] * 3 + [9] * 3 + [3] * 3 + [0])
    assert len(set(radii)) == 4                             # equal to the bit: each is encoded once


def test_matched_blurs_in_proportion_to_the_sampling_step():
    radii = focus_radii(MAPS_256, 256, 12.0, 'matched')
    assert radii[:-1] == pytest.approx([0.75 * 16 / p for p in MAPS_256[:-1]])
    assert focus_radii((2, 4, 8), 256, 12.0, 'matched') == [12, 6, 0]           # whatever the first map


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_blur_belongs_to_the_picture_and_not_to_its_grid(schedule):
    at_256 = focus_radii(MAPS_256, 256, 12.0, schedule)
    for side in (32, 512, 1024):
        assert focus_radii(MAPS_256, side, 12.0, schedule) == pytest.approx([r * side / 256 for r in at_256])
    assert focus_radii(MAPS_256, 32, schedule=schedule)[0] == 1.5


def test_an_unknown_schedule_is_named():
    with pytest.raises(UserError, match="focus_schedule='linear': choose"):
        focus_radii(MAPS_256, 256, 12.0, 'linear')


# -----------------------------------------------------------------------------
# blur and sampling

@pytest.mark.parametrize('kernel', ['disk', 'gaussian', 'none'])
def test_a_constant_image_stays_constant_up_to_the_border(kernel):
    images = torch.tensor([-1.0, 0.25, 1.0]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    for radius in (0, 0.7, 3, 10):
        blurred = defocus(images, radius, kernel)
        assert blurred.shape == images.shape and differ(blurred, images) < 1e-5


@pytest.mark.parametrize('kernel', ['disk', 'gaussian'])
@pytest.mark.parametrize('radius', [0.7, 2, 3.3, 7.5])
def test_defocus_is_convolution_with_reflected_borders(kernel, radius):
    images, weight = normal(2, 3, 24, 24), psf(radius, kernel).double()
    margin = len(weight) // 2
    padded = torch.from_numpy(np.pad(images.double().numpy(), ((0, 0), (0, 0), (margin, margin), (margin, margin)), 'reflect'))
    direct = F.conv2d(padded.flatten(0, 1)[:, None], weight[None, None]).view_as(images)
    assert differ(defocus(images, radius, kernel), direct) < 1e-5


def test_autocast_does_not_round_the_picture():
    """Tokenizers are trained under it, on pictures that must be those that token files are made of."""
    images = normal(2, 3, 24, 24)
    for radius in (0.9, 3.3):
        plain = defocus(images, radius), defocus_decimate(images, radius, 6)
        with torch.autocast('cpu', torch.bfloat16):
            cast = defocus(images, radius), defocus_decimate(images, radius, 6)
        assert all(map(torch.equal, plain, cast))


def test_a_blur_wider_than_the_image_is_refused():
    images = normal(1, 3, 16, 16)
    assert defocus(images, 15.5).shape == images.shape
    for blur in (lambda: defocus(images, 15.6), lambda: defocus_decimate(images, 15.6, 4)):
        with pytest.raises(UserError, match='16 pixels does not fit an image of 16: lower it, or max_radius'):
            blur()
    with pytest.raises(UserError, match='a blur of 1000000000 pixels fits no image: lower it, or max_radius'):
        defocus(images, 1e9)


@pytest.mark.parametrize('step', [1, 2, 3, 4, 12])
def test_a_whole_step_keeps_the_pixel_in_the_middle_of_each_cell(step):
    images = normal(2, 3, 24, 24)
    assert torch.equal(decimate(images, 24 // step), images[:, :, step // 2::step, step // 2::step])


def test_whole_and_fractional_steps_read_the_same_grid():
    """A straight line tells where it was read: by the middle of each cell, or half a pixel from it in even cells."""
    ramp = torch.arange(48.0).expand(1, 1, 48, 48)
    for size in (4, 5, 7, 9, 12, 16, 20, 24, 48):
        step = 48 / size
        middle = (torch.arange(size) + 0.5) * step - 0.5
        off = (decimate(ramp, size)[0, 0, 0] - middle)[1:-1]    # without the borders
        assert off.abs().max() <= (0.5 if step % 2 == 0 else 0.05), size     # bicubic bends a line a little


def test_a_fractional_step_reads_between_the_pixels():
    ramp = torch.linspace(-1, 1, 40).expand(2, 3, 40, 40)
    sampled = decimate(ramp, 16)
    assert sampled.shape == (2, 3, 16, 16)
    position = (torch.arange(16) + 0.5) * 2.5 - 0.5         # where a straight line must be read
    assert differ(sampled[..., 2:-2], (2 * position / 39 - 1)[2:-2]) < 0.005             # of 0.05 a pixel


def test_a_fractional_step_does_nothing_against_aliasing():
    """A point reaches only the samples within two pixels of it, however far the samples lie apart."""
    for position in range(15, 25):
        point = torch.zeros(1, 1, 40, 40)
        point[..., position, position] = 1
        assert 1 <= (decimate(point, 16) != 0).sum() <= 4
    assert decimate(normal(8, 3, 40, 40), 16).std() > 0.8


@pytest.mark.parametrize('kernel', ['disk', 'gaussian', 'none'])
@pytest.mark.parametrize('size', [48, 36, 24, 16, 10, 4])
def test_the_short_way_to_a_view_is_exact(kernel, size):
    images = normal(2, 3, 48, 48)
    for radius in (0, 0.9, 4.5, 12):
        view = defocus_decimate(images, radius, size, kernel)
        assert view.shape == (2, 3, size, size)
        assert differ(view, decimate(defocus(images, radius, kernel), size)) < 1e-5


# -----------------------------------------------------------------------------
# pyramid

MAPS, RADII = (1, 2, 3, 4), [6.0, 3.0, 1.0, 0.0]


def test_view_k_is_p_k_times_f_pixels_wide():
    views = build_pyramid(normal(2, 3, 32, 32), MAPS, RADII)
    for name in views:
        assert [view.shape for view in name] == [(2, 3, side, side) for side in (8, 16, 24, 32)]
    assert view_sizes(MAPS_256, 256) == [16 * p for p in MAPS_256]


@pytest.mark.parametrize('kernel', ['disk', 'gaussian'])
def test_downsampled_is_focused_plus_alias(kernel):
    images = normal(2, 3, 32, 32)
    focused, downsampled, alias = build_pyramid(images, MAPS, RADII, kernel=kernel)
    for k, (L, D, A) in enumerate(zip(focused, downsampled, alias)):
        assert torch.equal(A, D - L) and differ(L + A, D) < 1e-6
        assert torch.equal(D, decimate(images, D.shape[-1]))
        assert differ(L, decimate(defocus(images, RADII[k], kernel), L.shape[-1])) < 1e-5
        assert (A == 0).all() if k == 3 else A.std() > 0.1


def test_noise_follows_the_generator():
    images = normal(2, 3, 32, 32)

    def focused(source):
        return build_pyramid(images, MAPS, RADII, (0.1, 0.2), generator=source)[0]

    first, again, other = focused(generator(1)), focused(generator(1)), focused(generator(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(differ(a, b) > 0.1 for a, b in zip(first, other))


def test_noise_can_be_handed_in():
    """Which is how one rank of many takes its share of a global batch's noise."""
    images, asked = normal(2, 3, 32, 32), []

    def ones(shape, k):
        asked.append((*shape, k))
        return torch.ones(shape)

    focused = build_pyramid(images, MAPS, RADII, (0.1, 0.4), generator=ones)[0]
    assert asked == [(*L.shape, k) for k, L in enumerate(focused)]
    clean, downsampled, _ = build_pyramid(images, MAPS, RADII)
    for noisy, L, beta in zip(focused, clean, (0.1, 0.2, 0.3, 0.4)):
        assert differ(noisy, L + beta) < 1e-6
    noisy_downsampled = build_pyramid(images, MAPS, RADII, (0.1, 0.4), generator=ones)[1]
    assert all(torch.equal(a, b) for a, b in zip(noisy_downsampled, downsampled))


def test_noise_levels_are_linear():
    assert noise_levels((1e-3, 1e-2), 4) == pytest.approx([1e-3, 4e-3, 7e-3, 1e-2])
    assert noise_levels((1e-3, 1e-2), 1) == [1e-3]


def test_without_refocusing_nothing_is_removed():
    focused, downsampled, alias = build_pyramid(normal(2, 3, 32, 32), MAPS, RADII, (0.1, 0.2), 'none', generator(0))
    assert all(torch.equal(L, D) for L, D in zip(focused, downsampled))
    assert all((A == 0).all() for A in alias)


def test_an_image_that_does_not_fit_the_maps_is_refused():
    with pytest.raises(UserError, match=r'image_size=30 is not a multiple of the last of patch_nums=\(1, 2, 3, 4\)'):
        build_pyramid(normal(1, 3, 30, 30), MAPS, RADII)


# -----------------------------------------------------------------------------
# the drawing

SMALL = '--image_size=32', '--patch_nums=1,2,4'


@pytest.fixture
def draw(run_script):
    return lambda photo, out, *arguments: run_script('pyramid', photo, f'--out={out}', *SMALL, *arguments)


def test_a_photo_gives_a_drawing_of_three_rows(tmp_path):
    """On a real command line; the others run in this process."""
    photo, out = tmp_path / 'a photo.jpg', tmp_path / 'drawing.png'
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    noise.resize((80, 60), Image.Resampling.BICUBIC).save(photo)
    result = subprocess.run([sys.executable, str(HERE / 'pyramid.py'), str(photo), f'--out={out}', *SMALL],
                            capture_output=True, text=True, env=os.environ | {'PYTHONIOENCODING': 'utf-8'})
    assert (result.returncode, result.stderr) == (0, '') and str(out) in result.stdout
    with Image.open(out) as picture:
        assert picture.format == 'PNG' and picture.mode == 'RGB'
        assert 3 * 160 < picture.width < 5 * 160 and 3 * 160 < picture.height < 4 * 160
        last_column = np.asarray(picture, float)[:, -160:]
    focused, downsampled, alias = (last_column[len(last_column) + 2 - 162 * i:][:160] for i in (3, 2, 1))
    assert np.array_equal(focused, downsampled) and focused.std() > 10          # the last view is in focus …
    assert np.abs(alias - 127.5).max() <= 1                 # … so that nothing was removed from it


def test_a_photo_can_be_put_out_of_focus(draw, tmp_path):
    status, _, err = draw('brick', tmp_path / 'blurred.png', '--blur=3')
    assert (status, err) == (0, '')
    with Image.open(tmp_path / 'blurred.png') as picture:
        blurred = np.asarray(picture).transpose(2, 0, 1)
    sharp = normalize(Charts('val', 32, 10).images[[Charts.classes.index('brick')]])
    assert np.array_equal(blurred, to_uint8(defocus(sharp, 3.0))[0].numpy())


@pytest.mark.parametrize('kind, complaint', [('missing', 'no such picture'), ('corrupt', 'cannot be read as a picture')])
def test_a_photo_that_cannot_be_read_is_refused_in_one_line(draw, tmp_path, kind, complaint):
    photo, out = tmp_path / 'photo.jpg', tmp_path / 'drawing.png'
    if kind == 'corrupt':
        photo.write_bytes(b'<html>404 not found</html>')
    status, printed, err = draw(photo, out)
    assert status == 2 and printed == ''
    assert err.count('\n') == 1 and str(photo) in err and complaint in err
    assert [file.name for file in tmp_path.iterdir()] == ([photo.name] if kind == 'corrupt' else [])


@pytest.mark.parametrize('argument, complaint', [
    ('--image_size=0', 'image_size=0: must be at least 1'),
    ('--patch_nums=0', 'patch_nums=(0,) must grow from a number ≥ 1'),
    ('--patch_nums=4,2', 'patch_nums=(4, 2) must grow from a number ≥ 1'),
])
def test_a_pyramid_that_makes_no_sense_is_refused_in_one_line(draw, tmp_path, argument, complaint):
    assert draw('brick', tmp_path / 'drawing.png', argument) == (2, '', f'error: {complaint}\n')
    assert not list(tmp_path.iterdir())
