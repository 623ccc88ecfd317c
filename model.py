"""The student (a VAR, and all that is deployed), the teacher, and the loss that connects them (paper,
sections 3.3–3.6).

A picture is K token maps. Map k has p_k² tokens, all predicted at once from the maps before it. In training
one pass covers all L = Σ p_k² positions. Those of map k read f̂_{k−1} pooled to p_k × p_k, never map k's own
tokens, and attend under a block-causal mask to each other and to all earlier positions. The student is the
published VAR (Tian et al. 2024) to the letter, so weights convert both ways: see published.py.

Shapes: B batch, L positions, D embed_dim, V codes, C codebook_dim, H heads.
"""
import copy
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError
from tokenizer import area
from util.checkpoint import blame, digest, load_checkpoint, load_weights
from util.runtime import to_device


# -----------------------------------------------------------------------------
# transformer blocks

class SelfAttention(nn.Module):
    """Multi-head attention with biases on q and v but not on k.

    qk_norm: queries and keys are unit vectors, and each head learns a temperature. Without it the softmax
    scale is VAR's 0.25/√(D/H).
    """

    def __init__(self, embed_dim, num_heads, qk_norm):
        super().__init__()
        self.num_heads, self.qk_norm = num_heads, qk_norm
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(embed_dim)) for _ in range(2))
        self.proj = nn.Linear(embed_dim, embed_dim)
        if qk_norm:
            self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))

    def forward(self, x, layout=None, cache=None):
        B, L, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(B, L, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                # (B, H, L, D/H)
        scale = 0.25 / math.sqrt(D // self.num_heads)
        if self.qk_norm:
            # F.normalize returns float32 under autocast; attention should run in v's dtype
            q = (F.normalize(q, dim=-1) * self.log_scale.clamp(max=math.log(100)).exp()).to(v.dtype)
            k, scale = F.normalize(k, dim=-1).to(v.dtype), 1.0
        if cache is not None:
            if cache:
                k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v)))
            cache[:] = [k, v]
        if layout is None:
            h = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            h = block_causal_attention(q, k, v, *layout, scale)
        return self.proj(h.transpose(1, 2).reshape(B, L, D))


def block_causal_attention(q, k, v, lengths, mask, scale):
    """Attention of every map to itself and to earlier maps. q, k, v: (B, H, L, D/H); lengths: tokens per map.

    The last two maps, more than half of all positions, are computed separately, each over only the keys it
    may see. This saves a third of the work, and kernels without a mask are faster. mask: block-causal, for
    the earlier maps.
    """
    start, parts = len(mask), []
    if start:
        early = (t[:, :, :start] for t in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*early, attn_mask=mask, scale=scale))
    for length in lengths[-2:]:
        end = start + length
        keys, values = k[:, :, :end], v[:, :, :end]
        parts.append(F.scaled_dot_product_attention(q[:, :, start:end], keys, values, scale=scale))
        start = end
    return torch.cat(parts, 2)


class MLP(nn.Module):
    def __init__(self, embed_dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, embed_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate='tanh'))


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, scale, shift):
    """AdaLN: LayerNorm without parameters of its own, then the class's scale and shift."""
    return layer_norm(x) * (1 + scale) + shift


