"""How good pictures are: two of them, two sets of them, and the small CNN behind FD-cnn.

Images are float (B, 3, H, W) in [−1, 1] where pairs are compared, uint8 (N, 3, H, W) where sets are.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from util import runtime
from configurator import UserError
from data import normalize


# -----------------------------------------------------------------------------
# two images

def psnr(a, b):
    """Peak signal-to-noise ratio in dB, the mean over the images of each one's own. a, b (B, 3, H, W) in [−1, 1].

    The peak is 2, the width of the range. Equal images have inf.
    """
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()


def ssim(a, b):
    """Structural similarity (Wang et al. 2004), mean over images, channels and windows. a, b (B, C, H, W) in [−1, 1].

    11 × 11 Gaussian windows of σ = 1.5 that lie inside the image, K₁ = 0.01, K₂ = 0.03, range 2; on each colour
    channel, at full size. Raises UserError for images smaller than a window.
    """
    H, W = a.shape[-2:]
    if min(H, W) < 11:
        raise UserError(f'SSIM needs images of at least 11 × 11 pixels, got {H} × {W}')
    window = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5 ** 2))
    window = window / window.sum()
    # windowed means as matrix products: float64, because variances are small differences of large numbers
    down, across = (torch.eye(n, dtype=torch.float64).unfold(1, 11, 1) @ window for n in (H, W))   # (n, n − 10)

    def mean(x):
        return down.T @ x @ across

    a, b = a.cpu().double(), b.cpu().double()
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a ** 2, mean(b * b) - mean_b ** 2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a ** 2 + mean_b ** 2 + c1) * (variance_a + variance_b + c2)))
    return similarity.mean().item()


# -----------------------------------------------------------------------------
# two sets of images

def statistics(features):
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64. Raises UserError for N < 2."""
    if len(features) < 2:
        raise UserError(f'a Fréchet distance needs at least 2 images, got {len(features)}')
    features = features.double()
    mu = features.mean(0)
    return mu, (features - mu).T @ (features - mu) / (len(features) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), as Heusel et al. 2017 define FID. Means (D,), covariances (D, D).

    Σ₁Σ₂ has the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½, so no matrix needs an inverse and singular ones are fine.
    """
    mu1, sigma1, mu2, sigma2 = (t.double() for t in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap).clamp(min=0).item()


def torch_fidelity_metrics(generated, real, weights_path, device='cpu', batch_size=50, cache='', names=(None, None), moments=None):
    """FID, Inception score, precision and recall (k = 3) of generated against real images, by torch-fidelity.

    generated, real: uint8 (N, 3, H, W), N ≥ 10 each (IS takes ten parts). weights_path: Inception's weights on disk.
    cache, names: a folder, and names of the two sets in it, so that a set compared twice is looked at once.
    moments: published (mu, sigma) of real features: FID is then measured to them, and real may be None: no precision
    and recall. UserError for smaller sets.
    """
    sizes = [len(images) for images in (generated, real) if images is not None]
    if min(sizes) < 10:
        raise UserError(f'{" and ".join(map(str, sizes))} images: FID, IS, precision and recall need at least 10 on both sides')
    from torch_fidelity import calculate_metrics
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id_cached

    class Pictures(torch.utils.data.TensorDataset):         # items must be tensors, not tuples of one
        def __getitem__(self, index):
            return self.tensors[0][index]

    options = dict(
        input1=Pictures(generated), input2=None if real is None else Pictures(real), feature_extractor='inception-v3-compat',
        feature_extractor_weights_path=str(weights_path), input1_cache_name=names[0], input2_cache_name=names[1],
        cache=bool(cache), cache_root=str(cache) or None, cuda=torch.device(device).type == 'cuda', batch_size=batch_size,
        save_cpu_ram=True, verbose=False)
    if moments:                                             # both layers at once, for IS then finds its own in the cache
        extractor = create_feature_extractor('inception-v3-compat', ['2048', 'logits_unbiased'], **options)
        features = extract_featuresdict_from_input_id_cached(1, extractor, **options)['2048']
    found = calculate_metrics(isc=True, fid=moments is None, prc=real is not None, **options)
    return {'fid': frechet_distance(*statistics(features), *moments) if moments else found['frechet_inception_distance'],
            'isc': found['inception_score_mean'], 'precision': found.get('precision'), 'recall': found.get('recall')}


# -----------------------------------------------------------------------------
# the CNN behind FD-cnn

class SmallCNN(nn.Module):
    """A small classifier of pictures: four 3×3 convolutions with BatchNorm, and the mean over the picture as features.

    Images (B, 3, S, S) in [−1, 1]; those wider than 64 px are averaged down to 64.
    """

    def __init__(self, num_classes, width=32):
        super().__init__()
        layers, shapes = [], [(3, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
        for width_in, width_out, stride in shapes:
            layers += [nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(4 * width, num_classes)

    def features(self, x):
        """(B, 3, S, S) → (B, 4·width)."""
        if x.shape[-1] > 64:
            x = F.interpolate(x, (64, 64), mode='area')
        return self.layers(x).mean((2, 3))

    def forward(self, x):
        """(B, 3, S, S) → class logits (B, num_classes)."""
        return self.head(self.features(x))


def train_cnn(images, labels, num_classes, steps=300, batch=64, lr=5e-3, augment=False, device='cpu', seed=0):
    """A SmallCNN in eval mode, trained on images uint8 (N, 3, S, S) with labels (N,). The same seed gives the same CNN.

    augment: mirror half of the images and shift all by up to an eighth: for photographs, where mirrored and shifted
    is still the same class.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cnn = SmallCNN(num_classes)
    cnn = cnn.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(cnn.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = runtime.generator(seed, 6)
    shift = images.shape[-1] // 8
    bar = runtime.progress(steps, label='cnn', images_per_step=batch)
    for _ in range(steps):
        picks = torch.randint(len(images), (batch,), generator=generator)
        x = normalize(runtime.to_device(images[picks], device)).contiguous(memory_format=torch.channels_last)
        if augment:
            mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
            top, left = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
            x = torch.where(runtime.to_device(mirrored, device), x.flip(-1), x)
            x = F.pad(x, 4 * [shift], mode='reflect')[:, :, top:top + images.shape[-2], left:left + images.shape[-1]]
        loss = F.cross_entropy(cnn(x), runtime.to_device(labels[picks], device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    bar.close()
    return cnn.eval()


@torch.no_grad()
def look(cnn, images):
    """Features (N, D) and predicted classes (N,) of uint8 images, on the CPU."""
    dev = cnn.head.weight.device
    features = torch.cat([cnn.features(normalize(runtime.to_device(part, dev))) for part in images.split(256)])
    return features.cpu(), cnn.head(features).argmax(1).cpu()


def share(hits):
    return hits.float().mean().item()
