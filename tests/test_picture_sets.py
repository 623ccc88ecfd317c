"""Sets of pictures: what is read from folders and files, and what is said about those that would mislead."""
import numpy as np
import pytest
import torch

from configurator import UserError
from conftest import pictures, save_pictures, statistics_file
from util.picture_sets import check_count, check_samples, evenly_over_classes, read_reference, read_samples

CLASSES = ['dark', 'light']


def sums(images):
    """Which images a set has, whatever their order."""
    return sorted(images.sum((1, 2, 3)).tolist())


def test_as_many_are_chosen_of_every_class():
    labels = torch.arange(1200) % 10
    chosen = evenly_over_classes(labels, 100)
    assert len(set(chosen.tolist())) == 100 and labels[chosen].bincount().tolist() == 10 * [10]
    assert chosen.tolist() == sorted(chosen.tolist())
    for count in (0, 1200, 5000):
        assert evenly_over_classes(labels, count).tolist() == list(range(1200))


def test_class_folders_give_labels_and_flat_folders_do_not(tmp_path):
    labels = torch.tensor([0] * 4 + [1] * 4)
    images = pictures(labels)
    for c, name in enumerate(CLASSES):
        save_pictures(tmp_path / 'classes' / name, images[labels == c])
    save_pictures(tmp_path / 'flat', images)
    found, found_labels = read_samples(str(tmp_path / 'classes'), 16, CLASSES)
    assert found.shape == images.shape
    assert torch.equal((found.float().mean((1, 2, 3)) > 120).long(), found_labels)
    found, found_labels = read_samples(str(tmp_path / 'flat'), 16, CLASSES)
    assert found_labels is None and sums(found) == sums(images)


def test_npz_gives_the_images_and_labels_if_it_has_them(tmp_path):
    labels = torch.arange(6) % 2
    images = pictures(labels)
    np.savez(tmp_path / 'a.npz', images.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / 'b.npz', images.permute(0, 2, 3, 1).numpy(), labels.numpy())
    found, found_labels = read_samples(str(tmp_path / 'a.npz'), 16, CLASSES)
    assert torch.equal(found, images) and found_labels is None
    assert torch.equal(read_samples(str(tmp_path / 'b.npz'), 16, CLASSES)[1], labels)


@pytest.mark.parametrize('arrays, message', [
    ({'images': np.zeros((9, 16, 16, 3), np.uint8)}, 'are missing'),
    ({'arr_0': np.zeros((9, 16, 16, 3))}, 'must be uint8'),
    ({'arr_0': np.zeros((9, 3, 16, 16), np.uint8)}, 'must be uint8'),
    ({'arr_0': np.zeros((9, 16, 16, 3, 3), np.uint8)}, 'must be uint8'),
    ({'arr_0': np.zeros((), np.uint8)}, 'must be uint8'),
    ({'arr_0': np.zeros((0, 16, 16, 3), np.uint8)}, 'must be uint8'),
    ({'arr_0': np.zeros((9, 16, 32, 3), np.uint8)}, r'must be uint8 .N, 16, 16, 3. .* but are uint8 .9, 16, 32, 3.'),
    ({'arr_0': np.array([{}])}, 'cannot be read'),                          # a pickle, which could run code
    ({'arr_0': np.zeros((9, 16, 16, 3), np.uint8), 'arr_1': np.full(9, 2)}, 'class numbers from 0 to 1'),
    ({'arr_0': np.zeros((9, 16, 16, 3), np.uint8), 'arr_1': np.full(8, 1)}, '9 class numbers'),
])
def test_a_bad_npz_is_named_with_what_is_wrong(tmp_path, arrays, message):
    np.savez(tmp_path / 'bad.npz', **arrays)
    with pytest.raises(UserError, match=message) as error:
        read_samples(str(tmp_path / 'bad.npz'), 16, CLASSES)
    assert 'bad.npz' in str(error.value) and '\n' not in str(error.value)


