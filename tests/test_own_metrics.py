"""A kind of head of one file of the user's: report, compare and grid show its own metrics, without any other change."""
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from common import TINY, write_data

from timm_multilabel.cli.main import run_command
from timm_multilabel.errors import UserError
from timm_multilabel.heads import Head, NumericHead, SoftmaxHead, TagsHead, standard_head
from timm_multilabel.inference.predictions import OwnMetrics, Predictions
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.metric_names import Metric
from timm_multilabel.reports.experiments import (
    RunPredictions,
    compare_groups,
    describe_metrics,
    run_metrics,
    share,
    shared_metrics,
)
from timm_multilabel.reports.grid import metric_columns, metrics_text, read_metrics

PAGE = (Path(__file__).parent.parent / 'docs' / 'how-to' / 'custom-heads.md').read_text()
ORDER = ('blue', 'green', 'red')
HEAD = ['--head', 'color:loss=ordinal,order=blue+green+red']
DEVICE = ['-j', '0', '--device', 'cpu']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Two runs of the documentation's kind for colors, beside a usual head for shapes, and the kind's file."""
    folder = tmp_path_factory.mktemp('own')
    module = folder / 'my_heads.py'
    module.write_text(re.search(r'<!-- custom head -->\n```python\n(.*?)```', PAGE, re.S)[1])
    data = write_data(folder / 'data')
    for seed in (1, 2):
        run_command('train', 'train.py', [
            str(data), *TINY, '--epochs', '1', '--output', str(folder), '--experiment', f'run{seed}', '--seed',
            str(seed), '--head-module', str(module), *HEAD])
    return folder, module


def by_hand(folder, run, split='val'):
    """The two metrics of the head in a run's stored predictions."""
    found = Predictions.load(folder / run / f'predictions-{split}.npz')
    place = np.array([ORDER.index(name) for name in found.label_space.heads[0].classes])
    off = abs(place[found.target('color')] - place[found.outputs['color'].argmax(axis=1)])
    return 100 * (off == 0).mean(), 100 * (off <= 1).mean()


def test_compare_and_report_show_its_metrics(trained, tmp_path, capsys):
    folder, module = trained
    runs = [str(folder / 'run1'), str(folder / 'run2')]
    capsys.readouterr()
    run_command('compare', 'compare', [*runs, '--out', str(tmp_path), '--head-module', str(module), *DEVICE])
    printed = capsys.readouterr().out
    columns = printed.splitlines()[0]
    assert all(f'| val color {name} ' in columns for name in ('exact', 'within_one')) and 'val shape top1' in columns
    assert 'color top1' not in printed and '(mean)' not in columns  # one head alone has a top-1
    written = pd.read_csv(tmp_path / 'experiments.csv')
    for row, run in enumerate(('run1', 'run2')):
        exact, near = by_hand(folder, run)
        assert written['val color exact'][row] == pytest.approx(exact)
        assert written['val color within_one'][row] == pytest.approx(near)

    run_command('report', 'report', [runs[0], '--head-module', str(module), *DEVICE])
    page = (folder / 'run1' / 'report.html').read_text()
    exact, near = by_hand(folder, 'run1')
    number = '<td class="number">'
    rows = {name: (value, ends) for name, value, ends in re.findall(
        rf'<td>(exact|within_one)</td>{number}([\d.]+)</td>{number}(.*)\n', page)}
    assert {name: value for name, (value, _) in rows.items()} == {'exact': f'{exact:.2f}', 'within_one': f'{near:.2f}'}
    low, high = map(float, rows['exact'][1].split(' to '))
    assert low <= exact <= high and (low < high or exact in (0, 100))


