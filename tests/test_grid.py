"""timm-multilabel grid: what grid.yaml asks for, runs that are made once, tables of what came of them."""
import json
import time

import numpy as np
import pandas as pd
import pytest
import yaml
from common import write_data
from test_cli import fails

from timm_multilabel.cli import grid
from timm_multilabel.cli.grid_file import read_grid
from timm_multilabel.cli.jobs import Job, Jobs
from timm_multilabel.cli.main import run_command
from timm_multilabel.errors import UserError
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
    assert [(run.name, run.start) for run in made.runs] == [
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
    ({'settings': {'a b': {}, 'a/b': {}}}, "two runs would be called 'a-b-s3'"),
    ({'setting': {}}, "there is no 'setting' in a grid; there are title, about, flags,"),
    ({'axis': {'lr': [1]}, 'settings': {'a': {'values': [2]}}}, "the 'values' of 'a' are no list of some of the axis'"),
    ({'settings': [1]}, "'settings' is no mapping of names to flags"),
])
def test_what_is_no_grid(tmp_path, changes, line):
    with pytest.raises(UserError) as error:
        read_grid(write_grid(tmp_path, **changes) / 'grid.yaml')
    assert line in error.value.line and str(tmp_path / 'grid.yaml') in error.value.line


def test_an_experiment_is_run_once_and_its_tables_come_from_its_csvs(tmp_path, monkeypatch, capsys):
    folder = write_grid(tmp_path / 'tiny')
    data = write_data(tmp_path / 'data')
    out = tmp_path / 'out'
    command = [str(folder), str(data), '--jobs', '2', '--output', str(out), '--flags', '--checkpoint-hist', '1']
    run_command(grid, 'grid', command)
    runs = pd.read_csv(folder / 'results.csv')
    assert runs['setting'].tolist() == list(SETTINGS) and runs['seed'].tolist() == [3, 3]
    np.testing.assert_allclose(runs['mean'], runs[['color', 'shape']].mean(axis=1), rtol=1e-5)
    start, ours = (json.loads((out / name / 'done.json').read_text()) for name in (
        'simclr-s3', 'SimCLR-then-joint-s3'))
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
    monkeypatch.setattr(Jobs, '_start', lambda self, job: pytest.fail(f'starts {job.name}'))
    (folder / 'results.md').unlink()
    run_command(grid, 'grid', command)
    (folder / 'results.png').unlink()
    run_command(grid, 'grid', [str(folder), str(data), '--tables'])
    assert (folder / 'results.md').read_text() == tables and (folder / 'results.png').stat().st_size > 5000
    capsys.readouterr()

    # What was trained with other flags is not taken for this, and what cannot be trained shows before anything is.
    assert f'{out / "simclr-s3"}: a run of other flags' in fails(capsys, grid, command[:-1] + ['2'])
    write_grid(folder, settings={**SETTINGS, 'wrong': {'epoch': 3}})
    assert "setting 'wrong'" in (line := fails(capsys, grid, command)) and "did you mean 'epochs'" in line


def test_a_run_that_fails_ends_the_others_and_is_named(tmp_path):
    slow = write_data(tmp_path / 'data')
    jobs = Jobs(
        [Job('slow', [str(slow), '--model', 'test_resnet', '--img-size', '32', '-b', '4', '-j', '0', '--epochs',
                      '10000', '--output', str(tmp_path), '--experiment', 'slow']),
         Job('wrong', [str(tmp_path / 'nowhere')]), Job('later', [], ['slow'])],
        set(), 2, lambda name: tmp_path / f'{name}.log')
    started = time.monotonic()
    with pytest.raises(UserError, match="'wrong' ended with status 2: .*nowhere: no such data directory.*wrong.log"):
        list(jobs.run())
    assert not jobs.running and time.monotonic() - started < 60 and not (tmp_path / 'later.log').exists()


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
         'high': 9.0, 'p': 0.01, 'holm': 0.02} for value in ([0] if axis is None else [10, 20])]
    return GridResults('Title', 'About.', 'val', axis, pd.DataFrame(rows), pd.DataFrame(differences), ['color'])


def test_tables_hold_means_deviations_and_differences_by_seed():
    plain = grid_markdown(results(None))
    # 50 and 52, 54 and 58: deviations of sqrt(2) and sqrt(8).
    assert '| base    | 51.00 ± 1.41 | 51.00 ± 1.41 | 1.5         |' in plain
    assert '| other $ | 56.00 ± 2.83 | 56.00 ± 2.83 | 1.5         |' in plain
    assert '| other $ | mean   | +5.00      | +1.00 to +9.00 | +4.0 +6.0 | 0.0200   | yes   |' in plain
    by_value = grid_markdown(results('labelled_rows'))
    assert '| base    | 52.00 ± 1.41     | 53.00 ± 1.41     | 1.5         |' in by_value
    assert '| 20            | other $ | mean   | +5.00' in by_value
    assert len(draw_grid(results('labelled_rows')).axes) == len(draw_grid(results(None)).axes) == 2

