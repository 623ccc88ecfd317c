"""evaluate.py: every metric on a case whose answer is known, and what is said about bad input."""
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import evaluate
from configurator import UserError
from conftest import pictures, save_pictures, statistics_file
from data import TokenDataset, normalize, open_dataset
from model import build_student
from tokenizer import build_tokenizers
from util import checkpoint
from util.picture_sets import evenly_over_classes, fingerprint

STAGE1 = dict(image_size=16, patch_nums=(1, 2, 4), vocab_size=16, codebook_dim=4, channels=4, channel_mult=(1, 1, 1), res_blocks=1,
              alias_vocab_size=8, alias_codebook_dim=4, alias_channels=4, alias_res_blocks=1, beta=0.25, dual=True)
STAGE2 = dict(depth=1, embed_dim=8, num_heads=2, mlp_ratio=2.0, qk_norm=True, shared_aln=False, drop_path=0.0)
CLASSES = ['dark', 'light']


def change(monkeypatch, **settings):
    """Sets settings as a command line does."""
    for name, value in settings.items():
        monkeypatch.setattr(evaluate, name, value)
        monkeypatch.setitem(evaluate.config, name, value)


# -----------------------------------------------------------------------------
# the networks that judge

def test_missing_inception_weights_are_one_line_naming_file_and_place(monkeypatch, tmp_path):
    change(monkeypatch, inception_weights=str(tmp_path / 'here.pth'), distance='fid')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    with pytest.raises(UserError, match='not on disk') as error:
        evaluate.choose_distance(only_statistics=False)
    message = str(error.value)
    assert 'weights-inception-2015-12-05-6726825d.pth' in message and 'here.pth' in message and '\n' not in message


def test_without_inception_weights_the_cnn_is_used_and_that_is_said(monkeypatch, tmp_path, capsys):
    change(monkeypatch, inception_weights=str(tmp_path / 'here.pth'), distance='auto')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    assert evaluate.choose_distance(only_statistics=False) == ''
    assert 'no FID: the Inception weights are not on disk' in capsys.readouterr().out
    change(monkeypatch, distance='cnn')
    assert evaluate.choose_distance(only_statistics=False) == '' and capsys.readouterr().out == ''


def test_other_weights_are_not_taken_for_inception(monkeypatch, tmp_path):
    (tmp_path / 'here.pth').write_bytes(b'truncated')
    change(monkeypatch, inception_weights=str(tmp_path / 'here.pth'))
    with pytest.raises(UserError, match='truncated or another file'):
        evaluate.find_inception()


def test_cnn_is_kept_and_trained_again_only_for_other_data_or_settings(monkeypatch, tmp_path, capsys):
    change(monkeypatch, out_dir=str(tmp_path), cnn_steps=2)
    labels = torch.arange(20) % 2
    train, dev = (pictures(labels), labels), torch.device('cpu')
    cnn, accuracy = evaluate.load_or_train_cnn(train, train, 'folder', CLASSES, dev)
    monkeypatch.setattr(evaluate, 'train_cnn', None)                        # must not be called
    kept, kept_accuracy = evaluate.load_or_train_cnn(train, train, 'folder', CLASSES, dev)
    assert checkpoint.digest(kept.state_dict()) == checkpoint.digest(cnn.state_dict()) and kept_accuracy == accuracy
    with pytest.raises(TypeError):
        evaluate.load_or_train_cnn(train, train, 'another', CLASSES, dev)
    with pytest.raises(TypeError):
        evaluate.load_or_train_cnn((255 - train[0], labels), train, 'folder', CLASSES, dev)
    assert 'training it again' in capsys.readouterr().out


def test_a_cnn_of_one_class_is_said_to_know_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluate, 'cnn_file', str(tmp_path / 'cnn.pt'))
    monkeypatch.setattr(evaluate, 'cnn_steps', 1)
    train = torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    evaluate.load_or_train_cnn(train, train, 'folder', CLASSES[:1], torch.device('cpu'))
    assert 'one class teaches the CNN nothing' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# a whole run: random weights, twenty pictures of two classes

