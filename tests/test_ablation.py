"""ablation.py: rows differ only in what they claim to, share what they can, and resume."""
import functools
import json
import os
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import configurator
from chaos import ABLATION, draw_data
from configurator import HERE, UserError
from experiments import ablation

# the only settings that rows may change: budget, networks and token maps are the same
MAY_DIFFER = {
    'pyramid', 'kernel', 'dual', 'focus_input', 'focus_schedule', 'max_radius', 'distill', 'alias_scales',
    'teacher_blocks', 'shared_blocks', 'lambda_feat', 'lambda_focus', 'lambda_logit',
}
SAME_STAGE_1 = {
    'full', 'no_teacher', 'alias_scales=1', 'alias_scales=3', 'teacher_blocks=2', 'shared_blocks=0',
    'lambda_feat=1', 'lambda_feat=0', 'lambda_logit=2',
}
ROWS = [*ablation.TABLE_3, *ablation.VARIATIONS]
parsed_once = functools.cache(configurator.settings_of_all_scripts)
def folders(row, seed):
    return ablation.folders(ablation.settings(row, seed))



@pytest.fixture
def small(monkeypatch, tmp_path):
    """ablation with two seeds in a folder of its own; called with settings, it changes them."""
    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(ablation, name, value)
    monkeypatch.setattr(configurator, 'settings_of_all_scripts', parsed_once)   # or configs take seconds
    monkeypatch.setattr(ablation, 'deadline', ablation.deadline)
    change(out_dir=str(tmp_path / 'out'), results=str(tmp_path / 'results.json'), seeds=2)
    return change


# -----------------------------------------------------------------------------
# rows

def test_every_row_of_the_tables_is_there():
    assert set(ablation.TABLE_3) == {file.stem for file in (HERE / 'config' / 'ablation').glob('*.py')}
    names = {row.partition('=')[0] for row in ablation.VARIATIONS}
    assert names == MAY_DIFFER - {'pyramid', 'kernel', 'dual', 'distill'}


def test_rows_that_differ_only_in_stage_2_share_tokenizers_and_token_files(small):
    for seed in range(2):
        stage1 = {row: folders(row, seed)[0] for row in ROWS}
        assert {row for row in ROWS if stage1[row] == stage1['full']} == SAME_STAGE_1
        assert len(set(stage1.values())) == 1 + len(ROWS) - len(SAME_STAGE_1)
    students = {folders(row, seed)[1] for row in ROWS for seed in range(2)}
    assert len(students) == 2 * len(ROWS)                   # every row differs from all others in something


def test_all_rows_have_one_budget_and_one_student(small):
    full = ablation.settings('full', 1)
    for row in ROWS:
        changes = ablation.settings(row, 1)
        for script, defaults in ablation.DEFAULTS.items():
            values, others = defaults | changes[script], defaults | full[script]
            assert {name for name in values if values[name] != others[name]} <= MAY_DIFFER


def test_rows_can_be_chosen(small):
    small(rows='full,vra')
    with pytest.raises(UserError, match="no row 'vra'; choose from var, full, "):
        ablation.work()


# -----------------------------------------------------------------------------
# stages

FOUND = {
    'tokenizer': {'psnr': 20.0, 'ssim': 0.8},
    'student': {'bits_per_image': 300.0},
    'versions': {'torch': '2'},
    'distances': [
        {'set': 'generated', 'against': 'reference', 'fd_cnn': 9.0, 'recognised': 0.5},
        {'set': 'reconstructed', 'against': 'reference', 'fd_cnn': 3.0, 'recognised': 0.9},
        {'set': 'reconstructed', 'against': 'originals', 'fd_cnn': 2.0, 'recognised': 0.9},
        {'set': 'real', 'against': 'reference', 'fd_cnn': 0.1, 'recognised': 1.0},
    ],
}


@pytest.fixture
def work(small, monkeypatch):
    """Does all the work with stages that only pretend; returns {(script, folder): its settings}, in order."""
    status, started, parsing = {}, {}, threading.Lock()

    def pretend(command, env, stdin, stdout, stderr):
        assert env['OMP_NUM_THREADS'] == '1' and stdin == ablation.PIPE
        script = Path(command[3]).stem
        with parsing:                                       # Python 3.11 cannot do so in several threads
            said = configurator.parse(vars(sys.modules[script]), command[4:])
        values = sys.modules[script].config | said
        stdout.write('so far so good\nerror: no more\n')
        Path(values['out_dir'], 'results.json').write_text(json.dumps(FOUND | {'config': values}))
        assert (script, values['out_dir']) not in started
        started[script, values['out_dir']] = values
        return SimpleNamespace(returncode=status.get(script, 0))

    def run(**failing):
        status.clear()
        status.update(failing)
        started.clear()
        before = threading.enumerate()
        try:
            ablation.work()
        finally:
            for thread in set(threading.enumerate()) - set(before):     # those that a failure has left behind
                thread.join()
        return dict(started)

    monkeypatch.setattr(ablation.subprocess, 'run', pretend)
    small(VARIATIONS={}, processes=2)
    return run


def scripts(started):
    return {script for script, _ in started}


