"""Metrics of images, each on a case whose answer is known."""
import math

import numpy as np
import pytest
import torch

from configurator import UserError
from conftest import normal, pictures
from util import checkpoint, metrics
from util.metrics import (
    SmallCNN, cnn_statistics, frechet_distance, psnr, ssim, statistics, torch_fidelity_metrics, train_cnn)


# -----------------------------------------------------------------------------
# PSNR and SSIM

def test_psnr_is_the_mean_over_images_of_10_log10_of_4_over_the_squared_error():
    a = torch.zeros(2, 3, 8, 8)
    b = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.02)])
    assert psnr(a, b) == pytest.approx((20 + 40) / 2)              # 2/0.2 is 20 dB, 2/0.02 is 40 dB
    assert psnr(a, a) == math.inf


def test_ssim_of_equal_images_is_one_and_falls_with_noise():
    a, noise = normal(2, 3, 16, 20).clamp(-1, 1), normal(2, 3, 16, 20, seed=1)
    assert ssim(a, a) == pytest.approx(1)
    assert 1 > ssim(a, a + 0.1 * noise) > ssim(a, a + 0.5 * noise) > 0.1 > abs(ssim(a, noise))


def test_ssim_of_two_flat_images_is_the_luminance_term():
    a, b = torch.full((1, 3, 12, 12), 0.5), torch.full((1, 3, 12, 12), -0.1)
    c1 = (0.01 * 2) ** 2
    assert ssim(a, b) == pytest.approx((2 * 0.5 * -0.1 + c1) / (0.5 ** 2 + 0.1 ** 2 + c1), abs=1e-6)


def test_ssim_of_an_11_pixel_image_is_one_gaussian_window_by_hand():
    a, b = normal(11, 11, seed=1).numpy(), normal(11, 11, seed=2).numpy()
    bell = np.exp(-(np.arange(11) - 5) ** 2 / (2 * 1.5 ** 2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
    covariance = (window * (a - mean_a) * (b - mean_b)).sum()
    wanted = ((2 * mean_a * mean_b + 0.0004) * (2 * covariance + 0.0036)
              / ((mean_a ** 2 + mean_b ** 2 + 0.0004) * (variance_a + variance_b + 0.0036)))
    assert ssim(torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None]) == pytest.approx(wanted)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(UserError, match='11 × 11'):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


# -----------------------------------------------------------------------------
# Fréchet distance

def test_statistics_are_the_mean_and_the_unbiased_covariance():
    features = normal(50, 4)
    mu, sigma = statistics(features.float())
    assert mu.dtype == sigma.dtype == torch.float64
    np.testing.assert_allclose(mu, features.mean(0), atol=1e-6)
    np.testing.assert_allclose(sigma, np.cov(features.numpy(), rowvar=False), atol=1e-6)
    with pytest.raises(UserError, match='at least 2'):
        statistics(features[:1])


def test_frechet_distance_of_diagonal_gaussians():
    a, b = torch.tensor([1.0, 4, 9]).double(), torch.tensor([4.0, 4, 0]).double()
    zero, shift = torch.zeros(3).double(), torch.tensor([1.0, 2, 0]).double()
    wanted = 5 + (1 - 2) ** 2 + 0 + 3 ** 2                                  # |Δμ|² + Σ (√a − √b)²; one axis is singular
    assert frechet_distance(zero, a.diag(), shift, b.diag()) == pytest.approx(wanted)


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = torch.tensor([[2.0, 1], [1, 3]]).double(), torch.tensor([[1.0, -0.5], [-0.5, 4]]).double()
    product, zero = a @ b, torch.zeros(2).double()
    root = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))        # 2 × 2: tr √M = √(tr M + 2√det M)
    distance = frechet_distance(zero, a, zero, b)
    assert distance == pytest.approx(float(a.trace() + b.trace()) - 2 * root)
    assert distance == pytest.approx(frechet_distance(zero, b, zero, a))


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_fewer_images_than_features():
    moments = statistics(normal(10, 32))
    assert frechet_distance(*moments, *moments) == pytest.approx(0, abs=1e-5)


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
    """What torch-fidelity says about one dark picture, ten times, against dark and light ones, and the features that it keeps.

    But for the eigenvalues of Σ₁Σ₂, taken to be none, which would last ten seconds.
    """
    cache, real = tmp_path_factory.mktemp('cache'), pictures(torch.arange(10) % 2)
    dark = real[:1].repeat(10, 1, 1, 1)
    dark[:, 0, 0, 0] = torch.arange(10)                     # or all distances between them would be zero
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.linalg, 'eigvals', lambda matrix: np.zeros(len(matrix)))
        found = torch_fidelity_metrics(dark, real, random_inception, cache, ('dark', 'real'))
    files = (next(cache.glob(f'{name}-*-features-2048.pt')) for name in ('dark', 'real'))
    return dark, real, cache, found, [statistics(torch.load(file, weights_only=True)) for file in files]