class Block(nn.Module):
    """x + γ₁·attention(AdaLN(x)), then x + γ₂·MLP(AdaLN(x)). The class sets γ, scale and shift.

    With shared_aln (VAR's 512-px model) one projection serves all blocks, and each block adds its own offset.
    A teacher's last blocks have AG-XAttn, `alias_attention`, between the two.
    """

    def __init__(self, embed_dim, num_heads, mlp_ratio, qk_norm, shared_aln):
        super().__init__()
        self.attention = SelfAttention(embed_dim, num_heads, qk_norm)
        self.mlp = MLP(embed_dim, round(embed_dim * mlp_ratio))
        self.alias_attention = None
        self.shared_aln = shared_aln
        if shared_aln:
            self.ada_offset = nn.Parameter(torch.randn(1, 1, 6, embed_dim) / embed_dim ** 0.5)
        else:
            self.ada = nn.Linear(embed_dim, 6 * embed_dim)

    def modulation(self, condition):
        """γ₁, γ₂, scale₁, scale₂, shift₁, shift₂, each (B, 1, D), from Condition.blocks."""
        six = self.ada_offset + condition if self.shared_aln else self.ada(condition).unflatten(1, (1, 6, -1))
        return six.unbind(2)

    def forward(self, x, condition, layout=None, cache=None, drop_path_mask=(1, 1), alias=None,
                modulation=None):
        """layout: VAR.layout() for block-causal attention; None lets all positions see all. cache: keys and
        values of earlier maps, an empty list at first. drop_path_mask: factors of the branches, numbers or
        (B, 1, 1). alias: what alias_attention attends to. modulation: modulation(condition), if already
        known."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation or self.modulation(condition)
        attended = self.attention(modulate(x, scale1, shift1), layout, cache)
        x = x + drop_path_mask[0] * gamma1 * attended
        if self.alias_attention is not None:
            x = self.alias_attention(x, alias)
        return x + drop_path_mask[1] * gamma2 * self.mlp(modulate(x, scale2, shift2))


def run_block(block, *args, grad_checkpoint, **options):
    """The block's output. grad_checkpoint: keep only its input, and recompute the rest in backward."""
    if grad_checkpoint and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **options)
    return block(*args, **options)


def code_logits(x, condition, head_ada, head):
    """AdaLN and output layer: (B, n, D) and Condition.activated → (B, n, V) in float32."""
    scale, shift = head_ada(condition).unflatten(1, (1, 2, -1)).unbind(2)
    return head(modulate(x, scale, shift)).float()


def compile_sampling(student, device):
    """Compiles the loop of generate() into one graph, which a GPU replays whole (CUDA graphs)."""
    mode = 'reduce-overhead' if device.type == 'cuda' else None
    student.sample = torch.compile(student.sample, mode=mode, dynamic=False)


# -----------------------------------------------------------------------------
# the student

class Condition(NamedTuple):
    """What the class tells the network."""
    embedding: torch.Tensor     # (B, D): the input of the first map
    activated: torch.Tensor     # (B, D): silu(embedding), from which the head computes its AdaLN
    blocks: torch.Tensor        # from which the blocks do: `activated`, or its shared projection (B, 1, 6, D)


