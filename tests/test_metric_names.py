"""Names of metrics that no two metrics share; lines, tables and pictures of many heads; the metrics of each tag."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from common import TINY, tiny_task, train_run
from PIL import Image
from test_curves import legend, panels, summary_of

from timm_multilabel.assembly.head_options import match_columns
from timm_multilabel.cli.main import guarded, run_command
from timm_multilabel.errors import UserError, abbreviated
from timm_multilabel.heads import TagsHead
from timm_multilabel.heads.tags import tag_metrics
from timm_multilabel.labels import LabelSet, LabelSpace, TagSet
from timm_multilabel.metric_names import current_names, heads_of_summary, in_summary
from timm_multilabel.metrics import MultiLabelEvaluator
from timm_multilabel.reports.curves import write_curves
from timm_multilabel.reports.head_section import head_section
from timm_multilabel.reports.results import results_lines
from timm_multilabel.training.progress_bar import ProgressBar, fitted, wrapped
from timm_multilabel.training.run_folder import RunFolder
from timm_multilabel.training.trainer import epoch_lines, training_metrics

NAN = float('nan')
TAGS = ('a', 'b')
TARGET = torch.tensor([[1., 0.], [1., 1.], [0., 1.], [0., -1.]])
LOGITS = torch.tensor([[2., 1.], [-1., 2.], [1., 3.], [-2., -2.]])


def write_table(folder, columns, rows=8):
    """A data directory whose cells `columns` gives: {column: row number -> text}."""
    (folder / 'images').mkdir(parents=True)
    for split in ('train', 'val'):
        lines = [','.join(['image_path', *columns])]
        for row in range(rows):
            color = 30 * row, 90 if split == 'train' else 120, 200 - 20 * row
            Image.new('RGB', (32, 32), color).save(folder / 'images' / f'{split}{row}.png')
            lines.append(','.join([f'images/{split}{row}.png', *(cell(row) for cell in columns.values())]))
        (folder / f'{split}.csv').write_text('\n'.join(lines) + '\n')
    return folder


def tag_cells(row):
    return ('a', 'b', 'a|b', 'b')[row % 4]


# Names

def test_heads_whose_names_end_like_metrics():
    heads = {name: TagsHead(TagSet(name, TAGS), 4) for name in ('x', 'x_micro')}
    evaluator = MultiLabelEvaluator(heads, {'x': 0.5, 'x_micro': 0.5})
    evaluator.update({'x': LOGITS, 'x_micro': -LOGITS}, torch.cat([TARGET, TARGET], dim=1))
    metrics = evaluator.compute()
    # Of x, four labels are found, three of which are right, and four are ones; of x_micro two, one of which is right.
    assert metrics['x/micro_f1'] == pytest.approx(100 * 2 * 3 / (5 + 4))
    assert metrics['x_micro/f1'] == pytest.approx(100 * (2 * 1 / (2 + 2) + 0) / 2)
    assert [name for name in metrics if '/' in name] == [
        f'{head}/{metric}' for head in heads for metric in ('loss', 'map', 'f1', 'micro_f1', 'accuracy')]


def test_columns_of_one_summary_never_meet():
    heads = ('x', 'ema_x', 'ema', 'loss', 'top1', 'a/b', 'a', 'b/top1', 'train', 'x/loss')
    metrics = ('loss', 'top1', 'micro_f1')
    names = ['top1', 'loss', 'score', *(f'{head}/{metric}' for head in heads for metric in metrics)]
    columns = [in_summary(part, name) for part in ('train', 'eval', 'eval_ema') for name in names]
    assert len(set(columns)) == 3 * (3 + 10 * 3)
    assert heads_of_summary(columns) == list(heads)
    assert current_names(columns) == columns


def test_an_earlier_summary_has_the_names_of_now():
    earlier = [
        'phase', 'epoch', 'train_loss', 'simclr_loss', 'train_x_loss', 'train_x_micro_loss', 'train_a b_top1',
        'train_a b_loss', 'eval_loss', 'eval_score', 'eval_x_map', 'eval_x_micro_f1', 'eval_a b_top5',
        'eval_ema_loss', 'eval_ema_a b_top5', 'lr']
    assert current_names(earlier) == [
        'phase', 'epoch', 'train_loss', 'simclr_loss', 'train/x/loss', 'train/x_micro/loss', 'train/a b/top1',
        'train/a b/loss', 'eval_loss', 'eval_score', 'eval/x/map', 'eval/x_micro/f1', 'eval/a b/top5',
        'eval_ema_loss', 'eval_ema/a b/top5', 'lr']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp('names') / 'data', {
        'x': tag_cells, 'x_micro': tag_cells, 'ema_x': lambda row: 'uv'[row % 2]})


HEADS = ('--head', 'x:loss=tags', 'x_micro:loss=tags')


@pytest.mark.slow
def test_a_run_whose_heads_are_named_like_metrics(data, tmp_path, capsys):
    folder = train_run(data, tmp_path, *HEADS, '-wls', '0', '--model-ema', '--eval-metric', 'x/micro_f1', epochs=1)
    summary = pd.read_csv(folder / 'summary.csv')
    figures = {'x': ('loss', 'map', 'f1', 'micro_f1', 'accuracy'), 'ema_x': ('loss', 'top1', 'top5')}
    figures['x_micro'] = figures['x']
    for part in ('eval', 'eval_ema'):
        assert [column for column in summary if column.startswith(f'{part}/')] == [
            f'{part}/{head}/{metric}' for head in ('x', 'x_micro', 'ema_x') for metric in figures[head]]
    assert torch.load(folder / 'last.pth.tar', weights_only=True)['metric'] == max(
        summary['eval/x/micro_f1'][0], summary['eval_ema/x/micro_f1'][0])
    tags, = json.loads((folder / 'summary.json').read_text())
    for part in ('eval', 'eval_ema'):
        assert list(tags[part]) == ['x', 'x_micro'] and list(tags[part]['x']) == ['a', 'b']
        for name, metric in (('ap', 'map'), ('f1', 'f1'), ('accuracy', 'accuracy')):
            mean = np.mean([its[name] for its in tags[part]['x'].values()])
            assert summary[f'{part}/x/{metric}'][0] == pytest.approx(mean)
        assert [its['labels'] for its in tags[part]['x'].values()] == [8, 8]
        assert [its['ones'] for its in tags[part]['x'].values()] == [4, 6]

    # An earlier version wrote other names (and no head could begin with ema_); the run goes on under the names of now.
    header = list(summary)
    lost = ['eval/x/micro_f1', 'eval_ema/x/micro_f1']
    summary.drop(columns=lost).rename(
        columns=lambda name: name if '/ema_x/' in name else name.replace('/', '_')
    ).to_csv(folder / 'summary.csv', index=False)
    run_command('train', 'train.py', [
        str(data), *TINY, *HEADS, '-wls', '0', '--model-ema', '--eval-metric', 'x/micro_f1', '--epochs', '2',
        '--output', str(tmp_path), '--resume', str(folder)])
    again = pd.read_csv(folder / 'summary.csv')
    assert again['epoch'].tolist() == [0, 1] and sorted(again) == sorted(header)
    assert again['eval/x_micro/f1'][0] == summary['eval/x_micro/f1'][0]
    assert [each['epoch'] for each in json.loads((folder / 'summary.json').read_text())] == [0, 1]

    # What validation says of the same weights is the same.
    capsys.readouterr()
    for suffix in ('json', 'csv'):
        run_command('validate', 'validate.py', [
            str(data), '--checkpoint', str(folder / 'last.pth.tar'), '-j', '0', '--device', 'cpu', '--weights', 'ema',
            '--results-file', str(tmp_path / f'results.{suffix}')])
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines() if str(tmp_path) not in line)
    results = json.loads((tmp_path / 'results.json').read_text())
    last = json.loads((folder / 'summary.json').read_text())[-1]['eval_ema']
    for head in ('x', 'x_micro'):
        for tag in TAGS:
            assert results['heads'][head]['tags'][tag] == pytest.approx(last[head][tag])
    table = pd.read_csv(tmp_path / 'results.csv', keep_default_na=False)
    assert list(zip(table['head'], table['tag'])) == [
        ('x', ''), ('x', 'a'), ('x', 'b'), ('x_micro', ''), ('x_micro', 'a'), ('x_micro', 'b'), ('ema_x', ''), ('', '')]
    assert float(table['accuracy'][1]) == pytest.approx(last['x']['a']['accuracy'])


def metric_error(data, tmp_path, capsys, name):
    with pytest.raises(SystemExit) as ended:
        train_run(data, tmp_path, *HEADS, '-wls', '0', '--eval-metric', name, epochs=1)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.mark.slow
def test_eval_metric_by_an_earlier_name(data, tmp_path, capsys):
    """Of `x_micro_f1` nobody can tell whose it is; a name that only one metric had is still taken."""
    assert metric_error(data, tmp_path, capsys, 'x_micro_f1').endswith(
        "--eval-metric 'x_micro_f1': no such metric (there are: loss, score, top1, top5, x/loss, x/map, x/f1, "
        'x/micro_f1, x/accuracy, x_micro/loss, x_micro/map, x_micro/f1, x_micro/micro_f1, x_micro/accuracy, '
        'ema_x/loss, ema_x/top1, ema_x/top5)')
    folder = train_run(data, tmp_path, *HEADS, '-wls', '0', '--eval-metric', 'ema_x_top1', epochs=1)
    state = torch.load(folder / 'last.pth.tar', weights_only=True)
    assert state['eval_metric'] == 'ema_x/top1'
    assert state['metric'] == pd.read_csv(folder / 'summary.csv')['eval/ema_x/top1'][0]


@pytest.mark.parametrize('names, message', [
    ("('exact', 'loss')", "has a metric called 'loss', which is the name of something else"),
    ("('labels',)", "has a metric called 'labels', which is the name of something else"),
    ("('exact', 'exact')", "has a metric called 'exact', twice"),
    ("('a/b',)", "has a metric called 'a/b'; use letters, digits and underscores")])
def test_metrics_of_the_users_kinds_have_names_of_their_own(names, message, data, tmp_path, capsys):
    (tmp_path / 'kinds.py').write_text(
        f'from timm_multilabel.heads import SoftmaxHead\n\n\nclass Mine(SoftmaxHead):\n    kind = "mine"\n'
        f'    metric_names = {names}\n')
    with pytest.raises(SystemExit):
        train_run(data, tmp_path, '--head-module', str(tmp_path / 'kinds.py'), '--head', 'ema_x:loss=mine', epochs=1)
    assert message in capsys.readouterr().err


# Tags

def test_metrics_of_a_tag():
    target = np.array([1, 0, 1, 0, -1])
    probability = np.array([.9, .6, .4, .1, .9])
    # Ranked 1, 0, 1, 0; found: the first two, one of them rightly.
    assert tag_metrics(target, probability) == {
        'ap': pytest.approx(100 * (1 + 2 / 3) / 2), 'f1': 50, 'accuracy': 50, 'labels': 4, 'ones': 2}
    useless = tag_metrics(np.array([1, 1, -1]), probability[:3])
    assert all(math.isnan(useless[name]) for name in ('ap', 'f1', 'accuracy'))
    assert (useless['labels'], useless['ones']) == (2, 2)


@pytest.mark.slow
def test_a_report_has_the_metrics_of_each_tag():
    target = np.array([[1, 1], [0, 1], [1, -1], [0, 1]])
    output = np.array([[.9, .6], [.6, .7], [.4, .8], [.1, .9]])
    section = head_section(
        TagSet('t', ('a', '<b>')), target, np.ones(4, bool), output, np.array(list('wxyz')), lambda index: '')
    assert section.tags == [
        ('a', '83.33 %', '50.00 %', '50.00 %', '4', '2'), ('<b>', '-', '-', '-', '3', '3')]
    assert ('accuracy (mean over tags)', '50.00 %') in [row[:2] for row in section.metrics]


def test_summary_json_follows_a_run_that_goes_back(tmp_path):
    def epochs():
        return [(each['epoch'], each['eval']['t']['a']) for each in json.loads((tmp_path / 'summary.json').read_text())]

    folder = RunFolder(tmp_path, {}, LabelSpace(()))
    for epoch in range(3):
        folder.add_summary({'epoch': epoch, 'lr': 0.1}, {'eval': {'t': {'a': {'ap': 10.0 * epoch, 'f1': NAN}}}})
    assert epochs() == [(epoch, {'ap': 10.0 * epoch, 'f1': None}) for epoch in range(3)]
    folder.add_summary({'epoch': 1, 'lr': 0.2}, {'eval': {'t': {'a': {'ap': 99.0, 'f1': 1.0}}}})
    assert epochs() == [(0, {'ap': 0.0, 'f1': None}), (1, {'ap': 99.0, 'f1': 1.0})]
    folder.add_summary({'epoch': 1, 'lr': 0.3})  # an epoch without tags
    assert epochs() == [(0, {'ap': 0.0, 'f1': None})]
    (tmp_path / 'summary.json').write_text('[{"epoch": 0, "phase": "other"}]')
    with pytest.raises(UserError, match=r'summary\.json: cannot be read as the metrics of the tags of this run'):
        RunFolder(tmp_path, {}, LabelSpace(()))


# Lines

def test_items_that_do_not_fit_are_counted():
    items = ['loss 0.388', 'a 10.0%', 'b 20.0%', 'c 30.0%']
    assert fitted(items, 37) == 'loss 0.388  a 10.0%  b 20.0%  c 30.0%'
    assert fitted(items, 36) == 'loss 0.388  a 10.0%  +2 more'
    assert fitted(items, 5) == 'loss 0.388  +3 more'
    assert wrapped(['Epoch 1/2 + 1 of cooldown', 'loss 0.388', 'lr 0.1'], 30) == [
        'Epoch 1/2 + 1 of cooldown', '  loss 0.388  lr 0.1']
    assert abbreviated('attribute_of_the_photo_17', 12) == 'attri…oto_17'


@pytest.mark.parametrize('heads', [1, 3, 12, 40])
@pytest.mark.parametrize('width', [60, 80, 100, 2000])
def test_lines_of_an_epoch_are_no_wider_than_the_terminal(heads, width):
    names = [f'a_rather_long_attribute_{number}' for number in range(heads)]
    task = tiny_task(space=LabelSpace(tuple(LabelSet(name, ('u', 'v')) for name in names)))
    row = {'train_loss': 1.0, 'simclr_loss': 0.25, 'classification_loss': 0.75, 'lr': 0.1, 'images_per_second': 99.0}
    row |= dict.fromkeys((f'{term}_loss' for term in task.terms if f'{term}_loss' not in row), 0.0)
    row |= {'eval_top1': 50.0, 'eval_ema_top1': 51.0}
    row |= {f'{part}/{name}/top1': 50.0 for part in ('eval', 'eval_ema') for name in names}
    lines = epoch_lines('pretrain: Epoch 104/110, cooldown 4/10', row, task, width)
    assert all(len(line) <= width for line in lines)
    text = ' '.join(' '.join(lines).split())
    for part in ('eval 50.00%', 'eval_ema 51.00%', 'loss 1.000 (simclr 0.250, classification 0.750)', '99 images/s'):
        assert part in text, part
    shown = text.count('a_rather_')
    counted = sum(int(word[1:]) for word in text.split() if word.startswith('+'))
    # A single head is the mean itself, which is said once where the line is too narrow for both.
    assert shown + counted == (2 * heads if heads > 1 or width == 2000 else 0)
    assert counted == 0 or width < 2000 or heads == 40


def test_progress_lines_of_many_heads(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    names = [f'attribute_{number:02}' for number in range(40)]
    task = tiny_task(space=LabelSpace(tuple(LabelSet(name, ('u', 'v')) for name in names)))
    metrics = {'train_loss': 0.5, **dict.fromkeys((f'{term}_loss' for term in task.terms), 0.0)}
    metrics |= {f'train/{name}/top1': 2.0 * number for number, name in enumerate(names)}
    with guarded('x'), ProgressBar('Epoch 1/2', 4, True, 8) as progress:
        progress.started -= 8000  # so that speed and time are the same on every machine
        progress.show(4, training_metrics(metrics, task))
    assert capsys.readouterr().out == (
        'Epoch 1/2  step 4/4  loss 0.500  mean 39.0%  +40 more  0 images/s  left 00:00\n')


# Tables

def test_results_are_a_block_for_each_kind():
    results = {
        'heads': {
            'color': {'top1': 50.0, 'top5': 100.0, 'loss': 1.25, 'labels': 8},
            'shape': {'top1': NAN, 'top5': NAN, 'loss': 0.0, 'labels': 8, 'knn_top1': 12.5},
            'style': {'map': 75.0, 'loss': 0.5, 'labels': 7, 'tags': {'a': {'ap': 75.0}}},
            'price': {'r2': -5.0, 'mae': 12.0, 'loss': 0.625, 'labels': 6}},
        'mean': {'loss': 0.59375, 'score': 41.667}}
    kinds = {'color': 'softmax', 'shape': 'softmax', 'style': 'tags', 'price': 'numeric'}
    assert list(results_lines(results, kinds)) == [
        'softmax    top1     top5  knn_top1   loss  labels',
        'color    50.000  100.000         -  1.250       8',
        'shape         -        -    12.500  0.000       8',
        '',
        'tags      map   loss  labels',
        'style  75.000  0.500       7',
        '',
        'numeric      r2     mae   loss  labels',
        'price    -5.000  12.000  0.625       6',
        '',
        'all kinds       score   loss',
        'weighted mean  41.667  0.594']
    del results['heads']['style'], results['heads']['price']
    results['mean'] = {'top1': 50.0, 'loss': 0.625}
    assert list(results_lines(results, kinds)) == [
        'softmax          top1     top5  knn_top1   loss  labels',
        'color          50.000  100.000         -  1.250       8',
        'shape               -        -    12.500  0.000       8',
        'weighted mean  50.000        -         -  0.625       -']


def test_results_are_no_wider_than_a_page():
    many = {f'a_metric_of_a_long_name_{number}': 1.0 for number in range(12)}
    lines = list(results_lines({'heads': {'h' * 80: {**many, 'labels': 3}}, 'mean': {}}, {'h' * 80: 'mine'}))
    assert all(len(line) <= 100 for line in lines)
    assert sum(line.split().count('1.000') for line in lines) == 12 and len(lines) % 3 == 0


# Pictures

def test_twelve_heads_have_colors_of_their_own():
    axes = panels(summary_of([f'h{number}' for number in range(12)], 3))['accuracy']
    colors = {line.get_color() for line in axes.get_lines() if len(line.get_xdata()) > 1}
    assert len(colors) == 13  # with that of the mean


@pytest.mark.slow
def test_of_many_heads_the_best_and_the_worst_have_names(tmp_path):
    table = summary_of([f'h{number}' for number in range(40)], 3)  # the best of head h1 is 10 + 2
    figures = panels(table)
    names = ['h39', 'h38', 'h37', 'h36', 'h35', '30 others', 'h4', 'h3', 'h2', 'h1', 'h0']
    assert [text.split('  ')[0] for text in legend(figures['accuracy'])] == [*names, 'mean']
    assert [text.split('  ')[0] for text in legend(figures['head_losses'])] == names
    assert legend(figures['accuracy'])[:1] == ['h39  392.0 (3)'] and legend(figures['accuracy'])[10] == 'h0  2.00 (3)'
    axes = figures['accuracy']
    drawn = [line for line in axes.get_lines() if len(line.get_xdata()) > 1]
    assert len(drawn) == 41 and len({line.get_color() for line in drawn}) == 10 + 1 + 1
    write_curves(table, tmp_path / 'curves.png')
    with Image.open(tmp_path / 'curves.png') as picture:
        assert picture.width == 1200 and picture.height < 1600


# columns=attr_*

COLUMNS = ['color', 'attr_a', 'attr_b', 'other', 'attr_[c]']


@pytest.mark.parametrize('given, found', [
    ('attr_*', ['attr_a', 'attr_b', 'attr_[c]']),
    ('attr_?', ['attr_a', 'attr_b']),
    ('attr_[c]+*er', ['attr_[c]', 'other']),
    ('attr_b+attr_*', ['attr_b', 'attr_a', 'attr_[c]']),
    (['attr_*', 'other'], ['attr_a', 'attr_b', 'attr_[c]', 'other'])])
def test_patterns_of_columns(given, found):
    assert match_columns({'g': {'columns': given, 'drop': 0.1}, 'color': {}}, COLUMNS) == {
        'g': {'columns': found, 'drop': 0.1}, 'color': {}}


def test_a_pattern_that_matches_nothing():
    with pytest.raises(UserError) as error:
        match_columns({'g': {'columns': 'atr_*'}}, COLUMNS)
    assert str(error.value) == ("--head g:columns: no label column matches 'atr_*' (there are: color, attr_a, attr_b, "
                                'other, attr_[c])')
    assert match_columns({'g': {'columns': 'a*'}}, ['a*', 'ab']) == {'g': {'columns': ['a*']}}


@pytest.mark.slow
def test_train_and_check_take_patterns(tmp_path, capsys):
    data = write_table(tmp_path / 'data', {
        'attr_a': lambda row: str(row % 2), 'color': lambda row: 'uv'[row % 2], 'attr_b': lambda row: str(row // 4)})
    folder = train_run(data, tmp_path, '-wls', '0', '--head', 'attrs:columns=attr_*', epochs=1)
    assert 'heads: attrs (2 tags), color (2)' in capsys.readouterr().out
    space = LabelSpace.load(folder / 'label_space.json')
    assert [(labels.name, labels.columns) for labels in space.heads] == [
        ('attrs', ('attr_a', 'attr_b')), ('color', ('color',))]
    run_command('check', 'check', [str(data), '--head', 'attrs:columns=attr_*'])
    assert 'attrs' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_command('check', 'check', [str(data), '--head', 'attrs:columns=atr_*'])
    assert "no label column matches 'atr_*'" in capsys.readouterr().err
