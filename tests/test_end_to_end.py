"""The whole method as `make demo` runs it, in miniature; what its files hold, and what is said about bad input."""
import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from util import checkpoint, runtime
from chaos import draw_data
from configurator import HERE
from data import ImageFolder, TokenDataset, normalize
from util.charts import Charts
from util.metrics import psnr
from model import build_student, load_student
from util.pictures import load_photo, place_photo, to_picture
from pyramid import defocus
from tokenizer import AliasTokenizer, load_tokenizers

# what `make demo` starts, in this order, and what makes a run of seconds of it
DEMO = {
    'train_tokenizer': '--steps=6 --warm_start=2 --batch_size=8 --channels=8 --vocab_size=64 --eval_images=20 --log_every=1',
    'encode': '--batch_size=8',
    'train_fvar': '--steps=6 --batch_size=8 --depth=2 --embed_dim=32 --log_every=1',
    'sample': '--per_class=2',
    'evaluate': '--per_class=5 --cnn_steps=5 --cnn_batch=16 --distance=cnn',
}
CLASSES = sorted(Charts.classes[:4])


def command(script, data, out):
    """Arguments of a stage of the miniature demo. float32, so that no two machines disagree about precision."""
    own_data = [] if script in ('train_fvar', 'sample') else [f'--data={data}']
    return [str(HERE / 'config' / 'charts.py'), f'--out_dir={out}', *own_data, '--dtype=float32', '--device=cpu', *DEMO.get(script, '').split()]