class VAR(nn.Module):
    """Class-conditional transformer over the token maps r_1 … r_K; the deployed network.

    num_classes is also the label for "no class". By default embed_dim is 64·depth and num_heads is depth.
    drop_path: drop rate of the last block, growing linearly from 0. −1 means VAR's 0.1·depth/24.
    """

    def __init__(self, patch_nums, vocab_size, codebook_dim, num_classes=1000, depth=16, embed_dim=0,
                 num_heads=0, mlp_ratio=4.0, qk_norm=True, shared_aln=False, drop_path=-1.0):
        super().__init__()
        embed_dim = embed_dim or 64 * depth
        num_heads = num_heads or depth
        if drop_path >= 1:
            raise UserError(f'drop_path={drop_path}: must be less than 1')
        if embed_dim % num_heads:
            raise UserError(f'embed_dim={embed_dim} is not a multiple of num_heads={num_heads}')
        self.patch_nums = tuple(patch_nums)
        self.num_classes = num_classes
        self.num_heads = num_heads
        self.drop_path = 0.1 * depth / 24 if drop_path < 0 else drop_path
        self.grad_checkpoint = False
        self.lengths = [p * p for p in patch_nums]
        self.word_embed = nn.Linear(codebook_dim, embed_dim)
        self.class_embed = nn.Embedding(num_classes + 1, embed_dim)
        self.start = nn.Parameter(torch.empty(1, self.lengths[0], embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, sum(self.lengths), embed_dim))
        self.scale_embed = nn.Embedding(len(patch_nums), embed_dim)
        self.shared_ada = nn.Linear(embed_dim, 6 * embed_dim) if shared_aln else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qk_norm, shared_aln) for _ in range(depth))
        self.head_ada = nn.Linear(embed_dim, 2 * embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size)
        self.register_buffer('map_of_position', map_of_position(patch_nums), persistent=False)
        self.register_buffer('mask', block_causal_mask(patch_nums[:-2]), persistent=False)
        self.init_weights()

    def init_weights(self):
        """All initial values, VAR's defaults: truncated normals, and blocks that start near the identity."""
        embed_dim = self.word_embed.out_features
        depth = len(self.blocks)
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
                six = block.ada_offset[0, 0] if block.shared_aln else block.ada.weight.unflatten(0, (6, -1))
                six[:2] *= 1e-5                             # γ₁, γ₂
                six[2:] *= 0.5

    # -- pieces of the forward pass

    def condition(self, labels):
        """labels (B,), num_classes for "no class" → Condition."""
        embedding = self.class_embed(labels)
        activated = blocks = F.silu(embedding)
        if self.shared_ada is not None:
            blocks = self.shared_ada(activated).unflatten(1, (1, 6, -1))
        return Condition(embedding, activated, blocks)

    def layout(self):
        """What block_causal_attention needs to know: tokens per map, and the mask of all maps but the last
        two."""
        return self.lengths, self.mask

    def position(self, start, end):
        """Position plus scale embeddings of positions start … end − 1: (1, end − start, D)."""
        return self.pos_embed[:, start:end] + self.scale_embed(self.map_of_position[start:end])

    def logits(self, x, condition):
        """(B, n, D) → (B, n, V) in float32."""
        return code_logits(x, condition.activated, self.head_ada, self.head)

    def drop_path_mask(self, uniform):
        """Stochastic depth: (B, 2·depth) uniform in [0, 1) → factors of all branches, 0 or 1/(1 − rate)."""
        rates = torch.linspace(0, self.drop_path, len(self.blocks), device=uniform.device)
        rates = rates.repeat_interleave(2)
        return (uniform >= rates) / (1 - rates)

    def hidden(self, labels, inputs, drop_path_mask=None):
        """The residual stream before block 1 and after every block, (depth + 1) × (B, L, D); Condition."""
        condition = self.condition(labels)
        x = torch.cat([condition.embedding[:, None] + self.start, self.word_embed(inputs)], 1)
        stream = [x + self.position(0, x.shape[1])]
        for i, block in enumerate(self.blocks):
            factors = (1, 1)
            if drop_path_mask is not None:
                factors = drop_path_mask[:, 2 * i:2 * i + 2, None, None].unbind(1)
            stream.append(run_block(block, stream[-1], condition.blocks, self.layout(),
                                    drop_path_mask=factors, grad_checkpoint=self.grad_checkpoint))
        return stream, condition

    def forward(self, labels, inputs):
        """Teacher-forced logits (B, L, V).

        labels (B,) int64, num_classes for "no class"; inputs (B, L − p_1², C) from tokenizer.token_inputs.
        """
        stream, condition = self.hidden(labels, inputs)
        return self.logits(stream[-1], condition)

    # -- sampling

    @torch.no_grad()
    def generate(self, tokenizer, labels, cfg=1.5, top_k=900, top_p=0.96, generator=None, smooth=False,
                 given=()):
        """Samples token maps r_1 … r_K for labels (B,): (list of (B, p_k²), images in [−1, 1]).

        cfg: guidance strength at the last map, rising from 0 as in VAR: (1 + t)·with class − t·without class,
        with t = cfg·(k−1)/(K−1).
        top_k, top_p: filters, applied in this order. 0 keeps everything; top_k=1 is greedy.
        generator: a torch.Generator for the batch; or a list of CPU generators, one per picture, which makes
        a picture independent of the rest of its batch.
        smooth: feed back Gumbel-softmax mixtures of codes (VAR's "more smooth": prettier, but not for FID).
        given: the first few token maps, (B, p_k²) or (1, p_k²), with −1 for the tokens to sample (editing).
        """
        B = len(labels)
        device = labels.device
        V = self.head.out_features
        per_picture = isinstance(generator, list)

        def random(fill, *shape, dtype=torch.float32):
            if per_picture:
                numbers = [fill(torch.empty(shape, dtype=dtype), generator=g) for g in generator]
                return to_device(torch.stack(numbers), device)
            return fill(torch.empty(B, *shape, dtype=dtype, device=device), generator=generator)

        exponential = torch.Tensor.exponential_
        uniform = torch.Tensor.uniform_
        randoms, gumbels = [], []
        for n in self.lengths:
            if per_picture:
                randoms.append(random(uniform, n, dtype=torch.float64))
            else:
                randoms.append(random(exponential, n, V))
            gumbels.append(random(exponential, n, V) if smooth else None)
        tokens, f_hat = self.sample(tokenizer.quantizer, labels, randoms, gumbels, cfg, top_k, top_p, given)
        tokens = [token_map.clone() for token_map in tokens]    # a replayed CUDA graph overwrites its outputs
        if per_picture and not smooth:                      # one by one: last bits depend on the batch size
            parts = zip(*(token_map.split(1) for token_map in tokens))
            images = torch.cat([tokenizer.decode(part) for part in parts])
        else:
            images = tokenizer.decode_features(f_hat).clamp(-1, 1)
        return tokens, images.float()

    def sample(self, quantizer, labels, randoms, gumbels, cfg, top_k, top_p, given):
        """The loop of generate() for given random numbers: (tokens, f̂_K). One graph, without GPU syncs.

        Per map, randoms has what sample_tokens() takes; gumbels has what smooth_codes() takes, or None.
        """
        B, K = len(labels), len(self.patch_nums)
        both = torch.cat([labels, torch.full_like(labels, self.num_classes)]) if cfg else labels
        condition = self.condition(both)
        modulations = [block.modulation(condition.blocks) for block in self.blocks]     # same for every map
        given = [*given, *(labels.new_full((1, n), -1) for n in self.lengths[len(given):])]
        caches = [[] for _ in self.blocks]

        codes = quantizer.codebook.weight
        f_hat = codes.new_zeros(B, codes.shape[1], self.patch_nums[-1], self.patch_nums[-1])
        x = condition.embedding[:, None] + self.start
        tokens = []
        start = 0
        for k, p in enumerate(self.patch_nums):
            if k:
                inputs = area(f_hat, p).flatten(2).mT
                x = self.word_embed(inputs.repeat(2, 1, 1) if cfg else inputs)
            x = x + self.position(start, start + p * p)
            for block, modulation, cache in zip(self.blocks, modulations, caches):
                # not block(): FSDP's hooks would gather its weights again for every map
                x = block.forward(x, condition.blocks, cache=cache, modulation=modulation)
            logits = self.logits(x, condition)
            start += p * p

            progress = k / max(1, K - 1)
            if cfg:
                logits = (1 + cfg * progress) * logits[:B] - cfg * progress * logits[B:]
            logits = filter_logits(logits, top_k, top_p)
            known = given[k] >= 0
            tokens.append(torch.where(known, given[k], sample_tokens(logits, randoms[k])))
            chosen = quantizer.codebook(tokens[k])
            if gumbels[k] is not None:
                mixture = smooth_codes(logits, progress, codes, gumbels[k])
                chosen = torch.where(known[..., None], chosen, mixture)
            f_hat = f_hat + quantizer.refine(chosen.mT.unflatten(2, (p, p)), k)
        return tokens, f_hat


