"""results.py: the tables add up, and those of the documents are what the results say."""
import pytest

from configurator import HERE, UserError
from experiments import results


def run_of(row, seed, fd, bits=300.0):
    return {'row': row, 'seed': seed, 'psnr': 20.0 + seed, 'ssim': 0.8, 'rfd': 2.0, 'fd': fd,
            'recognised': 0.5, 'bits': bits, 'fd_sampled': [[2.0, 0.4, fd], [4.0, 0.9, fd / 2]]}


@pytest.fixture
def runs(monkeypatch):
    """The runs of an ablation, which a test can change."""
    found = [run_of('var', 0, 10.0), run_of('var', 1, 12.0), run_of('var', 2, 14.0),
             run_of('full', 0, 8.0, 290.0), run_of('full', 1, 11.0, 290.0), run_of('full', 2, 11.0, 290.0)]
    monkeypatch.setattr(results, 'read', lambda name: {'runs': found})
    return found


def test_means_deviations_and_paired_differences(runs):
    head, var, full = results.quality('ablation')
    assert var == ['VAR (baseline)', '3', '21.00 ± 1.00', '0.800 ± 0.000', '2.00 ± 0.00', '300.0 ± 0.0',
                   '50.0% ± 0.0%']
    assert len(head) == len(var) <= 8 and full[-2] == '290.0 ± 0.0'
    head, var, full = results.sampling('ablation')
    assert head == ['FD-cnn', 'cfg 2, top_p 0.4', '− VAR', 'cfg 4, top_p 0.9', '− VAR']
    assert var[1:] == ['12.00 ± 2.00', '–', '6.00 ± 1.00', '–']
    # differences −2, −1, −3: mean −2, standard deviation 1, standard error 1/√3
    assert full[1:] == ['10.00 ± 1.73', '-2.00 ± 0.58', '5.00 ± 0.87', '-1.00 ± 0.29']
    _, row = results.compared(('charts', 'ablation', 'full', 'var'))
    assert row == ['charts', '3', '10.00 ± 1.73', '12.00 ± 2.00', '-2.00 ± 0.58', '290.0', '300.0']


def test_only_equal_seeds_are_paired(runs):
    runs[:] = [run_of('var', 0, 10.0), run_of('var', 1, 50.0), run_of('gaussian', 0, 9.0),
               run_of('alias_scales=1', 2, 9.0)]
    _, _, gaussian, one_scale = results.sampling('ablation')
    assert gaussian[:3] == ['w/ Gaussian blur', '9.00', '-1.00'] and one_scale[1:3] == ['9.00', '–']


def test_only_tables_are_rewritten(runs, monkeypatch):
    monkeypatch.setattr(results, 'TABLES', {'some': lambda: [['a', 'b'], ['1', '2']]})
    text = 'before\n<!-- table: some -->\n| a |\n| old |\n\n| other |\n'
    wanted = 'before\n<!-- table: some -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n| other |\n'
    assert results.rewrite(text) == results.rewrite(wanted) == wanted


@pytest.mark.parametrize('document', results.DOCUMENTS)
def test_the_tables_of_the_documents_are_those_of_the_results(document):
    text = (HERE / document).read_text(encoding='utf-8')
    assert '<!-- table: ' in text and results.rewrite(text) == text
    assert all(line.count('|') <= 9 for line in text.splitlines() if line.startswith('|'))


def test_missing_results_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(results, 'HERE', tmp_path)
    with pytest.raises(UserError, match='results/demo.json is missing'):
        results.demo()
