"""ablation.py: rows differ in what they say and in nothing else, share what they can, resume, and the table adds up."""
import functools
import json
import os
import runpy
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import ablation
import configurator
from chaos import ABLATION, draw_data
from configurator import HERE, UserError

# all that rows may differ in: the budget, the networks and the token maps are the same
MAY_DIFFER = {'pyramid', 'kernel', 'dual', 'focus_input', 'focus_schedule', 'max_radius', 'distill', 'alias_scales', 'teacher_blocks',
              'shared_blocks', 'lambda_feat', 'lambda_focus'}
STAGE_2 = {'full', 'no_teacher', 'focus_schedule=matched', 'alias_scales=1', 'alias_scales=3', 'teacher_blocks=2', 'shared_blocks=0',
           'lambda_feat=1', 'lambda_feat=0'}


parsed_once = functools.cache(configurator.settings_of_all_scripts)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """ablation with two seeds in a folder of its own; called with settings, it changes them."""
    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(ablation, name, value)
    monkeypatch.setattr(configurator, 'settings_of_all_scripts', parsed_once)           # or config files take seconds
    change(out_dir=str(tmp_path / 'out'), results=str(tmp_path / 'results.json'), seeds=2)
    return change


def stages(run):
    """The four pieces of a row and seed: tokenizer, tokens, student, evaluation."""
    tokens, student, *_ = run.needs
    return *tokens.needs, tokens, student, run


# -----------------------------------------------------------------------------
# the plan

def test_every_row_of_the_tables_is_there():
    assert set(ablation.TABLE_3) == {file.stem for file in (HERE / 'config' / 'ablation').glob('*.py')}
    names = [row.partition('=')[0] for row in ablation.TABLE_4]
    assert set(names) == MAY_DIFFER - {'pyramid', 'kernel', 'dual', 'distill'}
    assert names.count('focus_schedule') == 3


def test_rows_that_differ_only_in_stage_2_share_tokenizers_and_token_files(small):
    pieces, runs = ablation.plan()
    for seed in range(2):
        of = {row: stages(runs[row, seed]) for row in ablation.TABLE_3 | ablation.TABLE_4}
        assert {row for row in of if of[row][0] is of['full'][0]} == STAGE_2
        assert {row for row in of if of[row][1] is of['full'][1]} == STAGE_2
        assert len({of[row][0].folder for row in of}) == 1 + len(of) - len(STAGE_2)
    assert stages(runs['full', 0])[0] is not stages(runs['full', 1])[0]
    assert all(stage1.folder == stage1b.folder for stage1, stage1b in (stages(run)[:2] for run in runs.values()))


def test_a_row_that_says_what_is_so_anyway_costs_nothing(small):
    pieces, runs = ablation.plan()
    assert runs['focus_schedule=matched', 1] is runs['full', 1]
    assert len({piece.marker for piece in pieces}) == len(pieces)


def test_rows_can_be_chosen_and_use_the_pieces_that_all_rows_would(small):
    all_pieces, all_runs = ablation.plan()
    small(rows='gaussian,alias_scales=1')
    pieces, runs = ablation.plan()
    assert runs == {(row, seed): all_runs[row, seed] for row in ('gaussian', 'alias_scales=1') for seed in range(2)}
    assert pieces == [piece for piece in all_pieces if piece in pieces] and len(pieces) < len(all_pieces)
    assert {piece.folder.rpartition('/')[2] for piece in pieces if piece.script == 'train_tokenizer'} == {
        'tokenizer-var-0', 'tokenizer-gaussian-0', 'tokenizer-gaussian-1', 'tokenizer-full-0', 'tokenizer-full-1'}   # the first for the CNN
    small(rows='full,vra')
    with pytest.raises(UserError, match="there is no row 'vra'; there are var, full, "):
        ablation.plan()


def test_pieces_come_after_what_they_need_and_table_3_before_table_4(small):
    pieces, runs = ablation.plan()
    place = {piece.marker: i for i, piece in enumerate(pieces)}
    assert all(place[need.marker] < place[piece.marker] for piece in pieces for need in piece.needs)
    places = [place[runs[row, seed].marker] for rows in (ablation.TABLE_3, {'focus_input=view': ''}) for seed in range(2) for row in rows]
    assert places == sorted(places)


