"""Image quality of pairs and of sets, and the small CNN behind FD-cnn.

Pairs are float (B, 3, H, W) in [−1, 1]; sets are uint8 (N, 3, H, W).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Subset

from configurator import UserError
from data import normalize
from util import runtime
from util.runtime import to_device


# -----------------------------------------------------------------------------
# pairs of images

def psnr(a, b):
    """Peak signal-to-noise ratio in dB, averaged over the images; infinite if any pair is equal.

    a, b (B, 3, H, W) in [−1, 1], so the peak is 2.
    """
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()


def ssim(a, b):
    """Structural similarity (Wang et al. 2004), averaged over images, channels and windows. a, b as in psnr.

    11 × 11 Gaussian windows of σ = 1.5 inside the image, K₁ = 0.01, K₂ = 0.03, range 2; per colour channel,
    at full size. Raises UserError for images smaller than a window.
    """
    H, W = a.shape[-2:]
    if min(H, W) < 11:
        raise UserError(f'SSIM needs images of at least 11 × 11 pixels, got {H} × {W}')
    window = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / 4.5)
    window /= window.sum()
    # windowed means as matrix products; float64, because variances are small differences of large numbers
    down, across = (
        torch.eye(n, dtype=torch.float64).unfold(1, 11, 1) @ window
        for n in (H, W))
    a, b = a.cpu().double(), b.cpu().double()
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = (
        down.T @ x @ across
        for x in (a, b, a * a, b * b, a * b))
    variances = mean_aa - mean_a ** 2 + (mean_bb - mean_b ** 2)
    covariance = mean_ab - mean_a * mean_b
    c1, c2 = 0.02 ** 2, 0.06 ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a ** 2 + mean_b ** 2 + c1) * (variances + c2)
    return similarity.mean().item()


# -----------------------------------------------------------------------------
# sets of images

def statistics(features):
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64. Raises UserError if N < 2."""
    if len(features) < 2:
        raise UserError(f'a Fréchet distance needs at least 2 images, got {len(features)}')
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½): FID, as Heusel et al. 2017 define it.

    Means (D,) and covariances (D, D) in float64. Σ₁Σ₂ has the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½,
    which needs no inverse, so singular matrices are fine.
    """
    variances, vectors = torch.linalg.eigh(sigma1)
    root = vectors * variances.clamp(min=0).sqrt() @ vectors.T
    values = torch.linalg.eigvalsh(root @ sigma2 @ root)
    overlap = values.clamp(min=0).sqrt().sum()
    shift = (mu1 - mu2).square().sum()
    distance = shift + sigma1.trace() + sigma2.trace() - 2 * overlap
    return distance.clamp(min=0).item()


def torch_fidelity_metrics(
        generated, real, weights_path, cache, names, moments=None, device='cpu', batch_size=50):
    """FID, Inception score, precision and recall (k = 3) of generated against real images, by torch-fidelity.

    generated, real: uint8 (N, 3, H, W) with N ≥ 10, else UserError (the Inception score splits its images in
    ten). weights_path: Inception's weights. cache, names: a folder, and names of the two sets in it, so that
    a set used twice is encoded once. moments: published (mu, sigma) of real features. FID is then measured
    against these, and real may be empty; precision and recall are None in that case.
    """
    if len(generated) < 10 or 0 < len(real) < 10:
        raise UserError(f'{len(generated)} images against {len(real)}: FID, IS, precision and recall need '
                        f'at least 10 on both sides')
    from torch_fidelity import calculate_metrics
    from torch_fidelity.utils import (
        create_feature_extractor, extract_featuresdict_from_input_id_cached)

    options = {
        'input1': Subset(generated, range(len(generated))),
        'input2': Subset(real, range(len(real))),
        'input1_cache_name': names[0],
        'input2_cache_name': names[1],
        'cache_root': cache,
        'feature_extractor': 'inception-v3-compat',
        'feature_extractor_weights_path': weights_path,
        'cuda': torch.device(device).type == 'cuda',
        'batch_size': batch_size,
        'save_cpu_ram': True,
        'verbose': False,
    }
    if moments:                                             # extract the layers of FID and IS in one pass
        layers = ['2048', 'logits_unbiased']
        extractor = create_feature_extractor('inception-v3-compat', layers, **options)
        features = extract_featuresdict_from_input_id_cached(1, extractor, **options)
        fid = frechet_distance(*statistics(features['2048']), *(m.double() for m in moments))
    found = calculate_metrics(isc=True, fid=not moments, prc=len(real) > 0, **options)
    return {
        'fid': fid if moments else found['frechet_inception_distance'],
        'isc': found['inception_score_mean'],
        'precision': found.get('precision'),
        'recall': found.get('recall'),
    }


# -----------------------------------------------------------------------------
# the CNN behind FD-cnn

class SmallCNN(nn.Module):
    """A small image classifier: four 3 × 3 convolutions with BatchNorm, features averaged over the image.

    Images (B, 3, S, S) in [−1, 1]. Those wider than 64 px are averaged down to 64.
    """

    def __init__(self, num_classes):
        super().__init__()
        widths = 3, 32, 64, 128, 128
        layers = []
        for width_in, width_out, stride in zip(widths, widths[1:], (1, 2, 2, 1)):
            layers += [
                nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width_out),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(128, num_classes)

    def features(self, x):
        """(B, 3, S, S) → (B, 128)."""
        if x.shape[-1] > 64:
            x = F.interpolate(x, (64, 64), mode='area')
        return self.layers(x).mean((2, 3))

    def forward(self, x):
        """(B, 3, S, S) → class logits (B, num_classes)."""
        return self.head(self.features(x))


def mirror_and_shift(x, generator):
    """Mirrors about half of the images (B, 3, S, S) and shifts all of them by the same offset, up to S/8."""
    S = x.shape[-1]
    shift = S // 8
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    top, left = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
    x = torch.where(to_device(mirrored, x.device), x.flip(-1), x)
    x = F.pad(x, 4 * [shift], mode='reflect')
    return x[:, :, top:top + S, left:left + S]


def train_cnn(images, labels, num_classes, steps, batch, lr, augment=False, device='cpu', seed=0):
    """Trains a SmallCNN on images uint8 (N, 3, S, S) with labels (N,); returns it in eval mode.

    The same seed gives the same CNN. augment: mirror_and_shift, for photos, whose class survives both.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cnn = SmallCNN(num_classes)
    cnn.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(cnn.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = runtime.generator(seed, 6)                  # a name would change FD-cnn
    with runtime.progress(steps, label='cnn', images_per_step=batch) as bar:
        for _ in range(steps):
            picks = torch.randint(len(images), (batch,), generator=generator)
            x = normalize(to_device(images[picks], device)).contiguous(memory_format=torch.channels_last)
            if augment:
                x = mirror_and_shift(x, generator)
            loss = F.cross_entropy(cnn(x), to_device(labels[picks], device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return cnn.eval()


@torch.no_grad()
def cnn_statistics(cnn, images, labels):
    """statistics() of the CNN's features of uint8 images, and its accuracy on their labels, if any."""
    device = cnn.head.weight.device
    features = torch.cat([
        cnn.features(normalize(to_device(batch, device)))
        for batch in images.split(256)])
    predicted = cnn.head(features).argmax(1).cpu()
    accuracy = None
    if labels is not None:
        accuracy = (predicted == labels).float().mean().item()
    return statistics(features.cpu()), accuracy