def test_a_reference_is_a_folder_images_or_statistics_or_both(tmp_path):
    images = pictures(torch.arange(6) % 2)
    nhwc = images.permute(0, 2, 3, 1).numpy()
    save_pictures(tmp_path / 'folder', images)
    np.savez(tmp_path / 'images.npz', nhwc, 7 + np.arange(6))                  # its labels are of no interest
    for name in ('folder', 'images.npz'):
        found, moments = read_reference(str(tmp_path / name), 16)
        assert moments is None and sums(found) == sums(images)
    found, (mu, sigma) = read_reference(statistics_file(tmp_path / 'mu.npz'), 16)
    assert found.shape == (0, 3, 16, 16) and mu.shape == (2048,)
    assert torch.equal(sigma, torch.eye(2048))
    found, moments = read_reference(statistics_file(tmp_path / 'both.npz', arr_0=nhwc, mu_s=np.zeros(3)), 16)
    assert torch.equal(found, images) and len(moments) == 2


@pytest.mark.parametrize('arrays, message', [
    ({'mu': np.zeros(64), 'sigma': np.eye(64)}, 'must be the finite mean .2048,. and covariance .2048, 2048.'),
    ({'sigma': np.zeros(0)}, 'must be the finite mean'),
    ({'mu': np.full(2048, np.nan)}, 'must be the finite mean'),
    ({'arr_0': np.zeros((9, 32, 32, 3), np.uint8)}, 'but are uint8 .9, 32, 32, 3.'),
])
def test_statistics_of_something_else_are_named(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message) as error:
        read_reference(statistics_file(tmp_path / 'bad.npz', **arrays), 16)
    assert 'bad.npz' in str(error.value) and '\n' not in str(error.value)


def test_missing_empty_broken_and_wrongly_sized_samples_are_named(tmp_path):
    with pytest.raises(UserError, match='cannot be read: missing'):
        read_samples(str(tmp_path / 'nowhere'), 16, CLASSES)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no pictures'):
        read_samples(str(tmp_path / 'empty'), 16, CLASSES)
    for name, content in (('text.npz', b'text'), ('nothing.npz', b'')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match='not an .npz'):
            read_samples(str(tmp_path / name), 16, CLASSES)
    save_pictures(tmp_path / 'small', pictures(torch.zeros(1, dtype=torch.int64), side=8))
    with pytest.raises(UserError, match='0.png: .* but are uint8 .1, 8, 8, 3.'):
        read_samples(str(tmp_path / 'small'), 16, CLASSES)
    (tmp_path / 'small' / '0.png').write_bytes(b'no picture')
    with pytest.raises(UserError, match='0.png.*cannot be read'):
        read_samples(str(tmp_path / 'small'), 16, CLASSES)


def test_good_samples_raise_no_warning_and_every_flaw_raises_its_own(tmp_path):
    labels = torch.arange(20) % 2
    images = pictures(labels)
    assert check_samples(images, labels, 2) == check_samples(images, labels, 2, path='samples.npz') == []
    flat = images.clone()
    flat[:3] = torch.tensor([200, 10, 10], dtype=torch.uint8)[:, None, None]
    uneven = labels.index_fill(0, torch.tensor(0), 1)
    repeated = images[[*range(18), 0, 1]]
    folder = tmp_path / 'samples'
    save_pictures(folder, images[:3])
    assert check_samples(images, labels, 2, path=str(folder)) == []
    (folder / '1.png').rename(folder / '1.JPEG')
    for message, arguments in {
            '3 of 20 samples are one flat colour': (flat, labels, 2),
            'class order': (images, labels.sort().values, 2),
            '9 to 11 samples per class': (images, uneven, 2),
            'have no classes': (images, None, 2),
            '2 of 20 samples repeat another one: the metrics are those of 18': (repeated, labels, 2),
            '3 of 20 samples are images of the reference': (images, labels, 2, images[4:7]),
            'no sample has a value above 1 of 255': (images % 2, labels, 2),
            '1 of 20 samples are JPEG': (images, labels, 2, (), str(folder))}.items():
        warnings = check_samples(*arguments)
        assert len(warnings) == 1 and message in warnings[0] and '\n' not in warnings[0]
    with pytest.raises(UserError, match='only 9 samples'):
        check_samples(images[:9], labels[:9], 2)


def test_too_few_images_are_warned_of():
    assert check_count('samples', 300, 128) == check_count('samples', 50_000, 2048) == []
    for what in ('samples', 'reference images'):
        assert f'100 {what} for 128 features: their covariance is singular' in check_count(what, 100, 128)[0]
        assert f'2048 {what} for 2048 features: their covariance' in check_count(what, 2048, 2048)[0]
        assert f'12000 {what}: published FIDs use 50,000' in check_count(what, 12_000, 2048)[0]