def test_all_rows_have_one_budget_one_student_and_one_cnn(small):
    pieces, runs = ablation.plan()
    for (_, seed), run in runs.items():
        for piece, other in zip(stages(run), stages(runs['full', seed])):
            differ = {name for name in piece.settings if piece.settings[name] != other.settings[name]}
            assert piece.script == other.script and differ <= MAY_DIFFER
    assert len({run.needs[2].marker for run in runs.values()}) == 1


@pytest.mark.parametrize('row', ablation.TABLE_3 | ablation.TABLE_4)
def test_the_command_of_a_piece_says_what_its_settings_are(row, small, monkeypatch):
    started = []
    monkeypatch.setattr(ablation.subprocess, 'Popen', lambda command, env, **_: started.append((command, env)))
    run = ablation.plan()[1][row, 1]
    for piece in stages(run):
        ablation.start(piece)
    for piece, (command, env) in zip(stages(run), started):
        script = sys.modules[piece.script]
        said = script.config | configurator.parse(vars(script), command[2:])
        assert {name: said[name] for name in piece.settings} == piece.settings
        assert said['out_dir'] == piece.folder and env['OMP_NUM_THREADS'] == '1' and command[1].stem == piece.script
        if piece.script in ('train_fvar', 'evaluate'):
            assert said['tokenizer'] == f'{stages(run)[0].folder}/tokenizer.pt'
    assert said['cnn_file'] == f'{ablation.out_dir}/cnn.pt' and said['seed'] == 1
    assert said['init_from'] == f'{stages(run)[2].folder}/student.pt'


def test_every_student_is_sampled_in_the_published_way_and_in_another(small):
    for run in ablation.plan()[1].values():
        others = run.needs[3:]
        assert [(piece.settings['cfg'], piece.settings['top_p']) for piece in others] == [(1.5, 0.96), (4.0, 0.9)]
        for piece in others:
            assert piece.needs == run.needs[:3] and piece.folder.startswith(run.folder + '/')
            assert piece.settings == run.settings | {name: piece.settings[name] for name in ('parts', 'cfg', 'top_p')}


# -----------------------------------------------------------------------------
# the work

FOUND = {'tokenizer': {'psnr': 20.0, 'ssim': 0.8}, 'student': {'bits_per_image': 300.0, 'ce_per_map': [1.0, 2.0]},
         'versions': {'torch': '2'}, 'distances': [
             {'set': 'generated', 'against': 'reference', 'fd_cnn': 9.0, 'recognised': 0.5},
             {'set': 'reconstructed', 'against': 'reference', 'fd_cnn': 3.0, 'recognised': 0.9},
             {'set': 'reconstructed', 'against': 'originals', 'fd_cnn': 2.0, 'recognised': 0.9},
             {'set': 'real', 'against': 'reference', 'fd_cnn': 0.1, 'recognised': 1.0}]}


@pytest.fixture
def work(small, monkeypatch):
    """A function that does the work, or pretends to, and returns the markers of the pieces that were started, in order."""
    status, started = {}, []

    def pretend(piece):
        Path(piece.folder).mkdir(parents=True, exist_ok=True)
        Path(f'{piece.folder}/results.json').write_text(json.dumps(FOUND))
        Path(f'{piece.folder}/{piece.script}.log').write_text('so far so good\nerror: no more\n')
        started.append(piece.marker)
        return SimpleNamespace(poll=lambda: 0, returncode=status.get(piece.script, 0), terminate=lambda: None, wait=lambda: None)

    def run(**failing):
        status.update(failing)
        started.clear()
        ablation.work(*ablation.plan())
        return list(started)

    monkeypatch.setattr(ablation, 'start', pretend)
    monkeypatch.setattr(ablation.time, 'sleep', lambda seconds: None)
    small(TABLE_4={}, processes=2)
    return run


def scripts(markers):
    return {Path(marker).name.partition('.')[0] for marker in markers}


