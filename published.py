"""Import and export of VAR's published weights, and the choice between them and our own checkpoints.

    tokenizer, student = load_official(vae_state_dict, var_state_dict, patch_nums)
    vae_state_dict, var_state_dict = to_official(tokenizer, student)        # the inverse, bit for bit
"""
import math
import re
from contextlib import suppress
from pathlib import Path

import torch

from configurator import UserError
from model import VAR, block_causal_mask, load_student
from tokenizer import StructureTokenizer, load_tokenizers
from util.checkpoint import load_weights, read_weights

# -----------------------------------------------------------------------------
# names: our part of a name and the published one, replaced in this order

TOKENIZER_NAMES = {
    'pre_quant': 'quant_conv', 'post_quant': 'post_quant_conv',
    'quantizer.phi': 'quantize.quant_resi.qresi_ls',
    'quantizer.codebook.weight': 'quantize.embedding.weight',
    'quantizer.codebook.usage': 'quantize.ema_vocab_hit_SV',
    'blocks': 'block', 'attentions': 'attn', 'middle.0': 'mid.block_1', 'middle.1': 'mid.attn_1',
    'middle.2': 'mid.block_2', 'shortcut': 'nin_shortcut', 'proj': 'proj_out',
}
STUDENT_NAMES = {
    'start': 'pos_start', 'pos_embed': 'pos_1LC', 'scale_embed': 'lvl_embed', 'class_embed': 'class_emb',
    'head_ada': 'head_nm.ada', 'ada.': 'ada_lin.1.', 'ada_offset': 'ada_gss', 'qkv': 'mat_qkv',
    'log_scale': 'scale_mul_1H11', 'attention': 'attn', 'mlp': 'ffn',
}
CONSTANTS = ('lvl_1L', 'attn_bias_for_masking', 'zero_k_bias')  # published, but they follow from the sizes


def renamed(name, names):
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def official_tokenizer_name(name, levels):
    """The published name of a tokenizer weight. The published decoder counts its levels from the image
    inwards."""
    side, numbers = ('down', range(levels)) if name.startswith('encoder') else ('up', range(levels)[::-1])
    name = re.sub(r'samplers\.(\d+)\.1', rf'levels.\1.{side}sample.conv', renamed(name, TOKENIZER_NAMES))
    return re.sub(r'levels\.(\d+)', lambda match: f'{side}.{numbers[int(match[1])]}', name)


def official_state(module):
    """The state dict of a StructureTokenizer or VAR under the published names, in its own order."""
    weights = module.state_dict().items()
    if isinstance(module, VAR):
        return {renamed(name, STUDENT_NAMES): weight for name, weight in weights}
    levels = len(module.encoder.levels)
    return {official_tokenizer_name(name, levels): weight for name, weight in weights}


# -----------------------------------------------------------------------------
# in

# its key in VAR's trainer checkpoints, a weight that must be there, a file of VAR's release
PARTS = {
    'tokenizer': ('vae_local', 'quantize.embedding.weight', 'vae_ch160v4096z32.pth'),
    'transformer': ('var_wo_ddp', 'word_embed.weight', 'var_d16.pth'),
}


class Published(dict):
    """A copy of a published state dict. UserError if it is not one, or for a name that it lacks.

    what: one of PARTS. Prefixes that DDP and torch.compile add, and all non-tensors, are removed.
    """

    def __init__(self, saved, what):
        self.what = what
        part, known, file = PARTS[what]
        with suppress(AttributeError):                      # not a dictionary
            trainer = saved.get('trainer', saved)
            weights = trainer.get(part, trainer).items()
            self.update((re.sub(r'\b(module|_orig_mod)\.', '', name), weight)
                        for name, weight in weights if torch.is_tensor(weight))
        if known not in self:
            raise UserError(f'this is not a published VAR {what} such as {file} (it has no {known})')

    def __missing__(self, name):
        raise UserError(f'this {self.what} is incomplete, or not as VAR publishes it: {name} is missing')

    def count(self, pattern):
        """How many distinct indices the pattern finds, for example of blocks. At least 1, so that a missing
        index 0 is reported by its name."""
        return max(1, len(set(re.findall(pattern, ' '.join(self)))))


def published_patch_nums(var_state_dict):
    """The token maps of a published transformer, which holds the map of every position."""
    _, lengths = Published(var_state_dict, 'transformer')['lvl_1L'].unique(return_counts=True)
    return tuple(map(math.isqrt, lengths.tolist()))