@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """out_dir with tokenizer.pt, student.pt and tokens/, made of random weights and a folder of pictures."""
    torch.manual_seed(0)
    data, out = tmp_path / 'data', tmp_path / 'out'
    labels = torch.arange(20) % 2
    images = {'train': pictures(labels, seed=1), 'val': pictures(labels, seed=2)}
    for split in images:
        for c, name in enumerate(CLASSES):
            save_pictures(data / split / name, images[split][labels == c])
    structure, alias = (module.eval() for module in build_tokenizers(STAGE1))
    structure.quantizer.codebook.weight.data.normal_()
    structure.quantizer.codebook.usage.fill_(1)
    checkpoint.save_checkpoint(out / 'tokenizer.pt', {
        'kind': 'tokenizer', 'config': STAGE1 | {'data': str(data)}, 'step': 7,
        'structure': structure.state_dict(), 'alias': alias.state_dict()})
    digest = checkpoint.digest(structure.state_dict())
    student = build_student(STAGE2, structure, 2)
    checkpoint.save_checkpoint(out / 'student.pt', {'kind': 'student', 'config': STAGE2, 'step': 9, 'tokenizer': digest,
                                                 'classes': CLASSES, 'student': student.state_dict()})
    x = normalize(images['val'])
    rows = torch.cat([*structure.encode(x), *alias.encode(x), labels[:, None]], 1).numpy().astype('<u2')
    (out / 'tokens').mkdir()
    rows.tofile(out / 'tokens' / 'val.bin')
    checkpoint.write_json(out / 'tokens' / 'val.json', {
        'rows': 20, 'columns': rows.shape[1], 'patch_nums': [1, 2, 4], 'alias_patch_nums': [1, 2], 'vocab_size': 16,
        'alias_vocab_size': 8, 'classes': CLASSES, 'tokenizer': digest})
    change(monkeypatch, out_dir=str(out), per_class=6, cnn_steps=10, cnn_batch=16, batch_size=8,
           distance='cnn', device='cpu')
    return out, structure, student.eval()


def test_student_metrics_of_a_student_that_knows_nothing_are_those_of_a_uniform_distribution(finished_run):
    out, structure, student = finished_run
    torch.nn.init.zeros_(student.head.weight)
    found = evaluate.student_metrics(student, structure, TokenDataset(out / 'tokens', 'val'), nullcontext)
    assert found['ce'] == pytest.approx(math.log(16)) and found['ce_per_map'] == pytest.approx(3 * [math.log(16)])
    assert found['bits_per_image'] == pytest.approx(21 * 4) and found['images'] == 20   # 1 + 4 + 16 tokens of 4 bits


def test_a_whole_run_writes_every_metric_and_the_same_ones_again(finished_run, capsys):
    out = finished_run[0]
    evaluate.main()
    results = json.loads((out / 'results.json').read_text())
    assert results['config'].keys() == evaluate.config.keys() and results['tokenizer_step'] == 7 and results['student_step'] == 9
    assert results['tokenizer']['perplexity'] == pytest.approx(3 * [16]) and math.isfinite(results['tokenizer']['psnr'])
    assert len(results['student']['ce_per_map']) == 3
    rows = {(row['set'], row['against']): row for row in results['distances']}
    assert list(rows) == evaluate.PAIRS and all(row['images'] == 12 for row in rows.values())
    # the floor is lower than what random networks make
    assert rows['real', 'reference']['recognised'] == results['cnn']['accuracy'] == 1
    assert all(rows['real', 'reference']['fd_cnn'] < rows[name, 'reference']['fd_cnn'] for name in ('generated', 'reconstructed'))
    printed = capsys.readouterr().out
    assert 'FD-cnn' in printed and f"fd_cnn {rows['real', 'reference']['fd_cnn']:.5g}" in printed
    assert 'fid' not in printed.lower()
    assert printed.count('covariance is singular') == len(results['warnings']) == 2      # of the samples, of the reference
    evaluate.main()
    assert json.loads((out / 'results.json').read_text()) == results


