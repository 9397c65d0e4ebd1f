"""timm-multilabel grid: what grid.yaml asks for, runs that are made once, tables of what came of them."""
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from common import write_data
from test_cli import fails

from timm_multilabel.assembly.experiment import read_results
from timm_multilabel.assembly.grid_file import read_grid
from timm_multilabel.assembly.jobs import Job, Jobs
from timm_multilabel.cli.main import run_command
from timm_multilabel.errors import UserError
from timm_multilabel.heads import SoftmaxHead
from timm_multilabel.reports.grid import GridResults, draw_grid, grid_markdown

FLAGS = {
    'model': 'test_resnet', 'img_size': 32, 'batch_size': 4, 'workers': 0, 'device': 'cpu', 'lr': 0.05, 'epochs': 1,
    'warmup_epochs': 0, 'cooldown_epochs': 0}
SETTINGS = {
    'supervised': {'simclr_loss_weight': 0, 'classification_loss_weight': 1},
    'SimCLR, then joint': {'start': 'simclr'},
}


def write_grid(folder, **changes):
    """An experiment with a start and two settings; its folder."""
    folder.mkdir(exist_ok=True)
    content = {'title': 'Tiny', 'about': 'Is there anything?', 'flags': FLAGS, 'seeds': [3],
               'starts': {'simclr': {'classification_loss_weight': 0}}, 'settings': SETTINGS, **changes}
    (folder / 'grid.yaml').write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def test_a_grid_is_every_setting_with_every_value_and_seed_after_its_start(tmp_path):
    made = read_grid(write_grid(tmp_path, seeds=[0, 1], axis={'labelled_rows': [4, 8]}) / 'grid.yaml')
    assert [(run.name, run.start and run.start.name) for run in made.runs] == [
        ('simclr-s0', None), ('simclr-s1', None),
        ('supervised-4-s0', None), ('SimCLR-then-joint-4-s0', 'simclr-s0'),
        ('supervised-4-s1', None), ('SimCLR-then-joint-4-s1', 'simclr-s1'),
        ('supervised-8-s0', None), ('SimCLR-then-joint-8-s0', 'simclr-s0'),
        ('supervised-8-s1', None), ('SimCLR-then-joint-8-s1', 'simclr-s1')]
    some = {**SETTINGS, 'variant': {'values': [8]}}
    made_again = read_grid(write_grid(tmp_path, axis={'labelled_rows': [4, 8]}, settings=some) / 'grid.yaml')
    assert [run.name for run in made_again.runs if run.setting == 'variant'] == ['variant-8-s3']
    assert made.runs[0].recipe == {**FLAGS, 'classification_loss_weight': 0}
    assert made.runs[2].recipe == {
        'labelled_rows': 4, **FLAGS, 'simclr_loss_weight': 0, 'classification_loss_weight': 1}


@pytest.mark.parametrize('changes, line', [
    ({'settings': {}}, "expected 'settings' by name"),
    ({'seeds': ['a']}, "and 'seeds', a list of numbers"),
    ({'axis': {'lr': 0.1}}, "expected one flag and a list of its values as 'axis'"),
    ({'starts': {}}, "'SimCLR, then joint' starts from 'simclr', which is none of the 'starts'"),
    ({'settings': {'a b': {'start': 'simclr'}, 'a/b': {}}}, "two runs would be called 'a-b-s3'"),
    ({'setting': {}}, "there is no 'setting' in a grid; there are title, about, flags,"),
    ({'axis': {'drop': [1]}, 'settings': {'b': {'start': 'simclr'}, 'a': {'values': [2]}}},
     "the 'values' of 'a' are no list of some of the axis' [1]"),
    ({'settings': [1]}, "'settings' is no mapping of names to flags"),
    ({'axis': {'lr': []}}, "expected one flag and a list of its values as 'axis'"),
    ({'axis': {'lr': [1]}}, "flags: 'lr' is what varies; leave it out"),
    ({'axis': {'seed': [1]}}, "axis: 'seed' is set by the grid itself"),
    ({'axis': {'drop': [1]}, 'settings': {'a': {'phases': [{'name': 'x', 'drop': 0}]}}}, "setting 'a': 'drop' is what"),
    ({'axis': {'drop': [1]}, 'settings': {'a': {'values': [1]}}}, "'a' is what the others are compared with"),
    ({'settings': {'a': {}}}, "no setting starts from 'simclr'; leave it out"),
    ({'settings': {'a': {'start': ['simclr']}}}, "which is none of the 'starts'"),
    ({'settings': {'a': {'epoch': 1}}}, "setting 'a': there is no flag 'epoch'; did you mean 'epochs'?"),
])
def test_what_is_no_grid(tmp_path, changes, line):
    with pytest.raises(UserError) as error:
        read_grid(write_grid(tmp_path, **changes) / 'grid.yaml')
    assert line in error.value.line and str(tmp_path / 'grid.yaml') in error.value.line


