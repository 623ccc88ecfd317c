"""The two VQ-VAEs (paper, section 3.3): Q_L for structure, Q_A for alias.

StructureTokenizer is VAR's multi-scale residual quantizer, fed with focus states instead of one feature map:

    f̂_0 = 0
    r_k  = nearest code of (e_k − area(f̂_{k−1} → p_k)),   e_k = area(Encoder(F_ρk(x)) → p_k)
    f̂_k = f̂_{k−1} + φ_k(bicubic(code(r_k) → p_K))
    focus state k = Decoder(f̂_k) ≈ F_ρk(x),   Decoder(f̂_K) ≈ x

With pyramid='scale' every ρ_k is zero, and this is VAR's own tokenizer, which takes its
published weights. AliasTokenizer is a
plain VQ-VAE over the views A_k that the blur removed. It is used in training only.

Encoder and Decoder follow VQGAN (Esser et al. 2021) as VAR publishes it. Images are (B, 3, S, S) in [−1, 1].
"""
import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError
from pyramid import build_pyramid, defocus, focus_radii, in_float32, noise_levels, noise_like
from util.checkpoint import blame, load_checkpoint, load_weights
from util.runtime import to_device


# -----------------------------------------------------------------------------
# convolutional encoder and decoder

def group_norm(channels):
    """32 groups, as in VQGAN, if 32 divides the width; otherwise 8, 4, 2 or 1, of at least two channels each.

    A group of a single channel loses the mean colour of the picture, which is all that the first token map
    holds. A small network should therefore not be 32 channels wide.
    """
    fitting = [g for g in (8, 4, 2) if channels % g == 0 and channels > g]
    groups = 32 if channels % 32 == 0 else max(fitting, default=1)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1 convolution on x where the width changes."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = group_norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """x + self-attention over the pixels, with one head."""

    def __init__(self, width):
        super().__init__()
        self.norm = group_norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).unflatten(1, (3, 1, -1)).flatten(-2)
        q, k, v = qkv.mT.unbind(1)                          # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.mT.reshape_as(x))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention at the lowest resolution."""

    def __init__(self, width_in, width_out, blocks, attention):
        super().__init__()
        widths = [width_in] + [width_out] * blocks
        self.blocks = nn.ModuleList(ResBlock(*pair) for pair in pairwise(widths))
        self.attentions = nn.ModuleList(
            SpatialAttention(width_out) if attention else nn.Identity() for _ in range(blocks))

    def forward(self, x):
        for block, attention in zip(self.blocks, self.attentions):
            x = attention(block(x))
        return x


def middle(width):
    return nn.Sequential(ResBlock(width, width), SpatialAttention(width), ResBlock(width, width))


def downsample(width):
    """Stride 2, padded on the right and at the bottom only."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))


def upsample(width):
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1))


def init_convolutions(network):
    """Xavier weights. Residual branches start at zero: the network begins as its skip connections alone."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, SpatialAttention):
            nn.init.zeros_(module.proj.weight)


class Encoder(nn.Module):
    """(B, 3, p·f, p·f) → (B, codebook_dim, p, p), with f = 2^(len(channel_mult) − 1)."""

    def __init__(self, channels, channel_mult, res_blocks, codebook_dim):
        super().__init__()
        widths = [channels * m for m in channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(*pair, res_blocks, i == last) for i, pair in enumerate(pairwise([channels, *widths])))
        self.samplers = nn.ModuleList([*map(downsample, widths[:-1]), nn.Identity()])
        self.middle = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], codebook_dim, 3, padding=1)
        init_convolutions(self)

    def forward(self, x):
        x = self.conv_in(x)
        for level, sampler in zip(self.levels, self.samplers):
            x = sampler(level(x))
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """(B, codebook_dim, p, p) → (B, 3, p·f, p·f). Levels run from the lowest resolution to the highest."""

    def __init__(self, channels, channel_mult, res_blocks, codebook_dim):
        super().__init__()
        widths = [channels * m for m in reversed(channel_mult)]
        self.conv_in = nn.Conv2d(codebook_dim, widths[0], 3, padding=1)
        self.middle = middle(widths[0])
        self.levels = nn.ModuleList(
            Level(*pair, res_blocks + 1, i == 0) for i, pair in enumerate(pairwise([widths[0], *widths])))
        self.samplers = nn.ModuleList([*map(upsample, widths[:-1]), nn.Identity()])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        init_convolutions(self)

    def hidden(self, x):
        """Everything but the last convolution: (B, channels, p·f, p·f)."""
        x = self.middle(self.conv_in(x))
        for level, sampler in zip(self.levels, self.samplers):
            x = sampler(level(x))
        return F.silu(self.norm_out(x))

    def forward(self, x):
        return self.conv_out(self.hidden(x))


