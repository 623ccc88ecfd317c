"""pictures.py: grids, files that other programs can read, and photos that cannot be read."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from configurator import UserError
from util import pictures
from util.pictures import (
    add_row, focus_labels, font_for, fonts, legible, load_mask, load_photo, picture_grid, plot_losses, save_gif,
    save_png, to_picture,
)

COLOURS = {'red': (255, 0, 0), 'lime': (0, 255, 0), 'blue': (0, 0, 255), 'gray': (128, 128, 128)}


def pixels(picture):
    return np.asarray(picture.convert('RGB')).astype(int)


def noise(count, side):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


# -----------------------------------------------------------------------------
# grids

def test_to_picture_keeps_rows_columns_and_channels_in_place():
    image = torch.full((3, 2, 3), -1.0)
    image[0, 1, 2] = 1.0                                    # red, bottom right
    picture = to_picture(image)
    assert picture.size == (3, 2) and picture.getpixel((2, 1)) == (255, 0, 0) and pixels(picture).sum() == 255


def enlarged(image, factor):
    return pixels(to_picture(image)).repeat(factor, 0).repeat(factor, 1)


def test_enlarging_repeats_pixels():
    images = noise(1, 4)
    assert np.array_equal(pixels(picture_grid(images, 1, side=12)), enlarged(images[0], 3))


@pytest.mark.parametrize('count, columns, image_side, side, size', [
    (6, 3, 8, 0, (3 * 64 + 2 * 2, 2 * 64 + 2)),             # small images are enlarged to 64 pixels
    (6, 3, 48, 0, (3 * 96 + 2 * 2, 2 * 96 + 2)),            # or to the next multiple of their side
    (5, 3, 100, 0, (3 * 100 + 2 * 2, 2 * 100 + 2)),         # large ones are left as they are; rows may end early
    (4, 1, 8, 16, (16, 4 * 16 + 3 * 2)),
    (1, 1, 8, 8, (8, 8)),
])
def test_a_grid_is_as_large_as_its_cells_and_the_gaps_between(count, columns, image_side, side, size):
    assert picture_grid(noise(count, image_side), columns, side=side).size == size


def test_every_image_stands_in_its_cell_and_gaps_are_white():
    images = noise(5, 8)
    grid = pixels(picture_grid(images, columns=3, side=16))
    for i, image in enumerate(images):
        top, left = 18 * (i // 3), 18 * (i % 3)
        assert np.array_equal(grid[top:top + 16, left:left + 16], enlarged(image, 2))
    assert (grid[16:18] == 255).all() and (grid[:, 16:18] == 255).all() and (grid[18:, 36:] == 255).all()


@pytest.mark.parametrize('columns_named, top', [(('a', 'b'), 24), (('a\n1', 'b'), 40)])
def test_names_stand_left_of_rows_and_above_columns(columns_named, top):
    images = noise(4, 64)
    plain, named = picture_grid(images, 2), picture_grid(images, 2, ('first row', ''), columns_named)
    left = named.width - plain.width
    assert named.height - plain.height == top and left > 40
    drawn = pixels(named)
    assert np.array_equal(drawn[top:, left:], pixels(plain))                    # no name runs into a cell
    assert (drawn[top:top + 64, :left] < 100).any() and (drawn[top + 66:, :left] == 255).all()
    assert all((drawn[:top, left + 66 * i:left + 66 * i + 64] < 100).any() for i in range(2))


def test_the_margin_fits_the_longest_name():
    images = noise(2, 64)
    short, long = (picture_grid(images, 1, ('x', name)) for name in ('x', 'a class with a long name'))
    margin = pixels(long)[:, :long.width - 64]
    assert long.width > short.width + 100 and (margin[:, -4:] == 255).all() and (margin[:, -40:] < 100).any()


FOUND = [font.getname()[0] for font in fonts()]


@pytest.mark.parametrize('name, stripped', [
    ('café', 'cafe'), ('cafe\u0301', 'cafe'), ('Ångström Ω', 'Angstrom'), ('金鱼 gold', 'gold'), ('金鱼', ''),
    ('🐟', ''), ('cat', 'cat'),
])
@pytest.mark.parametrize('found', [FOUND, FOUND[:1]], ids=['with the fonts here', 'with ASCII alone'])
def test_a_name_is_drawn_as_itself_or_without_what_no_font_has(monkeypatch, found, name, stripped):
    available = [font for font in fonts() if font.getname()[0] in found]
    monkeypatch.setattr(pictures, 'fonts', lambda: available)
    text, font = legible(name), font_for(legible(name))
    assert text in (name, stripped) and (text == stripped or len(found) > 1)
    assert all(list(font.getmask(letter)) != list(font.getmask('\uffff')) for letter in text)
    if text != name:
        drawn = [pixels(picture_grid(noise(1, 64), 1, [shown])) for shown in (name, text)]
        assert np.array_equal(*drawn)


def test_a_font_with_the_letters_is_used_if_there_is_one():
    if 'DejaVu Sans' not in FOUND:
        pytest.skip('no DejaVu Sans here')
    assert legible('café') == 'café' and font_for('café').getname()[0] == 'DejaVu Sans'
    assert font_for('cafe').getname()[0] == FOUND[0]


@pytest.mark.parametrize('name', ['new\nline', 'é\nline', 'é\r\t', '\udcff\udcfe', 'é\x07', '\u2028', ''])
def test_any_name_of_a_folder_can_be_drawn(name):
    assert picture_grid(noise(1, 64), 1, [name]).height == 64


# -----------------------------------------------------------------------------
# files

def test_a_png_comes_back_bit_for_bit_and_its_folder_is_made(tmp_path):
    picture = picture_grid(noise(4, 8), 2, ('a', 'b'))
    save_png(tmp_path / 'new' / 'grid.png', picture)
    with Image.open(tmp_path / 'new' / 'grid.png') as back:
        assert back.format == 'PNG' and np.array_equal(pixels(back), pixels(picture))
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['grid.png']


def read_gif(path):
    """(frames as arrays, their durations in ms, how often it repeats: 0 is for ever)."""
    with Image.open(path) as gif:
        assert gif.format == 'GIF'
        frames, durations, loop = [], [], gif.info['loop']
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(pixels(gif))
            durations.append(gif.info['duration'])
    return frames, durations, loop


def test_a_gif_shows_every_frame_for_ever_and_rests_on_the_last(tmp_path):
    save_gif(tmp_path / 'new' / 'a.gif', [Image.new('RGB', (30, 20), name) for name in COLOURS])
    frames, durations, loop = read_gif(tmp_path / 'new' / 'a.gif')
    assert durations == [500, 500, 500, 2000] and loop == 0
    for frame, colour in zip(frames, COLOURS.values()):
        assert frame.shape == (20, 30, 3) and np.abs(frame - colour).max() <= 1


def test_a_gif_of_one_frame_is_a_still(tmp_path):
    save_gif(tmp_path / 'a.gif', [Image.new('RGB', (8, 8), 'red')])
    assert len(read_gif(tmp_path / 'a.gif')[0]) == 1


def test_every_frame_of_a_gif_has_its_own_colours(tmp_path):
    """256 shades of red, then of blue: one palette for both would halve the shades."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    zero = np.zeros_like(ramp)
    wanted = [np.stack([ramp, zero, zero], -1), np.stack([zero, zero, ramp], -1)]
    save_gif(tmp_path / 'a.gif', [Image.fromarray(frame) for frame in wanted])
    for frame, want in zip(read_gif(tmp_path / 'a.gif')[0], wanted):
        assert np.abs(frame - want).max() <= 1


