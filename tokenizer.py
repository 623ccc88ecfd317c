"""The two VQ-VAEs (paper, section 3.3): Q_L for structure, Q_A for alias.

StructureTokenizer is VAR's multi-scale residual quantizer, fed by focus states instead of one feature map:

    f̂_0 = 0
    r_k  = nearest code of (e_k − area(f̂_{k−1} → p_k)),   e_k = area(Encoder(F_ρk(x)) → p_k)
    f̂_k = f̂_{k−1} + φ_k(bicubic(code(r_k) → p_K))
    focus state k = Decoder(f̂_k) ≈ F_ρk(x),   Decoder(f̂_K) ≈ x

With pyramid='scale' every ρ_k is zero and this is VAR's own tokenizer, weights included. AliasTokenizer is a
plain VQ-VAE over the views A_k that the blur removed; it exists in training only.

Encoder and Decoder follow VQGAN (Esser et al. 2021) as VAR publishes it. Images are (B, 3, S, S) in [−1, 1].
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError
from pyramid import build_pyramid, defocus, focus_radii, in_float32, noise_levels, noise_like, psf, reflect_pad
from util.checkpoint import blame, load_checkpoint, load_weights
from util.runtime import to_device


# -----------------------------------------------------------------------------
# convolutional encoder and decoder

def group_norm(channels):
    """32 groups as in VQGAN, where 32 divides the width; else 8, 4, 2 or 1, of two channels at least.

    A group of one channel loses the mean colour of the picture, all that the first token map holds: so no small
    network should be 32 channels wide.
    """
    groups = 32 if channels % 32 == 0 else next((g for g in (8, 4, 2) if channels % g == 0 and channels > g), 1)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1 convolution on x where the width changes."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(width_in), nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(width_out), nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """x + self-attention over the pixels, one head."""

    def __init__(self, width):
        super().__init__()
        self.norm = group_norm(width)
        self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, 1, C, H * W).transpose(-1, -2).unbind(1)  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(B, C, H, W))


class Level(nn.Module):
    """The residual blocks of one resolution; attention after each at the lowest."""

    def __init__(self, width_in, width_out, blocks, attention):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(width_in if i == 0 else width_out, width_out) for i in range(blocks))
        self.attentions = nn.ModuleList(SpatialAttention(width_out) for _ in range(blocks if attention else 0))

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block1, self.attention, self.block2 = ResBlock(width, width), SpatialAttention(width), ResBlock(width, width)

    def forward(self, x):
        return self.block2(self.attention(self.block1(x)))


class Downsample(nn.Conv2d):
    """Stride 2, padded on the right and the bottom only."""

    def __init__(self, width):
        super().__init__(width, width, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    def __init__(self, width):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2, mode='nearest'))


def init_convolutions(network):
    """Xavier weights, and residual branches that start at zero: the network begins as its skip connections alone.

    On charts a plain autoencoder so started is 3 dB ahead of PyTorch's own initial values after 200 steps.
    """
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
    """(B, 3, p·f, p·f) → (B, codebook_dim, p, p), f = 2^(len(channel_mult) − 1)."""

    def __init__(self, channels, channel_mult, res_blocks, codebook_dim):
        super().__init__()
        widths = [channels * m for m in channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels = nn.ModuleList(Level(([channels] + widths)[i], widths[i], res_blocks, i == last)
                                    for i in range(len(widths)))
        self.samplers = nn.ModuleList(Downsample(width) for width in widths[:-1])
        self.middle = Middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], codebook_dim, 3, padding=1)
        init_convolutions(self)

    def forward(self, x):
        x = self.conv_in(x)
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.samplers):
                x = self.samplers[i](x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """(B, codebook_dim, p, p) → (B, 3, p·f, p·f); its levels run from the lowest resolution to the highest."""

    def __init__(self, channels, channel_mult, res_blocks, codebook_dim):
        super().__init__()
        widths = [channels * m for m in reversed(channel_mult)]
        self.conv_in = nn.Conv2d(codebook_dim, widths[0], 3, padding=1)
        self.middle = Middle(widths[0])
        self.levels = nn.ModuleList(Level(([widths[0]] + widths)[i], widths[i], res_blocks + 1, i == 0)
                                    for i in range(len(widths)))
        self.samplers = nn.ModuleList(Upsample(width) for width in widths[:-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)
        init_convolutions(self)

    def hidden(self, x):
        """All but the last convolution: (B, channels, p·f, p·f)."""
        x = self.middle(self.conv_in(x))
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.samplers):
                x = self.samplers[i](x)
        return F.silu(self.norm_out(x))

    def forward(self, x):
        return self.conv_out(self.hidden(x))


def compile_convolutions(structure):
    """Compiles Q_L's encoder and decoder in place: names of weights stay as they are.

    Not Q_A's: its views come in K − 1 sizes, each of which would have to be compiled, and are a twentieth of the work.
    """
    structure.encoder.compile()
    structure.decoder.hidden = torch.compile(structure.decoder.hidden)      # by which it is called in training


# -----------------------------------------------------------------------------
# quantizers

def area(x, size):
    """Average pooling to (size, size): how feature maps go down the pyramid."""
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode='area')


def bicubic(x, size):
    """How token maps come up again."""
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode='bicubic')


class Codebook(nn.Embedding):
    """Codes found by Euclidean distance, with use counted for every token map so that collapse can be seen.

    usage (maps, vocab_size): a running average of how many times a code was taken a step.
    """

    def __init__(self, vocab_size, codebook_dim, maps):
        super().__init__(vocab_size, codebook_dim)
        self.register_buffer('usage', torch.zeros(maps, vocab_size))
        nn.init.uniform_(self.weight, -1 / vocab_size, 1 / vocab_size)

    def nearest(self, vectors):
        """(B, C, p, p) → the index of the nearest code, (B, p²) int64. Always in float32: ties must not depend on AMP."""
        with torch.no_grad(), in_float32(vectors.device):
            z = vectors.float().flatten(2).transpose(1, 2).reshape(-1, vectors.shape[1])
            codes = self.weight.float()
            found = [(part.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * part @ codes.T).argmin(1)
                     for part in z.split(2 ** 14)]          # half a GiB of distances to 8192 codes
            return torch.cat(found).view(vectors.shape[0], -1)

    def maps(self, tokens):
        """(B, p²) indices → (B, C, p, p) codes."""
        p = math.isqrt(tokens.shape[1])
        return self(tokens).transpose(1, 2).reshape(tokens.shape[0], -1, p, p)

    def histogram(self, tokens):
        """How often each code was taken, (maps, vocab_size) float32, of tokens: list of (B, p²). Unlike bincount it never waits."""
        hits = torch.zeros_like(self.usage)
        for row, t in zip(hits, tokens):
            row.scatter_add_(0, t.flatten(), torch.ones_like(t.flatten(), dtype=hits.dtype))
        return hits

    @torch.no_grad()
    def count(self, hits, weight=1.0, decay=0.99):
        """Takes one step's histogram, over all ranks, into `usage`; not at all where weight (a number or tensor) is 0."""
        self.usage.lerp_(hits, (1 - decay) * weight)

    def perplexity(self):
        """exp(entropy) of the use of codes for every token map: 1 is collapse, vocab_size is even use. (maps,)"""
        share = self.usage / self.usage.sum(1, keepdim=True).clamp(min=1e-9)
        return torch.exp(-(share * share.clamp(min=1e-9).log()).sum(1))

    @torch.no_grad()
    def reseed(self, vectors, generator, threshold, weight=1):
        """Moves dead codes (used less than `threshold` of an even share) onto given vectors. Returns how many, a tensor.

        vectors: list over token maps of (n_k, C), what had to be quantized. A token map is drawn first and a
        vector of it second, so that the few tokens of coarse maps get codes as well as the many of fine ones.
        Every code draws, dead or not, so that nobody has to wait until it is known which are. weight: 0 leaves all as they are.
        """
        use, (codes, width) = self.usage.sum(0), self.weight.shape
        dead = (use < threshold * use.mean()) & (weight > 0)
        lengths = torch.tensor([len(v) for v in vectors])
        maps = torch.randint(len(vectors), (codes,), generator=generator)
        place = (torch.rand(codes, generator=generator, dtype=torch.float64) * lengths[maps]).long()
        picks = lengths.cumsum(0)[maps] - lengths[maps] + place
        chosen = torch.cat(vectors)[to_device(picks, use.device)].float()
        # no two codes may be equal, or the second is dead again at once
        jitter = to_device(torch.randn(codes, width, generator=generator), use.device) * chosen.std() * 1e-2
        self.weight.copy_(torch.where(dead[:, None], chosen + jitter, self.weight))
        fresh = self.usage.sum(1, keepdim=True) / codes     # a fresh start, not dead yet
        self.usage.copy_(torch.where(dead, fresh, self.usage))
        return dead.sum()