def test_what_is_finished_is_not_done_again(work, small):
    assert sorted(work()) == sorted(piece.marker for piece in ablation.plan()[0]) and work() == []
    small(seeds=3)
    again = work()
    assert again and all('-2/' in marker for marker in again)


def test_what_has_changed_is_done_again_and_what_comes_after_it(work, small, tmp_path):
    work()
    small(steps=7, results=str(tmp_path / 'other.json'))
    assert scripts(work()) == {'train_fvar', 'evaluate'}
    small(tokenizer_steps=7, results=str(tmp_path / 'third.json'))
    again = work()
    assert len(again) == len(ablation.plan()[0]) and work() == []
    Path(again[0]).unlink()                                 # only the piece itself: what came of it has the same settings
    assert work() == [again[0]]


def test_a_setting_that_a_script_has_since_got_is_taken_to_have_had_its_default(work, small, monkeypatch):
    work()
    monkeypatch.setitem(ablation.DEFAULTS, 'train_fvar', ablation.DEFAULTS['train_fvar'] | {'new': 1})
    assert work() == []
    settings = ablation.settings
    monkeypatch.setattr(ablation, 'settings', lambda script, *row: settings(script, *row) | ({'new': 2} if script == 'train_fvar' else {}))
    small(results=ablation.results + '.json')
    assert scripts(work()) == {'train_fvar', 'evaluate'}


def test_a_failure_stops_with_the_last_words_and_keeps_what_is_finished(work):
    with pytest.raises(UserError, match=r'train_fvar failed \(.*/var-0/train_fvar.log\): no more$'):
        work(train_fvar=1)
    assert 'train_tokenizer' not in scripts(work(train_fvar=0)[:1])


def test_no_piece_is_begun_after_the_minutes(work, small):
    small(minutes=1e-9)
    assert work() == []


def test_results_are_merged_as_they_come_and_not_mixed_with_other_settings(work, small):
    small(seeds=1)
    work()
    first = json.loads(Path(ablation.results).read_text())
    assert {(run['row'], run['seed']) for run in first['runs']} == {(row, 0) for row in ablation.TABLE_3}
    small(seeds=2, out_dir=ablation.out_dir + '2', TABLE_3={'full': 'FVAR'})        # elsewhere: what is not on disk stays
    work()
    runs = json.loads(Path(ablation.results).read_text())['runs']
    assert len(runs) == len(first['runs']) + 1 and runs[-1]['row'] == 'full' and runs[-1]['seed'] == 1
    assert (runs[0]['fd'], runs[0]['rfd'], runs[0]['floor'], runs[0]['recognised']) == (9.0, 3.0, 0.1, 0.5)
    assert runs[0]['fd_sampled'] == [[2.0, 0.4, 9.0], [1.5, 0.96, 9.0], [4.0, 0.9, 9.0]]
    assert set(runs[0]['seconds']) == set(ablation.DEFAULTS)
    small(steps=7)
    with pytest.raises(UserError, match='other settings'):
        ablation.collect({})


def test_a_piece_that_outlived_a_killed_ablation_is_waited_for(small, monkeypatch):
    """Two processes would write the same files. The lock goes to the piece with its open file, and with its end."""
    piece, kept = ablation.plan()[0][0], []
    monkeypatch.setattr(ablation.subprocess, 'Popen', lambda command, pass_fds, **_: kept.append(os.dup(pass_fds[0])))
    ablation.start(piece)                                   # the file is open still in what was started
    second = threading.Thread(target=ablation.start, args=(piece,))
    second.start()
    second.join(0.5)
    assert second.is_alive() and len(kept) == 1
    os.close(kept[0])                                       # the piece has ended
    second.join(10)
    assert not second.is_alive() and len(kept) == 2


# -----------------------------------------------------------------------------
# the table

def run_of(row, seed, fd, bits=300.0):
    return {'row': row, 'seed': seed, 'psnr': 20.0 + seed, 'ssim': 0.8, 'floor': 0.1, 'rfd': 2.0, 'fd': fd, 'recognised': 0.5,
            'bits': bits, 'fd_sampled': [[2.0, 0.4, fd], [4.0, 0.9, fd / 2]], 'ce_per_map': [1.0, 2.0 + seed]}


