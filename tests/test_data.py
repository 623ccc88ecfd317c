"""The promises of data.py: what the charts look like, what order things come in, what broken files do."""
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from configurator import HERE, UserError
from data import (
    EXTENSIONS,
    ImageFolder,
    TokenDataset,
    batches,
    endless_keys,
    evenly_spaced,
    normalize,
    open_dataset,
    open_table,
    square_crop,
    to_uint8,
    undone_batches,
)
from util.charts import CHARTS, Charts


# -----------------------------------------------------------------------------
# pixels

def test_every_byte_survives_normalize_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    assert normalize(every).min() == -1 and normalize(every).max() == 1
    assert torch.equal(to_uint8(normalize(every)), every)


def test_to_uint8_clamps():
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.999, 1.0, 7.0])).tolist() == [0, 0, 255, 255, 255]


# -----------------------------------------------------------------------------
# charts

@pytest.fixture(scope='module')
def charts():
    return Charts('train', 32, 300)


def test_charts_are_uint8_pictures_of_ten_classes_in_turn(charts):
    image, label = charts[13]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and label == 3
    assert len(charts) == 300 and charts.images.shape == (300, 3, 32, 32)
    assert charts.classes == ['siemens_star', 'zone_plate', 'line_grating', 'checkerboard', 'halftone_dots',
                              'text', 'brick', 'concentric_rings', 'slanted_edge', 'blobs']


def test_chart_depends_on_split_and_index_only(charts):
    fewer = Charts('train', 32, 20)
    assert torch.equal(fewer.images, charts.images[:20])
    assert torch.equal(fewer[7, 123456][0], charts[7][0])
    assert (Charts('val', 32, 20).images != fewer.images).flatten(1).any(1).all()


def test_no_two_charts_are_alike(charts):
    assert len(torch.unique(charts.images.flatten(1), dim=0)) == len(charts)


@pytest.mark.parametrize('label', range(10), ids=Charts.classes)
def test_chart_is_the_same_drawing_at_every_size(charts, label):
    """Rendered at twice the size and box-averaged it hardly differs: nothing aliases at the source."""
    twice = torch.nn.functional.avg_pool2d(Charts('train', 64, 60).images[label::10].float(), 2)
    difference = (twice - charts.images[label:60:10].float()).abs().mean()
    assert difference < (8 if Charts.classes[label] == 'text' else 0.5)  # letters are hinted to their grid


@pytest.mark.parametrize('label', range(10), ids=Charts.classes)
def test_chart_has_contrast(charts, label):
    light = torch.einsum('c,nchw->nhw', torch.tensor([0.299, 0.587, 0.114]), charts.images[label::10] / 255)
    assert (light.flatten(1).amax(1) - light.flatten(1).amin(1)).min() > 0.3


def test_classes_can_be_told_apart():
    """Ridge regression on simple measures of structure, colour left out: far better than one in ten."""
    def measures(images):
        light = images.float().mean(1)
        light = (light - light.mean((1, 2), keepdim=True)) / (light.std((1, 2), keepdim=True) + 1)
        power = torch.fft.fft2(light).abs()
        power = torch.fft.fftshift(power, (1, 2))[:, ::2, ::2].flatten(1).log1p()
        return torch.cat([power, light.pow(3).mean((1, 2))[:, None], torch.ones(len(images), 1)], 1).double()

    train, val = Charts('train', 32, 1500), Charts('val', 32, 300)
    x, y = measures(train.images), torch.eye(10, dtype=torch.float64)[train.labels]
    weights = torch.linalg.solve(x.T @ x + 30 * torch.eye(x.shape[1]), x.T @ y)
    right = ((measures(val.images) @ weights).argmax(1) == val.labels).double().mean()
    assert right > 0.7


