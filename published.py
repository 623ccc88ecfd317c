"""VAR's published weights, in and out, and the choice between them and our own checkpoints.

    tokenizer, student = load_official(vae_state_dict, var_state_dict, patch_nums)
    vae_state_dict, var_state_dict = to_official(tokenizer, student)        # the inverse, bit for bit
"""
import os
import re

import torch

from configurator import UserError
from model import VAR, block_causal_mask, load_student
from tokenizer import StructureTokenizer, load_tokenizers
from util.checkpoint import load_weights, read_weights

# -----------------------------------------------------------------------------
# names: ours and the published one; the first match counts

TOKENIZER_NAMES = [
    ('pre_quant', 'quant_conv'), ('post_quant', 'post_quant_conv'),
    ('quantizer.phi', 'quantize.quant_resi.qresi_ls'),
    ('quantizer.codebook.weight', 'quantize.embedding.weight'),
    ('quantizer.codebook.usage', 'quantize.ema_vocab_hit_SV'),
]
LAYER_NAMES = [
    ('blocks', 'block'), ('attentions', 'attn'), ('middle.0', 'mid.block_1'), ('middle.1', 'mid.attn_1'),
    ('middle.2', 'mid.block_2'), ('shortcut', 'nin_shortcut'), ('proj', 'proj_out'),
]
STUDENT_NAMES = [
    ('start', 'pos_start'), ('pos_embed', 'pos_1LC'), ('scale_embed', 'lvl_embed'),
    ('class_embed', 'class_emb'), ('head_ada', 'head_nm.ada_lin.1'), ('shared_ada', 'shared_ada_lin.1'),
    ('ada_offset', 'ada_gss'), ('ada', 'ada_lin.1'), ('attention.qkv', 'attn.mat_qkv'),
    ('attention.log_scale', 'attn.scale_mul_1H11'), ('attention', 'attn'), ('mlp', 'ffn'),
]
CONSTANTS = ('lvl_1L', 'attn_bias_for_masking', 'zero_k_bias')  # published, but they follow from the sizes


def official_student_name(name):
    ours, theirs = next((pair for pair in STUDENT_NAMES if pair[0] in name), ('', ''))
    return name.replace(ours, theirs, 1)


def official_tokenizer_name(name, levels):
    """The published name of a tokenizer weight. The published decoder counts its levels from the image
    inwards."""
    for ours, theirs in TOKENIZER_NAMES:
        if name.startswith(ours):
            return name.replace(ours, theirs)
    side = 'down' if name.startswith('encoder') else 'up'

    def level(match):
        number = int(match[2]) if side == 'down' else levels - 1 - int(match[2])
        return f'{side}.{number}.' + (f'{side}sample.conv' if match[1] == 'samplers' else match[3])

    name = re.sub(r'(levels|samplers)\.(\d+)\.(blocks|attentions|1)', level, name)
    for ours, theirs in LAYER_NAMES:
        name = name.replace(ours, theirs)
    return name


# -----------------------------------------------------------------------------
# in

class Published(dict):
    """A copy of a published state dict. UserError if it is not one, or for a name that it lacks.

    part: its name in a checkpoint of VAR's trainer. Prefixes that DDP and torch.compile add are removed.
    """

    def __init__(self, state_dict, part, known, what):
        for inner in ('trainer', part):
            if isinstance(state_dict, dict):
                state_dict = state_dict.get(inner, state_dict)
        if isinstance(state_dict, dict):
            super().__init__((re.sub(r'\b(module|_orig_mod)\.', '', name), weight)
                             for name, weight in state_dict.items())
        if known not in self:
            raise UserError(f'this is not a published VAR {what} (it has no {known})')

    def __missing__(self, name):
        raise UserError(f'this state dict is incomplete, or not as VAR publishes it: {name} is missing')

    def count(self, pattern):
        """How many numbers the pattern's group matches, for example blocks. At least 1: a missing number 0 is
        reported by its name."""
        return max(1, len({match[1] for name in self if (match := re.match(pattern, name))}))


def published_vae(state_dict):
    known = 'quantize.embedding.weight'
    return Published(state_dict, 'vae_local', known, 'tokenizer such as vae_ch160v4096z32.pth')