def test_the_command_of_a_stage_says_what_its_settings_are(work, small):
    small(VARIATIONS={'alias_scales=1': '', 'max_radius=12': ''}, seeds=1)
    started = work()
    for row in (*ablation.TABLE_3, *ablation.VARIATIONS):
        stage1, student = folders(row, 0)
        evaluations = [values for (script, folder), values in started.items()
                       if script == 'evaluate' and folder.startswith(student + '/')]
        places = {'train_tokenizer': stage1, 'encode': stage1, 'train_fvar': student}
        stages = [started[place] for place in places.items()]
        for script, values in zip(ablation.DEFAULTS, (*stages, evaluations[-1])):
            wanted = ablation.settings(row, 0)[script]
            assert {name: values[name] for name in wanted} == wanted
        assert stages[0]['init_from'] == stages[2]['init_from'] == 'auto'
        samplings = [(values['cfg'], values['top_p']) for values in evaluations]
        assert samplings == [(1.5, 0.96), (4.0, 0.9), (2.0, 0.4)]
        for values in (stages[2], *evaluations):
            assert values['tokenizer'] == f'{stage1}/tokenizer.pt'
        for values in evaluations:
            assert values['init_from'] == f'{student}/student.pt'
            assert values['cnn_file'] == f'{ablation.out_dir}/cnn.pt'


def test_what_is_finished_is_not_done_again(work, small):
    assert len(work()) == 2 * (5 * 2 + 6 + 3 * 6) and work() == {}      # full and no_teacher share stage 1
    small(seeds=3)
    again = work()
    assert again and all(values['seed'] == 2 for values in again.values())


def test_a_changed_setting_repeats_what_depends_on_it(work, small, tmp_path):
    everything = work()
    small(steps=7, results=str(tmp_path / 'other.json'))
    assert scripts(work()) == {'train_fvar', 'evaluate'}
    small(tokenizer_steps=7, results=str(tmp_path / 'third.json'))
    again = work()
    assert len(again) == len(everything) and not again.keys() & everything.keys() and work() == {}


def test_a_setting_added_later_repeats_nothing_at_its_default(work, small, monkeypatch):
    work()
    monkeypatch.setitem(ablation.DEFAULTS, 'train_fvar', ablation.DEFAULTS['train_fvar'] | {'new': 1})
    assert work() == {}


def test_a_failure_stops_with_the_last_words_and_keeps_what_is_finished(work):
    with pytest.raises(UserError, match=r'^train_fvar failed \(.*/student-\w+/train_fvar.log\): no more$'):
        work(train_fvar=1)
    assert 0 < ablation.time.monotonic() > ablation.deadline            # no other thread begins a stage
    assert 'train_tokenizer' in scripts(work()) and work() == {}


def test_no_stage_starts_after_the_time_limit(work, small, capsys):
    small(minutes=1e-9)
    assert work() == {} and '0 of 12 runs finished' in capsys.readouterr().out
    small(minutes=0.0)
    assert work()


def test_results_are_merged_as_they_come_and_not_mixed_with_other_settings(work, small):
    small(seeds=1)
    work()
    before = json.loads(Path(ablation.results).read_text())
    assert {(run['row'], run['seed']) for run in before['runs']} == {(row, 0) for row in ablation.TABLE_3}
    small(seeds=2, out_dir=ablation.out_dir + '2', rows='full')         # elsewhere: what is not on disk stays
    work()
    runs = json.loads(Path(ablation.results).read_text())['runs']
    assert len(runs) == len(before['runs']) + 1 and (runs[-1]['row'], runs[-1]['seed']) == ('full', 1)
    assert [runs[0][name] for name in ('fd', 'rfd', 'floor', 'recognised')] == [9.0, 3.0, 0.1, 0.5]
    assert runs[0]['fd_sampled'] == [[1.5, 0.96, 9.0], [4.0, 0.9, 9.0], [2.0, 0.4, 9.0]]
    small(steps=7)
    with pytest.raises(UserError, match='other settings'):
        ablation.work()


def test_a_stage_ends_with_the_ablation_that_started_it(tmp_path):
    """However that ends: its end of the pipe closes."""
    script = tmp_path / 'script.py'
    script.write_text('import sys, time\nprint(__name__, *sys.argv, flush=True)\ntime.sleep(60)')
    read, write = os.pipe()
    command = [sys.executable, '-c', ablation.STAGE, str(script), '--steps=3']
    with subprocess.Popen(command, stdin=read, stdout=subprocess.PIPE, text=True) as stage:
        assert stage.stdout.readline() == f'__main__ {script} --steps=3\n'
        time.sleep(0.1)
        assert stage.poll() is None
        os.close(write)
        assert stage.wait(10) == 1
    os.close(read)


# -----------------------------------------------------------------------------
# everything, in miniature

def test_two_rows_from_tokenizers_to_results_and_figures(small, monkeypatch, tmp_path):
    (tmp_path / 'tiny.py').write_text(ABLATION)
    draw_data(tmp_path, 12)                                 # a folder, as for photographs
    small(base=str(tmp_path / 'tiny.py'), TABLE_3={'var': 'VAR', 'full': 'FVAR'}, VARIATIONS={}, seeds=1,
          data=str(tmp_path), tokenizer_steps=3, steps=3)

    def in_this_process(command, **_):                      # importing torch anew would take most of the time
        monkeypatch.setattr(sys, 'argv', command[3:])
        runpy.run_path(command[3], run_name='__main__')
        return SimpleNamespace(returncode=0)

    with monkeypatch.context() as patch:
        patch.setattr(ablation.subprocess, 'run', in_this_process)
        patch.setattr('signal.signal', lambda *_: None)                 # only allowed in the main thread
        ablation.work()
    found = json.loads(Path(ablation.results).read_text())['runs']
    assert [(run['row'], run['seed']) for run in found] == [('var', 0), ('full', 0)]
    assert all(run['fd'] > 0 and run['rfd'] > 0 and run['bits'] > 0 for run in found)
    assert found[0]['floor'] == found[1]['floor']
    ablation.make_figures()
    assert (tmp_path / 'results.png').is_file()