class MultiScaleQuantizer(nn.Module):
    """VAR's residual quantizer over token maps p_1 … p_K, with one target feature map e_k for each.

    φ_k are `phis` 3×3 convolutions shared by neighbouring maps, applied as ½h + ½conv(h).
    """

    def __init__(self, patch_nums, vocab_size, codebook_dim, phis=4):
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.codebook = Codebook(vocab_size, codebook_dim, len(patch_nums))
        self.phi = nn.ModuleList(nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1) for _ in range(phis))
        edge = (1 / 3 if phis == 4 else 1 / 2) / phis       # the published rule
        self.ticks = np.linspace(edge, 1 - edge, phis).tolist()

    def phi_of_map(self, k):
        """The index of the φ whose tick lies nearest to k/(K−1), k from 0."""
        return min(range(len(self.phi)), key=lambda i: abs(self.ticks[i] - k / max(1, len(self.patch_nums) - 1)))

    def contribution(self, tokens, k):
        """φ_k(bicubic(code(r_k) → p_K)), what map k adds to f̂: (B, C, p_K, p_K)."""
        return self.refine(self.codebook.maps(tokens), k)

    def refine(self, codes, k):
        h = bicubic(codes, self.patch_nums[-1])
        return 0.5 * h + 0.5 * self.phi[self.phi_of_map(k)](h)

    def accumulate(self, tokens):
        """f̂_1 … f̂_K from (a prefix of) the token maps, each (B, C, p_K, p_K)."""
        f_hat, states = 0, []
        for k, token_map in enumerate(tokens):
            f_hat = f_hat + self.contribution(token_map, k)
            states.append(f_hat)
        return states

    def forward(self, targets):
        """targets: list of e_k (B, C, p_k, p_k). Returns tokens, states f̂_k and residuals (what was quantized)."""
        f_hat = torch.zeros_like(bicubic(targets[0], self.patch_nums[-1]))
        tokens, states, residuals = [], [], []
        for k, (p, target) in enumerate(zip(self.patch_nums, targets)):
            residual = (target - area(f_hat, p)).detach()
            tokens.append(self.codebook.nearest(residual))
            f_hat = f_hat + self.contribution(tokens[k], k)
            states.append(f_hat)
            residuals.append(residual)
        return tokens, states, residuals