def test_torch_fidelity_is_called_as_it_wants_to_be(measured):
    _, _, cache, found, ((mu1, sigma1), (mu2, sigma2)) = measured
    assert set(found) == {'fid', 'isc', 'precision', 'recall'} and all(map(math.isfinite, found.values()))
    without_overlap = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()
    assert found['fid'] == pytest.approx(float(without_overlap), rel=1e-3)
    assert len({file.name.split('-')[0] for file in cache.iterdir()}) == 2


@pytest.mark.parametrize('images_beside', [True, False])
def test_fid_is_measured_to_published_statistics(measured, random_inception, monkeypatch, images_beside):
    """And precision and recall to the images beside them, if there are any."""
    dark, real, cache, by_images, (own, published) = measured
    monkeypatch.setattr(metrics, 'frechet_distance', lambda *moments: moments)
    images = real if images_beside else real[:0]
    found = torch_fidelity_metrics(dark, images, random_inception, cache, ('dark', 'real'), moments=published)
    assert all(torch.equal(a, b) for a, b in zip(found.pop('fid'), (*own, *published), strict=True))
    assert found['isc'] == by_images['isc']
    for name in ('precision', 'recall'):
        assert found[name] == (by_images[name] if images_beside else None)


def test_collapsed_but_realistic_samples_have_precision_and_no_recall(measured):
    """Precision: samples that lie among real images. Recall: real images that lie among samples."""
    *_, found, _ = measured
    assert found['precision'] == 1 and found['recall'] <= 1 / 10


def test_our_frechet_distance_is_torch_fidelitys():
    metric = pytest.importorskip('torch_fidelity.metric_fid')
    a, b = (statistics(normal(60, 20, seed=seed) @ normal(20, 20, seed=seed + 2)) for seed in (0, 1))
    theirs = metric.fid_statistics_to_metric(*({'mu': mu.numpy(), 'sigma': sigma.numpy()} for mu, sigma in (a, b)), verbose=False)
    assert frechet_distance(*a, *b) == pytest.approx(theirs['frechet_inception_distance'])


def test_torch_fidelity_needs_ten_images():
    with pytest.raises(UserError, match='at least 10'):
        torch_fidelity_metrics(torch.zeros(9, 3, 8, 8), torch.zeros(20, 3, 8, 8), 'weights.pth', '', ('a', 'b'))


# -----------------------------------------------------------------------------
# the CNN

def test_cnn_shapes_and_large_images_are_averaged_down():
    cnn = SmallCNN(5).eval()
    x = normal(2, 3, 128, 128).float()
    assert cnn.features(x).shape == (2, 128) and cnn(x).shape == (2, 5)
    torch.testing.assert_close(cnn(x), cnn(torch.nn.functional.avg_pool2d(x, 2)))


@pytest.mark.parametrize('augment', [False, True])
def test_cnn_learns_and_is_a_function_of_its_seed(augment):
    labels = torch.arange(40) % 2
    images = pictures(labels)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    cnn = train_cnn(images, labels, 2, steps=15, batch=16, lr=5e-3, augment=augment)
    assert torch.equal(torch.get_rng_state(), before)
    (mu, sigma), accuracy = cnn_statistics(cnn, pictures(labels, seed=9), labels)
    assert mu.shape == (128,) and sigma.shape == (128, 128) and accuracy == 1
    assert cnn_statistics(cnn, pictures(labels, seed=9), 1 - labels)[1] == 0
    again = train_cnn(images, labels, 2, steps=15, batch=16, lr=5e-3, augment=augment)
    assert checkpoint.digest(again.state_dict()) == checkpoint.digest(cnn.state_dict())
