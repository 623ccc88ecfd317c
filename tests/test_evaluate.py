"""evaluate.py: every figure on a case whose answer is known, and what is said about bad input."""
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import runtime
from configurator import UserError
from data import TokenDataset, normalize, open_dataset
from model import build_student
from tokenizer import build_tokenizers

STAGE1 = dict(image_size=16, patch_nums=(1, 2, 4), vocab_size=16, code_width=4, channels=4, channel_mult=(1, 1, 1), res_blocks=1,
              alias_vocab_size=8, alias_code_width=4, alias_channels=4, alias_res_blocks=1, beta=0.25, dual=True)
STAGE2 = dict(depth=1, width=8, num_heads=2, mlp_ratio=2.0, qk_norm=True, shared_aln=False, drop_path=0.0)
CLASSES = ['dark', 'light']


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(labels, side=16, seed=0):
    """Noise, dark for label 0 and light for label 1: uint8 (N, 3, side, side)."""
    noise = torch.randint(0, 100, (len(labels), 3, side, side), generator=torch.Generator().manual_seed(seed))
    return (noise + 140 * labels[:, None, None, None]).to(torch.uint8)


def save_pictures(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f'{i}.png')


# -----------------------------------------------------------------------------
# PSNR and SSIM

def test_psnr_is_the_mean_over_images_of_10_log10_of_4_over_the_squared_error():
    a = torch.zeros(2, 3, 8, 8)
    b = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.02)])
    assert evaluate.psnr(a, b) == pytest.approx((20 + 40) / 2)              # 2/0.2 is 20 dB, 2/0.02 is 40 dB
    assert evaluate.psnr(a, a) == math.inf


def test_ssim_of_equal_images_is_one_and_falls_with_noise():
    a, noise = normal(2, 3, 16, 20).clamp(-1, 1), normal(2, 3, 16, 20, seed=1)
    assert evaluate.ssim(a, a) == pytest.approx(1)
    assert 1 > evaluate.ssim(a, a + 0.1 * noise) > evaluate.ssim(a, a + 0.5 * noise) > 0.1 > abs(evaluate.ssim(a, noise))


def test_ssim_of_two_flat_images_is_the_luminance_term():
    a, b = torch.full((1, 3, 12, 12), 0.5), torch.full((1, 3, 12, 12), -0.1)
    c1 = (0.01 * 2) ** 2
    assert evaluate.ssim(a, b) == pytest.approx((2 * 0.5 * -0.1 + c1) / (0.5 ** 2 + 0.1 ** 2 + c1), abs=1e-6)


