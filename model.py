"""The student (a VAR, and all that is deployed), the teacher, and what passes between them (paper, 3.3–3.6).

A picture is K token maps; map k has p_k² tokens, and all of its tokens are predicted at once from the maps
before it. In training one pass sees all L = Σ p_k² positions under a block-causal mask: a position sees its
own map and every earlier one. The student follows the published VAR (Tian et al. 2024) to the letter, so
weights pass in both directions: load_official, to_official.

Shapes: B batch, L positions, D embed_dim, V codes, C codebook_dim, H heads.
"""
import copy
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError
from util.checkpoint import blame, digest, load_checkpoint, load_weights
from util.runtime import to_device
from tokenizer import area


# -----------------------------------------------------------------------------
# transformer blocks

class SelfAttention(nn.Module):
    """Multi-head attention with biases on q and v but not on k.

    qk_norm: queries and keys are unit vectors and each head learns its temperature; without it the softmax
    scale is VAR's 0.25/√(D/H).
    """

    def __init__(self, embed_dim, heads, qk_norm):
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(embed_dim)), nn.Parameter(torch.zeros(embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)
        if qk_norm:
            self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))

    def forward(self, x, maps=None, cache=None):
        B, L, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, D/H)
        scale = 0.25 / math.sqrt(D // self.heads)
        if self.qk_norm:
            # F.normalize is float32 under autocast; v's dtype is the one attention should run in
            q = (F.normalize(q, dim=-1) * self.log_scale.clamp(max=math.log(100)).exp()).to(v.dtype)
            k, scale = F.normalize(k, dim=-1).to(v.dtype), 1.0
        if cache is not None:
            k, v = cache.extend(k, v)
        h = F.scaled_dot_product_attention(q, k, v, scale=scale) if maps is None else block_causal_attention(q, k, v, maps, scale)
        return self.proj(h.transpose(1, 2).reshape(B, L, D))


def block_causal_attention(q, k, v, maps, scale):
    """Attention of every map to itself and to the earlier ones; q, k, v (B, H, L, D/H). maps: from VAR.maps.

    The two last maps, three quarters of the positions or so, are attended from one by one, over just what they may see.
    So a third less is computed than under one mask, which first computes what it then removes, and half of it runs
    without any mask, which is faster still. Map by map to the end gains nothing more: the early maps are tiny.
    """
    lengths, mask = maps
    first, parts = len(mask), []
    if first:
        parts.append(F.scaled_dot_product_attention(q[:, :, :first], k[:, :, :first], v[:, :, :first], attn_mask=mask, scale=scale))
    for length in lengths[-2:]:
        last = first + length
        parts.append(F.scaled_dot_product_attention(q[:, :, first:last], k[:, :, :last], v[:, :, :last], scale=scale))
        first = last
    return torch.cat(parts, 2)


class MLP(nn.Module):
    def __init__(self, embed_dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(embed_dim, hidden), nn.Linear(hidden, embed_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate='tanh'))


def modulate(x, scale, shift):
    """AdaLN: LayerNorm without parameters of its own, then the class's scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """x + γ₁·attention(AdaLN(x)), then x + γ₂·MLP(AdaLN(x)); γ, scale and shift come from the class.

    With shared_aln (VAR's 512-px model) one projection serves all blocks and a block adds its own offset.
    """

    def __init__(self, embed_dim, heads, mlp_ratio, qk_norm, shared_aln):
        super().__init__()
        self.attention = SelfAttention(embed_dim, heads, qk_norm)
        self.mlp = MLP(embed_dim, round(embed_dim * mlp_ratio))
        if shared_aln:
            self.ada_offset = nn.Parameter(torch.randn(1, 1, 6, embed_dim) / embed_dim ** 0.5)
        else:
            self.ada = nn.Linear(embed_dim, 6 * embed_dim)

    def modulation(self, condition, shared):
        """γ₁, γ₂, scale₁, scale₂, shift₁, shift₂, each (B, 1, D). condition: silu of the class embedding (B, D)."""
        modulation = self.ada_offset + shared if shared is not None else self.ada(condition).view(len(condition), 1, 6, -1)
        return modulation.unbind(2)

    def forward(self, x, condition, shared=None, maps=None, cache=None, drop_path_mask=(1, 1), modulation=None):
        """modulation: modulation(condition, shared), where it is known already. maps: block-causal attention over these (VAR.maps), else
        all positions see all. drop_path_mask: what stochastic depth multiplies the two branches by, numbers or (B, 1, 1)."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation or self.modulation(condition, shared)
        x = x + drop_path_mask[0] * gamma1 * self.attention(modulate(x, scale1, shift1), maps, cache)
        return x + drop_path_mask[1] * gamma2 * self.mlp(modulate(x, scale2, shift2))


def compile_blocks(blocks):
    for block in blocks:
        block.compile()                                     # in place: names of weights stay as they are


def compile_sampling(student, device):
    """Compiles the whole loop of generate() into one graph, which a GPU then replays without being told each kernel (CUDA graphs)."""
    student.sample = torch.compile(student.sample, mode='reduce-overhead' if device.type == 'cuda' else None, dynamic=False)


class KVCache:
    """Keys and values of one block for all positions, allocated once; sampling fills it map by map."""

    def __init__(self, batch, heads, length, head_width, like):
        self.keys = like.new_empty(batch, heads, length, head_width)
        self.values = torch.empty_like(self.keys)
        self.filled = 0

    def extend(self, k, v):
        end = self.filled + k.shape[2]
        self.keys[:, :, self.filled:end] = k
        self.values[:, :, self.filled:end] = v
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]


# -----------------------------------------------------------------------------
# the student

class VAR(nn.Module):
    """Class-conditional transformer over the token maps r_1 … r_K; the deployed network.

    num_classes is also the label that means "no class". Width 64·depth and depth heads unless given.
    drop_path: stochastic depth of the last block, growing linearly from 0 (VAR: 0.1·depth/24, the default).
    """

    def __init__(self, patch_nums, vocab_size=8192, codebook_dim=32, num_classes=1000, depth=16, embed_dim=0, num_heads=0,
                 mlp_ratio=4.0, qk_norm=True, shared_aln=False, drop_path=-1.0):
        super().__init__()
        embed_dim, num_heads = embed_dim or 64 * depth, num_heads or depth
        if embed_dim % num_heads:
            raise UserError(f'embed_dim={embed_dim} is not a multiple of num_heads={num_heads}')
        self.patch_nums, self.num_classes, self.num_heads = tuple(patch_nums), num_classes, num_heads
        self.drop_path, self.grad_checkpoint = 0.1 * depth / 24 if drop_path < 0 else drop_path, False
        self.lengths = [p * p for p in patch_nums]
        self.word_embed = nn.Linear(codebook_dim, embed_dim)
        self.class_embed = nn.Embedding(num_classes + 1, embed_dim)
        self.start = nn.Parameter(torch.empty(1, self.lengths[0], embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, sum(self.lengths), embed_dim))
        self.scale_embed = nn.Embedding(len(patch_nums), embed_dim)
        self.shared_ada = nn.Linear(embed_dim, 6 * embed_dim) if shared_aln else None
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qk_norm, shared_aln) for _ in range(depth))
        self.head_ada = nn.Linear(embed_dim, 2 * embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size)
        self.register_buffer('map_of_position', map_of_position(patch_nums), persistent=False)
        self.register_buffer('mask', block_causal_mask(patch_nums[:-2]), persistent=False)      # the last two need none
        self.init_weights()

    def init_weights(self):
        """Every initial value, as VAR's training starts: truncated normals, and blocks that begin near the identity."""
        embed_dim, depth = self.word_embed.out_features, len(self.blocks)
        std = math.sqrt(1 / (3 * embed_dim))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start, std=std)
        nn.init.trunc_normal_(self.pos_embed, std=std)
        with torch.no_grad():
            self.head.weight *= 0.02
            self.head_ada.weight *= 0.5
            for block in self.blocks:
                block.attention.proj.weight /= math.sqrt(2 * depth)
                block.mlp.fc2.weight /= math.sqrt(2 * depth)
                if self.shared_ada is None:
                    block.ada.weight[:2 * embed_dim] *= 1e-5      # γ₁, γ₂
                    block.ada.weight[2 * embed_dim:] *= 0.5
                else:
                    block.ada_offset[:, :, :2] *= 1e-5
                    block.ada_offset[:, :, 2:] *= 0.5

    # -- pieces of the forward pass

    def condition(self, labels):
        """(class embedding, silu of it, shared AdaLN or None); labels (B,), num_classes for "no class"."""
        embedding = self.class_embed(labels)
        condition = F.silu(embedding)
        shared = None if self.shared_ada is None else self.shared_ada(condition).view(len(labels), 1, 6, -1)
        return embedding, condition, shared

    def maps(self, positions):
        """(lengths of the maps which make up that many first positions, block-causal mask of all but the last two)."""
        lengths = self.lengths[:sum(end <= positions for end in itertools.accumulate(self.lengths))]
        early = sum(lengths[:-2])
        return lengths, self.mask[:early, :early]

    def position(self, first, last):
        """Position plus scale embeddings of positions first … last − 1: (1, last − first, D)."""
        return self.pos_embed[:, first:last] + self.scale_embed(self.map_of_position[first:last])

    def embed(self, embedding, inputs):
        """Class embedding (B, D) and token inputs (B, n, C) → (B, p_1² + n, D)."""
        x = torch.cat([embedding[:, None] + self.start, self.word_embed(inputs)], 1)
        return x + self.position(0, x.shape[1])

    def logits(self, x, condition):
        """(B, n, D) → (B, n, V) in float32."""
        scale, shift = self.head_ada(condition).view(len(condition), 1, 2, -1).unbind(2)
        return self.head(modulate(x, scale, shift)).float()

    def drop_path_mask(self, uniform):
        """Stochastic depth: numbers (B, 2·depth), uniform in [0, 1) → 0 or 1/(1 − rate) each, to be passed as drop_path_mask."""
        rates = torch.linspace(0, self.drop_path, len(self.blocks), device=uniform.device).repeat_interleave(2)
        return (uniform >= rates) / (1 - rates)

    def call(self, block, *args, **more):
        """A block's output. With grad_checkpoint only its input is kept for the backward pass, which computes the rest again."""
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **more)
        return block(*args, **more)

    def hidden(self, labels, inputs, drop_path_mask=None):
        """Residual stream before block 1 and after every block: [(B, n, D)] · (depth + 1), and the condition."""
        embedding, condition, shared = self.condition(labels)
        x = self.embed(embedding, inputs)
        stream, maps = [x], self.maps(x.shape[1])
        for i, block in enumerate(self.blocks):
            branches = (1, 1) if drop_path_mask is None else drop_path_mask[:, 2 * i:2 * i + 2, None, None].unbind(1)
            stream.append(self.call(block, stream[-1], condition, shared, maps, drop_path_mask=branches))
        return stream, (condition, shared)

    def forward(self, labels, inputs, drop_path_mask=None):
        """Teacher-forced logits (B, p_1² + n, V).

        labels (B,) int64 (num_classes means no class); inputs (B, n, C) from tokenizer.token_inputs, n = L − p_1²
        or a shorter run of whole maps; drop_path_mask from drop_path_mask, in training.
        """
        stream, (condition, _) = self.hidden(labels, inputs, drop_path_mask)
        return self.logits(stream[-1], condition)

    # -- sampling

    @torch.no_grad()
    def generate(self, tokenizer, labels, cfg=1.5, top_k=900, top_p=0.96, generator=None, smooth=False, kv_cache=True, given=()):
        """Samples token maps r_1 … r_K for labels (B,); returns (tokens: list of (B, p_k²), images in [−1, 1]).

        cfg: guidance strength at the last map, ramped from 0 (VAR): (1 + t)·with class − t·without, t = cfg·(k−1)/(K−1).
        top_k, top_p: filter in that order; top_k=0 and top_p=0 keep everything, top_k=1 is greedy.
        smooth: feed back Gumbel-softmax mixtures of codes instead of codes (VAR's "more smooth", prettier, not for FID).
        kv_cache=False recomputes all earlier maps at every step: the reference the cache is tested against.
        generator: torch.Generator for the batch; or a list of CPU generators, one for each picture, which is then the same in
        every batch.
        given: the first few token maps, (B, p_k²) or (1, p_k²) each, with −1 for the tokens to be drawn (editing, refocusing).
        """
        B, dev = len(labels), labels.device
        one_each = isinstance(generator, list)

        def random(fill, *shape, dtype):                    # the numbers of a picture come from its own generator, if it has one
            if one_each:
                numbers = [fill(torch.empty(shape, dtype=dtype), generator=g) for g in generator]
                return to_device(torch.stack(numbers), dev)
            return fill(torch.empty(B, *shape, dtype=dtype, device=dev), generator=generator)

        def exponential(n):
            return random(torch.Tensor.exponential_, n, self.head.out_features, dtype=torch.float32)

        chances, gumbels = [], []
        for n in self.lengths:
            chances.append(random(torch.Tensor.uniform_, n, dtype=torch.float64) if one_each else exponential(n))
            gumbels.append(exponential(n) if smooth else None)
        tokens, f_hat = self.sample(tokenizer.quantizer, labels, chances, gumbels, cfg, top_k, top_p, kv_cache, given)
        tokens = [token_map.clone() for token_map in tokens]    # a replayed CUDA graph writes the next batch into the same memory
        if one_each and not smooth:                         # by themselves: in a batch their last bits depend on its size
            return tokens, torch.cat([tokenizer.decode([t[i:i + 1] for t in tokens]) for i in range(B)])
        return tokens, tokenizer.decode_features(f_hat).clamp(-1, 1)

    def sample(self, quantizer, labels, chances, gumbels, cfg, top_k, top_p, kv_cache, given):
        """The loop of generate(), with all random numbers drawn: (tokens, f̂_K). Compiles to one graph, and waits for nothing.

        chances: what draw() takes, for each map; gumbels: what smooth_codes() takes, or None where codes are not mixed.
        """
        B, maps, last = len(labels), len(self.patch_nums), self.patch_nums[-1]
        branches = torch.cat([labels, torch.full_like(labels, self.num_classes)]) if cfg else labels
        embedding, condition, shared = self.condition(branches)
        caches = self.new_caches(embedding, len(branches)) if kv_cache else None
        modulations = [block.modulation(condition, shared) for block in self.blocks] if kv_cache else None     # the same for every map
        given = [*given, *(labels.new_full((1, n), -1) for n in self.lengths[len(given):])]

        codes = quantizer.codebook.weight
        f_hat = codes.new_zeros(B, codes.shape[1], last, last)
        inputs, tokens, first = codes.new_zeros(B, 0, codes.shape[1]), [], 0
        for k, p in enumerate(self.patch_nums):
            guided = inputs.repeat(2, 1, 1) if cfg else inputs
            if kv_cache:
                x = (self.word_embed(guided) if k else embedding[:, None] + self.start) + self.position(first, first + p * p)
                for block, modulation, cache in zip(self.blocks, modulations, caches):
                    x = block(x, condition, shared, cache=cache, modulation=modulation)
                logits = self.logits(x, condition)
            else:
                logits = self(branches, guided)[:, first:]

            progress = k / max(1, maps - 1)
            if cfg:
                logits = (1 + cfg * progress) * logits[:B] - cfg * progress * logits[B:]
            logits = filter_logits(logits, top_k, top_p)
            drawn = draw(logits, chances[k])
            known = given[k] >= 0
            tokens.append(torch.where(known, given[k], drawn))
            chosen = quantizer.codebook.maps(tokens[k])
            if gumbels[k] is not None:
                mixture = smooth_codes(logits, progress, codes, gumbels[k]).transpose(1, 2).reshape(B, -1, p, p)
                chosen = torch.where(known.view(-1, 1, p, p), chosen, mixture)
            f_hat = f_hat + quantizer.refine(chosen, k)
            first += p * p
            if k + 1 < maps:
                following = area(f_hat, self.patch_nums[k + 1]).flatten(2).transpose(1, 2)
                inputs = following if kv_cache else torch.cat([inputs, following], 1)
        return tokens, f_hat

    def new_caches(self, like, batch):
        head_width = like.shape[-1] // self.num_heads
        dtype = torch.get_autocast_dtype(like.device.type) if torch.is_autocast_enabled(like.device.type) else like.dtype
        like = torch.empty(0, dtype=dtype, device=like.device)
        return [KVCache(batch, self.num_heads, sum(self.lengths), head_width, like) for _ in self.blocks]


