"""VAR's published weights, in and out."""
import os
import re

import torch

from configurator import UserError
from model import VAR, block_causal_mask, load_student
from tokenizer import StructureTokenizer, load_tokenizers
from util.checkpoint import load_weights, read_weights

TOKENIZER_NAMES = [
    ('pre_quant', 'quant_conv'), ('post_quant', 'post_quant_conv'), ('quantizer.phi', 'quantize.quant_resi.qresi_ls'),
    ('quantizer.codebook.weight', 'quantize.embedding.weight'), ('quantizer.codebook.usage', 'quantize.ema_vocab_hit_SV'),
]

STUDENT_NAMES = [
    ('start', 'pos_start'), ('pos_embed', 'pos_1LC'), ('scale_embed', 'lvl_embed'), ('class_embed', 'class_emb'),
    ('head_ada', 'head_nm.ada_lin.1'), ('shared_ada', 'shared_ada_lin.1'), ('ada_offset', 'ada_gss'), ('ada', 'ada_lin.1'),
    ('attention.qkv', 'attn.mat_qkv'), ('attention.log_scale', 'attn.scale_mul_1H11'), ('attention', 'attn'), ('mlp', 'ffn'),
]

STUDENT_CONSTANTS = ('lvl_1L', 'attn_bias_for_masking', 'zero_k_bias')      # published buffers that follow from the sizes


def official_student_name(name):
    for ours, theirs in STUDENT_NAMES:
        if ours in name:
            return name.replace(ours, theirs, 1)
    return name


def official_tokenizer_name(name, levels):
    """The published name of a tokenizer weight; the published decoder numbers its levels from the image inwards."""
    for ours, theirs in TOKENIZER_NAMES:
        if name.startswith(ours + '.') or name == ours:
            return theirs + name[len(ours):]
    side = 'down' if name.startswith('encoder') else 'up'

    def level(match):
        number = int(match[2]) if side == 'down' else levels - 1 - int(match[2])
        return f'{side}.{number}.' + (f'{side}sample.conv' if match[1] == 'samplers' else match[3])

    name = re.sub(r'(levels|samplers)\.(\d+)(?:\.(blocks|attentions))?', level, name)
    for ours, theirs in (('blocks', 'block'), ('attentions', 'attn'), ('middle.block', 'mid.block_'), ('shortcut', 'nin_shortcut'),
                         ('middle.attention', 'mid.attn_1'), ('proj', 'proj_out')):
        name = name.replace(ours, theirs)
    return name


def count_of(pattern, names):
    """How many numbers the one group of a pattern takes over some names: blocks of a network. At least 1: if there
    are none, number 0 will be missed by its name."""
    return max(1, len({match[1] for name in names if (match := re.match(pattern, name))}))


class Published(dict):
    """A copy of a published state dict of which the name of one weight is known; asking it for one it lacks is a UserError."""

    def __init__(self, state_dict, known, what):
        if not isinstance(state_dict, dict) or known not in state_dict:
            raise UserError(f'this is no published VAR {what} (it has no {known})')
        super().__init__(state_dict)

    def __missing__(self, name):
        raise UserError(f'this state dict is not whole, or not as VAR publishes it: {name} is missing')


def published_vae(state_dict):
    return Published(state_dict, 'quantize.embedding.weight', 'tokenizer such as vae_ch160v4096z32.pth')


def published_var(state_dict):
    return Published(state_dict, 'word_embed.weight', 'transformer such as var_d16.pth')

PUBLISHED_PATCH_NUMS = ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))   # at 256 and 512 px


def published_patch_nums(var_state_dict):
    """The token maps of a published transformer, which its weights do not tell: VAR's at 256 or 512 px, whichever fits."""
    var = published_var(var_state_dict)
    sizes = var['lvl_embed.weight'].shape[0], var['pos_1LC'].shape[1]
    for patch_nums in PUBLISHED_PATCH_NUMS:
        if sizes == (len(patch_nums), sum(p * p for p in patch_nums)):
            return patch_nums
    raise UserError(f'this transformer has {sizes[0]} token maps with {sizes[1]} tokens, as none of VAR\'s own: give --patch_nums')


def load_official(vae_state_dict, var_state_dict, patch_nums, num_heads=None):
    """(StructureTokenizer, VAR) from the published state dicts; every size is read off names and shapes.

    num_heads: where QK-norm's temperatures don't tell, VAR's rule, as many as blocks. Raises UserError when a
    dictionary is not what it should be or belongs to other patch_nums.
    """
    vae = published_vae(vae_state_dict)
    student = load_official_student(var_state_dict, patch_nums, num_heads)
    tokenizer = load_official_tokenizer(vae, patch_nums)
    codebook, head, embed = tokenizer.quantizer.codebook.weight, student.head.weight, student.word_embed.weight
    if (len(head), embed.shape[1]) != codebook.shape:
        raise UserError(f'tokenizer ({len(codebook)} codes × {codebook.shape[1]}) and transformer ({len(head)} codes × '
                        f'{embed.shape[1]}) do not belong together')
    return tokenizer, student