def test_real_pictures_given_as_samples_are_as_good_as_the_floor(finished_run, monkeypatch):
    out = finished_run[0]
    (out / 'student.pt').unlink()                                           # samples from elsewhere need no student
    change(monkeypatch, parts='samples')
    images, labels = evaluate.load_images(open_dataset(str(out.parent / 'data'), 'val', 16), 0)
    for c, name in enumerate(CLASSES):
        save_pictures(out / 'samples' / name, images[labels == c])
    change(monkeypatch, samples=str(out / 'samples'))
    evaluate.main()
    results = json.loads((out / 'results.json').read_text())
    generated, floor = results['distances']
    assert generated['fd_cnn'] == pytest.approx(floor['fd_cnn'], rel=1e-3) and generated['recognised'] == 1
    assert 'student' not in results and 'tokenizer' not in results


def test_fid_is_printed_where_torch_fidelity_measured(finished_run, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, 'choose_distance', lambda only_statistics: 'weights.pth')
    monkeypatch.setattr(evaluate, 'torch_fidelity_metrics', lambda *_: {
        'fid': 12.3456, 'isc': 2.0, 'precision': 0.5, 'recall': None})
    evaluate.main()
    printed = capsys.readouterr().out
    assert 'generated against reference: images 12' in printed and 'fid 12.346' in printed
    assert 'FD-cnn' not in printed and 'fd_cnn' not in printed