def test_open_dataset_knows_charts_and_folders(tmp_path):
    assert len(open_dataset('charts', 'val', 8, count=30)) == 30
    assert len(open_dataset('charts', 'val', 4)) == len(open_dataset('charts:70', 'val', 4)) == 1000
    assert len(open_dataset('charts:70', 'train', 4)) == 70
    for data in ('charts:many', 'charts:0'):
        with pytest.raises(UserError, match=f"data='{data}': write charts, or charts:4000"):
            open_dataset(data, 'train', 4)
    with pytest.raises(UserError, match='no such folder'):
        open_dataset(str(tmp_path / 'chart'), 'train', 8)


def test_there_is_a_function_for_each_class():
    assert [chart.__name__ for chart in CHARTS] == Charts.classes


# -----------------------------------------------------------------------------
# order

def first(iterable, n):
    return [item for item, _ in zip(iterable, range(n))]


def of_rank(monkeypatch, rank, world_size):
    monkeypatch.setenv('RANK', str(rank))
    monkeypatch.setenv('WORLD_SIZE', str(world_size))


@pytest.mark.parametrize('world_size', [2, 3, 6])
def test_ranks_share_the_batch_that_one_rank_would_see(world_size, monkeypatch):
    alone, shares = first(endless_keys(50, 12, seed=3), 20), []
    for rank in range(world_size):
        of_rank(monkeypatch, rank, world_size)
        shares.append(first(endless_keys(50, 12, seed=3), 20))
    assert [sum(parts, []) for parts in zip(*shares)] == alone


def test_resuming_goes_on_where_it_stopped():
    whole = first(endless_keys(50, 12, seed=3), 20)
    assert first(endless_keys(50, 12, seed=3, start=7), 13) == whole[7:]