@pytest.mark.slow
def test_an_experiment_is_run_once_and_its_tables_come_from_its_csvs(tmp_path, capsys):
    folder = write_grid(tmp_path / 'tiny')
    data = write_data(tmp_path / 'data')
    out = tmp_path / 'out'
    command = [str(folder), str(data), '--jobs', '2', '--output', str(out), '--flags', '--checkpoint-hist', '1']
    run_command('grid', 'grid', command)
    runs = pd.read_csv(folder / 'results.csv')
    assert runs['setting'].tolist() == list(SETTINGS) and runs['seed'].tolist() == [3, 3]
    np.testing.assert_allclose(runs['mean'], runs[['color', 'shape']].mean(axis=1), rtol=1e-5)
    start, ours = (json.loads((out / f'{name}.json').read_text()) for name in ('simclr-s3', 'SimCLR-then-joint-s3'))
    assert runs['cpu_minutes'][1] * 60 == pytest.approx(start['cpu_seconds'] + ours['cpu_seconds'], rel=1e-4)
    assert ours['cpu_seconds'] > 0.5 and runs['torch'][0]
    assert 'took backbone, projector' in (out / 'SimCLR-then-joint-s3.log').read_text()
    for number, name in enumerate(('supervised-s3', 'SimCLR-then-joint-s3')):
        assert pd.read_csv(out / name / 'summary.csv')['eval_top1'][0] == pytest.approx(runs['mean'][number], rel=1e-5)
    differences = pd.read_csv(folder / 'differences.csv')
    assert differences['head'].tolist() == ['mean', 'color', 'shape']
    np.testing.assert_allclose(
        differences['difference'], runs.loc[1, ['mean', 'color', 'shape']].astype(float)
        - runs.loc[0, ['mean', 'color', 'shape']].astype(float), atol=1e-3)
    tables = (folder / 'results.md').read_text()
    assert tables == capsys.readouterr().out.removesuffix('\n') and '# Tiny' in tables

    # Nothing is trained again; tables come from the CSVs.
    def times():
        return {path: path.stat().st_mtime_ns for path in out.rglob('*') if path.suffix in ('.tar', '.log', '.csv')}

    made = times()
    (folder / 'results.md').unlink()
    run_command('grid', 'grid', command)
    assert times() == made and len(made) > 6
    (folder / 'results.png').unlink()
    run_command('grid', 'grid', [str(folder), '--tables'])
    assert (folder / 'results.md').read_text() == tables and (folder / 'results.png').stat().st_size > 5000
    capsys.readouterr()

    # What a run took that was resumed is not known.
    record = json.loads((out / 'supervised-s3.json').read_text())
    (out / 'supervised-s3.json').write_text(json.dumps({**record, 'seconds': None, 'cpu_seconds': None}))
    run_command('grid', 'grid', command)
    assert pd.read_csv(folder / 'results.csv')['cpu_minutes'].isna().tolist() == [True, False]
    assert re.search(r'supervised .*\|  +\|$', (folder / 'results.md').read_text(), re.MULTILINE)
    capsys.readouterr()

    # What was trained with other flags is not taken for this, and what cannot be trained shows before anything is.
    assert f'{out / "simclr-s3"}: a run of other flags' in fails(capsys, 'grid', command[:-1] + ['2'])
    for settings, text in (
        ({**SETTINGS, 'wrong': {'lr': 'abc'}}, "setting 'wrong': "),
        ({**SETTINGS, 'wrong': {'classification_loss_weight': 0}}, "setting 'wrong': trains no heads"),
    ):
        write_grid(folder, settings=settings)
        assert text in fails(capsys, 'grid', command)
    write_grid(folder)
    assert '--flags --seed: set by the grid itself' in fails(capsys, 'grid', [*command, '--seed', '5'])
    assert 'test.csv: no such file' in fails(capsys, 'grid', [str(folder), str(data), '--split', 'test'])
    assert 'name the data directory too' in fails(capsys, 'grid', [str(folder)])
    # Another start makes other runs of those that start from it, even where the start itself is gone.
    write_grid(folder, starts={'simclr': {'classification_loss_weight': 0, 'temperature': 0.1}})
    (out / 'simclr-s3.json').unlink()
    assert f'{out / "SimCLR-then-joint-s3"}: a run of other flags' in fails(capsys, 'grid', command)


def make_jobs(tmp_path, *jobs):
    said = []
    return Jobs(jobs, set(), 2, lambda name: tmp_path / f'{name}.log', said.append, said.append), said


def endless(tmp_path, name):
    return Job(name, [str(tmp_path / 'data'), '--model', 'test_resnet', '--img-size', '32', '-b', '4', '-j', '0',
                      '--device', 'cpu', '--epochs', '10000', '--output', str(tmp_path), '--experiment', name])