def load_official(vae_state_dict, var_state_dict, patch_nums, num_heads=0):
    """(StructureTokenizer, VAR) in eval mode from the published state dicts, whose names and shapes give all
    sizes.

    num_heads: see load_official_student. Raises UserError if a dictionary is not what it should be, or
    belongs to other patch_nums.
    """
    vae = Published(vae_state_dict, 'tokenizer')            # first, to say so when the two are swapped
    student = load_official_student(var_state_dict, patch_nums, num_heads)
    vocab_size, codebook_dim = vae['quantize.embedding.weight'].shape
    if (vocab_size, codebook_dim) != (student.head.out_features, student.word_embed.in_features):
        raise UserError(f'tokenizer and transformer do not belong together: the tokenizer has {vocab_size} '
                        f'codes × {codebook_dim}, the transformer {student.head.out_features} × '
                        f'{student.word_embed.in_features}')
    channels = len(vae['encoder.conv_in.weight'])
    levels = vae.count(r'encoder\.down\.(\d+)\.')
    tokenizer = StructureTokenizer(
        image_size=patch_nums[-1] * 2 ** (levels - 1), patch_nums=patch_nums, vocab_size=vocab_size,
        codebook_dim=codebook_dim, channels=channels, pyramid='scale',
        channel_mult=[len(vae[f'encoder.down.{i}.block.0.conv1.weight']) // channels for i in range(levels)],
        res_blocks=vae.count(r'encoder\.down\.0\.block\.(\d+)\.'),
        phis=vae.count(r'quantize\.quant_resi\.qresi_ls\.(\d+)\.'))
    fill_official_tokenizer(tokenizer, vae)
    return tokenizer.eval(), student


def fill_official_tokenizer(tokenizer, vae_state_dict):
    """Loads published weights into a StructureTokenizer of any pyramid. UserError if they do not fit."""
    vae = Published(vae_state_dict, 'tokenizer')
    usage = tokenizer.quantizer.codebook.usage
    if vae['quantize.ema_vocab_hit_SV'].shape != usage.shape:       # of other maps: start anew, as VAR does
        vae['quantize.ema_vocab_hit_SV'] = torch.zeros_like(usage)
    load_renamed(tokenizer, vae)


def load_official_student(var_state_dict, patch_nums, num_heads=0):
    """A student in eval mode from VAR's transformer. Raises UserError for other weights or token maps.

    num_heads: by default the number of QK-norm temperatures, or without them VAR's rule, the number of
    blocks.
    """
    var = Published(var_state_dict, 'transformer')
    trained_with = published_patch_nums(var)
    if tuple(patch_nums) != trained_with:
        raise UserError(f'this transformer has patch_nums={trained_with}, not {tuple(patch_nums)}: give the '
                        'patch_nums it was trained with')
    embed_dim, codebook_dim = var['word_embed.weight'].shape
    qk_norm = 'blocks.0.attn.scale_mul_1H11' in var
    if qk_norm and not num_heads:
        num_heads = var['blocks.0.attn.scale_mul_1H11'].shape[1]
    student = VAR(
        patch_nums, len(var['head.weight']), codebook_dim, num_classes=len(var['class_emb.weight']) - 1,
        depth=var.count(r'blocks\.(\d+)\.'), embed_dim=embed_dim, num_heads=num_heads,
        mlp_ratio=len(var['blocks.0.ffn.fc1.weight']) / embed_dim, qk_norm=qk_norm,
        shared_aln='shared_ada_lin.1.weight' in var)
    load_renamed(student, var)
    return student.eval()


def load_renamed(module, published):
    """Fills a module from a Published. UserError unless they have the same names and shapes."""
    ours = dict(zip(official_state(module), module.state_dict()))
    weights = {ours.get(name, name): published[name] for name in ours | published
               if not name.endswith(CONSTANTS)}
    load_weights(module, weights, f'the published {published.what}')


# -----------------------------------------------------------------------------
# out

def to_official(tokenizer, student):
    """(vae_state_dict, var_state_dict) under the published names and shapes: load_official's inverse."""
    vae, var = official_state(tokenizer), official_state(student)
    var['lvl_1L'] = student.map_of_position[None]
    mask = block_causal_mask(student.patch_nums)
    var['attn_bias_for_masking'] = torch.where(mask, 0.0, -torch.inf)[None, None]
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
    numbers, and patch_nums, if given, must be the transformer's. Raises UserError for files that are wrong.
    """
    if not vae:
        if patch_nums:
            raise UserError('--patch_nums goes with --vae: a tokenizer.pt knows its own')
        student_file = Path(init_from or f'{out_dir}/student.pt')
        structure, _, stage1 = load_tokenizers(tokenizer or student_file.with_name('tokenizer.pt'), device)
        student, stage2 = load_student(student_file, structure, device)
        return structure, student, stage1, stage2
    if not init_from or tokenizer:
        raise UserError(f'--vae={vae}: give the transformer that belongs to it as --init_from=var_d16.pth, '
                        'and no --tokenizer')
    vae_weights, var_weights = read_weights(vae), read_weights(init_from)
    structure, student = load_official(
        vae_weights, var_weights, patch_nums or published_patch_nums(var_weights))
    classes = [str(number) for number in range(student.num_classes)]
    structure.to(device, memory_format=torch.channels_last)
    return structure, student.to(device), {'step': 0}, {'classes': classes, 'step': 0}