def map_of_position(patch_nums):
    """Which token map (from 0) each of the L positions belongs to."""
    lengths = [p * p for p in patch_nums]
    return torch.repeat_interleave(torch.arange(len(patch_nums)), torch.tensor(lengths, dtype=torch.int64), output_size=sum(lengths))


def block_causal_mask(patch_nums):
    """(L, L) bool: query row sees key column iff the key's map is not later than the query's."""
    k = map_of_position(patch_nums)
    return k[:, None] >= k[None, :]


def filter_logits(logits, top_k, top_p):
    """logits (..., V) with −inf outside the top_k largest and then outside the smallest set of probability ≥ top_p.

    Only the top_k largest are sorted; both filters then are one threshold, so that of equal logits all stay.
    """
    V = logits.shape[-1]
    if not (0 < top_k < V or 0 < top_p < 1):
        return logits
    largest = logits.topk(top_k if 0 < top_k < V else V, dim=-1).values
    threshold = largest[..., -1:]
    if 0 < top_p < 1:
        tail = largest.flip(-1).softmax(-1).cumsum(-1) <= 1 - top_p
        tail[..., -1] = False                               # the most likely token always stays
        threshold = largest.gather(-1, (~tail).sum(-1, keepdim=True) - 1)
    return logits.masked_fill(logits < threshold, -torch.inf)