def test_every_epoch_shows_everything_once_in_another_order():
    keys = sum(first(endless_keys(30, 7, seed=0), 30), [])
    assert [position for _, position in keys] == list(range(210))
    epochs = [[index for index, _ in keys[start:start + 30]] for start in range(0, 210, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 7


def test_a_batch_may_be_larger_than_the_data():
    keys = first(endless_keys(3, 8, seed=0), 1)[0]
    assert sorted(index for index, _ in keys[:3]) == [0, 1, 2] and len(keys) == 8


def test_order_depends_on_the_seed():
    assert first(endless_keys(50, 50, seed=0), 1) != first(endless_keys(50, 50, seed=1), 1)


def test_the_order_is_the_same_on_every_machine():
    keys = first(endless_keys(5, 4, seed=3), 2)
    assert keys == [[(4, 0), (2, 1), (1, 2), (3, 3)], [(0, 4), (1, 5), (4, 6), (0, 7)]]


def test_batches_of_charts_follow_the_keys(charts, monkeypatch):
    of_rank(monkeypatch, rank=1, world_size=2)
    images, labels = first(batches(charts, 8, seed=5, start=3), 1)[0]
    indices = [index for index, _ in first(endless_keys(300, 8, 5, start=3), 1)[0]]
    assert torch.equal(images, charts.images[indices]) and torch.equal(labels, charts.labels[indices])
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64


def test_evenly_spaced_items_may_be_all(charts):
    for count in (300, 1000):
        images, labels = evenly_spaced(charts, count)
        assert torch.equal(images, charts.images) and torch.equal(labels, charts.labels)


# -----------------------------------------------------------------------------
# folders

def photo(seed=0, size=(50, 40)):
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8))
    return noise.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Two classes of four pictures in train, one each in val, with names of every kind."""
    names = ['a.jpg', 'B.JPEG', 'with space.png', 'new\nline.webp']
    for split, count in (('train', 4), ('val', 1)):
        for label, name in enumerate(('cat', 'dog')):
            (tmp_path / split / name / 'deep').mkdir(parents=True)
            for i in range(count):
                photo(10 * label + i).save(
                    tmp_path / split / name / (f'deep/{names[i]}' if i == 1 else names[i])
                )
    return tmp_path


def test_some_items_are_spread_over_all_classes(folder):
    dataset = ImageFolder(folder, 'train', 8)
    _, labels = evenly_spaced(dataset, 3)
    assert labels.tolist() == [
        int(dataset.labels[i]) for i in (0, round((len(dataset) - 1) / 2), len(dataset) - 1)
    ]
    assert labels[0] == 0 and labels[-1] == len(dataset.classes) - 1
    images, everything = evenly_spaced(dataset, 99)
    assert everything.tolist() == dataset.labels.tolist() and torch.equal(images[1], dataset[1][0])


def test_folder_finds_every_picture_in_order(folder):
    (folder / 'train' / 'cat' / 'notes.txt').write_text('not a picture')
    (folder / 'train' / 'cat' / '._a.jpg').write_text('what a Mac leaves behind')
    (folder / 'train' / '.ipynb_checkpoints').mkdir()
    dataset = ImageFolder(folder, 'train', 16)
    assert dataset.classes == ['cat', 'dog'] and len(dataset) == 8
    assert dataset.labels.tolist() == [0] * 4 + [1] * 4 and dataset.files == sorted(dataset.files)
    for image, label in dataset:
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
    assert not dataset.skipped.any()


def test_numbered_classes_are_in_numeric_order(tmp_path):
    for name in ('10', '2', '1'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        photo(int(name)).save(tmp_path / 'train' / name / 'a.png')
    dataset = ImageFolder(tmp_path, 'train', 16)
    assert dataset.classes == ['1', '2', '10'] and dataset.labels.tolist() == [0, 1, 2]
    assert [file.split('/')[-2] for file in dataset.files] == dataset.classes
    (tmp_path / 'train' / '2').rename(tmp_path / 'train' / '2b')
    assert ImageFolder(tmp_path, 'train', 16).classes == ['1', '10', '2b']


FORMATS = {'.jpe': 'JPEG', '.jfif': 'JPEG', '.tif': 'TIFF', '.tiff': 'TIFF', '.gif': 'GIF', '.ppm': 'PPM',
           '.PGM': 'PPM', '.tga': 'TGA', '.ico': 'ICO', '.qoi': 'QOI', '.dds': 'DDS', '.jp2': 'JPEG2000',
           '.avif': 'AVIF', '.apng': 'PNG'}


@pytest.mark.parametrize('extension', FORMATS)
def test_what_pillow_reads_is_a_picture(folder, extension):
    if FORMATS[extension] not in Image.SAVE:
        pytest.skip('this Pillow does not write it')
    picture = opened(folder, photo(size=(64, 64)), f'x{extension}', format=FORMATS[extension])
    assert np.abs(np.asarray(picture).mean((0, 1)) - np.asarray(photo()).mean((0, 1))).max() < 12


def test_files_that_are_left_out_are_counted_in_one_line(folder, capsys):
    assert not {'.eps', '.mpg', '.h5', '.txt', '.mp4'} & set(EXTENSIONS)
    for name in ('cat/a.txt', 'cat/deep/b.heic', 'dog/README', 'loose.jpg', 'dog/.hidden.txt', '.DS_Store'):
        (folder / 'train' / name).touch()
    assert len(ImageFolder(folder, 'train', 16)) == 8
    shown = capsys.readouterr().out
    assert shown.startswith('warning: ') and shown.count('\n') == 1 and 'left out 4 files' in shown
    assert "such as ['loose.jpg', '" in shown and 'a.txt' in shown
    ImageFolder(folder, 'val', 16)
    assert capsys.readouterr().out == ''


def test_text_in_a_png_is_no_reason_to_skip_it(folder):
    info = PngInfo()
    info.add_text('prompt', 'y' * 2_000_000, zip=True)
    info.add_text('comment', 'z' * 70_000_000)
    info.add_text('xmp', 'where Pillow wants bytes')
    info.add_text('Raw profile type exif', 'no hexadecimal numbers\n\n\n\nxyz')
    assert np.array_equal(opened(folder, photo(), 'x.png', pnginfo=info), photo())


@pytest.mark.parametrize('values, warns', [(4095, True), (1023, True), (16383, True), (65535, False)])
def test_pictures_that_are_nearly_black_are_warned_of(folder, capsys, values, warns):
    for file in (folder / 'train').rglob('*.*'):
        ramp = np.linspace(0, values, 64 * 64).astype(np.uint16).reshape(64, 64)
        Image.fromarray(ramp).save(file.with_suffix('.png'))
        file.suffix == '.png' or file.unlink()
    open_dataset(str(folder), 'train', 16)
    shown = capsys.readouterr().out
    assert shown.count('warning: most pictures of ') == shown.count('\n') == warns


def test_pictures_that_are_all_alike_but_for_one_are_warned_of(folder, capsys):
    for file in sorted((folder / 'train').rglob('*.*'))[1:]:
        Image.new('RGB', (40, 40), 'white').save(file)
    open_dataset(str(folder), 'train', 16)
    assert 'nearly flat or nearly black' in capsys.readouterr().out


RANKS = """
import sys
from configurator import UserError
from data import TokenDataset, open_dataset, open_table
from util import runtime