def published_var(state_dict):
    known = 'word_embed.weight'
    return Published(state_dict, 'var_wo_ddp', known, 'transformer such as var_d16.pth')


PUBLISHED_PATCH_NUMS = ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))  # 256, 512 px


def sizes_of(patch_nums):
    """(number of token maps, of tokens), which a transformer's weights reveal."""
    return len(patch_nums), sum(p * p for p in patch_nums)


def published_patch_nums(var_state_dict):
    """VAR's token maps at 256 or 512 px, whichever fits a transformer's weights, which do not hold them."""
    var = published_var(var_state_dict)
    maps = len(var['lvl_embed.weight'])
    tokens = var['pos_1LC'].shape[1]
    for patch_nums in PUBLISHED_PATCH_NUMS:
        if (maps, tokens) == sizes_of(patch_nums):
            return patch_nums
    raise UserError(f'this transformer has {maps} token maps with {tokens} tokens, unlike any of VAR\'s own: '
                    'give --patch_nums')


def load_official(vae_state_dict, var_state_dict, patch_nums, num_heads=None):
    """(StructureTokenizer, VAR) from the published state dicts. All sizes are read from names and shapes.

    num_heads: by default the number of QK-norm temperatures, or without them VAR's rule, the number of
    blocks. Raises UserError if a dictionary is not what it should be, or belongs to other patch_nums.
    """
    vae = published_vae(vae_state_dict)                     # first, to say so when the two are swapped
    student = load_official_student(var_state_dict, patch_nums, num_heads)
    tokenizer = load_official_tokenizer(vae, patch_nums)
    wanted = student.head.out_features, student.word_embed.in_features
    found = tuple(tokenizer.quantizer.codebook.weight.shape)
    if wanted != found:
        raise UserError(f'tokenizer ({found[0]} codes × {found[1]}) and transformer ({wanted[0]} codes × '
                        f'{wanted[1]}) do not belong together')
    return tokenizer, student