def draw(logits, chances):
    """One token per position: (B, n, V) → (B, n), by random numbers of one of two kinds; unlike torch.multinomial it never waits.

    Exponentially distributed, (B, n, V): the code with the largest probability per number wins; these are multinomial's own tokens.
    Uniform in [0, 1), (B, n) float64: which code a number means is read off the cumulative distribution, in float64, so that
    logits which differ in their last bits nearly always mean the same code.
    """
    probabilities = logits.softmax(-1)
    if chances.dim() == 3:
        return (probabilities / chances).argmax(-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, chances[..., None] * cumulative[..., -1:], right=True).squeeze(-1)


def smooth_codes(logits, progress, codes, exponential):
    """Gumbel-softmax mixtures of codes (B, n, C), hardening as progress goes from 0 to 1; the constants are VAR's.

    exponential: exponentially distributed numbers, as many as logits.
    """
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return ((logits * (1 + progress) - exponential.log()) / temperature).softmax(-1) @ codes


GENERATE_BYTES = 16 * 2 ** 30


def pictures_at_once(student, most=50):
    """How many pictures to sample or to score at a time: at most so many, and no more than take 16 GiB, half precision or not.

    A picture has keys and values of every block, and some copies of the logits of its largest map, with its class and without.
    """
    depth, length, embed_dim, codes = len(student.blocks), sum(student.lengths), student.head.in_features, student.head.out_features
    floats = 2 * 2 * depth * length * embed_dim + 2 * 6 * student.lengths[-1] * codes
    return max(1, min(most, GENERATE_BYTES // (4 * floats)))


# -----------------------------------------------------------------------------
# the teacher

class AliasGateCrossAttention(nn.Module):
    """AG-XAttn (Eq. 9, 10): Z = X + α ⊙ W_O·Attn(X W_Q, E_a W_K, E_a W_V), α = sigmoid(W_α X), one gate a channel.

    W_O starts at zero, so a teacher starts as its student.
    """

    def __init__(self, embed_dim, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(embed_dim, embed_dim) for _ in range(3))
        self.gate, self.proj = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x, alias, mask):
        """x (B, n, D), alias (B, m, D), mask (n, m) or None → what to add to x, (B, n, D)."""
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        q, k, v = (layer(t).view(*t.shape[:2], self.heads, -1).transpose(1, 2)
                   for layer, t in ((self.query, x), (self.key, alias), (self.value, alias)))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)
        return torch.sigmoid(self.gate(x)) * self.proj(h)