def main():
    rank, (data, other, tokens, other_tokens, table) = runtime.rank(), sys.argv[1:]
    runtime.start('cpu')
    open_dataset(data, 'train', 16)
    TokenDataset(tokens, 'train')
    for function, arguments in ((TokenDataset, ((tokens, other_tokens)[rank], 'train')),
                                (open_table, (table, {'rank': rank}, 5, 3, 'uint16', 9))):
        try:
            function(*arguments)
        except UserError as error:
            print(error)
    open_dataset((data, other)[rank], 'train', 16)
runtime.run(main)
"""


def test_ranks_that_see_other_files_all_end_with_one_line(folder, tokens):
    paths = [folder / 'data', folder / 'other', tokens[0] / 'tokens', tokens[0] / 'again', folder / 'table']
    for path in paths[:2]:
        shutil.copytree(folder / 'train', path / 'train')
    for path in paths[2:4]:
        path.mkdir()
        shutil.copy(tokens[0] / 'train.bin', path)
        write_meta(path, seed=path.name)
    (paths[1] / 'train' / 'dog' / 'a.jpg').rename(paths[1] / 'train' / 'dog' / 'c.jpg')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    common = os.environ | {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    ranks = [subprocess.Popen([sys.executable, '-c', RANKS, *map(str, paths)], cwd=HERE, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=common | {'RANK': str(rank), 'LOCAL_RANK': str(rank)}) for rank in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=100)
        assert rank.returncode == 2 and err.startswith('error: ') and err.count('\n') == 1
        assert 'train\': not the same on every rank' in err
        assert out.count('not the same on every rank') == out.count('\n') == 2
    assert not paths[4].exists()


def test_centre_crop_is_what_resizing_and_cropping_gives(folder):
    dataset = ImageFolder(folder, 'train', 32)
    image = photo(size=(60, 40))
    whole = image.resize((54, 36), Image.Resampling.LANCZOS)                    # 36 = 1.125 · 32
    wanted = torch.from_numpy(np.array(whole.crop((11, 2, 43, 34)))).permute(2, 0, 1)
    assert (dataset.crop(image).float() - wanted.float()).abs().max() <= 1


def test_square_crop_lies_where_it_is_told_to():
    image = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 60, 3))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(square_crop(image, 40, side=40), pixels[:, :, 10:50])
    assert torch.equal(square_crop(image, 20, side=20, across=1, down=0), pixels[:, :20, 40:])


def test_random_crop_depends_on_seed_and_position_only(folder):
    dataset, again = ImageFolder(folder, 'train', 16), ImageFolder(folder, 'train', 16)
    assert torch.equal(dataset[2, 9][0], again[2, 9][0])
    assert not torch.equal(dataset[2, 9][0], dataset[2, 10][0])
    assert not torch.equal(dataset[2, 9][0], ImageFolder(folder, 'train', 16, seed=1)[2, 9][0])
    assert not torch.equal(dataset[2, 9][0], dataset[2][0])


def test_flip_mirrors_half_of_the_crops_and_only_when_asked(folder):
    plain, flipping = ImageFolder(folder, 'train', 16), ImageFolder(folder, 'train', 16, flip=True)
    mirrored = [torch.equal(plain[2, p][0].flip(2), flipping[2, p][0]) for p in range(60)]
    same = [torch.equal(plain[2, p][0], flipping[2, p][0]) for p in range(60)]
    assert 15 < sum(mirrored) < 45 and sum(mirrored) + sum(same) == 60


@pytest.mark.parametrize('size', [(1, 1), (3, 4), (2, 3000), (3000, 2), (700, 500)])
def test_any_shape_of_picture_gives_a_crop(folder, size):
    photo(size=size).save(folder / 'train' / 'cat' / '0.png')
    dataset = ImageFolder(folder, 'train', 16)
    for key in [0, *((0, position) for position in range(20))]:
        assert dataset[key][0].shape == (3, 16, 16)
    assert not dataset.skipped.any()


def opened(folder, image, name, **options):
    """What load() makes of one picture saved under a name."""
    image.save(folder / 'train' / 'cat' / name, **options)
    dataset = ImageFolder(folder, 'train', 16)
    picture = dataset.load(dataset.files.index(str(folder / 'train' / 'cat' / name)))
    assert not dataset.skipped.any() and picture.mode == 'RGB'
    return picture


@pytest.mark.parametrize(
    'mode, name',
    [
        ('CMYK', 'x.jpg'),
        ('L', 'x.jpg'),
        ('L', 'x.png'),
        ('1', 'x.png'),
        ('LA', 'x.png'),
        ('RGBA', 'x.webp'),
        ('P', 'x.bmp'),
        ('RGB', 'x.BMP'),
    ],
)
def test_every_mode_becomes_rgb(folder, mode, name):
    flat = Image.new('RGB', (40, 40), (200, 200, 200)).convert(mode)
    middle = np.asarray(opened(folder, flat, name)).mean((0, 1))
    if mode != '1':                                         # dithered
        assert np.abs(middle - 200).max() < 3


def test_sixteen_bits_are_scaled_not_clipped(folder):
    ramp = Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64))
    grey = np.asarray(opened(folder, ramp, 'ramp.png'))
    assert grey.min() == 0 and grey.max() == 255 and abs(grey.mean() - 127.5) < 1


def test_transparency_is_over_white(folder):
    clear = Image.new('RGBA', (40, 40), (0, 0, 0, 0))
    assert np.asarray(opened(folder, clear, 'clear.png')).min() == 255
    palette = Image.new('P', (40, 40), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert np.asarray(opened(folder, palette, 'palette.png', transparency=1)).min() == 255


def test_an_animation_is_its_first_frame_whatever_its_name(folder):
    red, blue = Image.new('RGB', (40, 40), 'red'), Image.new('RGB', (40, 40), 'blue')
    frame = opened(folder, red, 'animated.png', format='GIF', save_all=True, append_images=[blue])
    assert frame.getpixel((5, 5)) == (255, 0, 0)


def test_exif_rotation_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6                                        # turn by 90° to be upright
    assert opened(folder, photo(size=(60, 40)), 'turned.jpg', exif=exif).size == (40, 60)


def test_a_large_jpeg_is_decoded_small(folder):
    assert opened(folder, photo(size=(1600, 1200)), 'large.jpg').size == (200, 150)


def broken_bytes(kind):
    if kind == 'empty':
        return b''
    if kind == 'text':
        return b'<html>404 not found</html>'
    buffer = io.BytesIO()
    photo(size=(200, 200)).save(buffer, 'JPEG' if kind == 'jpeg' else 'PNG')
    return buffer.getvalue()[:len(buffer.getvalue()) // 2]


def assert_skipped(capsys, *patterns):
    """Each skipped picture is one line on stderr, in the program's own voice."""
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == len(patterns) and '\n'.join(shown).isascii()
    for line, pattern in zip(shown, patterns):
        assert re.fullmatch(f"warning: skipped '.*{pattern}.*", line), line


