"""config/: the paper's models have the paper's sizes, and every ablation changes what its docstring says.

Table 1 has two to three digits, and its counts are those of VAR, whose codebook has 4096 codes. The 8192 codes that the
paper names (section 4.2) cost 4096·(embed_dim + 1) more in the output layer: 0.4 to 2.4 % of a student.
"""
import runpy
from pathlib import Path

import pytest
import torch

import train_fvar
import train_tokenizer
from configurator import HERE, read_config_file
from model import build_student
from tokenizer import build_tokenizers

PAPER = ('d12', 'd16', 'd16_1024', 'd20', 'd24', 'd36_512')
TABLE_3 = {'full': 'FVAR-d16 (Full)', 'gaussian': 'w/ Gaussian blur', 'no_dual': 'w/o Dual tokenizers',
           'no_refocusing': 'w/o Progressive Refocusing', 'no_teacher': 'w/o High-Freq Teacher', 'var': 'VAR-d16 (Baseline)'}


def settings(script, *configs):
    """All settings of an imported script after some config files."""
    values = dict(script.config)
    for name in configs:
        values |= read_config_file(HERE / 'config' / f'{name}.py', script.__name__, script.config)
    return values


def stages(name):
    """Settings of stage 1 and stage 2 for one of the paper's models."""
    stage2 = settings(train_fvar, name)
    folder = Path(stage2['tokenizer']).parent               # out-tokenizer_256/tokenizer.pt was made by tokenizer_256.py
    return settings(train_tokenizer, str(folder).removeprefix('out-')), stage2


# -----------------------------------------------------------------------------
# the paper's models

def parameters(name, **changes):
    """Parameters of the student, deployed alone, for ImageNet's 1000 classes; nothing is allocated."""
    stage1, stage2 = stages(name)
    with torch.device('meta'):
        structure, _ = build_tokenizers(stage1 | changes)
        student = build_student(stage2, structure, num_classes=1000)
    return sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize('name, printed, within', [
    ('d12', 132e6, 0.01), ('d16', 310e6, 0.01), ('d20', 600e6, 0.01),           # 133.2M, 310.3M, 600.9M
    ('d24', 1.0e9, 0.05),                                                       # 1.033B, which prints as 1.0B
    ('d36_512', 2.3e9, 0.03),                                                   # 2.354B; not in the paper: what VAR's list of models says
])
def test_with_vars_4096_codes_a_student_has_the_parameters_of_table_1(name, printed, within):
    assert parameters(name, vocab_size=4096) == pytest.approx(printed, rel=within)


@pytest.mark.parametrize('name, millions', [                # above Table 1 by
    ('d12', 136.3),                                         # 3.3 %
    ('d16', 314.5),                                         # 1.4 %
    ('d20', 606.2),                                         # 1.0 %
    ('d24', 1039.7),                                        # 4.0 %, and still 1.0B
    ('d36_512', 2363.3),                                    # 2.8 %
    ('d16_1024', 324.6),                                    # no figure in the paper: d16 and 9841 · 1024 more positions
])
def test_with_the_papers_8192_codes_a_student_is_a_little_larger(name, millions):
    assert stages(name)[0]['vocab_size'] == 8192
    assert parameters(name) == pytest.approx(millions * 1e6, abs=0.05e6)


def test_codes_cost_one_row_of_the_output_layer_each():
    assert parameters('d16') - parameters('d16', vocab_size=4096) == 4096 * (16 * 64 + 1)


def test_one_adaln_for_all_blocks_is_what_makes_d36_2_3b():
    stage1, stage2 = stages('d36_512')
    with torch.device('meta'):
        structure, _ = build_tokenizers(stage1)
        own = build_student(stage2 | {'shared_aln': False}, structure, 1000)
    assert sum(p.numel() for p in own.parameters()) > 3.4e9


@pytest.mark.parametrize('name', PAPER)
def test_depth_is_in_the_name_and_width_is_64_times_depth(name):
    stage2 = stages(name)[1]
    assert f'd{stage2["depth"]}' == name.partition('_')[0] and (stage2['embed_dim'], stage2['num_heads']) == (0, 0)
    assert stage2['out_dir'] == f'out-{name}'


@pytest.mark.parametrize('name', PAPER)
def test_stage_2_is_trained_as_the_paper_says(name):
    """Section 4.2: 400K steps, learning rate 1e-4, batch 256, the teacher in the last two blocks, λ 1.0 and 0.5."""
    wanted = dict(steps=400_000, lr=1e-4, batch_size=256, distill=True, teacher_blocks=2, lambda_feat=1.0, lambda_logit=0.5)
    assert stages(name)[1] | wanted == stages(name)[1]