class TeacherBlock(nn.Module):
    """A copy of a student block; where `alias_attention` is given, AG-XAttn after its self-attention."""

    def __init__(self, block, alias_attention=None):
        super().__init__()
        self.block, self.alias_attention = copy.deepcopy(block), alias_attention

    def forward(self, x, condition, shared, maps, alias, alias_mask, first):
        """first: the position from which on maps look at alias tokens; alias_mask: None where all see all of them."""
        block = self.block
        gamma1, gamma2, scale1, scale2, shift1, shift2 = block.modulation(condition, shared)
        x = x + gamma1 * block.attention(modulate(x, scale1, shift1), maps)
        if self.alias_attention is not None:
            x = torch.cat([x[:, :first], x[:, first:] + self.alias_attention(x[:, first:], alias, alias_mask)], 1)
        return x + gamma2 * block.mlp(modulate(x, scale2, shift2))


class Teacher(nn.Module):
    """The High-Frequency Residual Teacher (section 3.5): sees the alias tokens of the picture it predicts.

    It reads the student's trunk (detached) after `shared_blocks` blocks and owns copies of the rest and of the
    head; the last `teacher_blocks` carry AG-XAttn. shared_blocks = depth − teacher_blocks by default (−1);
    0 is the full dual network. The structure positions of the last `alias_scales` maps query the alias tokens
    of maps K − alias_scales … K − 1, a map k seeing alias maps ≤ k; only there it knows more than the student,
    so only there it predicts.
    """

    def __init__(self, student, alias_vocab_size, alias_scales=2, teacher_blocks=2, shared_blocks=-1):
        super().__init__()
        depth, maps, embed_dim = len(student.blocks), len(student.patch_nums), student.word_embed.out_features
        shared_blocks = depth - teacher_blocks if shared_blocks < 0 else shared_blocks
        if not 1 <= teacher_blocks <= depth or shared_blocks > depth - teacher_blocks:
            raise UserError(f'teacher_blocks={teacher_blocks} and shared_blocks={shared_blocks} do not fit depth={depth}: '
                            f'their sum may not exceed it, and teacher_blocks is at least 1')
        if not 1 <= alias_scales <= maps - 1:
            raise UserError(f'alias_scales={alias_scales}: {maps} token maps allow 1 to {maps - 1}')
        self.shared_blocks, self.teacher_blocks = shared_blocks, teacher_blocks
        gated = range(depth - teacher_blocks, depth)
        self.blocks = nn.ModuleList(
            TeacherBlock(student.blocks[i], AliasGateCrossAttention(embed_dim, student.num_heads) if i in gated else None)
            for i in range(shared_blocks, depth))
        self.head_ada, self.head = copy.deepcopy(student.head_ada), copy.deepcopy(student.head)

        lengths = student.lengths
        self.first = sum(lengths[:-alias_scales])                               # first position that looks at alias
        map_of = map_of_position(student.patch_nums)
        map_of_query = map_of[self.first:]
        map_of_alias = map_of[sum(lengths[:-alias_scales - 1]):sum(lengths[:-1])]       # k = K−M … K−1, counted from 1
        self.register_buffer('map_of_alias', map_of_alias, persistent=False)
        mask = map_of_query[:, None] >= map_of_alias[None, :]
        # two maps see all there is, and without a mask attention has faster ways
        self.register_buffer('alias_mask', mask if alias_scales > 2 else None, persistent=False)
        self.alias_embed = nn.Embedding(alias_vocab_size, embed_dim)
        self.alias_pos = nn.Parameter(torch.empty(1, len(map_of_alias), embed_dim))
        self.alias_scale = nn.Embedding(maps, embed_dim)
        for weight in (self.alias_embed.weight, self.alias_pos, self.alias_scale.weight):
            nn.init.trunc_normal_(weight, std=math.sqrt(1 / (3 * embed_dim)))

    def forward(self, stream, condition, shared, maps, alias_tokens, call=lambda block, *args: block(*args)):
        """stream, condition, shared: from student.hidden; maps: student.maps of all positions; call: student.call;
        alias_tokens (B, Σ_{k<K} p_k²) int64.

        Returns (logits (B, n, V), features [(B, n, D)] after each of the last teacher_blocks blocks), for the n
        positions of the last alias_scales maps. No gradient reaches the student.
        """
        x, condition = stream[self.shared_blocks].detach(), condition.detach()
        shared = None if shared is None else shared.detach()
        tokens = alias_tokens[:, -len(self.map_of_alias):]
        alias = self.alias_embed(tokens) + self.alias_pos + self.alias_scale(self.map_of_alias)
        features = []
        for block in self.blocks:
            x = call(block, x, condition, shared, maps, alias, self.alias_mask, self.first)
            features.append(x[:, self.first:])
        scale, shift = self.head_ada(condition).view(len(condition), 1, 2, -1).unbind(2)
        return self.head(modulate(features[-1], scale, shift)).float(), features[-self.teacher_blocks:]