@pytest.mark.parametrize('kind', ['empty', 'text', 'jpeg', 'png'])
def test_the_next_picture_stands_in_for_a_broken_one(folder, kind, capsys):
    (folder / 'train' / 'dog' / 'zz\nbroken.jpg').write_bytes(broken_bytes(kind))
    dataset = ImageFolder(folder, 'train', 16)
    image, label = dataset[8]
    dataset[8, 5]
    assert_skipped(capsys, r'zz\\nbroken.jpg')
    assert dataset.skipped.nonzero().tolist() == [[8]] and label == 0 and torch.equal(image, dataset[0][0])


def test_a_decompression_bomb_counts_as_broken(folder, monkeypatch, capsys):
    """Pillow refuses twice its limit. Between the two are photos of 100 megapixels, which are fine."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40 * 50)
    photo(size=(90, 90)).save(folder / 'train' / 'cat' / '0.png')
    photo(size=(50, 41)).save(folder / 'train' / 'cat' / '1.png')
    dataset = ImageFolder(folder, 'train', 16)
    assert torch.equal(dataset[0][0], dataset[1][0]) and dataset.skipped.nonzero().tolist() == [[0]]
    assert_skipped(capsys, 'DecompressionBomb')


def test_a_name_that_is_no_utf8_can_be_reported(folder, capsys):
    path = os.fsencode(folder / 'train' / 'dog') + b'/\xff\xfe.jpg'
    try:
        with open(path, 'wb'):
            pass
    except OSError:
        pytest.skip('this file system takes UTF-8 names only')
    ImageFolder(folder, 'train', 16)[8]
    assert_skipped(capsys, 'udcff')


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / 'train' / 'cat').mkdir(parents=True)
    (tmp_path / 'train' / 'cat' / 'a.jpg').touch()
    dataset = ImageFolder(tmp_path, 'train', 16)
    with pytest.raises(UserError, match='none of the 1 pictures can be read'):
        dataset[0]


def test_links_in_a_circle_end(folder):
    (folder / 'train' / 'cat' / 'deep' / 'up').symlink_to(folder / 'train' / 'cat')
    (folder / 'train' / 'cat' / 'deep' / 'more').symlink_to(folder / 'train' / 'cat' / 'deep')
    (folder / 'train' / 'cat' / 'self').symlink_to(folder / 'train' / 'cat' / 'self')
    (folder / 'train' / 'circle').symlink_to(folder / 'train' / 'circle')
    assert len(ImageFolder(folder, 'train', 16)) == 8


def test_a_class_may_be_a_link(folder):
    (folder / 'train' / 'zebra').symlink_to(folder / 'train' / 'cat')
    assert ImageFolder(folder, 'train', 16).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_labels_of_val_are_those_of_train(folder):
    (folder / 'train' / 'ant').mkdir()
    photo().save(folder / 'train' / 'ant' / 'a.png')
    dataset = ImageFolder(folder, 'val', 16)
    assert dataset.classes == ['ant', 'cat', 'dog'] and dataset.labels.tolist() == [1, 2]


@pytest.mark.parametrize('break_it, message', [
    (lambda root: (root / 'train').rename(root / 'training'), "/train': no such folder"),
    (lambda root: (root / 'train' / 'emu').mkdir(), "class 'emu' of .* has no pictures"),
    (lambda root: root.rename(root.with_name(root.name + ' moved')), 'no such folder'),
])
def test_a_folder_in_disorder_is_named(folder, break_it, message):
    break_it(folder)
    with pytest.raises(UserError, match=message):
        ImageFolder(folder, 'train', 16)


def test_a_split_without_classes_is_named(tmp_path):
    (tmp_path / 'train').mkdir()
    photo().save(tmp_path / 'train' / 'loose.jpg')
    with pytest.raises(UserError, match='no class folders'):
        ImageFolder(tmp_path, 'train', 16)


def test_a_val_class_that_train_lacks_is_named(folder):
    (folder / 'val' / 'emu').mkdir()
    photo().save(folder / 'val' / 'emu' / 'a.png')
    with pytest.raises(UserError, match="class 'emu'"):
        ImageFolder(folder, 'val', 16)


@pytest.mark.filterwarnings('ignore:This process')         # newer Pythons warn of fork beside threads
def test_loader_workers_change_nothing_but_speed(folder):
    (folder / 'train' / 'cat' / '0.jpg').touch()
    dataset, again = ImageFolder(folder, 'train', 16), ImageFolder(folder, 'train', 16)
    before = torch.get_rng_state()
    alone = first(batches(dataset, 6, seed=0), 4)
    helped = first(batches(again, 6, seed=0, workers=2), 4)
    assert all(torch.equal(a, b) for one, two in zip(alone, helped) for a, b in zip(one, two))
    assert again.skipped.nonzero().tolist() == dataset.skipped.nonzero().tolist() == [[0]]     # a worker's finding is known here
    assert torch.equal(torch.get_rng_state(), before)


def test_the_contents_of_a_folder_change_with_its_pictures_and_their_classes_but_not_with_its_place(folder, tmp_path):
    before = ImageFolder(folder, 'train', 16).contents
    copy = shutil.copytree(folder, tmp_path / 'copy')
    assert ImageFolder(copy, 'train', 16).contents == before
    cat, *_ = sorted((copy / 'train').iterdir())
    picture = sorted(file for file in cat.iterdir() if file.is_file())[0]
    shutil.copy(picture, cat / 'new.png')
    assert ImageFolder(copy, 'train', 16).contents != before
    (cat / '.hidden').mkdir()
    shutil.move(cat / 'new.png', cat / '.hidden')
    assert ImageFolder(copy, 'train', 16).contents == before


@pytest.mark.filterwarnings('ignore:This process')
@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='no sigwaitinfo here')
def test_signals_to_the_whole_job_leave_loader_workers_at_work(folder):
    others = multiprocessing.active_children()
    supply = batches(ImageFolder(folder, 'train', 16), 2, seed=0, workers=2)
    first(supply, 2)                                        # both have begun
    children = [child for child in multiprocessing.active_children() if child not in others]
    for child in children:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # sent by another process than the parent
            subprocess.run(['kill', f'-{int(number)}', str(child.pid)], check=True)
    first(supply, 10)
    assert len(children) == 2 and all(child.is_alive() for child in children)
    for child in children:
        child.terminate()
        child.join(5)
        assert not child.is_alive()


def test_open_dataset_passes_flip_and_seed_on_to_folders_alone(folder):
    def crops(**options):
        dataset = open_dataset(str(folder), 'train', 16, **options)
        return torch.stack([dataset[2, position][0] for position in range(10)])

    assert torch.equal(crops(seed=0), crops()) and not torch.equal(crops(seed=1), crops())
    assert not torch.equal(crops(flip=True), crops())
    charts = [open_dataset('charts:10', 'train', 8, seed=seed).images for seed in (0, 1)]
    assert torch.equal(*charts)


# -----------------------------------------------------------------------------
# files that fill row by row

def table_of(tmp_path, **settings):
    return open_table(tmp_path / 'new' / 'a.partial', {'seed': 0} | settings, 5, 3, np.uint16, 9)


def test_ranks_of_two_machines_cannot_fill_one_table(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '16')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    with pytest.raises(UserError, match='one machine'):
        table_of(tmp_path)
    assert not (tmp_path / 'new').exists()


def test_a_table_keeps_what_was_written_and_knows_what_is_missing(tmp_path, monkeypatch):
    table = table_of(tmp_path)
    assert table.tolist() == 5 * [[9, 9, 9]] and undone_batches(table, 2, 9) == [
        range(2),
        range(2, 4),
        range(4, 5),
    ]
    table[2:4] = 1
    table.flush()
    again = table_of(tmp_path)
    assert again[2:4].tolist() == 2 * [[1, 1, 1]] and undone_batches(again, 2, 9) == [range(2), range(4, 5)]
    of_rank(monkeypatch, rank=1, world_size=2)
    assert undone_batches(again, 2, 9) == [range(4, 5)]


@pytest.mark.parametrize('spoil', [lambda path: os.truncate(path, 7), lambda path: path.unlink(),
                                   lambda path: path.with_name('a.partial.json').write_text('[1')])
def test_a_damaged_table_is_started_again(tmp_path, spoil):
    table_of(tmp_path)[:] = 1
    spoil(tmp_path / 'new' / 'a.partial')
    assert table_of(tmp_path).tolist() == 5 * [[9, 9, 9]]


def test_a_table_of_other_settings_is_started_again_and_that_is_said(tmp_path, capsys):
    table_of(tmp_path)[:] = 1
    assert table_of(tmp_path, seed=1).tolist() == 5 * [[9, 9, 9]]
    assert 'a.partial was made with other settings (seed): starting again' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# token files

@pytest.fixture
def tokens(tmp_path):
    """Five rows: 1 + 4 structure tokens of 16 codes, 1 alias token of 8, a label of 2."""
    rows = np.random.default_rng(0).integers(0, [16] * 5 + [8] + [2], size=(5, 7)).astype('<u2')
    rows.tofile(tmp_path / 'train.bin')
    write_meta(tmp_path)
    return tmp_path, rows


def write_meta(folder, **changes):
    meta = dict(rows=5, columns=7, patch_nums=[1, 2], alias_patch_nums=[1], vocab_size=16, alias_vocab_size=8,
                classes=['cat', 'dog'], tokenizer='abc123')
    (folder / 'train.json').write_text(json.dumps(meta | changes))


def test_tokens_come_back_as_they_were_written(tokens):
    folder, rows = tokens
    dataset = TokenDataset(folder, 'train')
    structure, alias, labels = dataset.batch(np.array([4, 0, 4]))
    assert all(part.is_contiguous() for part in (structure, alias, labels)), 'or copies to a GPU would wait'
    assert len(dataset) == 5 and dataset.classes == ['cat', 'dog'] and dataset.meta['tokenizer'] == 'abc123'
    assert structure.dtype == alias.dtype == labels.dtype == torch.int64
    assert structure.tolist() == rows[[4, 0, 4], :5].tolist()
    assert alias.tolist() == rows[[4, 0, 4], 5:6].tolist() and labels.tolist() == rows[[4, 0, 4], 6].tolist()


def test_tokens_without_alias(tmp_path):
    np.ones((5, 6), '<u2').tofile(tmp_path / 'train.bin')
    write_meta(tmp_path, columns=6, alias_patch_nums=[])
    assert TokenDataset(tmp_path, 'train').batch([0, 1])[1].shape == (2, 0)


def test_missing_tokens_say_what_to_run(tokens):
    with pytest.raises(UserError, match='no usable token files val.bin .*missing.*run encode.py'):
        TokenDataset(tokens[0], 'val')


def test_truncated_tokens_are_noticed(tokens):
    os.truncate(tokens[0] / 'train.bin', 68)
    with pytest.raises(UserError, match='damaged or from different runs; run encode.py'):
        TokenDataset(tokens[0], 'train')


def test_tokens_of_another_tokenizer_are_noticed(tokens):
    TokenDataset(tokens[0], 'train', 'abc123')
    with pytest.raises(UserError, match='these tokens come from another tokenizer; run encode.py again'):
        TokenDataset(tokens[0], 'train', 'abc124')


@pytest.mark.parametrize(
    'changes', [dict(columns=8), dict(rows=0), dict(patch_nums=None), dict(classes=None)]
)
def test_a_description_that_does_not_fit_is_noticed(tokens, changes):
    write_meta(tokens[0], **changes)
    with pytest.raises(UserError, match='damaged or from different runs; run encode.py'):
        TokenDataset(tokens[0], 'train')


def test_a_damaged_description_is_noticed(tokens):
    (tokens[0] / 'train.json').write_text('{"rows": 5,')
    with pytest.raises(UserError, match='damaged'):
        TokenDataset(tokens[0], 'train')


@pytest.mark.parametrize('column, number', [(0, 16), (5, 8), (6, 2)])
def test_tokens_out_of_range_are_noticed(tokens, column, number):
    folder, rows = tokens
    rows[3, column] = number
    rows.tofile(folder / 'train.bin')
    dataset = TokenDataset(folder, 'train')
    dataset.batch([0, 1])
    with pytest.raises(UserError, match='train.bin.* is damaged: it has numbers out of range'):
        dataset.batch([2, 3])