def compile_convolutions(structure):
    """Compiles Q_L's encoder and decoder in place. Q_A is a small part of the work, and its K − 1 view sizes
    would each have to be compiled."""
    structure.encoder.compile()
    structure.decoder.hidden = torch.compile(structure.decoder.hidden)      # what training calls


# -----------------------------------------------------------------------------
# quantizers

def area(x, size):
    """Average pooling to (size, size): how feature maps go down the pyramid."""
    return x if x.shape[-1] == size else F.interpolate(x, size, mode='area')


def bicubic(x, size):
    """Bicubic resizing to (size, size): how code maps return to full size."""
    return x if x.shape[-1] == size else F.interpolate(x, size, mode='bicubic')


class Codebook(nn.Embedding):
    """Codes found by Euclidean distance. Their use is counted per token map, so collapse is visible.

    usage (K, vocab_size): a running average of how many times per step a code was used.
    """

    def __init__(self, vocab_size, codebook_dim, num_maps):
        super().__init__(vocab_size, codebook_dim)
        self.register_buffer('usage', torch.zeros(num_maps, vocab_size))
        nn.init.uniform_(self.weight, -1 / vocab_size, 1 / vocab_size)

    def nearest(self, vectors):
        """(B, C, p, p) → index of the nearest code, (B, p²) int64. bfloat16 would make codes tie."""
        with torch.no_grad(), in_float32(vectors.device):
            z = vectors.float().flatten(2).mT.flatten(0, 1)
            codes = self.weight.float()
            norms = codes.square().sum(1)
            found = [(part.square().sum(1, keepdim=True) + norms - 2 * part @ codes.T).argmin(1)
                     for part in z.split(2 ** 14)]          # half a GiB of distances to 8192 codes
            return torch.cat(found).view(len(vectors), -1)

    def lookup(self, tokens):
        """(B, p²) indices → (B, C, p, p) codes."""
        p = math.isqrt(tokens.shape[1])
        return self(tokens).mT.unflatten(2, (p, p))

    def histogram(self, tokens):
        """How often each code was used: list of (B, p²) → (K, vocab_size). bincount would synchronise."""
        hits = torch.zeros_like(self.usage)
        for row, token_map in zip(hits, tokens):
            row.scatter_add_(0, token_map.flatten(), row.new_ones(token_map.numel()))
        return hits

    @torch.no_grad()
    def count(self, hits, finite=True, decay=0.99):
        """Folds the histogram of a step, over all ranks, into `usage`, unless `finite` is false."""
        self.usage.lerp_(hits, (1 - decay) * finite)

    def perplexity(self):
        """exp(entropy) of code use per token map, (K,): 1 means collapse, vocab_size means even use."""
        p = self.usage / self.usage.sum(1, keepdim=True).clamp(min=1e-9)
        return torch.special.entr(p).sum(1).exp()

    @torch.no_grad()
    def reseed(self, vectors, generator, threshold, finite=True):
        """Moves dead codes (used less than `threshold` times the average) onto vectors. Returns how many.

        vectors: per token map, the (n_k, C) quantizer inputs. A map is chosen first, then one of its
        vectors, so the few tokens of coarse maps get codes too. A vector is drawn for every code, dead or
        not, so no GPU sync is needed. Nothing changes if `finite` is false.
        """
        use, (codes, dim) = self.usage.sum(0), self.weight.shape
        dead = (use < threshold * use.mean()) & finite
        lengths = torch.tensor([len(v) for v in vectors])
        maps = torch.randint(len(vectors), (codes,), generator=generator)
        place = (torch.rand(codes, generator=generator, dtype=torch.float64) * lengths[maps]).long()
        picks = lengths.cumsum(0)[maps] - lengths[maps] + place
        chosen = torch.cat(vectors)[to_device(picks, use.device)].float()
        # jitter keeps two codes from being equal, which would make the second one dead again at once
        jitter = to_device(torch.randn(codes, dim, generator=generator), use.device) * chosen.std() * 1e-2
        self.weight.copy_(torch.where(dead[:, None], chosen + jitter, self.weight))
        average = self.usage.sum(1, keepdim=True) / codes
        self.usage.copy_(torch.where(dead, average, self.usage))
        return dead.sum()