@pytest.mark.parametrize('name, image_size, tokens', [('tokenizer_256', 256, 680), ('tokenizer_512', 512, 2240),
                                                      ('tokenizer_1024', 1024, 10_521)])
def test_stage_1_is_trained_as_the_paper_says(name, image_size, tokens):
    """Section 4.2: 8192 and 512 codes, ρ_max = 12 pixels, β from 1e-3 to 1e-2, 100K steps."""
    stage1 = settings(train_tokenizer, name)
    wanted = dict(image_size=image_size, vocab_size=8192, alias_vocab_size=512, max_radius=12.0, noise=(1e-3, 1e-2), steps=100_000,
                  kernel='disk', dual=True, pyramid='focus', out_dir=f'out-{name}')
    assert stage1 | wanted == stage1
    with torch.device('meta'):
        structure, _ = build_tokenizers(stage1)             # image_size, patch_nums and channel_mult belong together
    assert sum(p * p for p in structure.patch_nums) == tokens


# -----------------------------------------------------------------------------
# Table 3

STAGE_1 = {'full': {}, 'gaussian': {'kernel': 'gaussian'}, 'no_dual': {'dual': False}, 'no_refocusing': {'kernel': 'none'},
           'no_teacher': {}, 'var': {'pyramid': 'scale'}}
STAGE_2 = {'full': {}, 'gaussian': {}, 'no_dual': {}, 'no_refocusing': {}, 'no_teacher': {'distill': False},
           'var': {'distill': False}}


def test_every_row_of_table_3_is_here():
    assert sorted(file.stem for file in (HERE / 'config' / 'ablation').glob('*.py')) == sorted(TABLE_3)


@pytest.mark.parametrize('row', TABLE_3)
def test_a_row_of_table_3_changes_one_thing_and_its_folder(row):
    tokenizer = 'out-full/tokenizer.pt' if row == 'no_teacher' else ''         # '' is the one in out_dir
    full1, full2 = settings(train_tokenizer, 'tokenizer_256'), settings(train_fvar, 'd16')
    assert full2['tokenizer'] == 'out-tokenizer_256/tokenizer.pt'
    assert settings(train_tokenizer, 'tokenizer_256', f'ablation/{row}') == full1 | STAGE_1[row] | {'out_dir': f'out-{row}'}
    assert settings(train_fvar, 'd16', f'ablation/{row}') == full2 | STAGE_2[row] | {'out_dir': f'out-{row}', 'tokenizer': tokenizer}


@pytest.mark.parametrize('row', TABLE_3)
def test_the_docstring_of_a_row_is_its_name_in_the_paper(row):
    doc = ' '.join(runpy.run_path(str(HERE / 'config' / 'ablation' / f'{row}.py'), {'script': 'nobody'})['__doc__'].split())
    name = TABLE_3[row].lower().replace('high-freq ', 'high-frequency ')
    assert doc.lower().startswith(f'table 3, "{name}"') and 'Give it after another config file.' in doc


def demo_tokenizers(row):
    """Both tokenizers of a row at the size of the demo, and two pictures."""
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return *build_tokenizers(settings(train_tokenizer, 'charts', f'ablation/{row}')), pictures


@pytest.mark.parametrize('row', ['no_refocusing', 'var'])
def test_without_refocusing_there_is_no_blur_and_no_alias(row):
    structure, alias, pictures = demo_tokenizers(row)
    assert structure.radii == [0.0] * 6 and all((view == 0).all() for view in alias.views(pictures))


def test_full_and_gaussian_share_radii_but_not_the_blur():
    (full, full_alias, pictures), (gaussian, gaussian_alias, _) = demo_tokenizers('full'), demo_tokenizers('gaussian')
    assert full.radii == gaussian.radii and full.radii[0] == 4 and full.radii[-1] == 0
    for radius, a, b in zip(full.radii, full_alias.views(pictures), gaussian_alias.views(pictures)):
        if radius > 0.5:                                    # less is no blur at all
            assert a.abs().max() > 0.01 and not torch.equal(a, b)


def test_without_dual_tokenizers_one_codebook_serves_both():
    structure, alias, pictures = demo_tokenizers('no_dual')
    assert alias.codebook is structure.quantizer.codebook and alias.vocab_size == 256
    assert not list(alias.parameters())
    _, own, _ = demo_tokenizers('full')
    assert own.vocab_size == 512 and list(own.parameters())