@pytest.mark.slow
def test_a_grid_has_its_metrics_in_tables_and_picture(trained, tmp_path, capsys):
    folder, module = trained
    experiment = tmp_path / 'ordinal'
    experiment.mkdir()
    flags = {'model': 'test_resnet', 'img_size': 32, 'batch_size': 4, 'workers': 0, 'device': 'cpu', 'lr': 0.05,
             'epochs': 1, 'warmup_epochs': 0, 'cooldown_epochs': 0, 'simclr_loss_weight': 0,
             'classification_loss_weight': 1, 'head': {'color': {'loss': 'ordinal', 'order': list(ORDER)}}}
    (experiment / 'grid.yaml').write_text(yaml.safe_dump({
        'title': 'Ordinal', 'about': 'Is it?', 'flags': flags, 'seeds': [0],
        'settings': {'base': {}, 'other': {'lr': 0.01}}}))
    run_command('grid', 'grid', [
        str(experiment), str(folder / 'data'), '--output', str(tmp_path / 'out'), '--jobs', '2', '--flags',
        '--head-module', str(module)])
    tables = capsys.readouterr().out
    header = next(line for line in tables.splitlines() if line.startswith('| setting'))
    assert [cell.strip() for cell in header.split('|')[2:5]] == ['color/exact', 'color/within_one', 'shape']
    runs = pd.read_csv(experiment / 'results.csv')
    for row, run in enumerate(('base-s0', 'other-s0')):
        exact, near = by_hand(tmp_path / 'out', run)
        assert runs['color/exact'][row] == pytest.approx(exact, rel=1e-5)
        assert runs['color/within_one'][row] == pytest.approx(near, rel=1e-5)
    differences = pd.read_csv(experiment / 'differences.csv')
    assert differences['head'].tolist() == ['color/exact', 'color/within_one', 'shape']
    assert differences['difference'][0] == pytest.approx(runs['color/exact'].diff()[1], abs=1e-3)
    (experiment / 'results.md').unlink()
    run_command('grid', 'grid', [str(experiment), '--tables'])  # of the CSVs alone
    assert (experiment / 'results.md').read_text() == tables.removesuffix('\n')
    runs['metrics'] = '{"color/exact": {"name": "exact", "form": "999f"}}'
    runs.to_csv(experiment / 'results.csv', index=False)
    with pytest.raises(SystemExit):
        run_command('grid', 'grid', [str(experiment), '--tables'])
    assert 'cannot be read as results of an experiment' in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_another_kind_is_compared_by_what_both_have(trained, tmp_path, capsys):
    """The default kind does not know `exact`: both have the top-1 of their labels."""
    folder, module = trained
    run_command('train', 'train.py', [
        str(folder / 'data'), *TINY, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'usual'])
    capsys.readouterr()
    run_command('compare', 'compare', [
        str(folder / 'run1'), str(tmp_path / 'usual'), '--head-module', str(module), *DEVICE])
    table = [line.split('|') for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    shown = pd.DataFrame([[cell.strip() for cell in row] for row in table[2:4]], columns=[
        cell.strip() for cell in table[0]])
    assert shown['val color exact'][1] == '' and shown['val color exact'][0] == shown['val color top1'][0] != ''
    assert shown['val color top1'][1] and shown['val top1 (mean)'][0]


@pytest.mark.slow
def test_what_an_earlier_version_stored_is_made_again(trained, tmp_path, capsys):
    folder, module = trained
    shutil.copytree(folder / 'run1', tmp_path / 'run')
    words = [str(tmp_path / 'run'), '--head-module', str(module), *DEVICE, '--force']
    run_command('report', 'report', words)
    stored = tmp_path / 'run' / 'predictions-val.npz'
    arrays = dict(np.load(stored))
    values = Predictions.load(stored).own_metrics['color'].values
    del arrays['head_metrics'], arrays['own_0']
    np.savez(stored, **arrays, own_metrics=np.array(json.dumps({'color': values})))  # as they were for a time
    assert Predictions.load(stored).own_metrics is None
    run_command('report', 'report', words)
    assert Predictions.load(stored).own_metrics['color'].values == values


@pytest.mark.parametrize('change', [
    {'size': {}}, {'color': 1.0}, [1], {'color': {'values': {'exact': '<b>'}}}, {'color': {'values': {'other': 1.0}}},
    {'color': {'has_probabilities': 1}}, {'color': {'of_rows': ['exact']}},
    {'color': {'metrics': [{'name': 'exact', 'form': '.9999f'}]}}, {'color': {'metrics': [{'name': 'a/b'}]}},
    {'color': {'metrics': [{'name': 'exact', 'title': 1}]}}])
def test_metrics_in_a_file_that_are_none(trained, tmp_path, change):
    folder, module = trained
    if not (folder / 'run1' / 'predictions-val.npz').is_file():
        run_command('report', 'report', [str(folder / 'run1'), '--head-module', str(module), *DEVICE, '--force'])
    arrays = dict(np.load(folder / 'run1' / 'predictions-val.npz'))
    held = json.loads(str(arrays['head_metrics']))
    if isinstance(change, dict):
        change = {name: {**held['color'], **its} if isinstance(its, dict) else its for name, its in change.items()}
    np.savez(tmp_path / 'p.npz', **{**arrays, 'head_metrics': np.array(json.dumps(change))})
    with pytest.raises(UserError, match='metrics that are not numbers of its heads'):
        Predictions.load(tmp_path / 'p.npz')


# Metrics that are means over rows


class Several(Head):
    """A mean over rows, one that is none, and one that a single row does not allow."""
    kind = 'several'
    metric_names = ('right', 'spread', 'error')
    lower_is_better = ('error',)
    metric_titles = {'error': 'mean error'}
    metric_formats = {'right': '.1f %', 'error': '.3e'}

    def metrics(self, target, measured):
        off = abs(target[:, 0] - measured[:, 0])
        return {'right': 100 * (off == 0).mean(), 'spread': float(off.std()), 'error': float(off.mean())}


class Fails(Several):
    def metrics(self, target, measured):
        if len(target) < 2:
            raise ValueError('too few')
        return super().metrics(target, measured)


def test_means_over_rows_are_found():
    generator = np.random.default_rng(0)
    target, measured = generator.integers(3, size=(2, 40, 1)).astype(np.float32)
    labels = LabelSet('c', ('a', 'b', 'c'))
    rows = Several(labels).row_metrics(target, measured)
    assert list(rows) == ['right', 'error']
    np.testing.assert_allclose(rows['right'], 100.0 * (target == measured)[:, 0])
    assert Fails(labels).row_metrics(target, measured) == {}
    assert Several.metric('right').text(12.345) + Several.metric('right').unit == '12.3 %'
    assert Several.metric('error') == Metric('error', 'mean error', True, '.3e')


def test_means_over_rows_of_our_kinds():
    generator = np.random.default_rng(1)
    for head, target, measured in (
            (SoftmaxHead(LabelSet('c', ('a', 'b', 'c')), 2), *generator.integers(3, size=(2, 30, 1))),
            (NumericHead(Quantity('n', 1.0, 2.5), 2), *generator.normal(size=(2, 30, 1)).astype(np.float32))):
        whole = head.metrics(target, measured)
        for name, values in head.row_metrics(target, measured).items():
            assert values.shape == (30,) and values.mean() == pytest.approx(whole[name], rel=1e-5)
    assert TagsHead(TagSet('t', ('x', 'y')), 2).row_metrics(np.zeros((3, 2)), np.zeros((3, 2))) == {}


def answers(target, predicted, lower):
    """A run of `Several` on images 0, 1, ..., whose error is better when it is lower, or not."""
    labels = LabelSet('c', ('a', 'b', 'c'))
    target, outputs = np.array(target, dtype=np.float32), np.eye(3, dtype=np.float32)[predicted]
    head = Several(labels)
    own = OwnMetrics.of(head, torch.tensor(target).long(), torch.tensor(predicted)[:, None].float())
    if not lower:
        own = replace(own, metrics=tuple(replace(each, lower_is_better=False) for each in own.metrics))
    return RunPredictions.of(Predictions(
        LabelSpace((labels,)), np.array(['r'] * len(target)), np.array([f'/x/{image}' for image in range(len(target))]),
        target[:, None], {'c': outputs}, np.zeros((len(target), 1), np.float32), own_metrics={'c': own}))


def test_parts_of_the_images_and_missing_labels():
    run = answers([0, 1, 2, -1], [0, 1, 0, 2], lower=True)
    other = answers([0, 1, 2], [0, 0, 0], lower=True)
    assert [run.value('c', name) for name in ('right', 'error')] == pytest.approx([200 / 3, 2 / 3])
    a, b = share([run, other], ['a', 'b'], 'val', lambda line: None)
    table = run_metrics([a, b])
    assert table['c', 'right'].tolist() == pytest.approx([200 / 3, 100 / 3])
    assert np.isnan(table['c', 'spread'][0])  # known of all of its images alone
    assert table['c', 'spread'][1] == pytest.approx(np.std([0, 1, 2]))
    assert shared_metrics([a, b]) == [('c', 'right'), ('c', 'error')]
    found = compare_groups([a, b], [[0], [1]], [0, 0], 0)
    assert found[['head', 'metric']].to_numpy().tolist() == [['c', 'right'], ['c', 'error']]
    assert found['difference'].tolist() == pytest.approx([-100 / 3, 1 / 3])
    assert describe_metrics([a, b])['c', 'error'].lower_is_better


def test_columns_of_a_grid():
    table = pd.DataFrame({('a', 'top1'): [1.0], ('a', 'exact'): [1.0], ('', 'top1'): [1.0]})
    assert metric_columns(table) == {'a': ('a', 'top1'), 'a/exact': ('a', 'exact')}
    with pytest.raises(UserError, match='two metrics would have one column'):
        metric_columns(pd.DataFrame({('a', 'exact'): [1.0], ('a/exact', 'top1'): [1.0]}))
    metrics = {'a': SoftmaxHead.metric('top1'), 'a/error': Several.metric('error')}
    runs = pd.DataFrame({'metrics': [metrics_text(metrics)]})
    assert read_metrics(runs, ['a', 'a/error']) == metrics
    for columns, text in ((['a'], metrics_text(metrics)), (['a'], '{"a": 1}'), (['a'], '1'), (['a'], 'x')):
        with pytest.raises(ValueError):
            read_metrics(pd.DataFrame({'metrics': [text]}), columns)


def test_the_metrics_of_labels_need_no_weights():
    head = standard_head(LabelSet('c', ('a', 'b')))
    assert head.fc.weight.is_meta and head.metrics(np.array([[0.0]]), np.array([[0.0]])) == {'top1': 100, 'top5': 100}