def test_a_row_compares_the_sets_it_names(finished_run, monkeypatch):
    """rFID: reconstructions against their originals. Only the reference has published statistics."""
    out, structure, _ = finished_run
    calls, moments = {}, ('mu', 'sigma')
    val = evaluate.load_images(open_dataset(str(out.parent / 'data'), 'val', 16), 0)[0]

    def torch_fidelity_metrics(images, others, weights_path, cache, names, moments, device, batch_size):
        calls[names] = images, others, moments
        return {'fid': 1.0, 'isc': 2.0, 'precision': None, 'recall': None}

    change(monkeypatch, reference=str(out))
    monkeypatch.setattr(evaluate, 'choose_distance', lambda only_statistics: 'weights.pth' if only_statistics else None)
    monkeypatch.setattr(evaluate, 'read_reference', lambda *_: (val[:0], moments))
    monkeypatch.setattr(evaluate, 'digest', lambda *_, digest=checkpoint.digest: digest(structure.state_dict()))
    monkeypatch.setattr(evaluate, 'torch_fidelity_metrics', torch_fidelity_metrics)
    evaluate.main()
    assert list(calls) == evaluate.PAIRS
    chosen = evenly_over_classes(torch.arange(20) // 10, 12)
    reconstructed, originals, published = calls['reconstructed', 'originals']
    assert torch.equal(originals, val[chosen]) and published is None
    with torch.no_grad():
        decoded = evaluate.to_uint8(structure.decode(structure.encode(normalize(val))))
    assert torch.equal(reconstructed, decoded[chosen])
    generated, real = calls['generated', 'reference'][0], calls['real', 'reference'][0]
    assert len(generated) == 12 and torch.equal(real, val[chosen])
    assert torch.equal(calls['reconstructed', 'reference'][0], reconstructed)
    for name in ('generated', 'reconstructed', 'real'):
        assert len(calls[name, 'reference'][1]) == 0 and calls[name, 'reference'][2] == moments
    rows = json.loads((out / 'results.json').read_text())['distances']
    assert [row['against_images'] for row in rows] == [None, None, 12, None]


@pytest.mark.parametrize('reference, floor', [('train', 'val'), ('val', 'train')])
def test_the_floor_lies_outside_the_reference(finished_run, monkeypatch, reference, floor):
    """Or the floor of evaluate.py --reference=val would be a distance of pictures to themselves."""
    images = {split: evaluate.load_images(open_dataset(str(finished_run[0].parent / 'data'), split, 16), 0)[0]
              for split in ('train', 'val')}
    sets = {}
    monkeypatch.setattr(evaluate, 'compare', lambda found, *_: sets.update(found) or [])
    change(monkeypatch, reference=reference, parts='samples')
    evaluate.main()
    assert torch.equal(sets['reference'][0], images[reference])
    chosen = evenly_over_classes(torch.arange(20) // 10, 12)
    assert torch.equal(sets['real'][0], images[floor][chosen]) and not torch.equal(images['train'], images['val'])


def test_distances_to_an_npz_are_those_to_the_split_it_holds(finished_run, monkeypatch):
    out, distances = finished_run[0], []
    images, _ = evaluate.load_images(open_dataset(str(out.parent / 'data'), 'train', 16), 0)
    np.savez(out / 'train.npz', images.permute(0, 2, 3, 1).numpy())
    for reference in ('train', str(out / 'train.npz')):
        change(monkeypatch, reference=reference)
        evaluate.main()
        results = json.loads((out / 'results.json').read_text())
        distances.append({(row['set'], row['against']): row['fd_cnn'] for row in results['distances']})
    assert distances[0] == pytest.approx(distances[1])
    assert results['reference']['name'] == reference and results['reference']['images'] == 20


def test_statistics_of_inception_features_are_no_reference_for_the_cnn(finished_run, monkeypatch, tmp_path):
    change(monkeypatch, reference=statistics_file(tmp_path / 'mu.npz'), inception_weights=str(tmp_path / 'here.pth'))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    for distance, remedy in (('cnn', 'leave out --distance=cnn'), ('auto', 'here.pth')):
        change(monkeypatch, distance=distance)
        with pytest.raises(UserError, match=f'mu.npz holds statistics of Inception features.*{remedy}') as error:
            evaluate.main()
        assert '\n' not in str(error.value)


def test_results_say_what_is_needed_to_get_them_again(finished_run, monkeypatch):
    out, structure, student = finished_run
    images, labels = evaluate.generate(student, structure, nullcontext)
    np.savez(out / 'samples.npz', images.permute(0, 2, 3, 1).numpy(), labels.numpy(), made_with=np.array('{"seed": 5}'))
    for samples in ('', str(out / 'samples.npz')):
        change(monkeypatch, samples=samples)
        evaluate.main()
        results = json.loads((out / 'results.json').read_text())
        assert results['samples'] == {'images': 12, 'fingerprint': fingerprint(images),
                                      'made_with': {'seed': 5} if samples else None}
        assert results['student_digest'] == checkpoint.digest(student.state_dict()) and results['device'] == 'cpu'
        assert results['tokenizer_digest'] == checkpoint.digest(structure.state_dict())
        assert results['versions'].keys() == {'python', 'torch', 'torch-fidelity', 'numpy', 'pillow'}
        assert results['versions']['numpy'] == np.__version__ and set(evaluate.config) == set(results['config'])
        assert results['reference']['images'] == 20 and len(results['reference']['fingerprint']) == 16
        assert results['cnn']['digest']


@pytest.mark.parametrize('settings, message', [
    ({'parts': 'tokenizer,sampels'}, '--parts=tokenizer,sampels: choose from'),
    ({'per_class': 0}, 'at least 1'),
    ({'reference': 'test'}, 'choose train, val, a folder of images, or an .npz'),
    ({'distance': 'is'}, 'auto, fid or cnn'),
    ({'data': 'nowhere'}, 'no such folder'),
    ({'tokens': 'nowhere'}, 'no usable token files'),
    ({'tokenizer': 'nowhere.pt'}, 'run train_tokenizer.py first'),
    ({'samples': 'nowhere'}, 'nowhere cannot be read: missing'),
])
def test_a_mistaken_setting_is_refused_in_one_line(finished_run, monkeypatch, settings, message):
    change(monkeypatch, **settings)
    with pytest.raises(UserError, match=message) as error:
        evaluate.main()
    assert '\n' not in str(error.value)


def test_a_missing_student_and_tokens_of_another_tokenizer_are_named(finished_run):
    out = finished_run[0]
    meta = json.loads((out / 'tokens' / 'val.json').read_text())
    checkpoint.write_json(out / 'tokens' / 'val.json', meta | {'tokenizer': 'another'})
    with pytest.raises(UserError, match='another tokenizer'):
        evaluate.main()
    checkpoint.write_json(out / 'tokens' / 'val.json', meta | {'classes': ['light', 'dark']})
    with pytest.raises(UserError, match='in that order'):
        evaluate.main()
    (out / 'student.pt').unlink()
    with pytest.raises(UserError, match='run train_fvar.py first'):
        evaluate.main()