def in_a_process(script, *arguments):
    return subprocess.run([sys.executable, f'{script}.py', *arguments], cwd=HERE, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    """A finished demo on 48 pictures of four classes and 20 held out: folders data and out, and what was printed.

    train_fvar.py runs on a real command line, with FLOPs counted; the others in this process, which takes seconds less.
    """
    folder = tmp_path_factory.mktemp('demo')
    data, out, printed = folder / 'data', folder / 'out', {}
    draw_data(data, 36)
    for script in DEMO:
        arguments = command(script, data, out)
        if script == 'train_fvar':
            done = in_a_process(script, *arguments)
            assert done.returncode == 0, done.stderr
            printed[script] = done.stdout
        else:
            with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as shown:
                patch.setattr(sys, 'argv', [f'{script}.py', *arguments])
                runpy.run_path(str(HERE / f'{script}.py'), run_name='__main__')
            printed[script] = shown.getvalue()
    return SimpleNamespace(data=data, out=out, printed=printed)


@pytest.fixture
def copy(demo, tmp_path):
    """The demo's out folder, to be spoilt."""
    return Path(shutil.copytree(demo.out, tmp_path / 'out'))


@pytest.fixture
def run(run_script, demo):
    """Runs a script in this process, otherwise as a command line would: (exit status, stdout, stderr)."""
    def run(script, out, *arguments, data=demo.data):
        return run_script(script, *command(script, data, out), *arguments)
    return run


def contents(folder):
    """{path: bytes} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


# -----------------------------------------------------------------------------
# what the demo leaves

def test_make_demo_starts_these_stages_in_this_order():
    if not shutil.which('make'):
        pytest.skip('no make here')
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('MAKE', 'MFLAGS'))}
    shown = subprocess.run(['make', '--dry-run', 'demo', 'OUT=some where'], cwd=HERE, env=environment, capture_output=True, text=True)
    assert re.findall(r"(\w+)\.py config/charts.py --out_dir='some where'$", shown.stdout, re.M) == list(DEMO)


def test_every_promised_file_is_there_and_no_other(demo):
    assert set(contents(demo.out)) == {
        'tokenizer.pt', 'tokenizer_state.pt', 'tokenizer.jsonl', 'tokenizer.png', 'tokens/train.bin', 'tokens/train.json',
        'tokens/val.bin', 'tokens/val.json', 'student.pt', 'fvar_state.pt', 'fvar.jsonl', 'progress.png', 'samples.png',
        'focus.gif', 'cnn.pt', 'results.json'} | ({'loss.png'} if find_spec('matplotlib') else set())


def test_every_script_says_what_it_wrote(demo):
    for script, file in {'train_tokenizer': 'tokenizer.pt', 'encode': 'tokens/val.bin', 'train_fvar': 'student.pt',
                         'sample': 'focus.gif', 'evaluate': 'results.json'}.items():
        assert f'{demo.out}/{file}' in demo.printed[script] and f'{script}.py: done in' in demo.printed[script]


def test_the_gif_shows_as_many_focus_states_as_there_are_token_maps(demo):
    with Image.open(demo.out / 'focus.gif') as gif:
        assert gif.n_frames == 6 and gif.info['loop'] == 0
        assert gif.size[1] > 2 * 160                        # decoded pictures above blurred ones
    with Image.open(demo.out / 'samples.png') as picture:
        assert picture.height == 4 * 66 - 2                 # four rows, a class each


def test_the_results_hold_every_figure(demo):
    results = json.loads((demo.out / 'results.json').read_text())
    assert results['tokenizer_step'] == results['student_step'] == 6
    assert 5 < results['tokenizer']['psnr'] < 40 and len(results['tokenizer']['perplexity']) == 6
    assert 0 < results['student']['ce'] < 1.1 * math.log(64) and len(results['student']['ce_per_map']) == 6
    rows = {(row['set'], row['against']): row['fd_cnn'] for row in results['distances']}
    assert len(rows) == 4 and rows['real', 'reference'] < rows['generated', 'reference']


def test_the_deployed_file_holds_the_student_alone(demo):
    """Names and sizes are those of the plain VAR; no tensor lies elsewhere in the file, and it is no larger than they are."""
    structure, _, _ = load_tokenizers(demo.out / 'tokenizer.pt')
    saved = torch.load(demo.out / 'student.pt', weights_only=True)
    weights = saved.pop('student')
    plain = build_student(saved['config'], structure, len(CLASSES)).state_dict()
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in plain.items()}
    assert not [name for name in weights if 'alias' in name or 'teacher' in name]
    assert 'tensor' not in repr(saved) and saved['classes'] == CLASSES
    assert (demo.out / 'student.pt').stat().st_size < sum(w.nbytes for w in weights.values()) + 50_000
    assert any(name.startswith('teacher.') for name in torch.load(demo.out / 'fvar_state.pt', weights_only=True)['network'])


# -----------------------------------------------------------------------------
# token files

def test_a_row_of_tokens_is_what_the_tokenizers_make_of_that_crop(demo):
    structure, alias, _ = load_tokenizers(demo.out / 'tokenizer.pt')
    for split, first in (('train', 0), ('train', 40), ('val', 8)):
        dataset = ImageFolder(demo.data, split, 32)
        crops, labels = zip(*(dataset[(i, i) if split == 'train' else i] for i in range(first, first + 8)))
        images, noise = normalize(torch.stack(crops)), runtime.noise_of(range(first, first + 8), 'cpu', 0, split)
        wanted = [torch.cat(tokenizer.encode(images, noise), 1) for tokenizer in (structure, alias)]
        found = TokenDataset(demo.out / 'tokens', split).batch(list(range(first, first + 8)))
        assert all(torch.equal(a, b) for a, b in zip(found, (*wanted, torch.tensor(labels))))


def test_token_files_say_what_they_were_made_of(demo):
    structure, alias, _ = load_tokenizers(demo.out / 'tokenizer.pt')
    for split, rows in (('train', 48), ('val', 20)):
        meta = json.loads((demo.out / 'tokens' / f'{split}.json').read_text())
        assert (meta['rows'], meta['columns'], meta['classes']) == (rows, 130 + 66 + 1, CLASSES)
        assert meta['tokenizer'] == checkpoint.digest(structure.state_dict()) and meta['alias_tokenizer'] == checkpoint.digest(alias.state_dict())


def test_seed_and_flip_reach_the_crops_and_the_description(demo, run, copy, monkeypatch):
    seen = []
    monkeypatch.setattr('data.ImageFolder', lambda *given: seen.append(given[1:]) or ImageFolder(*given))
    saved = torch.load(copy / 'tokenizer.pt', weights_only=True)
    for flip, seed in ((False, 1), (True, 0)):
        saved['config']['flip'] = flip
        torch.save(saved, copy / 'tokenizer.pt')
        assert run('encode', copy, f'--seed={seed}')[0] == 0
        meta = json.loads((copy / 'tokens' / 'train.json').read_text())
        assert (meta['flip'], meta['seed']) == (flip, seed)
        assert seen == [('train', 32, flip, seed), ('val', 32, flip, seed)]
        assert contents(copy / 'tokens')['train.bin'] != contents(demo.out / 'tokens')['train.bin']
        seen.clear()


def test_tokens_are_encoded_again_only_where_the_pictures_have_changed(demo, run, copy):
    description, kept = copy / 'tokens' / 'train.json', 'already exists with identical settings'
    status, out, _ = run('encode', copy)
    assert status == 0 and [f'{split}.bin {kept}' in out for split in ('train', 'val')] == [True, True]
    meta = json.loads(description.read_text())
    assert meta['contents'] == ImageFolder(demo.data, 'train', 32).contents
    description.write_text(json.dumps(meta | {'contents': 'of other pictures'}))
    status, out, _ = run('encode', copy)
    assert status == 0 and [f'{split}.bin {kept}' in out for split in ('train', 'val')] == [False, True]
    assert contents(copy / 'tokens') == contents(demo.out / 'tokens')


@pytest.fixture
def interrupted(demo, tmp_path, run, monkeypatch):
    """A folder in which encode.py was stopped in its fourth batch of 8, while it wrote the third; what it encodes from then on."""
    out, encode, counts = tmp_path / 'out', AliasTokenizer.encode, []

    def counted(self, images, noise=None):
        counts.append(len(images))
        if counts == 4 * [8]:
            raise KeyboardInterrupt
        return encode(self, images, noise)

    out.mkdir()
    shutil.copy(demo.out / 'tokenizer.pt', out)
    monkeypatch.setattr(AliasTokenizer, 'encode', counted)
    status, _, err = run('encode', out)
    assert status == 130 and 'error: interrupted' in err
    counts[:] = 4 * [0]                                     # stop no more
    assert set(contents(out)) == {'tokenizer.pt', 'tokens/train.partial', 'tokens/train.partial.json'}
    table = np.memmap(out / 'tokens' / 'train.partial', np.uint16, 'r+', shape=(48, 197))
    assert (table[:, -1] == 65535).tolist() == 24 * [False] + 24 * [True]
    table[20:24] = 65535                                    # as a kill in the middle of a write leaves them
    table[20, :100] = 7
    table.flush()
    return out, counts, err


def test_an_interrupted_encode_goes_on_where_it_stopped_and_gives_the_same_files(demo, run, interrupted):
    out, counts, _ = interrupted
    assert run('encode', out)[0] == 0
    assert counts[4:] == 4 * [8] + [8, 8, 4]                # batches 3 to 6 of train, and val
    assert contents(out / 'tokens') == contents(demo.out / 'tokens')


def test_what_stops_a_run_is_said_on_a_line_of_its_own_and_not_behind_the_progress_bar(interrupted):
    assert 'error: interrupted' in interrupted[2].splitlines()


def test_a_partial_file_of_other_settings_is_begun_again(demo, run, interrupted):
    out, counts, _ = interrupted
    assert run('encode', out, '--seed=1')[0] == 0
    assert counts[4:] == 6 * [8] + [8, 8, 4]
    assert contents(out / 'tokens')['train.bin'] != contents(demo.out / 'tokens')['train.bin']
    assert run('encode', out)[0] == 0                       # and a finished one is replaced
    assert contents(out / 'tokens') == contents(demo.out / 'tokens')


# -----------------------------------------------------------------------------
# variants of training

def test_without_distillation_there_is_no_teacher_anywhere(run, copy):
    for file in copy.glob('*fvar*'):
        file.unlink()
    status, out, _ = run('train_fvar', copy, '--distill=False', '--steps=2')
    assert status == 0 and 'teacher' not in out
    assert all(name.startswith('student.') for name in torch.load(copy / 'fvar_state.pt', weights_only=True)['network'])
    assert all('kl' not in line and 'teacher' not in line for line in (copy / 'fvar.jsonl').read_text().splitlines())
    assert run('sample', copy, '--per_class=1')[0] == 0


def test_a_student_needs_token_files(run, demo, tmp_path):
    shutil.copy(demo.out / 'tokenizer.pt', tmp_path)
    status, _, err = run('train_fvar', tmp_path, '--steps=2')
    assert status == 2 and 'no usable token files train.bin and train.json' in err and 'run encode.py' in err


# -----------------------------------------------------------------------------
# sampling

@pytest.fixture
def sample(run, demo, tmp_path):
    """Pixels of samples.png with some arguments, sampled from the demo's student."""
    def sample(*arguments):
        status, _, err = run('sample', tmp_path, f'--init_from={demo.out}/student.pt', *arguments)
        assert status == 0, err
        return np.asarray(Image.open(tmp_path / 'samples.png'))
    return sample


def test_the_same_seed_gives_the_same_pictures_and_another_one_others(sample, demo):
    assert np.array_equal(sample(), np.asarray(Image.open(demo.out / 'samples.png')))
    assert not np.array_equal(sample('--seed=1'), sample())


def test_classes_are_drawn_as_asked_for(sample):
    one, two = sample('--classes=2', '--per_class=3'), sample('--classes=2,0', '--per_class=3')
    assert one.shape[0] == 64 and two.shape[0] == 2 * 66 - 2
    assert two.shape[1] == sample('--classes=2,0', '--per_class=2').shape[1] + 66


def test_sampling_needs_nothing_but_tokenizer_and_student(run, demo, tmp_path):
    for file in ('tokenizer.pt', 'student.pt'):
        shutil.copy(demo.out / file, tmp_path)
    away = demo.data.rename(demo.data.with_name('away'))
    try:
        assert run('sample', tmp_path)[0] == 0
    finally:
        away.rename(demo.data)
    assert set(contents(tmp_path)) == {'tokenizer.pt', 'student.pt', 'samples.png', 'focus.gif'}
    assert contents(tmp_path)['samples.png'] == contents(demo.out)['samples.png']


# -----------------------------------------------------------------------------
# editing and refocusing

@pytest.fixture(scope='module')
def photo(demo):
    return sorted((demo.data / 'val' / 'zone_plate').iterdir())[0]


@pytest.fixture
def drawn(run, demo, tmp_path):
    """Pixels (per_class, 32, 32, 3) of what sample.py makes of a photo, and the student's square of the photo itself."""
    def drawn(name, *arguments):
        status, _, err = run('sample', tmp_path, f'--init_from={demo.out}/student.pt', '--per_class=3', *arguments)
        assert status == 0, err
        assert (tmp_path / f'{name}.png').is_file() and not (tmp_path / f'{name}-4.png').exists()
        return np.stack([np.asarray(Image.open(tmp_path / f'{name}-{i}.png')) for i in (1, 2, 3)])
    return drawn


def square(photo):
    return (load_photo(photo, 32)[0].permute(1, 2, 0).numpy() * 127.5 + 127.5).round().astype(np.uint8)


def test_inpainting_changes_what_is_white_in_the_mask_and_nothing_else(drawn, photo, tmp_path):
    """At the size of the photo, 36 px; the mask is drawn at twice that, and everything comes out at 32."""
    mask = np.zeros((72, 72), np.uint8)
    mask[:, 36:] = 255
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    pictures = drawn('edit', f'--edit={photo}', f'--mask={tmp_path}/mask.png')
    assert (pictures[:, :, :16] == square(photo)[:, :16]).all()
    assert (pictures[:, :, 20:] != square(photo)[:, 20:]).any(-1).mean() > 0.9
    assert not np.array_equal(pictures[0], pictures[1]), 'variants differ'
    boxed = drawn('edit', f'--edit={photo}', '--mask=16,0,32,32')
    assert np.array_equal(boxed, pictures), 'a box is a mask'


def test_a_class_can_be_asked_for_in_the_mask(drawn, photo):
    pictures = [drawn('edit', f'--edit={photo}', '--mask=8,8,24,24', f'--class={c}', '--cfg=4') for c in (0, 3)]
    changed = (pictures[0] != pictures[1]).any((0, 3))
    assert changed[8:24, 8:24].any() and not changed[:8].any() and not changed[24:].any() and not changed[:, :8].any()


def test_outpainting_puts_the_photo_inside_and_draws_around_it(drawn, photo):
    pictures = drawn('outpaint', f'--edit={photo}', '--outpaint=0,16,16,0')
    with Image.open(photo) as image:
        inside = np.asarray(image.convert('RGB').resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(pictures[:, 16:, :16] - inside).max() <= 1
    canvas = pictures.astype(int) - np.asarray(place_photo(photo, 32, (0, 16, 16, 0))[0][0].permute(1, 2, 0) * 127.5 + 127.5)
    assert (np.abs(canvas[:, :13]) > 1).any(-1).mean() > 0.9 and not np.array_equal(pictures[0], pictures[1])


def test_refocusing_draws_what_the_blur_left_open(drawn, photo, tmp_path):
    blurred = defocus(load_photo(photo, 32), 2.0)
    to_picture(blurred[0]).save(tmp_path / 'blurred.png')
    pictures = drawn('refocus', f'--refocus={tmp_path}/blurred.png', '--radius=2')
    again = defocus(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1, 2.0)
    assert psnr(again, blurred.expand_as(again)) > 25, 'put out of focus again it is the photo that was given'
    assert not np.array_equal(pictures[0], pictures[1])


def test_refocusing_is_measured_beside_the_classical_remedies(run, demo, tmp_path):
    status, out, err = run('experiments/refocus', tmp_path, f'--init_from={demo.out}/student.pt', '--images=12')
    rows = json.loads((tmp_path / 'refocus.json').read_text())['refocus']
    assert status == 0 and 'student + Wiener' in out and {row['images'] for row in rows} == {12}
    found = {(row['radius'], row['noise'], row['method']): row['psnr'] for row in rows}
    assert len(found) == len(rows) == 5 * 2 * 5 and max(radius for radius, _, _ in found) == 4
    assert found[4, 0, 'Wiener'] > found[4, 0, 'unsharp'] > found[4, 0, 'blurred'] > found[4, 0, 'student']


# -----------------------------------------------------------------------------
# our student in the published format and back

def test_an_exported_student_draws_the_same_pictures(run, sample, demo, tmp_path):
    assert run('sample', demo.out, f'--export={tmp_path}/published')[0] == 0
    names = {path.name: str(path) for path in (tmp_path / 'published').iterdir()}
    assert set(names) == {'vae_ch8v64z16.pth', 'var_d2.pth'}
    status, _, err = run('sample', tmp_path, f'--vae={names["vae_ch8v64z16.pth"]}', f'--init_from={names["var_d2.pth"]}',
                         '--patch_nums=1,2,3,4,6,8', '--classes=0,1,2,3')
    assert status == 0, err
    ours = sample()
    theirs = np.asarray(Image.open(tmp_path / 'samples.png'))       # narrower: its classes are numbers, not names
    assert np.array_equal(ours[:, -theirs.shape[1] + 40:], theirs[:, 40:])


def test_training_goes_on_from_published_files(run, demo, tmp_path):
    """Stage 1 from the tokenizer alone, stage 2 from the transformer; another number of classes starts theirs anew."""
    assert run('sample', demo.out, f'--export={tmp_path}/published')[0] == 0
    vae, var = f'{tmp_path}/published/vae_ch8v64z16.pth', f'{tmp_path}/published/var_d2.pth'
    status, _, err = run('train_tokenizer', tmp_path / 'out', f'--init_from={vae}', '--steps=0')
    assert status == 0, err
    ours, theirs = (load_tokenizers(out / 'tokenizer.pt')[0].state_dict() for out in (demo.out, tmp_path / 'out'))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    arguments = f'--init_from={var}', f'--tokenizer={demo.out}/tokenizer.pt', '--steps=1', '--lr=0', '--distill=False'
    status, out, _ = run('train_fvar', tmp_path / 'out', *arguments)
    assert status == 0 and 'var_d2.pth knows 4 of 4 classes by number' in out
    structure = load_tokenizers(demo.out / 'tokenizer.pt')[0]
    trained, ours = (torch.load(out / 'student.pt', weights_only=True)['student'] for out in (tmp_path / 'out', demo.out))
    assert all(torch.equal(ours[name], trained[name]) for name in ours)

    shutil.rmtree(tmp_path / 'out')
    fewer = shutil.copytree(demo.data, tmp_path / 'data')
    for split in ('train', 'val'):
        shutil.rmtree(fewer / split / CLASSES[0])
    (tmp_path / 'fewer').mkdir()
    shutil.copy(demo.out / 'tokenizer.pt', tmp_path / 'fewer' / 'tokenizer.pt')
    assert run('encode', tmp_path / 'fewer', data=fewer)[0] == 0
    tokens = f'--tokens={tmp_path}/fewer/tokens'
    status, out, err = run('train_fvar', tmp_path / 'out', *arguments, tokens)
    assert status == 0 and 'var_d2.pth knows 0 of 3 classes by number' in out, err
    student = load_student(tmp_path / 'out' / 'student.pt', structure)[0].state_dict()
    assert torch.equal(student['class_embed.weight'][-1], ours['class_embed.weight'][-1])
    assert all(torch.equal(ours[name], student[name]) for name in ours if name != 'class_embed.weight')


# -----------------------------------------------------------------------------
# bad input: one line on stderr which names the thing, the right status, and nothing written

def truncated(name):
    return lambda out: os.truncate(out / name, 1000)


def missing(name):
    return lambda out: (out / name).unlink()


def swapped(name, other):
    return lambda out: shutil.copy(out / other, out / name)


def changed(file, **changes):
    """Gives a checkpoint other contents: a dictionary is merged into what is there."""
    def change(out):
        saved = torch.load(out / file, weights_only=True)
        torch.save(saved | {name: saved[name] | value if isinstance(value, dict) else value for name, value in changes.items()}, out / file)
    return change


BAD = {                         # and more in test_bad_input.py
    'dtype': ('train_tokenizer', '--dtype=float13', None, '--dtype=float13: choose auto, float32, bfloat16 or float16'),
    'float16 with a GAN': ('train_tokenizer', '--dtype=float16 --lambda_gan=0.5 --image_size=32', None, "loses the GAN's small gradients"),
    'float16 without a GPU': ('train_fvar', '--dtype=float16', None, '--dtype=float16 needs a GPU'),
    'device': ('sample', '--device=abacus', None, '--device=abacus: '),
    'no tokenizer': ('encode', '', missing('tokenizer.pt'), 'tokenizer.pt: no such checkpoint; run train_tokenizer.py first'),
    'no student': ('sample', '', missing('student.pt'), 'student.pt: no such checkpoint; run train_fvar.py first'),
    'nothing to resume': ('train_fvar', '--init_from=resume', missing('fvar_state.pt'), 'fvar_state.pt: no such checkpoint; run train_fvar.py first'),
    'nothing to start from': ('train_fvar', '--init_from=elsewhere.pt', None,
                              'elsewhere.pt: No such file or directory; check the path'),
    'unknown start': ('train_tokenizer', '--init_from=student.pt', None,
                      'student.pt: No such file or directory; check the path'),
    'truncated tokenizer': ('train_fvar', '', truncated('tokenizer.pt'), 'tokenizer.pt cannot be read (truncated, not a checkpoint'),
    'student for tokenizer': ('encode', '', swapped('tokenizer.pt', 'student.pt'), 'tokenizer.pt holds student, not tokenizer'),
    'tokenizer for student': ('sample', '', swapped('student.pt', 'tokenizer.pt'), 'student.pt holds tokenizer, not student'),
    'tokenizer of another config': ('encode', '', changed('tokenizer.pt', config={'channels': 16}),
                                    'tokenizer.pt does not fit this model: '),
    'tokenizer of another size': ('encode', '', changed('tokenizer.pt', config={'image_size': 64}),
                                  'image_size=64 does not fit patch_nums'),
    'no token file': ('train_fvar', '', missing('tokens/val.bin'), 'no usable token files val.bin and val.json'),
    'resumed at another size': ('train_tokenizer', '--init_from=resume --image_size=16 --patch_nums=1,2,4', None,
                                'tokenizer_state.pt was made with image_size=32, which a resumed run cannot change'),
    'image size that does not fit': ('train_tokenizer', '--image_size=48', None, 'image_size=48 does not fit patch_nums ending in 8'),
    'maps that shrink': ('train_tokenizer', '--patch_nums=1,4,2,8', None, 'patch_nums=(1, 4, 2, 8) must grow'),
    'batch that does not divide': ('train_fvar', '--batch_size=7 --grad_accum_steps=2', None, 'batch_size=7 must be a multiple of'),
    'no such class': ('sample', '--classes=4', None, "--class and --classes take numbers from 0 to 3, or none; got ['4']"),
    'photo without a mask': ('sample', '--edit=brick', None, 'give --edit=PHOTO and one of --mask=MASK.png and --outpaint='),
    'mask without a photo': ('sample', '--mask=1,1,9,9', None, 'give --edit=PHOTO and one of --mask=MASK.png and --outpaint='),
    'no such photo': ('sample', '--edit=nowhere.png --mask=1,1,9,9', None, "'nowhere.png': no such picture"),
    'no such mask': ('sample', '--edit=brick --mask=nowhere.png', None, "'nowhere.png': no such picture"),
    'mask of nothing': ('sample', '--edit=brick --mask=9,9,9,9', None, '--mask=9,9,9,9: covers nothing of the photo'),
    'mask of everything': ('sample', '--edit=brick --mask=0,0,32,32', None, '--mask=0,0,32,32: covers all of the photo'),
    'mask beyond the picture': ('sample', '--edit=brick --mask=0,0,33,32', None, '--mask: give LEFT,TOP,RIGHT,BOTTOM'),
    'mask of another shape': ('sample', '--edit=brick --mask={out}/samples.png', None, 'must have the proportions of the photo'),
    'no margins': ('sample', '--edit=brick --outpaint=0,0,0,0', None, '--outpaint: leave some of the 32 pixels'),
    'margins without a photo': ('sample', '--edit=brick --outpaint=16,0,16,0', None, '--outpaint: leave some of the 32 pixels'),
    'class for sampling': ('sample', '--class=1', None, '--class=NUMBER goes with --edit and --refocus'),
    'no such class to paint': ('sample', '--edit=brick --mask=1,1,9,9 --class=4', None, 'from 0 to 3, or none; got [4]'),
    'refocusing without a radius': ('sample', '--refocus=brick', None, 'give --refocus=PHOTO and --radius=PIXELS'),
    'blur beyond the first state': ('sample', '--refocus=brick --radius=5', None, '--radius=5: give the blur radius'),
    'published transformer alone': ('sample', '--vae=vae.pth', None, '--vae=vae.pth: give the transformer that belongs to it'),
    'maps of our own files': ('sample', '--patch_nums=1,2', None, '--patch_nums goes with --vae'),
    'our student as published': ('sample', '--vae={out}/tokenizer.pt --init_from={out}/student.pt', None, 'is not a published VAR'),
    'start from a tokenizer': ('train_fvar', '--init_from={out}/tokenizer.pt', None, 'tokenizer.pt holds tokenizer, not student'),
    'tokenizer from a student': ('train_tokenizer', '--init_from={out}/student.pt', None, 'is not a published VAR tokenizer'),
    'no such kernel': ('train_tokenizer', '--kernel=dsik', None, "kernel='dsik': choose disk, gaussian or none"),
    'blur wider than the picture': ('train_tokenizer', '--max_radius=1000', None, 'max_radius'),
    'noise without an end': ('train_tokenizer', '--noise=0.1', None, 'noise=(0.1,)'),
    'no steps': ('train_fvar', '--steps=0', None, 'steps=0'),
    'never to validate': ('train_fvar', '--eval_every=0', None, 'eval_every=0'),
    'no crops': ('encode', '--crops=0', None, 'crops=0: must be at least 1'),
    'teacher that does not fit': ('train_fvar', '--teacher_blocks=3', None, 'teacher_blocks=3'),
    'file as folder of samples': ('sample', '--init_from={out}/student.pt --out_dir={out}/results.json', None,
                                  'results.json: File exists'),
    'read-only folder': ('train_tokenizer', '--out_dir=/sys/fvar', None, '/sys/fvar: '),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line_and_leaves_everything_as_it_was(run, copy, case):
    script, arguments, spoil, message = BAD[case]
    if '/sys' in arguments and not os.path.isdir('/sys/kernel'):
        pytest.skip('no /sys, which is read-only even to root')
    if spoil:
        spoil(copy)
    before = contents(copy)
    status, _, err = run(script, copy, *arguments.format(out=copy).split())
    assert status == 2 and err.startswith('error: ') and message in err and err.count('\n') == 1
    assert contents(copy) == before


def test_bad_input_is_one_line_on_a_real_command_line_too(demo, copy):
    script, _, spoil, message = BAD['truncated tokenizer']
    spoil(copy)
    done = in_a_process(script, *command(script, demo.data, copy))
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.startswith('error: ') and message in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('spoil, message', [
    (lambda data: shutil.rmtree(data / 'val'), "/val': no such folder"),
    (lambda data: shutil.rmtree(data / 'train'), "/train': no such folder"),
    (lambda data: [file.unlink() for file in (data / 'train' / 'zone_plate').iterdir()], 'zone_plate'),
    (lambda data: [file.write_bytes(b'') for file in data.rglob('*.png')], 'none of the 48 pictures can be read'),
], ids=['no val', 'no train', 'an empty class', 'nothing readable'])
def test_a_bad_folder_of_images_is_refused_in_one_line(run, demo, tmp_path, spoil, message):
    data = shutil.copytree(demo.data, tmp_path / 'data')
    spoil(data)
    status, _, err = run('train_tokenizer', tmp_path / 'out', data=data)
    *skipped, last = err.splitlines()
    assert status == 2 and last.startswith('error: ') and message in last
    assert all(line.startswith('warning: skipped ') for line in skipped)
    assert not (tmp_path / 'out').exists()


def test_a_corrupt_image_is_skipped_with_a_warning_and_left_out_of_the_tokens(run, demo, tmp_path):
    data = shutil.copytree(demo.data, tmp_path / 'data')
    broken = sorted((data / 'train' / 'zone_plate').iterdir())[3]
    os.truncate(broken, 200)
    assert run('train_tokenizer', tmp_path / 'out', data=data)[0] == 0
    status, out, err = run('encode', tmp_path / 'out', data=data)
    assert err.count(f'warning: skipped {str(broken)!a}: ') == 1
    assert status == 0 and 'train.bin: 47 × 197 tokens' in out and 'left out 1 rows whose images cannot be read' in out
    assert TokenDataset(tmp_path / 'out' / 'tokens', 'train').batch(list(range(47)))[2].bincount().tolist() == [12, 12, 12, 11]
    assert run('train_fvar', tmp_path / 'out', '--steps=1', data=data)[0] == 0


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full, a file on a full disk')
@pytest.mark.parametrize('script, file', [('train_tokenizer', 'tokenizer.pt'), ('train_fvar', 'student.pt'), ('sample', 'samples.png')])
def test_a_full_disk_is_one_line_and_what_was_there_is_intact(run, copy, script, file):
    """The file that becomes `file` when it is whole is made to lie on a full disk."""
    before, temporary = contents(copy), copy / f'.{file}.tmp'
    temporary.symlink_to('/dev/full')
    status, _, err = run(script, copy, *(['--steps=2'] if script != 'sample' else []))
    assert status == 1 and err.splitlines()[-1].startswith('error: disk full while writing a file')
    after = contents(copy)
    assert not temporary.is_symlink() and after.keys() == before.keys() and after[file] == before[file]