def load_official_tokenizer(vae_state_dict, patch_nums):
    vae = published_vae(vae_state_dict)
    vocab_size, codebook_dim = vae['quantize.embedding.weight'].shape
    channels, levels = vae['encoder.conv_in.weight'].shape[0], count_of(r'encoder\.down\.(\d+)\.', vae)
    mult = tuple(vae[f'encoder.down.{i}.block.0.conv1.weight'].shape[0] // channels for i in range(levels))
    tokenizer = StructureTokenizer(
        image_size=patch_nums[-1] * 2 ** (levels - 1), patch_nums=patch_nums, vocab_size=vocab_size, codebook_dim=codebook_dim,
        channels=channels, channel_mult=mult, res_blocks=count_of(r'encoder\.down\.0\.block\.(\d+)\.', vae),
        phis=count_of(r'quantize\.quant_resi\.qresi_ls\.(\d+)\.', vae), pyramid='scale')
    fill_official_tokenizer(tokenizer, vae)
    return tokenizer.eval()


def fill_official_tokenizer(tokenizer, vae_state_dict):
    """Puts published weights into a StructureTokenizer of their sizes, whatever its pyramid. UserError if they don't fit."""
    vae, levels = published_vae(vae_state_dict), len(tokenizer.encoder.levels)
    hits = vae['quantize.ema_vocab_hit_SV']
    if len(hits) != len(tokenizer.patch_nums):              # counts of other maps: VAR starts them anew as well
        vae['quantize.ema_vocab_hit_SV'] = hits.new_zeros(len(tokenizer.patch_nums), hits.shape[1])
    load_renamed(tokenizer, vae, lambda name: official_tokenizer_name(name, levels), 'tokenizer')


def load_official_student(var_state_dict, patch_nums, num_heads=None):
    var = published_var(var_state_dict)
    length = sum(p * p for p in patch_nums)
    if ((var['lvl_embed.weight'].shape[0], var['pos_1LC'].shape[1]) != (len(patch_nums), length)
            or var['pos_start'].shape[1] != patch_nums[0] ** 2):
        raise UserError(f'this transformer has {var["lvl_embed.weight"].shape[0]} token maps with {var["pos_1LC"].shape[1]} tokens, '
                        f'patch_nums={tuple(patch_nums)} has {len(patch_nums)} with {length}: give the patch_nums it was trained with')
    depth, (embed_dim, codebook_dim) = count_of(r'blocks\.(\d+)\.', var), var['word_embed.weight'].shape
    qk_norm = 'blocks.0.attn.scale_mul_1H11' in var
    if num_heads is None:
        num_heads = var['blocks.0.attn.scale_mul_1H11'].shape[1] if qk_norm else depth
    student = VAR(patch_nums, var['head.weight'].shape[0], codebook_dim, num_classes=var['class_emb.weight'].shape[0] - 1,
                  depth=depth, embed_dim=embed_dim, num_heads=num_heads, mlp_ratio=var['blocks.0.ffn.fc1.weight'].shape[0] / embed_dim,
                  qk_norm=qk_norm, shared_aln='shared_ada_lin.1.weight' in var)
    load_renamed(student, var, official_student_name, 'transformer')
    return student.eval()


def load_renamed(module, published, published_name, what):
    """Fills a module from a published state dict; UserError unless they hold the same names and shapes."""
    name_of = {name: published_name(name) for name in module.state_dict()}
    unexpected = [name for name in published if name not in name_of.values() and not name.endswith(STUDENT_CONSTANTS)]
    missing = [name for name in name_of.values() if name not in published]
    if unexpected or missing:
        raise UserError(f'this is no {what} as VAR publishes it: '
                        + (f'{missing[0]} is missing' if missing else f'unknown {unexpected[0]}'))
    load_weights(module, {name: published[theirs] for name, theirs in name_of.items()}, f'the published {what}')


def to_official(tokenizer, student):
    """(vae_state_dict, var_state_dict) under the published names and shapes: load_official's inverse, bit for bit."""
    vae, var = tokenizer.state_dict(), student.state_dict()
    levels = len(tokenizer.encoder.levels)
    official_vae = {official_tokenizer_name(name, levels): value for name, value in vae.items()}
    official_var = {official_student_name(name): value for name, value in var.items()}
    official_var['lvl_1L'] = student.map_of_position[None]
    mask = block_causal_mask(student.patch_nums)
    official_var['attn_bias_for_masking'] = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None]
    for i, block in enumerate(student.blocks):
        official_var[f'blocks.{i}.attn.zero_k_bias'] = torch.zeros_like(block.attention.q_bias)
    return official_vae, official_var


def load_deployed(out_dir, init_from='', tokenizer='', vae='', patch_nums=(), device='cpu'):
    """(StructureTokenizer, VAR in eval mode, checkpoint of the tokenizers, of the student): what sampling needs.

    init_from: student.pt (default: the one in out_dir). tokenizer: tokenizer.pt (default: the one beside it). vae: instead
    of it a published tokenizer; then init_from is a published transformer, classes are only numbers, and patch_nums are
    VAR's own unless given. Raises UserError naming the file that is wrong.
    """
    if not vae:
        if patch_nums:
            raise UserError('--patch_nums goes with --vae: a tokenizer.pt knows its own')
        student_file = init_from or os.path.join(out_dir, 'student.pt')
        structure, _, stage1 = load_tokenizers(tokenizer or os.path.join(os.path.dirname(student_file), 'tokenizer.pt'), device)
        student, stage2 = load_student(student_file, structure, device)
        return structure, student, stage1, stage2
    if not init_from or tokenizer:
        raise UserError(f'--vae={vae}: give the transformer that belongs to it as --init_from=var_d16.pth, and no --tokenizer')
    vae_weights, var_weights = read_weights(vae), read_weights(init_from)
    try:
        structure, student = load_official(vae_weights, var_weights, patch_nums or published_patch_nums(var_weights))
    except UserError as error:
        raise UserError(f'--vae={vae} --init_from={init_from}: {error}') from None
    stage1, stage2 = {'config': {'data': ''}, 'step': 0}, {'classes': [str(c) for c in range(student.num_classes)], 'step': 0}
    return structure.to(device, memory_format=torch.channels_last), student.to(device), stage1, stage2