def load_official_tokenizer(vae_state_dict, patch_nums):
    """A StructureTokenizer in eval mode from VAR's VQ-VAE. Raises UserError if these are other weights."""
    vae = published_vae(vae_state_dict)
    vocab_size, codebook_dim = vae['quantize.embedding.weight'].shape
    channels = len(vae['encoder.conv_in.weight'])
    levels = vae.count(r'encoder\.down\.(\d+)\.')
    tokenizer = StructureTokenizer(
        image_size=patch_nums[-1] * 2 ** (levels - 1), patch_nums=patch_nums, vocab_size=vocab_size,
        codebook_dim=codebook_dim, channels=channels, pyramid='scale',
        channel_mult=[len(vae[f'encoder.down.{i}.block.0.conv1.weight']) // channels for i in range(levels)],
        res_blocks=vae.count(r'encoder\.down\.0\.block\.(\d+)\.'),
        phis=vae.count(r'quantize\.quant_resi\.qresi_ls\.(\d+)\.'))
    fill_official_tokenizer(tokenizer, vae)
    return tokenizer.eval()


def fill_official_tokenizer(tokenizer, vae_state_dict):
    """Loads published weights into a StructureTokenizer of any pyramid. UserError if they do not fit."""
    vae = published_vae(vae_state_dict)
    levels = len(tokenizer.encoder.levels)
    hits = vae['quantize.ema_vocab_hit_SV']
    if len(hits) != len(tokenizer.patch_nums):              # counts for other maps: start anew, as VAR does
        vae['quantize.ema_vocab_hit_SV'] = hits.new_zeros(len(tokenizer.patch_nums), hits.shape[1])
    load_renamed(tokenizer, vae, lambda name: official_tokenizer_name(name, levels), 'tokenizer')


def load_official_student(var_state_dict, patch_nums, num_heads=None):
    """A student in eval mode from VAR's transformer. Raises UserError for other weights or token maps.

    num_heads: needed only if the weights do not tell and it is not the depth.
    """
    var = published_var(var_state_dict)
    maps = len(var['lvl_embed.weight'])
    tokens = var['pos_1LC'].shape[1]
    if (maps, tokens) != sizes_of(patch_nums) or var['pos_start'].shape[1] != patch_nums[0] ** 2:
        wanted_maps, wanted_tokens = sizes_of(patch_nums)
        raise UserError(f'this transformer has {maps} token maps with {tokens} tokens, but '
                        f'patch_nums={tuple(patch_nums)} has {wanted_maps} with {wanted_tokens}: give the '
                        'patch_nums it was trained with')
    embed_dim, codebook_dim = var['word_embed.weight'].shape
    depth = var.count(r'blocks\.(\d+)\.')
    temperatures = var.get('blocks.0.attn.scale_mul_1H11')
    if num_heads is None:
        num_heads = depth if temperatures is None else temperatures.shape[1]
    student = VAR(
        patch_nums, len(var['head.weight']), codebook_dim, num_classes=len(var['class_emb.weight']) - 1,
        depth=depth, embed_dim=embed_dim, num_heads=num_heads,
        mlp_ratio=len(var['blocks.0.ffn.fc1.weight']) / embed_dim, qk_norm=temperatures is not None,
        shared_aln='shared_ada_lin.1.weight' in var)
    load_renamed(student, var, official_student_name, 'transformer')
    return student.eval()


def load_renamed(module, published, published_name, what):
    """Fills a module from a published state dict. UserError unless they have the same names and shapes."""
    name_of = {name: published_name(name) for name in module.state_dict()}
    unknown = [name for name in published if name not in name_of.values() and not name.endswith(CONSTANTS)]
    missing = [name for name in name_of.values() if name not in published]
    if unknown or missing:
        problem = f'{missing[0]} is missing' if missing else f'unknown {unknown[0]}'
        raise UserError(f'this is not a {what} as VAR publishes it: {problem}')
    weights = {name: published[theirs] for name, theirs in name_of.items()}
    load_weights(module, weights, f'the published {what}')


# -----------------------------------------------------------------------------
# out

def to_official(tokenizer, student):
    """(vae_state_dict, var_state_dict) under the published names and shapes: load_official's inverse."""
    levels = len(tokenizer.encoder.levels)
    mask = block_causal_mask(student.patch_nums)
    vae = {official_tokenizer_name(name, levels): value for name, value in tokenizer.state_dict().items()}
    var = {official_student_name(name): value for name, value in student.state_dict().items()}
    var['lvl_1L'] = student.map_of_position[None]
    var['attn_bias_for_masking'] = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None]
    for i, block in enumerate(student.blocks):
        var[f'blocks.{i}.attn.zero_k_bias'] = torch.zeros_like(block.attention.q_bias)
    return vae, var


# -----------------------------------------------------------------------------
# ours or theirs

def load_deployed(out_dir, init_from='', tokenizer='', vae='', patch_nums=(), device='cpu'):
    """What sampling needs: (StructureTokenizer, VAR in eval mode, stage 1's checkpoint, stage 2's
    checkpoint).

    init_from: student.pt (default: the one in out_dir). tokenizer: tokenizer.pt (default: the one beside
    it). vae: a published tokenizer instead; then init_from is a published transformer, classes are only
    numbers, and patch_nums are VAR's own unless given. Raises UserError naming the file that is wrong.
    """
    if not vae:
        if patch_nums:
            raise UserError('--patch_nums goes with --vae: a tokenizer.pt knows its own')
        student_file = init_from or os.path.join(out_dir, 'student.pt')
        tokenizer_file = tokenizer or os.path.join(os.path.dirname(student_file), 'tokenizer.pt')
        structure, _, stage1 = load_tokenizers(tokenizer_file, device)
        student, stage2 = load_student(student_file, structure, device)
        return structure, student, stage1, stage2
    if not init_from or tokenizer:
        raise UserError(f'--vae={vae}: give the transformer that belongs to it as --init_from=var_d16.pth, '
                        'and no --tokenizer')
    vae_weights = read_weights(vae)
    var_weights = read_weights(init_from)
    try:
        patch_nums = patch_nums or published_patch_nums(var_weights)
        structure, student = load_official(vae_weights, var_weights, patch_nums)
    except UserError as error:
        raise UserError(f'--vae={vae} --init_from={init_from}: {error}') from None
    classes = [str(number) for number in range(student.num_classes)]
    structure.to(device, memory_format=torch.channels_last)
    return structure, student.to(device), {'config': {'data': ''}, 'step': 0}, {'classes': classes, 'step': 0}