class MultiScaleQuantizer(nn.Module):
    """VAR's residual quantizer over token maps p_1 … p_K, with one target feature map e_k per token map.

    φ_k is one of `phis` 3×3 convolutions, shared by neighbouring maps and applied as ½h + ½conv(h).
    """

    def __init__(self, patch_nums, vocab_size, codebook_dim, phis=4):
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.codebook = Codebook(vocab_size, codebook_dim, len(patch_nums))
        self.phi = nn.ModuleList(nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1) for _ in range(phis))
        # the φ convolutions lie at `phis` places between 0 and 1 (as published), map k at (k−1)/(K−1)
        edge = (1 / 3 if phis == 4 else 1 / 2) / phis
        of_phi = np.linspace(edge, 1 - edge, phis)
        of_map = np.arange(len(patch_nums)) / max(1, len(patch_nums) - 1)
        self.phi_of_map = abs(of_phi - of_map[:, None]).argmin(1).tolist()

    def refine(self, codes, k):
        """φ_k(bicubic(codes → p_K)), what map k adds to f̂: (B, C, p_k, p_k) → (B, C, p_K, p_K)."""
        h = bicubic(codes, self.patch_nums[-1])
        return 0.5 * h + 0.5 * self.phi[self.phi_of_map[k]](h)

    def accumulate(self, tokens):
        """f̂_1 … f̂_K from all token maps, or from a prefix of them. Each is (B, C, p_K, p_K)."""
        f_hat, states = 0, []
        for k, token_map in enumerate(tokens):
            f_hat = f_hat + self.refine(self.codebook.lookup(token_map), k)
            states.append(f_hat)
        return states

    def forward(self, targets):
        """targets e_k (B, C, p_k, p_k) → lists of tokens, states f̂_k, and residuals (what was quantized)."""
        f_hat = torch.zeros_like(bicubic(targets[0], self.patch_nums[-1]))
        tokens, states, residuals = [], [], []
        for k, (p, target) in enumerate(zip(self.patch_nums, targets)):
            residuals.append((target - area(f_hat, p)).detach())
            tokens.append(self.codebook.nearest(residuals[k]))
            f_hat = f_hat + self.refine(self.codebook.lookup(tokens[k]), k)
            states.append(f_hat)
        return tokens, states, residuals


def straight_through(quantized, features):
    """The value of `quantized` with the gradient of `features`."""
    return quantized.detach() + features - features.detach()


def vq_loss(quantized, features, beta):
    """Pulls codes to the features, and features to the codes with weight beta (van den Oord et al. 2017)."""
    return F.mse_loss(quantized, features.detach()) + beta * F.mse_loss(features, quantized.detach())


# -----------------------------------------------------------------------------
# Q_L

PIXELS_PER_PART = 2 ** 20       # 16 pictures of 256 px, one of 1024 px