def distillation_loss(student_logits, teacher_logits, student_features, teacher_features):
    """The two terms by which the student learns from the teacher (Eq. 12), gradients to the student only.

    feature: mean squared difference a feature element, averaged over the blocks. Features are compared after the
    LayerNorm through which every later layer sees them: the bare residual streams drift apart in size, and pulling
    them together stopped students from learning at the learning rates that small models want.
    kl: KL(p_teacher ‖ p_student), mean over positions, nats.
    """
    def seen(x):
        return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)

    feature = sum(F.mse_loss(seen(s), seen(t.detach())) for s, t in zip(student_features, teacher_features))
    kl = F.kl_div(student_logits.log_softmax(-1).flatten(0, 1), teacher_logits.detach().log_softmax(-1).flatten(0, 1),
                  log_target=True, reduction='batchmean')
    return {'feature': feature / len(teacher_features), 'kl': kl}


class FVAR(nn.Module):
    """What is trained in stage 2: the student, and (unless teacher is None) its teacher, with the loss of Eq. 12."""

    def __init__(self, student, teacher=None, lambda_feat=1.0, lambda_logit=0.5):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.lambda_feat, self.lambda_logit = lambda_feat, lambda_logit

    def forward(self, labels, inputs, structure_tokens, alias_tokens, drop_path_mask=None, trust=1.0):
        """Terms of the loss by name, 'total' being their weighted sum, and 'per_map': student CE of every map (K,).

        labels (B,) with the dropped ones already num_classes; inputs from token_inputs; structure_tokens (B, L) and
        alias_tokens (B, La) int64; drop_path_mask from drop_path_mask; trust in [0, 1] scales both weights of distillation.
        Cross-entropies in nats a token.
        """
        student = self.student
        stream, (condition, shared) = student.hidden(labels, inputs, drop_path_mask)
        logits = student.logits(stream[-1], condition)
        ce = F.cross_entropy(logits.flatten(0, 1), structure_tokens.flatten(), reduction='none').view(structure_tokens.shape)
        terms = {'ce': ce.mean()}
        terms['per_map'] = torch.stack([part.mean() for part in ce.detach().split(student.lengths, 1)])
        terms['total'] = terms['ce']
        if self.teacher is not None:
            first = self.teacher.first
            teacher_logits, teacher_features = self.teacher(stream, condition, shared, student.maps(logits.shape[1]), alias_tokens,
                                                            student.call)
            student_features = [x[:, first:] for x in stream[-len(teacher_features):]]
            terms['teacher_ce'] = F.cross_entropy(teacher_logits.flatten(0, 1), structure_tokens[:, first:].flatten())
            terms |= distillation_loss(logits[:, first:], teacher_logits, student_features, teacher_features)
            terms['total'] = (terms['ce'] + terms['teacher_ce']
                              + trust * (self.lambda_feat * terms['feature'] + self.lambda_logit * terms['kl']))
        return terms