@pytest.mark.slow
def test_after_a_run_that_fails_those_that_run_end_and_no_other_starts(tmp_path):
    write_data(tmp_path / 'data')
    job = endless(tmp_path, 'good')
    words = [*job.words[:job.words.index('10000')], '1', *job.words[job.words.index('10000') + 1:],
             '--warmup-epochs', '0', '--cooldown-epochs', '0']
    jobs, said = make_jobs(tmp_path, Job('wrong', [str(tmp_path / 'nowhere')]), Job('good', words),
                           Job('later', [], 'good'))

    def starts(name):
        said.append(name)
        if name == 'good':  # not before the other one has failed, without reaping it
            os.waitid(os.P_PID, jobs.running[0].process.pid, os.WEXITED | os.WNOWAIT)

    jobs.starts = starts
    ended = []
    with pytest.raises(UserError, match="'wrong' ended with status 2: .*nowhere: no such data directory.*wrong.log"):
        ended.extend(name for name, _ in jobs.run())
    assert not jobs.running and jobs.done == {'good'} and not (tmp_path / 'later.log').exists()
    assert said[:2] == ['wrong', 'good'] and "run 'wrong' ended" in said[2]


@pytest.mark.slow
def test_runs_save_and_stop_where_the_grid_is_stopped(tmp_path):
    write_data(tmp_path / 'data')
    jobs, said = make_jobs(tmp_path, endless(tmp_path, 'a'), endless(tmp_path, 'b'))

    def interrupt():
        while not all((tmp_path / name / 'last.pth.tar').is_file() for name in 'ab'):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        list(jobs.run())
    thread.join()
    assert said[-1] == 'a, b: to save and stop' and not jobs.running
    for name in 'ab':
        assert 'repeat the command with --resume' in (tmp_path / f'{name}.log').read_text()


def results(axis):
    """Two settings, two seeds, perhaps two values."""
    rows = [
        {'setting': setting, **({} if axis is None else {axis: value}), 'seed': seed, 'color': color + value / 10,
         'mean': color + value / 10, 'minutes': 1.0, 'cpu_minutes': 1.5, 'commit': 'abc', 'machine': 'here',
         'torch': '2', 'command': 'grid'}
        for value in ([0] if axis is None else [10, 20])
        for seed in (0, 1) for setting, color in (('base', 50 + 2 * seed), ('other $', 54 + 4 * seed))]
    differences = [
        {**({} if axis is None else {axis: value}), 'setting': 'other $', 'head': 'mean', 'difference': 5.0, 'low': 1.0,
         'high': 9.0, 'p': 0.01, 'holm': 0.02, 'over': 'seeds and images'}
        for value in ([0] if axis is None else [10, 20])]
    return GridResults('Title', 'About.', 'val', axis, ['base', 'other $'], pd.DataFrame(rows),
                       pd.DataFrame(differences), {'color': SoftmaxHead.metric('top1')})


def test_tables_hold_means_deviations_and_differences_by_seed():
    plain = grid_markdown(results(None))
    assert '| setting  | color        | CPU minutes |' in plain  # one head is its own mean
    # 50 and 52, 54 and 58: deviations of sqrt(2) and sqrt(8).
    assert '| base     | 51.00 ± 1.41 | 1.5         |' in plain
    assert r'| other \$ | 56.00 ± 2.83 | 1.5         |' in plain
    assert r'| other \$ | mean   | +5.00      | +1.00 to +9.00 | +4.0 +6.0 | 0.0200   | better  |' in plain
    by_value = grid_markdown(results('labelled_rows'))
    assert '| base     | 52.00 ± 1.41     | 53.00 ± 1.41     | 1.5         |' in by_value
    assert r'| 20            | other \$ | mean   | +5.00' in by_value
    assert len(draw_grid(results('labelled_rows')).axes) == len(draw_grid(results(None)).axes) == 1



EXPERIMENTS = Path(__file__).parents[1] / 'experiments'


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(path.parent.name for path in EXPERIMENTS.glob('*/grid.yaml')))
def test_experiments_are_read_and_their_tables_are_those_of_their_csvs(name):
    made = read_grid(EXPERIMENTS / name / 'grid.yaml')
    if (EXPERIMENTS / name / 'results.csv').is_file():
        found = read_results(EXPERIMENTS / name, 'val', made)
        assert grid_markdown(found) == (EXPERIMENTS / name / 'results.md').read_text()
        asked = [(run.setting, run.value, run.seed) for run in made.runs if not run.is_start]
        there = found.runs if made.axis else found.runs.assign(**{'': None})
        assert list(zip(there['setting'], there[made.axis or ''], there['seed'])) == asked


def test_the_tables_of_the_pages_are_those_of_the_experiments():
    pages = ''.join(path.read_text() for path in (EXPERIMENTS.parent / 'docs' / 'experiments').glob('*.md'))
    rows = [line for line in pages.split('\n') if line.startswith('|') and re.search(r'\d ± \d', line)]
    tables = ''.join(path.read_text() for path in EXPERIMENTS.glob('*/results.md'))
    assert rows and all(row in tables for row in rows)