def test_ssim_of_an_11_pixel_image_is_one_gaussian_window_by_hand():
    a, b = normal(11, 11, seed=1).numpy(), normal(11, 11, seed=2).numpy()
    bell = np.exp(-(np.arange(11) - 5) ** 2 / (2 * 1.5 ** 2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
    covariance = (window * (a - mean_a) * (b - mean_b)).sum()
    wanted = ((2 * mean_a * mean_b + 0.0004) * (2 * covariance + 0.0036)
              / ((mean_a ** 2 + mean_b ** 2 + 0.0004) * (variance_a + variance_b + 0.0036)))
    assert evaluate.ssim(torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None]) == pytest.approx(wanted)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(UserError, match='11 × 11'):
        evaluate.ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


# -----------------------------------------------------------------------------
# Fréchet distance

def test_statistics_are_the_mean_and_the_unbiased_covariance():
    features = normal(50, 4)
    mu, sigma = evaluate.statistics(features.float())
    assert mu.dtype == sigma.dtype == torch.float64
    np.testing.assert_allclose(mu, features.mean(0), atol=1e-6)
    np.testing.assert_allclose(sigma, np.cov(features.numpy(), rowvar=False), atol=1e-6)
    with pytest.raises(UserError, match='at least 2'):
        evaluate.statistics(features[:1])


def test_frechet_distance_of_diagonal_gaussians():
    a, b, shift = torch.tensor([1.0, 4, 9]), torch.tensor([4.0, 4, 0]), torch.tensor([1.0, 2, 0])
    wanted = 5 + (1 - 2) ** 2 + 0 + 3 ** 2                                  # |Δμ|² + Σ (√a − √b)²; one axis is singular
    assert evaluate.frechet_distance(torch.zeros(3), a.diag(), shift, b.diag()) == pytest.approx(wanted)


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = torch.tensor([[2.0, 1], [1, 3]]), torch.tensor([[1.0, -0.5], [-0.5, 4]])
    product = a @ b                                                         # 2 × 2: tr √M = √(tr M + 2√det M)
    root = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    distance = evaluate.frechet_distance(torch.zeros(2), a, torch.zeros(2), b)
    assert distance == pytest.approx(float(a.trace() + b.trace()) - 2 * root)
    assert distance == pytest.approx(evaluate.frechet_distance(torch.zeros(2), b, torch.zeros(2), a))


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_fewer_images_than_features():
    moments = evaluate.statistics(normal(10, 32))
    assert evaluate.frechet_distance(*moments, *moments) == pytest.approx(0, abs=1e-5)


# -----------------------------------------------------------------------------
# torch-fidelity, with random weights in place of Inception's

@pytest.fixture(scope='module')
def random_inception(tmp_path_factory):
    fidelity = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
    network = fidelity.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:                             # build it without downloading
        patch.setattr(fidelity, 'load_state_dict_from_url', lambda *_, **__: {})
        patch.setattr(network, 'load_state_dict', lambda *_, **__: None)
        extractor = network('inception-v3-compat', ['2048'])
    for module in extractor.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp('weights') / 'random.pth'
    torch.save(extractor.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def measured(random_inception, tmp_path_factory):
    """What torch-fidelity says about dark pictures against dark and light ones, and the features that it keeps of them.

    But for the eigenvalues of Σ₁Σ₂, taken to be none, which would last ten seconds.
    """
    cache, labels = tmp_path_factory.mktemp('cache'), torch.arange(10) % 2
    dark, real = pictures(0 * labels, seed=1), pictures(labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.linalg, 'eigvals', lambda matrix: np.zeros(len(matrix)))
        figures = evaluate.torch_fidelity_metrics(dark, real, random_inception, cache=cache, names=('dark', 'real'))
    files = (next(cache.glob(f'{name}-*-features-2048.pt')) for name in ('dark', 'real'))
    return dark, real, cache, figures, [evaluate.statistics(torch.load(file, weights_only=True)) for file in files]


def test_torch_fidelity_is_called_as_it_wants_to_be(measured):
    _, _, cache, figures, ((mu1, sigma1), (mu2, sigma2)) = measured
    assert set(figures) == {'fid', 'isc', 'precision', 'recall'} and all(map(math.isfinite, figures.values()))
    assert figures['fid'] == pytest.approx(float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()), rel=1e-3)
    assert figures['recall'] < 1                            # the light half of the real ones is never made
    assert len({file.name.split('-')[0] for file in cache.iterdir()}) == 2


@pytest.mark.parametrize('images_beside', [True, False])
def test_fid_is_measured_to_published_statistics(measured, random_inception, monkeypatch, images_beside):
    """And precision and recall to the images beside them, if there are any."""
    dark, real, cache, by_images, (own, published) = measured
    monkeypatch.setattr(evaluate, 'frechet_distance', lambda *moments: moments)
    figures = evaluate.torch_fidelity_metrics(dark, real if images_beside else None, random_inception, cache=cache,
                                              names=('dark', 'real'), moments=published)
    assert all(torch.equal(a, b) for a, b in zip(figures.pop('fid'), (*own, *published), strict=True))
    assert figures == {name: by_images[name] if images_beside or name == 'isc' else None for name in ('isc', 'precision', 'recall')}


def test_our_frechet_distance_is_torch_fidelitys():
    metric = pytest.importorskip('torch_fidelity.metric_fid')
    a, b = (evaluate.statistics(normal(60, 20, seed=seed) @ normal(20, 20, seed=seed + 2)) for seed in (0, 1))
    theirs = metric.fid_statistics_to_metric(*({'mu': mu.numpy(), 'sigma': sigma.numpy()} for mu, sigma in (a, b)), verbose=False)
    assert evaluate.frechet_distance(*a, *b) == pytest.approx(theirs['frechet_inception_distance'])


def test_torch_fidelity_needs_ten_images():
    with pytest.raises(UserError, match='at least 10'):
        evaluate.torch_fidelity_metrics(torch.zeros(9, 3, 8, 8), torch.zeros(20, 3, 8, 8), 'weights.pth')


def test_missing_inception_weights_are_one_line_naming_file_and_place(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, 'inception_weights', str(tmp_path / 'here.pth'))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    path, missing = evaluate.find_inception()
    assert path == '' and 'weights-inception-2015-12-05-6726825d.pth' in missing and 'here.pth' in missing and '\n' not in missing
    monkeypatch.setattr(evaluate, 'distance', 'fid')
    with pytest.raises(UserError, match='not on disk'):
        evaluate.choose_distance()


def test_other_weights_are_not_taken_for_inception(monkeypatch, tmp_path):
    (tmp_path / 'here.pth').write_bytes(b'truncated')
    monkeypatch.setattr(evaluate, 'inception_weights', str(tmp_path / 'here.pth'))
    with pytest.raises(UserError, match='truncated or another file'):
        evaluate.find_inception()


# -----------------------------------------------------------------------------
# the CNN

def test_cnn_shapes_and_large_images_are_averaged_down():
    cnn = evaluate.SmallCNN(5, width=4).eval()
    x = normal(2, 3, 128, 128).float()
    assert cnn.features(x).shape == (2, 16) and cnn(x).shape == (2, 5)
    torch.testing.assert_close(cnn(x), cnn(torch.nn.functional.avg_pool2d(x, 2)))


@pytest.mark.parametrize('augment', [False, True])
def test_cnn_learns_and_is_a_function_of_its_seed(augment):
    labels = torch.arange(40) % 2
    images = pictures(labels)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    cnn = evaluate.train_cnn(images, labels, 2, steps=15, batch=16, augment=augment)
    assert torch.equal(torch.get_rng_state(), before)
    features, predicted = evaluate.look(cnn, pictures(labels, seed=9))
    assert features.shape == (40, 128) and torch.equal(predicted, labels)
    again = evaluate.train_cnn(images, labels, 2, steps=15, batch=16, augment=augment)
    assert runtime.digest(again.state_dict()) == runtime.digest(cnn.state_dict())


def test_cnn_is_kept_and_trained_again_only_for_other_data_or_settings(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluate, 'out_dir', str(tmp_path))
    monkeypatch.setattr(evaluate, 'cnn_steps', 2)
    labels = torch.arange(20) % 2
    train, dev = (pictures(labels), labels), torch.device('cpu')
    cnn, accuracy = evaluate.load_or_train_cnn(train, train, 'folder', CLASSES, dev)
    monkeypatch.setattr(evaluate, 'train_cnn', None)                        # must not be called
    kept, kept_accuracy = evaluate.load_or_train_cnn(train, train, 'folder', CLASSES, dev)
    assert runtime.digest(kept.state_dict()) == runtime.digest(cnn.state_dict()) and kept_accuracy == accuracy
    with pytest.raises(TypeError):
        evaluate.load_or_train_cnn(train, train, 'another', CLASSES, dev)
    assert 'training it again' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# samples

def test_spread_takes_the_same_share_of_every_class():
    labels = torch.arange(1200) % 10
    some = evaluate.spread(labels, 100)
    assert len(set(some.tolist())) == 100 and labels[some].bincount().tolist() == 10 * [10]
    assert evaluate.spread(labels, 0).tolist() == evaluate.spread(labels, 5000).tolist() == list(range(1200))


def test_class_folders_give_labels_and_flat_folders_do_not(tmp_path):
    labels = torch.tensor([0] * 4 + [1] * 4)
    images = pictures(labels)
    for c, name in enumerate(CLASSES):
        save_pictures(tmp_path / 'classes' / name, images[labels == c])
    save_pictures(tmp_path / 'flat', images)
    found, found_labels = evaluate.read_samples(str(tmp_path / 'classes'), 16, CLASSES)
    assert found.shape == images.shape and torch.equal((found.float().mean((1, 2, 3)) > 120).long(), found_labels)
    found, found_labels = evaluate.read_samples(str(tmp_path / 'flat'), 16, CLASSES)
    assert found_labels is None and sorted(found.sum((1, 2, 3)).tolist()) == sorted(images.sum((1, 2, 3)).tolist())


def test_npz_gives_the_images_and_labels_if_it_has_them(tmp_path):
    labels = torch.arange(6) % 2
    images = pictures(labels)
    np.savez(tmp_path / 'a.npz', images.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / 'b.npz', images.permute(0, 2, 3, 1).numpy(), labels.numpy())
    found, found_labels = evaluate.read_samples(str(tmp_path / 'a.npz'), 16, CLASSES)
    assert torch.equal(found, images) and found_labels is None
    assert torch.equal(evaluate.read_samples(str(tmp_path / 'b.npz'), 16, CLASSES)[1], labels)


@pytest.mark.parametrize('arrays, message', [
    ({'images': np.zeros((9, 16, 16, 3), np.uint8)}, 'no arr_0'),
    ({'arr_0': np.zeros((9, 16, 16, 3))}, 'must be uint8'),
    ({'arr_0': np.zeros((9, 3, 16, 16), np.uint8)}, 'must be uint8'),
    ({'arr_0': np.zeros((0, 16, 16, 3), np.uint8)}, 'must be uint8'),
    ({'arr_0': np.zeros((9, 16, 32, 3), np.uint8)}, '32 × 16 px, the tokenizer.s images 16 × 16'),
    ({'arr_0': np.array([{}])}, 'can not be read'),                         # a pickle, which could run code
    ({'arr_0': np.zeros((9, 16, 16, 3), np.uint8), 'arr_1': np.full(9, 2)}, 'class numbers from 0 to 1'),
    ({'arr_0': np.zeros((9, 16, 16, 3), np.uint8), 'arr_1': np.full(8, 1)}, '9 class numbers'),
])
def test_a_bad_npz_is_named_with_what_is_wrong(tmp_path, arrays, message):
    np.savez(tmp_path / 'bad.npz', **arrays)
    with pytest.raises(UserError, match=message) as error:
        evaluate.read_samples(str(tmp_path / 'bad.npz'), 16, CLASSES)
    assert 'bad.npz' in str(error.value) and '\n' not in str(error.value)


def statistics_file(path, **others):
    np.savez(path, **{'mu': np.zeros(2048), 'sigma': np.eye(2048, dtype=np.float32)} | others)
    return str(path)


def test_a_reference_is_a_folder_images_or_statistics_or_both(tmp_path):
    images = pictures(torch.arange(6) % 2)
    nhwc = images.permute(0, 2, 3, 1).numpy()
    save_pictures(tmp_path / 'folder', images)
    np.savez(tmp_path / 'images.npz', nhwc, 7 + np.arange(6))                  # its labels are of no interest
    for name in ('folder', 'images.npz'):
        found, moments = evaluate.read_reference(str(tmp_path / name), 16)
        assert moments is None and sorted(found.sum((1, 2, 3)).tolist()) == sorted(images.sum((1, 2, 3)).tolist())
    found, (mu, sigma) = evaluate.read_reference(statistics_file(tmp_path / 'mu.npz'), 16)
    assert found is None and mu.shape == (2048,) and torch.equal(sigma, torch.eye(2048))
    found, moments = evaluate.read_reference(statistics_file(tmp_path / 'both.npz', arr_0=nhwc, mu_s=np.zeros(3)), 16)
    assert torch.equal(found, images) and len(moments) == 2


@pytest.mark.parametrize('arrays, message', [
    ({'mu': np.zeros(64), 'sigma': np.eye(64)}, 'must be mean .2048,. and covariance .2048, 2048.'),
    ({'sigma': np.zeros(0)}, 'must be mean'),
    ({'mu': np.zeros(2048, np.int64)}, 'they are int64'),
    ({'mu': np.full(2048, np.nan)}, 'not finite, or not symmetric'),
    ({'sigma': np.eye(2048, k=1)}, 'not finite, or not symmetric'),
    ({'arr_0': np.zeros((9, 32, 32, 3), np.uint8)}, '32 × 32 px'),
])
def test_statistics_of_something_else_are_named(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.read_reference(statistics_file(tmp_path / 'bad.npz', **arrays), 16)
    assert 'bad.npz' in str(error.value) and '\n' not in str(error.value)


def test_missing_empty_broken_and_wrongly_sized_samples_are_named(tmp_path):
    with pytest.raises(UserError, match='no such folder or file'):
        evaluate.read_samples(str(tmp_path / 'nowhere'), 16, CLASSES)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no pictures'):
        evaluate.read_samples(str(tmp_path / 'empty'), 16, CLASSES)
    for name, content in (('text.npz', b'text'), ('nothing.npz', b'')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match='not an .npz'):
            evaluate.read_samples(str(tmp_path / name), 16, CLASSES)
    save_pictures(tmp_path / 'small', pictures(torch.zeros(1, dtype=torch.int64), side=8))
    with pytest.raises(UserError, match='0.png: these are 8 × 8 px'):
        evaluate.read_samples(str(tmp_path / 'small'), 16, CLASSES)
    (tmp_path / 'small' / '0.png').write_bytes(b'no picture')
    with pytest.raises(UserError, match='can not be read'):
        evaluate.read_samples(str(tmp_path / 'small'), 16, CLASSES)


def test_good_samples_raise_no_warning_and_every_flaw_raises_its_own():
    labels = torch.arange(20) % 2
    images = pictures(labels)
    assert evaluate.check_samples(images, labels, 8, 2) == []
    flat = images.clone()
    flat[:3] = torch.tensor([200, 10, 10], dtype=torch.uint8)[:, None, None]
    uneven = labels.index_fill(0, torch.tensor(0), 1)
    for message, arguments in {'3 of 20 samples are one flat colour': (flat, labels, 8, 2),
                               'covariance is singular': (images, labels, 20, 2),
                               'class order': (images, labels.sort().values, 8, 2),
                               '9 to 11 samples a class': (images, uneven, 8, 2),
                               'carry no class': (images, None, 8, 2),
                               '2 of 20 samples repeat another one: the figures are of 18': (images[[*range(18), 0, 1]], labels, 8, 2),
                               '3 of 20 samples are images of the reference': (images, labels, 8, 2, evaluate.fingerprints(images[4:7])),
                               'nothing above 1 of 255': (images % 2, labels, 8, 2)}.items():
        warnings = evaluate.check_samples(*arguments)
        assert len(warnings) == 1 and message in warnings[0] and '\n' not in warnings[0]
    many = torch.arange(3 * 2049 * 4, dtype=torch.int64).remainder(251).to(torch.uint8).view(2049, 3, 2, 2)
    assert 'published FIDs use 50,000' in evaluate.check_samples(many, torch.arange(2049) % 3, 2048, 3)[0]
    with pytest.raises(UserError, match='only 9 samples'):
        evaluate.check_samples(images[:9], labels[:9], 8, 2)


def test_a_small_reference_and_lossy_files_are_warned_of(tmp_path):
    assert evaluate.check_reference(300, 128) == evaluate.check_reference(50_000, 2048) == []
    assert '100 reference images for 128 features: their covariance is singular' in evaluate.check_reference(100, 128)[0]
    assert '12000 reference images' in evaluate.check_reference(12_000, 2048)[0]
    save_pictures(tmp_path / 'samples', pictures(torch.zeros(3, dtype=torch.int64)))
    assert evaluate.check_files(str(tmp_path / 'samples')) == evaluate.check_files('samples.npz') == []
    (tmp_path / 'samples' / '1.png').rename(tmp_path / 'samples' / '1.JPEG')
    assert '1 of 3 samples are JPEG' in evaluate.check_files(str(tmp_path / 'samples'))[0]


# -----------------------------------------------------------------------------
# a whole run: random weights, twenty pictures of two classes

@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """out_dir with tokenizer.pt, student.pt and tokens/, made of random weights and a folder of pictures."""
    torch.manual_seed(0)
    data, out = tmp_path / 'data', tmp_path / 'out'
    labels = torch.arange(20) % 2
    images = {'train': pictures(labels, seed=1), 'val': pictures(labels, seed=2)}
    for split in images:
        for c, name in enumerate(CLASSES):
            save_pictures(data / split / name, images[split][labels == c])
    structure, alias = (module.eval() for module in build_tokenizers(STAGE1))
    structure.quantizer.codebook.weight.data.normal_()
    structure.quantizer.codebook.usage.fill_(1)
    runtime.save_checkpoint(out / 'tokenizer.pt', {
        'kind': 'tokenizer', 'config': STAGE1 | {'data': str(data)}, 'step': 7,
        'structure': structure.state_dict(), 'alias': alias.state_dict()})
    digest = runtime.digest(structure.state_dict())
    student = build_student(STAGE2, structure, 2)
    runtime.save_checkpoint(out / 'student.pt', {'kind': 'student', 'config': STAGE2, 'step': 9, 'tokenizer': digest,
                                                 'classes': CLASSES, 'student': student.state_dict()})
    x = normalize(images['val'])
    rows = torch.cat([*structure.encode(x), *alias.encode(x), labels[:, None]], 1).numpy().astype('<u2')
    (out / 'tokens').mkdir()
    rows.tofile(out / 'tokens' / 'val.bin')
    runtime.write_json(out / 'tokens' / 'val.json', {
        'rows': 20, 'columns': rows.shape[1], 'patch_nums': [1, 2, 4], 'alias_patch_nums': [1, 2], 'vocab_size': 16,
        'alias_vocab_size': 8, 'classes': CLASSES, 'tokenizer': digest})
    settings = dict(out_dir=str(out), per_class=6, cnn_steps=10, cnn_batch=16, batch_size=8, distance='cnn', device='cpu')
    for name, value in settings.items():
        monkeypatch.setattr(evaluate, name, value)
    return out, structure, student.eval()


def test_student_figures_of_a_student_that_knows_nothing_are_those_of_even_odds(finished_run):
    out, structure, student = finished_run
    torch.nn.init.zeros_(student.head.weight)
    figures = evaluate.student_figures(student, structure, TokenDataset(out / 'tokens', 'val'), nullcontext)
    assert figures['ce'] == pytest.approx(math.log(16)) and figures['ce_per_map'] == pytest.approx(3 * [math.log(16)])
    assert figures['bits_an_image'] == pytest.approx(21 * 4) and figures['images'] == 20       # 1 + 4 + 16 tokens of 4 bits


def test_a_whole_run_writes_every_figure_and_the_same_ones_again(finished_run, capsys):
    out = finished_run[0]
    evaluate.main()
    results = json.loads((out / 'results.json').read_text())
    assert results['config'].keys() == evaluate.config.keys() and results['tokenizer_step'] == 7 and results['student_step'] == 9
    assert results['tokenizer']['perplexity'] == pytest.approx(3 * [16]) and math.isfinite(results['tokenizer']['psnr'])
    assert len(results['student']['ce_per_map']) == 3
    rows = {(row['set'], row['against']): row for row in results['distances']}
    assert list(rows) == evaluate.PAIRS and all(row['images'] == 12 for row in rows.values())
    # the floor is lower than what random networks make
    assert rows['real', 'reference']['recognised'] == results['cnn']['accuracy'] == 1
    assert all(rows['real', 'reference']['fd_cnn'] < rows[name, 'reference']['fd_cnn'] for name in ('generated', 'reconstructed'))
    printed = capsys.readouterr().out
    assert 'FD-cnn' in printed and 'FID' not in printed.replace('FID.', '')
    assert printed.count('covariance is singular') == len(results['warnings']) == 2      # of the samples, of the reference
    evaluate.main()
    assert json.loads((out / 'results.json').read_text()) == results


def test_real_pictures_given_as_samples_are_as_good_as_the_floor(finished_run, monkeypatch):
    out = finished_run[0]
    (out / 'student.pt').unlink()                                           # samples from elsewhere need no student
    monkeypatch.setattr(evaluate, 'parts', 'samples')
    images, labels = evaluate.load_images(open_dataset(str(out.parent / 'data'), 'val', 16), 0)
    for c, name in enumerate(CLASSES):
        save_pictures(out / 'samples' / name, images[labels == c])
    monkeypatch.setattr(evaluate, 'samples', str(out / 'samples'))
    evaluate.main()
    results = json.loads((out / 'results.json').read_text())
    generated, floor = results['distances']
    assert generated['fd_cnn'] == pytest.approx(floor['fd_cnn'], rel=1e-3) and generated['recognised'] == 1
    assert 'student' not in results and 'tokenizer' not in results


def test_the_table_says_fid_where_torch_fidelity_measured(finished_run, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, 'choose_distance', lambda only_statistics: 'weights.pth')
    monkeypatch.setattr(evaluate, 'torch_fidelity_metrics', lambda *_: {'fid': 12.3456, 'isc': 2.0, 'precision': 0.5, 'recall': 0.25})
    evaluate.main()
    printed = capsys.readouterr().out
    assert '12.346' in printed and 'FID' in printed and 'FD-cnn' not in printed


def test_a_row_compares_the_sets_it_names(finished_run, monkeypatch):
    """rFID: reconstructions against their own originals. Only what is measured to the reference is measured to its statistics."""
    out, structure, _ = finished_run
    seen, moments, val = [], ('mu', 'sigma'), evaluate.load_images(open_dataset(str(out.parent / 'data'), 'val', 16), 0)[0]
    monkeypatch.setattr(evaluate, 'choose_distance', lambda only_statistics: 'weights.pth')
    monkeypatch.setattr(evaluate, 'reference', str(out))
    monkeypatch.setattr(evaluate, 'read_reference', lambda *_: (None, moments))
    monkeypatch.setattr(runtime, 'digest', lambda *_, digest=runtime.digest: digest(structure.state_dict()))
    monkeypatch.setattr(evaluate, 'torch_fidelity_metrics', lambda *arguments: seen.append(arguments) or {
        'fid': 1.0, 'isc': 2.0, 'precision': None, 'recall': None})
    evaluate.main()
    found = {arguments[6]: arguments for arguments in seen}
    assert list(found) == evaluate.PAIRS
    some = evaluate.spread(torch.arange(20) // 10, 12)
    reconstructed, originals = found['reconstructed', 'originals'][:2]
    assert torch.equal(originals, val[some]) and found['reconstructed', 'originals'][7] is None
    with torch.no_grad():
        assert torch.equal(reconstructed, evaluate.to_uint8(structure.decode(structure.encode(normalize(val)))[some]))
    for name, images in (('generated', seen[0][0]), ('reconstructed', reconstructed), ('real', val[some])):
        assert torch.equal(found[name, 'reference'][0], images) and found[name, 'reference'][1::6] == (None, moments)
    rows = json.loads((out / 'results.json').read_text())['distances']
    assert [row['against_images'] for row in rows] == [None, None, 12, None]


def test_distances_to_an_npz_are_those_to_the_split_it_holds(finished_run, monkeypatch):
    out, distances = finished_run[0], []
    images, _ = evaluate.load_images(open_dataset(str(out.parent / 'data'), 'train', 16), 0)
    np.savez(out / 'train.npz', images.permute(0, 2, 3, 1).numpy())
    for reference in ('train', str(out / 'train.npz')):
        monkeypatch.setattr(evaluate, 'reference', reference)
        evaluate.main()
        results = json.loads((out / 'results.json').read_text())
        distances.append({(row['set'], row['against']): row['fd_cnn'] for row in results['distances']})
    assert distances[0] == pytest.approx(distances[1])
    assert results['reference']['name'] == reference and results['reference']['images'] == 20


def test_statistics_of_inception_features_are_no_reference_for_the_cnn(finished_run, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, 'reference', statistics_file(tmp_path / 'mu.npz'))
    monkeypatch.setattr(evaluate, 'inception_weights', str(tmp_path / 'here.pth'))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    for distance, remedy in (('cnn', 'leave --distance=cnn out'), ('auto', 'here.pth')):
        monkeypatch.setattr(evaluate, 'distance', distance)
        with pytest.raises(UserError, match=f'mu.npz holds statistics of Inception features.*{remedy}') as error:
            evaluate.main()
        assert '\n' not in str(error.value)


def test_results_say_what_is_needed_to_get_them_again(finished_run, monkeypatch):
    out, structure, student = finished_run
    images, labels = evaluate.generate(student, structure, nullcontext)
    np.savez(out / 'samples.npz', images.permute(0, 2, 3, 1).numpy(), labels.numpy(), made_with=np.array('{"seed": 5}'))
    for samples in ('', str(out / 'samples.npz')):
        monkeypatch.setattr(evaluate, 'samples', samples)
        evaluate.main()
        results = json.loads((out / 'results.json').read_text())
        assert results['samples'] == {'images': 12, 'fingerprint': evaluate.fingerprint(evaluate.fingerprints(images)),
                                      'made_with': {'seed': 5} if samples else None}
        assert results['student_digest'] == runtime.digest(student.state_dict()) and results['device'] == 'cpu'
        assert results['tokenizer_digest'] == runtime.digest(structure.state_dict())
        assert results['versions'].keys() == {'python', 'torch', 'torch-fidelity', 'numpy', 'pillow'}
        assert results['versions']['numpy'] == np.__version__ and set(evaluate.config) == set(results['config'])
        assert results['reference']['images'] == 20 and len(results['reference']['fingerprint']) == 16
        assert results['cnn']['digest']


@pytest.mark.parametrize('settings, message', [
    ({'parts': 'tokenizer,sampels'}, "'sampels' is no part"),
    ({'per_class': 0}, 'at least 1'),
    ({'reference': 'test'}, 'choose train, val, a folder of images, or an .npz'),
    ({'distance': 'is'}, 'auto, fid or cnn'),
    ({'data': 'nowhere'}, 'no such folder'),
    ({'tokens': 'nowhere'}, 'no token files'),
    ({'tokenizer': 'nowhere.pt'}, 'train_tokenizer.py writes it'),
    ({'samples': 'nowhere'}, 'no such folder or file'),
])
def test_a_mistaken_setting_is_one_line(finished_run, monkeypatch, settings, message):
    for name, value in settings.items():
        monkeypatch.setattr(evaluate, name, value)
    with pytest.raises(UserError, match=message) as error:
        evaluate.main()
    assert '\n' not in str(error.value)


def test_a_missing_student_and_tokens_of_another_tokenizer_are_named(finished_run):
    out = finished_run[0]
    meta = json.loads((out / 'tokens' / 'val.json').read_text())
    runtime.write_json(out / 'tokens' / 'val.json', meta | {'tokenizer': 'another'})
    with pytest.raises(UserError, match='another tokenizer'):
        evaluate.main()
    runtime.write_json(out / 'tokens' / 'val.json', meta | {'classes': ['light', 'dark']})
    with pytest.raises(UserError, match='in that order'):
        evaluate.main()
    (out / 'student.pt').unlink()
    with pytest.raises(UserError, match='train_fvar.py writes it'):
        evaluate.main()