def cells(row, runs):
    line = next(line for line in ablation.markdown(runs).splitlines() if line.startswith(f'| {row} |'))
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_means_deviations_and_paired_differences():
    runs = [run_of('var', 0, 10.0), run_of('var', 1, 12.0), run_of('var', 2, 14.0),
            run_of('full', 0, 8.0, 290.0), run_of('full', 1, 11.0, 290.0), run_of('full', 2, 11.0, 290.0)]
    var, full = cells('VAR (baseline)', runs), cells('FVAR (full)', runs)
    assert var[1:] == ['3', '21.00 ± 1.00', '0.800 ± 0.000', '0.10', '2.00 ± 0.00', '12.00 ± 2.00', '–', '50.0 ± 0.0', '300.0 ± 0.0', '–',
                       '1.00 3.00']
    # differences −2, −1, −3: mean −2, deviation 1, standard error 1/√3, and −2 of 12
    assert full[6] == '10.00 ± 1.73' and full[7] == '-2.00 ± 0.58 (-16.7 %: -20, -8, -21)'
    assert full[10] == '-10.00 ± 0.00 (-3.3 %: -3, -3, -3)'
    assert 'rFD is 14 to 25 % of FD-cnn' in ablation.markdown(runs)
    assert '| FVAR (full) | 10.00 ± 1.73 | -2.00 ± 0.58 (-16.7 %: -20, -8, -21) | 5.00 ± 0.87 | -1.00 ±' in ablation.markdown(runs)
    assert '| VAR (baseline) | +2.00 ± 0.58 (+20.0 %: +25, +9, +27) | +1.00 ± 0.29' in ablation.markdown(runs)      # against full


def test_only_equal_seeds_are_paired():
    runs = [run_of('var', 0, 10.0), run_of('var', 1, 50.0), run_of('gaussian', 0, 9.0), run_of('alias_scales=1', 2, 9.0)]
    assert cells('w/ Gaussian blur', runs)[6:8] == ['9.00', '-1.00 (-10.0 %)']
    assert cells('1 alias scale', runs)[7] == '–'


def test_the_table_needs_results(small):
    with pytest.raises(UserError, match='nothing is finished yet'):
        ablation.read_runs()


# -----------------------------------------------------------------------------
# the whole, in miniature

def test_two_rows_from_tokenizers_to_table_and_pictures(small, monkeypatch, tmp_path):
    (tmp_path / 'tiny.py').write_text(ABLATION)
    draw_data(tmp_path, 12)                                 # a folder as of photographs
    small(base=str(tmp_path / 'tiny.py'), TABLE_3={'var': 'VAR', 'full': 'FVAR'}, TABLE_4={}, seeds=1, data=str(tmp_path),
          tokenizer_steps=3, steps=3)

    def in_this_process(command, **_):                      # importing torch anew would take most of the time
        monkeypatch.setattr(sys, 'argv', [str(part) for part in command[1:]])
        runpy.run_path(str(command[1]), run_name='__main__')
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(ablation.subprocess, 'Popen', in_this_process)
    pieces, runs = ablation.plan()
    ablation.work(pieces, runs)
    found = ablation.read_runs()
    assert [(run['row'], run['seed'], len(run['ce_per_map'])) for run in found] == [('var', 0, 3), ('full', 0, 3)]
    assert all(run['fd'] > 0 and run['rfd'] > 0 and run['bits'] > 0 for run in found) and found[0]['floor'] == found[1]['floor']
    assert '| FVAR | 1 |' in ablation.markdown(found)
    ablation.draw(runs)
    assert all((tmp_path / f'results_{what}.png').is_file() for what in ('samples', 'curves'))


@pytest.mark.parametrize('data', ['charts', 'photos', 'charts_3600', 'photos_3600'])
def test_the_tables_of_the_readme_are_those_of_the_results(data):
    runs = json.loads((HERE / 'results' / f'ablation_{data}.json').read_text(encoding='utf-8'))['runs']
    tables = ablation.markdown(runs)
    shown = tables.split('\n\n')[1] if data.endswith('3600') else tables       # of the longer runs FD-cnn alone
    assert shown in (HERE / 'README.md').read_text(encoding='utf-8')