# -----------------------------------------------------------------------------
# the published VAR's weights

# our name → published name, the first that matches


@torch.no_grad()
def held_out_loss(network, tokenizer, batches, device, autocast):
    """Loss terms of an FVAR averaged over images: {'ce': nats per token, 'ce_per_map': list, 'bits_per_image': …}.

    batches yields (structure tokens (B, L), alias tokens (B, La), labels (B,)). Nothing is dropped.
    """
    network.eval()
    sums, count = {}, 0
    for batch in batches:
        structure_tokens, alias_tokens, labels = (to_device(tensor, device) for tensor in batch)
        inputs = tokenizer.token_inputs(list(structure_tokens.split(network.student.lengths, 1)))
        with autocast():
            terms = network(labels, inputs, structure_tokens, alias_tokens)
        sums = {name: sums.get(name, 0) + value.double() * len(labels) for name, value in terms.items()}
        count += len(labels)
    ce_per_map = (sums.pop('per_map') / count).tolist()
    bits = sum(ce * n for ce, n in zip(ce_per_map, network.student.lengths)) / math.log(2)
    means = {name: value.item() / count for name, value in sums.items()}
    return means | {'ce_per_map': ce_per_map, 'bits_per_image': bits}


# -----------------------------------------------------------------------------
# files

STUDENT_SETTINGS = ('depth', 'embed_dim', 'num_heads', 'mlp_ratio', 'qk_norm', 'shared_aln', 'drop_path')


def build_student(config, structure, num_classes):
    """A VAR for the tokens of a StructureTokenizer, from the settings of train_fvar.py."""
    codebook = structure.quantizer.codebook
    return VAR(structure.patch_nums, codebook.num_embeddings, codebook.embedding_dim, num_classes,
               **{name: config[name] for name in STUDENT_SETTINGS})


def load_student(path, structure, device='cpu'):
    """(VAR in eval mode, checkpoint) from student.pt; UserError if it was trained on another tokenizer's tokens."""
    checkpoint = load_checkpoint(path, 'student', made_by='train_fvar.py')
    with blame(path):
        if checkpoint['tokenizer'] != digest(structure.state_dict()):
            raise UserError(f'{path} was trained on the tokens of another tokenizer: use the tokenizer.pt that lies beside it')
        student = build_student(checkpoint['config'], structure, len(checkpoint['classes']))
        load_weights(student, checkpoint['student'], path)
    return student.to(device).eval(), checkpoint