# -----------------------------------------------------------------------------
# photos

@pytest.fixture(params=[(90, 40), (40, 90), (41, 40)])
def photo(request, tmp_path):
    """A blue photo of some shape whose centre square is lime with a black middle."""
    width, height = request.param
    image = Image.new('RGB', (width, height), 'blue')
    image.paste('lime', ((width - 40) // 2, (height - 40) // 2, (width + 40) // 2 + 1, (height + 40) // 2 + 1))
    image.paste('black', (width // 2 - 10, height // 2 - 10, width // 2 + 10, height // 2 + 10))
    image.save(tmp_path / 'photo.png')
    return str(tmp_path / 'photo.png')


@pytest.mark.parametrize('image_size', [10, 20, 80])
def test_a_photo_is_its_centre_square(photo, image_size):
    image = load_photo(photo, image_size)
    assert image.shape == (1, 3, image_size, image_size) and image.dtype == torch.float32
    assert image.min() == -1 and image.max() == 1
    corners = image[0][:, [1, 1, -2, -2], [1, -2, 1, -2]]
    assert (corners - torch.tensor([[-1.0], [1.0], [-1.0]])).abs().max() < 0.3  # lime
    quarter = image_size // 4 + 2
    assert (image[..., quarter:-quarter, quarter:-quarter] < -0.7).all()       # black


def broken(folder, kind):
    path = folder / 'photo.png'
    if kind == 'a folder':
        path.mkdir()
    elif kind == 'half a picture':
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind != 'missing':
        path.write_bytes({'empty': b'', 'text': b'<html>404 not found</html>'}[kind])
    return str(path)


@pytest.mark.parametrize('kind, message', [
    ('missing', 'no such picture'),
    ('empty', 'cannot be read as a picture'),
    ('text', 'cannot be read as a picture'),
    ('a folder', 'no such picture'),
    ('half a picture', 'cannot be read as a picture'),
])
def test_a_photo_that_cannot_be_read_is_named_in_one_line(tmp_path, kind, message):
    with pytest.raises(UserError, match=f'photo.png.*{message}') as error:
        load_photo(broken(tmp_path, kind), 32)
    assert '\n' not in str(error.value)


def test_a_name_with_odd_characters_is_still_one_line(tmp_path):
    with pytest.raises(UserError, match='no such picture') as error:
        load_photo(str(tmp_path / 'ph\noto é.png'), 32)
    assert '\n' not in str(error.value) and str(error.value).isascii()


# -----------------------------------------------------------------------------
# masks

@pytest.mark.parametrize('name', ['mask.png', 'mask.jpg'])
@pytest.mark.parametrize('width', [1, 2, 5, 16, 40])
def test_a_scratch_in_a_large_mask_is_kept(tmp_path, name, width):
    """From 600 x 512 pixels to 32: every pixel of the result that the scratch touches is inside, others are not."""
    photo, mask = Image.new('RGB', (600, 512)), Image.new('L', (600, 512))
    photo.save(tmp_path / 'photo.png')
    ImageDraw.Draw(mask).rectangle((144, 0, 144 + width - 1, 300), fill=255)
    mask.save(tmp_path / name, **({'quality': 95} if name == 'mask.jpg' else {}))
    inside = load_mask(f'{tmp_path}/{name}', f'{tmp_path}/photo.png', 32)
    wanted = torch.zeros(32, 32)
    wanted[:19, 6:6 + -(-(width + 4) // 16)] = 1            # 144 is 100 in the centre square: 6.25 of 16 pixels
    assert torch.equal(inside, wanted)


def test_a_mask_that_is_white_beside_the_centre_square_alone_covers_nothing(tmp_path):
    photo, mask = Image.new('RGB', (600, 512)), Image.new('L', (600, 512))
    photo.save(tmp_path / 'photo.png')
    mask.paste(255, (0, 0, 40, 512))
    mask.save(tmp_path / 'mask.png')
    with pytest.raises(UserError, match="mask.png: covers nothing of the photo.s centre square"):
        load_mask(f'{tmp_path}/mask.png', f'{tmp_path}/photo.png', 32)


# -----------------------------------------------------------------------------
# what training shows

def test_focus_states_are_labelled_with_their_blur_and_their_distance_from_it():
    blurred = [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)]
    assert focus_labels([4.0, 0.0], [blurred[0] + 0.2, blurred[1]], blurred) == [
        'k=1, blur 4 px\n20.0 dB', 'k=2, blur 0 px\nthe same']


def test_a_row_goes_below_the_earlier_ones_and_in_place_of_later_ones(tmp_path):
    path = tmp_path / 'rows.png'
    for row, level in enumerate((-1.0, 0.0, 1.0)):
        add_row(path, row, torch.full((2, 3, 8, 8), level), f'step {10 ** row}')
    add_row(path, 1, torch.full((2, 3, 8, 8), -1.0), 'step 7')             # the run was resumed before row 1
    picture = np.asarray(Image.open(path).convert('L'))
    assert picture.shape[0] == 2 * 64 + 2 and (picture[:64, -64:] < 2).all() and (picture[66:, -64:] < 2).all()
    path.write_text('no picture')
    add_row(path, 1, torch.ones(2, 3, 8, 8), 'step 7')
    assert Image.open(path).height == 2 * 64 + 2


def test_loss_curves_are_drawn_of_what_the_log_has(tmp_path):
    pytest.importorskip('matplotlib')
    log = tmp_path / 'fvar.jsonl'
    log.write_text('{"step": 0, "ce": 3.0}\n{"step": 9, "ce": null}\n{"step": 9, "val_ce": 2.5}\n')
    plot_losses(log, tmp_path / 'loss.png', ('ce', 'val_ce', 'teacher_ce'))
    assert Image.open(tmp_path / 'loss.png').size == (800, 500)