def in_parts(function, x, side, grad_checkpoint):
    """function(x) for pictures of `side` pixels. Without gradients it runs part by part, to bound memory.

    grad_checkpoint: with gradients too; then the backward pass recomputes each part.
    """
    learns = torch.is_grad_enabled()
    if learns and not grad_checkpoint:
        return function(x)
    parts = x.split(max(1, PIXELS_PER_PART // side ** 2))
    if learns:
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([function(part) for part in parts])


def decode_in_parts(decoder, codes, side, grad_checkpoint, post_quant=nn.Identity()):
    """decoder(post_quant(codes)), computed by in_parts.

    With gradients the last convolution stays outside: VQGAN's adaptive weight asks for the gradient of its
    weights alone, and inside a checkpoint that would recompute every part.
    """
    learns = torch.is_grad_enabled()
    network = decoder.hidden if learns else decoder
    decoded = in_parts(lambda part: network(post_quant(part)), codes, side, grad_checkpoint)
    return decoder.conv_out(decoded) if learns else decoded


class StructureTokenizer(nn.Module):
    """Q_L: images → token maps r_1 … r_K, and back. Every prefix of the maps decodes to a focus state.

    pyramid      'focus', or 'scale': VAR's tokenizer, with all radii zero and VAR's own VQ loss
                 (kernel='none' only drops blur and noise)
    focus_input  'image': defocus the full-size image and pool its features; 'view': encode L_k itself (Eq. 3)
    kernel, focus_schedule, max_radius   see pyramid.py
    noise        β_1 and β_K of Eq. 3. With focus_input='image' it is added at full size, so Q_L and Q_A see
                 different noise: A_k = D_k − L_k holds for the views of build_pyramid.
    Raises UserError if image_size, patch_nums and channel_mult do not fit together.
    """

    def __init__(self, image_size, patch_nums, vocab_size, codebook_dim, channels,
                 channel_mult=(1, 1, 2, 2, 4), res_blocks=2, phis=4, pyramid='focus', focus_input='image',
                 focus_schedule='matched', max_radius=12.0, kernel='disk', noise=(1e-3, 1e-2), beta=0.25):
        super().__init__()
        radii = focus_radii(patch_nums, image_size, max_radius, focus_schedule)
        check_sizes(image_size, patch_nums, channel_mult)
        if pyramid not in ('focus', 'scale') or focus_input not in ('image', 'view'):
            raise UserError(f'pyramid={pyramid!r}, focus_input={focus_input!r}: '
                            'choose focus or scale, and image or view')
        if len(noise) != 2 or min(noise) < 0:
            raise UserError(f'noise={tuple(noise)}: give two numbers, β_1 and β_K, both 0 or more')
        self.image_size = image_size
        self.patch_nums = tuple(patch_nums)
        self.noise = noise
        self.beta = beta
        self.pyramid, self.grad_checkpoint = pyramid, False
        self.focus_input, self.kernel = (focus_input, kernel) if pyramid == 'focus' else ('image', 'none')
        self.radii = radii if self.kernel != 'none' else [0.0] * len(patch_nums)
        # refuse an unknown kernel, or one that does not fit the picture, now and not in the first step
        defocus(torch.empty(1, 1, image_size, image_size, device='meta'), max(self.radii), kernel)
        self.encoder = Encoder(channels, channel_mult, res_blocks, codebook_dim)
        self.decoder = Decoder(channels, channel_mult, res_blocks, codebook_dim)
        self.pre_quant = nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1)
        self.post_quant = nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(patch_nums, vocab_size, codebook_dim, phis)

    # -- images to tokens

    def features(self, images):
        """(B, 3, p·f, p·f) → (B, C, p, p), before quantization."""
        side = images.shape[-1]
        return in_parts(lambda part: self.pre_quant(self.encoder(part)), images, side, self.grad_checkpoint)

    def state_features(self, images, generator=None, radii=None):
        """The features of every focus state: (B, C, p_K, p_K), or (B, C, p_k, p_k) with focus_input='view'.

        generator: adds the noise of Eq. 3; None adds none. radii: in place of the tokenizer's; fewer than K
        give the first maps.
        """
        radii = self.radii if radii is None else radii
        if self.focus_input == 'view':
            views, _, _ = build_pyramid(images, self.patch_nums, radii, self.noise, self.kernel, generator)
            return [self.features(view) for view in views]
        noisy = generator is not None and self.kernel != 'none'
        betas = noise_levels(self.noise, len(self.patch_nums))
        radii = [max(radius, 0.5) for radius in radii]      # ρ ≤ ½ is the identity
        image_of = {}                                       # radius → image, each of which is encoded once
        for k, radius in enumerate(radii):
            if radius not in image_of:
                state = defocus(images, radius, self.kernel)
                image_of[radius] = state + betas[k] * noise_like(images, k, generator) if noisy else state
        features = self.features(torch.cat(list(image_of.values()))).chunk(len(image_of))
        features_of = dict(zip(image_of, features))
        return [features_of[radius] for radius in radii]

    @torch.no_grad()
    def encode(self, images, generator=None, radii=None):
        """(B, 3, S, S) in [−1, 1] → token maps: a list of (B, p_k²) int64. The rest as in state_features."""
        features = self.state_features(images, generator, radii)
        return self.quantizer([area(f, p) for f, p in zip(features, self.patch_nums)])[0]

    # -- tokens to images

    def decode_features(self, f_hat):
        """f̂ (B, C, p_K, p_K) → images, not clamped."""
        return decode_in_parts(self.decoder, f_hat, self.image_size, self.grad_checkpoint, self.post_quant)

    @torch.no_grad()
    def decode_states(self, tokens):
        """All token maps, or a prefix → the focus states they decode to: a list of images in [−1, 1]."""
        return [self.decode_features(f_hat).clamp(-1, 1) for f_hat in self.quantizer.accumulate(tokens)]

    def focus_states(self, images):
        """What the states should decode to: F_ρk(x) of images (B, 3, S, S) for every token map k."""
        return [defocus(images, radius, self.kernel) for radius in self.radii]

    @torch.no_grad()
    def decode(self, tokens):
        """Token maps → images (B, 3, S, S) in [−1, 1]."""
        return self.decode_features(self.quantizer.accumulate(tokens)[-1]).clamp(-1, 1)

    @torch.no_grad()
    def token_inputs(self, tokens):
        """What the transformer reads in training: area(f̂_k → p_{k+1}) for k < K, as (B, L − p_1², C)."""
        states = self.quantizer.accumulate(tokens[:-1])
        pooled = [area(f_hat, p).flatten(2) for f_hat, p in zip(states, self.patch_nums[1:])]
        return torch.cat(pooled, 2).mT

    # -- training

    def autoencode(self, images):
        """Encodes and decodes images without the quantizer in between."""
        return self.decode_features(self.features(images))

    def forward(self, images, generator, state=None):
        """One training pass: a namespace of picture, state_picture, vq (the VQ loss), tokens and residuals.

        state: index of the token map whose focus state is decoded too, into state_picture; None for none.
        """
        features = self.state_features(images, generator)
        targets = [area(f, p) for f, p in zip(features, self.patch_nums)]
        tokens, states, residuals = self.quantizer(targets)

        if self.pyramid == 'scale':                         # VAR compares every f̂_k with f at full size
            losses = [vq_loss(f_hat, features[-1], self.beta) for f_hat in states]
            vq = sum(losses) / len(losses)
        else:                                               # a focus state is compared with its own target
            losses = [p * vq_loss(area(f_hat, p), e, self.beta)
                      for p, f_hat, e in zip(self.patch_nums, states, targets)]
            vq = sum(losses) / sum(self.patch_nums)

        decoded = straight_through(states[-1], features[-1])
        if state is not None:
            # detached: only the decoder learns from this state, not the codes or the encoder
            decoded = torch.cat([decoded, states[state].detach()])
        picture, *others = self.decode_features(decoded).split(len(images))
        state_picture = others[0] if others else None
        return SimpleNamespace(
            picture=picture, state_picture=state_picture, vq=vq, tokens=tokens, residuals=residuals)


def check_sizes(image_size, patch_nums, channel_mult):
    """UserError unless the encoder takes image_size to p_K."""
    f = 2 ** (len(channel_mult) - 1)
    if min(channel_mult, default=0) < 1:
        raise UserError(f'channel_mult={tuple(channel_mult)}: give numbers of at least 1')
    if image_size != f * patch_nums[-1]:
        raise UserError(f'image_size={image_size} does not fit patch_nums ending in {patch_nums[-1]}: with '
                        f'{len(channel_mult)} entries in channel_mult the tokenizer reduces by {f}, so '
                        f'image_size must be {f * patch_nums[-1]}')


# -----------------------------------------------------------------------------
# Q_A

class AliasTokenizer(nn.Module):
    """Q_A: the alias views A_1 … A_{K−1} → one plain VQ map each, without a residual chain. Training only.

    There is no A_K, because nothing is removed at the last map. Each view is divided by `scale`, its running
    root mean square, since alias energy differs by an order of magnitude between maps.
    dual=False: the encoder, codebook and decoder of `structure` serve both tokenizers (Table 3, "w/o dual
    tokenizers").
    """

    def __init__(self, structure, vocab_size=512, codebook_dim=8, channels=64, channel_mult=(1, 1, 2, 2, 4),
                 res_blocks=1, beta=0.25, dual=True):
        super().__init__()
        check_sizes(structure.image_size, structure.patch_nums, channel_mult)
        self.patch_nums = structure.patch_nums[:-1]
        self.beta = beta
        self.dual = dual
        self.reduction = 2 ** (len(channel_mult) - 1)
        self.grad_checkpoint = False
        self._structure = (structure,)                      # in a tuple, which keeps its weights out of ours
        self.register_buffer('scale', torch.zeros(len(self.patch_nums)))
        if dual:
            self.encoder = Encoder(channels, channel_mult, res_blocks, codebook_dim)
            self.decoder = Decoder(channels, channel_mult, res_blocks, codebook_dim)
            self.own_codebook = Codebook(vocab_size, codebook_dim, len(self.patch_nums))

    @property
    def codebook(self):
        return self.own_codebook if self.dual else self._structure[0].quantizer.codebook

    @property
    def vocab_size(self):
        return self.codebook.num_embeddings

    def views(self, images, generator=None):
        """A_1 … A_{K−1} in image units, each (B, 3, p_k·f, p_k·f). generator: adds the noise of Eq. 3."""
        structure = self._structure[0]
        _, _, alias = build_pyramid(
            images, structure.patch_nums, structure.radii, structure.noise, structure.kernel, generator)
        return alias[:-1]

    @torch.no_grad()
    def track_scale(self, energy, finite=True, decay=0.99):
        """Updates `scale` from the mean squares of the views, (K − 1,), unless `finite` is false."""
        followed = decay * self.scale + (1 - decay) * energy.sqrt()
        updated = torch.where(self.scale == 0, energy.sqrt(), followed)
        self.scale.copy_(torch.where(torch.as_tensor(finite), updated, self.scale))

    def divisors(self, energy=None):
        """What views are divided by, (K − 1,). energy: their mean squares, used until `scale` is tracked."""
        scale = self.scale if energy is None else torch.where(self.scale == 0, energy.sqrt(), self.scale)
        return scale.clamp(min=1e-3)

    def normalised(self, views, energy=None):
        return [view / divisor for view, divisor in zip(views, self.divisors(energy))]

    def features(self, view):
        if not self.dual:
            return self._structure[0].features(view)
        return in_parts(self.encoder, view, view.shape[-1], self.grad_checkpoint)

    def decode_features(self, codes):
        if not self.dual:
            return self._structure[0].decode_features(codes)
        return decode_in_parts(self.decoder, codes, codes.shape[-1] * self.reduction, self.grad_checkpoint)

    @torch.no_grad()
    def encode(self, images, generator=None):
        """(B, 3, S, S) in [−1, 1] → alias token maps: a list over k < K of (B, p_k²) int64."""
        views = self.normalised(self.views(images, generator))
        return [self.codebook.nearest(self.features(view)) for view in views]

    @torch.no_grad()
    def decode(self, tokens):
        """Alias token maps → the views Â_k in image units."""
        views = [self.decode_features(self.codebook.lookup(token_map)) for token_map in tokens]
        return [view * divisor for view, divisor in zip(views, self.divisors())]

    def forward(self, views):
        """One training pass over normalised views: a namespace of l2, vq (the losses), tokens, features.

        l2 is the mean over the views, in units of each view's energy.
        """
        features = [self.features(view) for view in views]
        tokens = [self.codebook.nearest(f) for f in features]
        codes = [self.codebook.lookup(token_map) for token_map in tokens]
        decoded = [self.decode_features(straight_through(c, f)) for c, f in zip(codes, features)]
        l2 = sum(map(F.mse_loss, decoded, views)) / len(views)
        vq = sum(vq_loss(c, f, self.beta) for c, f in zip(codes, features)) / len(views)
        return SimpleNamespace(l2=l2, vq=vq, tokens=tokens, features=[f.detach() for f in features])


# -----------------------------------------------------------------------------
# files

STRUCTURE_SETTINGS = (
    'image_size', 'patch_nums', 'vocab_size', 'codebook_dim', 'channels', 'channel_mult', 'res_blocks',
    'phis', 'pyramid', 'focus_input', 'focus_schedule', 'max_radius', 'kernel', 'noise', 'beta')


def build_tokenizers(config):
    """(StructureTokenizer, AliasTokenizer) from the settings of train_tokenizer.py."""
    structure = StructureTokenizer(**{name: config[name] for name in STRUCTURE_SETTINGS if name in config})
    own = {name: config[f'alias_{name}'] for name in ('vocab_size', 'codebook_dim', 'channels', 'res_blocks')}
    common = {name: config[name] for name in ('channel_mult', 'beta', 'dual')}
    return structure, AliasTokenizer(structure, **own, **common)


def load_tokenizers(path, device='cpu'):
    """(StructureTokenizer, AliasTokenizer, checkpoint) as train_tokenizer.py saved them, in eval mode."""
    checkpoint = load_checkpoint(path, 'tokenizer', made_by='train_tokenizer.py')
    with blame(path):
        tokenizers = build_tokenizers(checkpoint['config'])
        for name, tokenizer in zip(('structure', 'alias'), tokenizers):
            load_weights(tokenizer, checkpoint[name], path)
            tokenizer.to(device, memory_format=torch.channels_last).eval()
    return *tokenizers, checkpoint