def straight_through(quantized, features):
    """The value of `quantized` with the gradient of `features`."""
    return quantized.detach() + features - features.detach()


def vq_loss(quantized, features, beta):
    """Codes go to the features, features stay near the codes (van den Oord et al. 2017)."""
    return F.mse_loss(quantized, features.detach()) + beta * F.mse_loss(features, quantized.detach())


# -----------------------------------------------------------------------------
# Q_L

AT_ONCE = 2 ** 20               # pixels: 16 pictures of 256 px, one of 1024


def in_parts(function, x, side, grad_checkpoint):
    """function(x), for pictures of `side` pixels: without gradients part by part, or a batch of 1024-px pictures would not fit.

    grad_checkpoint: with gradients too, and nothing inside a part is kept for the backward pass, which computes it again.
    """
    learns = torch.is_grad_enabled()
    if learns and not grad_checkpoint:
        return function(x)
    parts = x.split(max(1, AT_ONCE // side ** 2))
    if not learns:
        return torch.cat([function(part) for part in parts])
    return torch.cat([checkpoint(function, part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def decode_in_parts(decoder, codes, side, grad_checkpoint, before=nn.Identity()):
    """decoder(before(codes)) by in_parts.

    With gradients the last convolution stays outside: VQGAN's adaptive weight asks for the gradient of its weights alone, and
    inside it would make every part be computed again, and kept.
    """
    if not torch.is_grad_enabled():
        return in_parts(lambda part: decoder(before(part)), codes, side, grad_checkpoint)
    return decoder.conv_out(in_parts(lambda part: decoder.hidden(before(part)), codes, side, grad_checkpoint))


class StructureTokenizer(nn.Module):
    """Q_L: images → token maps r_1 … r_K, and back, every prefix decoding to a focus state.

    pyramid      'focus', or 'scale': all radii zero, which is VAR's tokenizer
    focus_input  'image': defocus the full-size image, pool its features; 'view': encode L_k itself (Eq. 3)
    kernel, focus_schedule, max_radius   see pyramid.py
    noise        β_1 and β_K of Eq. 3
    Raises UserError when image_size, patch_nums and channel_mult do not belong together.
    """

    def __init__(self, image_size=256, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocab_size=8192, codebook_dim=32,
                 channels=160, channel_mult=(1, 1, 2, 2, 4), res_blocks=2, phis=4, pyramid='focus',
                 focus_input='image', focus_schedule='matched', max_radius=12.0, kernel='disk',
                 noise=(1e-3, 1e-2), beta=0.25):
        super().__init__()
        check_sizes(image_size, patch_nums, channel_mult)
        if pyramid not in ('focus', 'scale') or focus_input not in ('image', 'view'):
            raise UserError(f'pyramid={pyramid!r}, focus_input={focus_input!r}: choose focus or scale, image or view')
        if len(noise) != 2 or min(noise) < 0:
            raise UserError(f'noise={tuple(noise)}: give two numbers, β_1 and β_K, both 0 or more')
        self.image_size, self.patch_nums, self.noise, self.beta = image_size, tuple(patch_nums), noise, beta
        self.pyramid, self.focus_input, self.kernel, self.grad_checkpoint = pyramid, focus_input, kernel, False
        self.radii = [0.0] * len(patch_nums)
        if pyramid == 'focus' and kernel != 'none':
            self.radii = focus_radii(patch_nums, image_size, max_radius, focus_schedule)
        # an unknown kernel, or one that does not fit the picture, is refused now and not in the first step
        reflect_pad(torch.empty(1, 1, image_size, image_size, device='meta'), psf(max(self.radii), kernel).shape[-1] // 2)
        self.encoder = Encoder(channels, channel_mult, res_blocks, codebook_dim)
        self.decoder = Decoder(channels, channel_mult, res_blocks, codebook_dim)
        self.pre_quant = nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1)
        self.post_quant = nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(patch_nums, vocab_size, codebook_dim, phis)

    # -- the way in

    def features(self, images):
        return in_parts(lambda part: self.pre_quant(self.encoder(part)), images, images.shape[-1], self.grad_checkpoint)

    def targets(self, images, generator=None, radii=None):
        """e_1 … e_K, each (B, C, p_k, p_k). With a generator the views carry the noise of Eq. 3.

        radii: other ones than the tokenizer's own; fewer than K give only the first maps.
        """
        radii = self.radii if radii is None else radii
        if self.focus_input == 'view' and self.pyramid == 'focus':
            noise = self.noise if generator is not None else (0.0, 0.0)
            views, _, _ = build_pyramid(images, self.patch_nums, radii, noise, self.kernel, generator)
            return [self.features(view) for view in views]
        return [area(f, p) for f, p in zip(self.focused_features(images, radii, generator), self.patch_nums)]

    def focused_features(self, images, radii, generator=None):
        """Encoder(F_ρk(x)) at full size for every radius; each distinct one is encoded once."""
        distinct = [max(r, 0.5) for r in radii]             # ρ ≤ ½ is the identity
        noisy = generator is not None and self.pyramid == 'focus' and self.kernel != 'none'
        states = {}
        for k, (radius, beta) in enumerate(zip(distinct, noise_levels(self.noise, len(distinct)))):
            if radius not in states:
                states[radius] = defocus(images, radius, self.kernel)
                if noisy:
                    states[radius] = states[radius] + beta * noise_like(images, k, generator)
        features = self.features(torch.cat(list(states.values()))).chunk(len(states))
        of_radius = dict(zip(states, features))
        return [of_radius[radius] for radius in distinct]

    @torch.no_grad()
    def encode(self, images, generator=None, radii=None):
        """(B, 3, S, S) in [−1, 1] → token maps, a list of (B, p_k²) int64. generator, radii: as in targets()."""
        return self.quantizer(self.targets(images, generator, radii))[0]

    # -- the way out

    def decode_features(self, f_hat):
        """f̂ (B, C, p_K, p_K) → images, not clamped."""
        return decode_in_parts(self.decoder, f_hat, self.image_size, self.grad_checkpoint, self.post_quant)

    @torch.no_grad()
    def decode_states(self, tokens):
        """Token maps (all K, or a prefix) → the focus states they decode to: a list of images in [−1, 1]."""
        return [self.decode_features(f_hat).clamp(-1, 1) for f_hat in self.quantizer.accumulate(tokens)]

    @torch.no_grad()
    def decode(self, tokens):
        """Token maps → images (B, 3, S, S) in [−1, 1]."""
        return self.decode_features(self.quantizer.accumulate(tokens)[-1]).clamp(-1, 1)

    @torch.no_grad()
    def token_inputs(self, tokens):
        """What the transformer reads in training: area(f̂_k → p_{k+1}) for k < K, as (B, L − p_1², C)."""
        states = self.quantizer.accumulate(tokens[:-1])
        return torch.cat([area(f, p).flatten(2).transpose(1, 2) for f, p in zip(states, self.patch_nums[1:])], 1)

    # -- training

    def autoencode(self, images):
        """What the network makes of images without a quantizer in between."""
        return self.decode_features(self.features(images))

    def forward(self, images, generator, state):
        """One training pass: (final image, focus state `state` of it, VQ loss, tokens, residuals).

        state: index of the token map to decode besides the last, −1 for none (then the second result is None).
        """
        full = None
        if self.focus_input == 'image' or self.pyramid == 'scale':
            full = self.focused_features(images, self.radii, generator)
        targets = self.targets(images, generator) if full is None else [area(f, p) for f, p in zip(full, self.patch_nums)]
        tokens, states, residuals = self.quantizer(targets)

        if self.pyramid == 'scale':                         # VAR compares every f̂_k with f at full size
            pairs, weights = [(f_hat, full[-1]) for f_hat in states], [1] * len(states)
        else:                                               # a focus state is held to its own target, map k with weight p_k
            pairs, weights = [(area(f_hat, p), e) for f_hat, p, e in zip(states, self.patch_nums, targets)], self.patch_nums
        vq = sum(weight * vq_loss(*pair, self.beta) for weight, pair in zip(weights, pairs)) / sum(weights)

        def picture(k):
            e = full[k] if full is not None else bicubic(targets[k], self.patch_nums[-1])
            return straight_through(states[k], e)

        wanted = [picture(-1)] + ([picture(state)] if state >= 0 else [])
        decoded = self.decode_features(torch.cat(wanted)).chunk(len(wanted))
        return decoded[0], decoded[1] if state >= 0 else None, vq, tokens, residuals


def check_sizes(image_size, patch_nums, channel_mult):
    """UserError unless the encoder takes image_size to p_K and patch_nums grow."""
    f = 2 ** (len(channel_mult) - 1)
    if not patch_nums or list(patch_nums) != sorted(set(patch_nums)) or patch_nums[0] < 1:
        raise UserError(f'patch_nums={tuple(patch_nums)} must grow from a number ≥ 1')
    if min(channel_mult, default=0) < 1:
        raise UserError(f'channel_mult={tuple(channel_mult)}: give numbers of at least 1')
    if image_size != f * patch_nums[-1]:
        raise UserError(f'image_size={image_size} does not fit patch_nums ending in {patch_nums[-1]}: with {len(channel_mult)} '
                        f'entries in channel_mult the tokenizer reduces by {f}, so image_size must be {f * patch_nums[-1]}')


# -----------------------------------------------------------------------------
# Q_A

class AliasTokenizer(nn.Module):
    """Q_A: the alias views A_1 … A_{K−1} → one plain VQ map each (no residual chain). Training only.

    A_K is left out: at the last scale nothing was removed. Each view is divided by its running standard
    deviation `scale`, because alias energy differs by an order of magnitude between scales.
    shared: a StructureTokenizer whose encoder, codebook and decoder serve both (the "w/o dual tokenizers" row
    of Table 3), instead of networks of its own.
    """

    def __init__(self, structure, vocab_size=512, codebook_dim=8, channels=64, channel_mult=(1, 1, 2, 2, 4),
                 res_blocks=1, beta=0.25, dual=True):
        super().__init__()
        check_sizes(structure.image_size, structure.patch_nums, channel_mult)
        self.patch_nums, self.beta, self.dual, self.grad_checkpoint = structure.patch_nums[:-1], beta, dual, False
        self.reduction = 2 ** (len(channel_mult) - 1)
        # pyramid geometry comes from the structure tokenizer; a tuple keeps its weights out of ours
        self._structure = (structure,)
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
        """A_1 … A_{K−1} in image units, each (B, 3, p_k·f, p_k·f)."""
        structure = self._structure[0]
        noise = structure.noise if generator is not None and structure.pyramid == 'focus' else (0.0, 0.0)
        kernel = structure.kernel if structure.pyramid == 'focus' else 'none'
        return build_pyramid(images, structure.patch_nums, structure.radii, noise, kernel, generator)[2][:-1]

    @torch.no_grad()
    def track_scale(self, energy, weight=1.0, decay=0.99):
        """Follows the standard deviation of every view, given their mean squares (K − 1,); not at all where weight is 0."""
        followed = torch.where(self.scale == 0, energy.sqrt(), decay * self.scale + (1 - decay) * energy.sqrt())
        self.scale.copy_(torch.where(torch.as_tensor(weight > 0), followed, self.scale))

    def divisors(self, energy=None):
        """What each view is divided by, (K − 1,). energy: mean squares of the views, for as long as nothing has been tracked."""
        scale = self.scale if energy is None else torch.where(self.scale == 0, energy.sqrt(), self.scale)
        return scale.clamp(min=1e-3)

    def normalised(self, views, energy=None):
        return [view / divisor for view, divisor in zip(views, self.divisors(energy))]

    def features(self, view):
        return in_parts(self.encoder, view, view.shape[-1], self.grad_checkpoint) if self.dual else self._structure[0].features(view)

    def decode_features(self, codes):
        if not self.dual:
            return self._structure[0].decode_features(codes)
        return decode_in_parts(self.decoder, codes, codes.shape[-1] * self.reduction, self.grad_checkpoint)

    @torch.no_grad()
    def encode(self, images, generator=None):
        """(B, 3, S, S) in [−1, 1] → alias token maps, a list over k < K of (B, p_k²) int64."""
        return [self.codebook.nearest(self.features(view)) for view in self.normalised(self.views(images, generator))]

    @torch.no_grad()
    def decode(self, tokens):
        """Alias token maps → the views Â_k in image units."""
        return [self.decode_features(self.codebook.maps(token_map)) * divisor
                for token_map, divisor in zip(tokens, self.divisors())]

    def forward(self, views):
        """One training pass over normalised views: (reconstruction loss, VQ loss, tokens, features as seed vectors).

        The reconstruction loss is the mean over the views of L2 in units of each view's variance.
        """
        tokens, vectors, reconstruction, vq = [], [], [], []
        for view in views:
            features = self.features(view)
            tokens.append(self.codebook.nearest(features))
            codes = self.codebook.maps(tokens[-1])
            reconstruction.append(F.mse_loss(self.decode_features(straight_through(codes, features)), view))
            vq.append(vq_loss(codes, features, self.beta))
            vectors.append(features.detach())
        return sum(reconstruction) / len(views), sum(vq) / len(views), tokens, vectors


# -----------------------------------------------------------------------------
# files

def build_tokenizers(config):
    """(StructureTokenizer, AliasTokenizer) from the settings of train_tokenizer.py."""
    names = ('image_size', 'patch_nums', 'vocab_size', 'codebook_dim', 'channels', 'channel_mult', 'res_blocks', 'phis',
             'pyramid', 'focus_input', 'focus_schedule', 'max_radius', 'kernel', 'noise', 'beta')
    structure = StructureTokenizer(**{name: config[name] for name in names if name in config})
    alias = AliasTokenizer(structure, config['alias_vocab_size'], config['alias_codebook_dim'], config['alias_channels'],
                           config['channel_mult'], config['alias_res_blocks'], config['beta'], config['dual'])
    return structure, alias


def load_tokenizers(path, device='cpu'):
    """(StructureTokenizer, AliasTokenizer, checkpoint) as train_tokenizer.py saved them, in eval mode."""
    checkpoint = load_checkpoint(path, 'tokenizer', made_by='train_tokenizer.py')
    with blame(path):
        structure, alias = build_tokenizers(checkpoint['config'])
        load_weights(structure, checkpoint['structure'], path)
        load_weights(alias, checkpoint['alias'], path)
    structure, alias = (network.to(device, memory_format=torch.channels_last).eval() for network in (structure, alias))
    return structure, alias, checkpoint