def map_of_position(patch_nums):
    """The token map, counted from 0, of each of the L positions."""
    return torch.tensor([k for k, p in enumerate(patch_nums) for _ in range(p * p)])


def block_causal_mask(patch_nums):
    """(L, L) bool: a query sees a key if the key's map is not later than its own."""
    k = map_of_position(patch_nums)
    return k[:, None] >= k[None, :]


def filter_logits(logits, top_k, top_p):
    """logits (..., V) with −inf outside the top_k largest, then outside the smallest set of the likeliest
    codes whose probability reaches top_p.

    Only the top_k largest are sorted. Both filters then reduce to one threshold, so equal logits stay or go
    together.
    """
    V = logits.shape[-1]
    if not (0 < top_k < V or 0 < top_p < 1):
        return logits
    largest = logits.topk(top_k if 0 < top_k < V else V, dim=-1).values
    threshold = largest[..., -1:]
    if 0 < top_p < 1:
        ascending = largest.flip(-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False                            # the most likely code always stays
        threshold = ascending.gather(-1, dropped.sum(-1, keepdim=True))
    return logits.masked_fill(logits < threshold, -torch.inf)


def sample_tokens(logits, random):
    """One token per position, (B, n, V) → (B, n), from random numbers; torch.multinomial would wait for a
    GPU.

    random (B, n, V), exponentially distributed: the code with the largest ratio of probability to number,
    which is what torch.multinomial computes. random (B, n) float64, uniform in [0, 1): inverts the cumulative
    distribution in float64, so logits that differ in their last bits nearly always give the same code.
    """
    probabilities = logits.softmax(-1)
    if random.dim() == 3:
        return (probabilities / random).argmax(-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    random = random[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, random, right=True).squeeze(-1)


def smooth_codes(logits, progress, codes, exponential):
    """Gumbel-softmax mixtures of codes (B, n, C), hardening as progress goes from 0 to 1; VAR's constants.

    exponential: exponentially distributed numbers shaped like logits.
    """
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return ((logits * (1 + progress) - exponential.log()) / temperature).softmax(-1) @ codes


SAMPLING_BYTES = 16 * 2 ** 30


def pictures_at_once(student):
    """How many pictures to sample or score at a time: at most 50, and no more than fit into 16 GiB.

    A picture needs keys and values of all blocks and a few copies of its last map's logits, all twice for
    cfg.
    """
    cached = 2 * len(student.blocks) * sum(student.lengths) * student.head.in_features
    logits = 6 * student.lengths[-1] * student.head.out_features
    return max(1, min(50, SAMPLING_BYTES // (4 * 2 * (cached + logits))))


# -----------------------------------------------------------------------------
# the teacher

class AliasGateCrossAttention(nn.Module):
    """AG-XAttn (Eq. 9, 10): Z = X + α ⊙ W_O·Attn(X̄ W_Q, E_a W_K, E_a W_V), with one gate per channel,
    α = sigmoid(W_α X̄). X̄ = LayerNorm(X) is ours: the paper writes X.

    W_O starts at zero, so a teacher starts as its student. Positions before `start` are left alone. mask
    (n, m) says which alias tokens the others see; None means all.
    """

    def __init__(self, embed_dim, num_heads, start=0, mask=None):
        super().__init__()
        self.num_heads, self.start = num_heads, start
        self.query, self.key, self.value = (nn.Linear(embed_dim, embed_dim) for _ in range(3))
        self.gate = nn.Linear(embed_dim, embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.register_buffer('mask', mask, persistent=False)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x, alias):
        """x (B, start + n, D), alias (B, m, D) → Z, shaped like x."""
        early, late = x[:, :self.start], x[:, self.start:]
        normed = layer_norm(late)
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                   for t in (self.query(normed), self.key(alias), self.value(alias)))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2)
        return torch.cat([early, late + torch.sigmoid(self.gate(normed)) * self.proj(h)], 1)


class Teacher(nn.Module):
    """The High-Frequency Residual Teacher (section 3.5), which sees the alias tokens of the picture it
    predicts.

    It reads the student's trunk (detached) after `shared_blocks` blocks and owns copies of the other blocks
    and of the head. Its last `teacher_blocks` blocks have AG-XAttn. shared_blocks = −1 means all but those;
    0: all its blocks are copies. Structure positions of the last `alias_scales` maps query the alias
    tokens of maps K − alias_scales … K − 1; map k sees alias maps ≤ k. Only there does the teacher know
    more than the student, so it predicts only there.
    """

    def __init__(self, student, alias_vocab_size, alias_scales=2, teacher_blocks=2, shared_blocks=-1):
        super().__init__()
        depth, K = len(student.blocks), len(student.patch_nums)
        embed_dim = student.word_embed.out_features
        lengths = student.lengths
        shared_blocks = depth - teacher_blocks if shared_blocks < 0 else shared_blocks
        if not 1 <= teacher_blocks <= depth or shared_blocks > depth - teacher_blocks:
            raise UserError(f'teacher_blocks={teacher_blocks} and shared_blocks={shared_blocks} do not fit '
                            f'depth={depth}: teacher_blocks must be at least 1, and their sum at most depth')
        if not 1 <= alias_scales <= K - 1:
            raise UserError(f'alias_scales={alias_scales}: {K} token maps allow 1 to {K - 1}')
        self.shared_blocks = shared_blocks
        self.teacher_blocks = teacher_blocks
        self.lengths = lengths
        self.grad_checkpoint = student.grad_checkpoint
        self.start = sum(lengths[:-alias_scales])           # the first position that sees alias tokens
        map_of = map_of_position(student.patch_nums)
        map_of_alias = map_of[sum(lengths[:-alias_scales - 1]):sum(lengths[:-1])]   # K − M … K − 1
        # up to two maps see every alias token, and attention is faster without a mask
        mask = map_of[self.start:, None] >= map_of_alias if alias_scales > 2 else None
        self.blocks = copy.deepcopy(student.blocks[shared_blocks:])
        for block in self.blocks[-teacher_blocks:]:
            block.alias_attention = AliasGateCrossAttention(embed_dim, student.num_heads, self.start, mask)
        self.head_ada = copy.deepcopy(student.head_ada)
        self.head = copy.deepcopy(student.head)
        self.register_buffer('mask', student.mask, persistent=False)
        self.register_buffer('map_of_alias', map_of_alias, persistent=False)
        self.alias_embed = nn.Embedding(alias_vocab_size, embed_dim)
        self.alias_pos = nn.Parameter(torch.empty(1, len(map_of_alias), embed_dim))
        self.alias_scale = nn.Embedding(K, embed_dim)
        for weight in (self.alias_embed.weight, self.alias_pos, self.alias_scale.weight):
            nn.init.trunc_normal_(weight, std=math.sqrt(1 / (3 * embed_dim)))

    def forward(self, stream, condition, alias_tokens):
        """stream, condition from student.hidden; alias_tokens (B, Σ_{k<K} p_k²) int64.

        Returns (logits (B, n, V), features [(B, n, D)] after each of the last teacher_blocks blocks) for
        the n positions of the last alias_scales maps. No gradient reaches the student.
        """
        condition = Condition(*(t.detach() for t in condition))
        alias = self.alias_embed(alias_tokens[:, -len(self.map_of_alias):])
        alias = alias + self.alias_pos + self.alias_scale(self.map_of_alias)
        x, features = stream[self.shared_blocks].detach(), []
        for block in self.blocks:
            x = run_block(block, x, condition.blocks, (self.lengths, self.mask), alias=alias,
                          grad_checkpoint=self.grad_checkpoint)
            features.append(x[:, self.start:])
        logits = code_logits(features[-1], condition.activated, self.head_ada, self.head)
        return logits, features[-self.teacher_blocks:]


def distillation_loss(student_logits, teacher_logits, student_features, teacher_features):
    """The two terms that teach the student (Eq. 12). Gradients reach the student only.

    feature: mean squared difference per feature element, averaged over blocks. Features are compared after a
    LayerNorm, which is how every later layer sees them: bare residual streams drift apart in size.
    kl: KL(p_teacher ‖ p_student), mean over positions, in nats.
    """
    features = [F.mse_loss(layer_norm(s.float()), layer_norm(t.detach().float()))
                for s, t in zip(student_features, teacher_features)]
    feature = sum(features) / len(features)
    student, teacher = (logits.log_softmax(-1).flatten(0, 1)
                        for logits in (student_logits, teacher_logits.detach()))
    return {'feature': feature, 'kl': F.kl_div(student, teacher, log_target=True, reduction='batchmean')}


class FVAR(nn.Module):
    """What stage 2 trains: the student, its teacher (or None), and the loss of Eq. 12,

    CE(student) + CE(teacher) + λ_feat·‖features − teacher's‖² + λ_logit·KL(teacher ‖ student).
    """

    def __init__(self, student, teacher=None, lambda_feat=1.0, lambda_logit=0.5):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.lambda_feat = lambda_feat
        self.lambda_logit = lambda_logit

    def forward(self, labels, inputs, structure_tokens, alias_tokens, drop_path_mask=None,
                distill_weight=1.0):
        """The loss terms by name: 'total' is their weighted sum, 'per_map' (K,) the student's CE per map.

        Always 'ce'; with a teacher also 'teacher_ce', 'feature' and 'kl'.
        labels (B,), num_classes where the class is dropped; inputs from token_inputs; structure_tokens (B, L)
        and alias_tokens (B, La) int64; distill_weight in [0, 1] scales both distillation terms.
        Cross-entropies are in nats per token.
        """
        stream, condition = self.student.hidden(labels, inputs, drop_path_mask)
        logits = self.student.logits(stream[-1], condition)
        ce = F.cross_entropy(logits.flatten(0, 1), structure_tokens.flatten(), reduction='none')
        ce = ce.view(structure_tokens.shape)
        per_map = [part.mean() for part in ce.detach().split(self.student.lengths, 1)]
        terms = {'ce': ce.mean(), 'per_map': torch.stack(per_map)}
        terms['total'] = terms['ce']
        if self.teacher is not None:
            start = self.teacher.start
            teacher_logits, teacher_features = self.teacher(stream, condition, alias_tokens)
            student_features = [x[:, start:] for x in stream[-len(teacher_features):]]
            wanted = structure_tokens[:, start:].flatten()
            terms['teacher_ce'] = F.cross_entropy(teacher_logits.flatten(0, 1), wanted)
            terms |= distillation_loss(
                logits[:, start:], teacher_logits, student_features, teacher_features)
            distillation = self.lambda_feat * terms['feature'] + self.lambda_logit * terms['kl']
            terms['total'] = terms['ce'] + terms['teacher_ce'] + distill_weight * distillation
        return terms


@torch.no_grad()
def held_out_loss(network, tokenizer, batches, device, autocast):
    """Loss terms of an FVAR averaged over images, with 'ce_per_map' (a list) and 'bits_per_image'.

    Cross-entropies and KL are in nats per token. batches yields (structure tokens (B, L), alias tokens
    (B, La), labels (B,)); autocast is a context factory. Nothing is dropped, and the network stays in eval
    mode.
    """
    network.eval()
    sums, count = {}, 0
    for batch in batches:
        structure_tokens, alias_tokens, labels = (to_device(tensor, device) for tensor in batch)
        inputs = tokenizer.token_inputs(structure_tokens.split(network.student.lengths, 1))
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
    options = {name: config[name] for name in STUDENT_SETTINGS}
    return VAR(structure.patch_nums, codebook.num_embeddings, codebook.embedding_dim, num_classes, **options)


def load_student(path, structure, device='cpu'):
    """(VAR in eval mode, checkpoint) from student.pt. UserError if its tokens came from another tokenizer."""
    checkpoint = load_checkpoint(path, 'student', made_by='train_fvar.py')
    with blame(path):
        if checkpoint['tokenizer'] != digest(structure.state_dict()):
            raise UserError(f'{path} was trained on the tokens of another tokenizer: use that --tokenizer, '
                            'or run encode.py and train_fvar.py again')
        student = build_student(checkpoint['config'], structure, len(checkpoint['classes']))
        load_weights(student, checkpoint['student'], path)
    return student.to(device).eval(), checkpoint
