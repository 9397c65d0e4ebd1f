"""timm-multilabel compare: groups, figures, differences that hold, and what cannot be compared."""
import itertools
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import yaml
from common import SPACE, train_run, write_data
from sklearn.metrics import average_precision_score
from test_cli import fails

from timm_multilabel.assembly.stored import made_from
from timm_multilabel.cli.main import run_command
from timm_multilabel.inference.predictions import Predictions
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.reports.experiments import (
    MEAN,
    Run,
    RunPredictions,
    compare_groups,
    differing_settings,
    flat_settings,
    group_runs,
    run_metrics,
    share,
    shared_heads,
)
from timm_multilabel.reports.tables import markdown_table

NAN = np.nan
FLAGS = ['-j', '0', '--device', 'cpu']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of a tiny model, on 6 validation images."""
    folder = tmp_path_factory.mktemp('compare')
    write_data(folder / 'data')
    return train_run(folder / 'data', folder / 'out', epochs=1)


@pytest.fixture
def make_run(trained, tmp_path):
    """Make a run folder with settings and the answers that its stored predictions hold, 1 for a right one."""

    def make(name, split='val', settings=(), **right):
        run = tmp_path / name
        if not run.is_dir():
            shutil.copytree(trained, run, ignore=shutil.ignore_patterns('predictions-*', '.*'))
            args = {**yaml.safe_load((run / 'args.yaml').read_text()), 'experiment': name, **dict(settings)}
            (run / 'args.yaml').write_text(yaml.safe_dump(args))
        data = trained.parent.parent / 'data'
        rows = pd.read_csv(data / 'val.csv')
        targets = np.stack([[labels.classes.index(text) for text in rows[labels.name]] for labels in SPACE.heads], 1)
        outputs = {
            labels.name: np.eye(len(labels.classes), dtype=np.float32)[
                (targets[:, column] + 1 - np.array(right[labels.name])) % len(labels.classes)]
            for column, labels in enumerate(SPACE.heads)}
        Predictions(
            SPACE, np.array([f'{data}/{split}.csv row {number}' for number in range(2, 8)]),
            np.array([str(data / image) for image in rows['image_path']]), targets.astype(np.float32), outputs,
            np.zeros((6, 2), np.float32), made_from(run / 'model_best.pth.tar', data / f'{split}.csv')).save(
            run / f'predictions-{split}.npz')
        return run

    return make


def table(text):
    """The first table of Markdown as a frame of texts."""
    lines = itertools.takewhile(lambda line: line.startswith('|'), text.splitlines())
    rows = [[cell.strip().strip('*') for cell in line.strip('|').split(' | ')] for line in lines]
    return pd.DataFrame(rows[2:], columns=rows[0])


def compare_runs(*argv):
    run_command('compare', 'compare', [str(word) for word in (*argv, *FLAGS)])


RIGHT = {
    'a0': {'color': [1, 1, 1, 1, 1, 1], 'shape': [1, 1, 1, 0, 0, 0]},
    'a1': {'color': [1, 1, 1, 1, 0, 0], 'shape': [1, 1, 0, 0, 0, 0]},
    'b0': {'color': [1, 0, 1, 0, 0, 0], 'shape': [1, 1, 1, 1, 0, 0]},
    'b1': {'color': [1, 1, 0, 0, 0, 0], 'shape': [1, 0, 1, 0, 0, 1]},
}


@pytest.fixture
def four_runs(make_run):
    """Two settings with two seeds each."""
    return [make_run(name, settings={'seed': int(name[1]), 'lr': 0.1 if name[0] == 'a' else 0.2}, **right)
            for name, right in RIGHT.items()]


def test_table_of_two_groups(four_runs, tmp_path, capsys):
    compare_runs(*four_runs, '--out', tmp_path / 'new' / 'out')
    printed = capsys.readouterr().out
    assert printed == (tmp_path / 'new' / 'out' / 'experiments.md').read_text()
    shown = table(printed)
    assert shown.columns.tolist() == [
        'runs', 'seed', '--lr', 'best epoch', 'epochs trained', 'val color top1', 'val shape top1', 'val top1 (mean)']
    assert shown.to_numpy().tolist() == [
        ['a0', '0', '0.1', '1', '1', '100.00', '50.00', '75.00'],
        ['a1', '1', '0.1', '1', '1', '66.67', '33.33', '50.00'],
        ['a0, a1', '0, 1', '0.1', '1, 1', '1, 1', '83.33 ± 23.57', '41.67 ± 11.79', '62.50 ± 17.68'],
        ['b0', '0', '0.2', '1', '1', '33.33', '66.67', '50.00'],
        ['b1', '1', '0.2', '1', '1', '33.33', '50.00', '41.67'],
        ['b0, b1', '0, 1', '0.2', '1, 1', '1, 1', '33.33 ± 0.00', '58.33 ± 11.79', '45.83 ± 5.89']]
    assert '**a0, a1**' in printed and 'Against a0, a1:' in printed and 'on 6 images of val. ' in printed

    written = pd.read_csv(tmp_path / 'new' / 'out' / 'experiments.csv')
    groups = written[written['runs'].isin(['a0, a1', 'b0, b1'])].reset_index()
    assert groups['val color top1'].tolist() == pytest.approx([500 / 6, 100 / 3])
    assert groups['val top1 (mean) sd'].tolist() == pytest.approx([25 / 2 ** 0.5, 25 / 3 / 2 ** 0.5])
    assert np.isnan(groups['val color top1 difference'][0]) and written['lr'].tolist() == [0.1] * 3 + [0.2] * 3
    assert written['val color top1 sd'].isna().tolist() == [True, True, False] * 2

    # Against all 6^6 resamples of correctness averaged over the seeds, plus a t of one degree of freedom (two pairs).
    right = {name: 100 * np.array([of_run['color'], of_run['shape']], dtype=float) for name, of_run in RIGHT.items()}
    pairs = np.stack([right['b0'] - right['a0'], right['b1'] - right['a1']])
    every = pairs.mean(axis=0)[:, np.array(list(itertools.product(range(6), repeat=6)))].mean(axis=2)
    by_seed = pairs.mean(axis=2)
    for name, value, of_resamples, of_seeds in [
            ('color top1', -50, every[0], by_seed[:, 0]), ('shape top1', 100 / 6, every[1], by_seed[:, 1]),
            ('top1 (mean)', -100 / 6, every.mean(axis=0), by_seed.mean(axis=1))]:
        assert groups[f'val {name} difference'][1] == pytest.approx(value)
        step = 100 / 6 / (2 if 'mean' in name else 1)  # of accuracies of 6 images, and of their mean over two heads
        error = max(abs(of_seeds[0] - of_seeds[1]) / 2, step / 12 ** 0.5)
        ends = [groups[f'val {name} {end}'][1] for end in ('low', 'high')]
        tails = [scipy.stats.cauchy.cdf(-side * of_resamples / error).mean() for side in (1, -1)]
        for end, tail in zip(ends, (0.025, 0.975)):  # accuracies differ by 100 at most
            assert abs(end) == 100 or scipy.stats.cauchy.cdf((end - of_resamples) / error).mean() == pytest.approx(
                tail, abs=0.004)
        assert groups[f'val {name} p'][1] == pytest.approx(min(1, 2 * min(tails)), abs=0.015)
    ps = groups.loc[1, ['val color top1 p', 'val shape top1 p']].to_numpy()
    corrected = groups.loc[1, ['val color top1 p Holm', 'val shape top1 p Holm']].to_numpy()
    assert corrected.tolist() == pytest.approx([2 * ps[0], max(2 * ps[0], ps[1])]) and ps[0] < ps[1]
    assert groups['val top1 (mean) p Holm'][1] == groups['val top1 (mean) p'][1]  # the only one of its kind


@pytest.mark.slow
def test_another_baseline_and_a_test_split(four_runs, make_run, capsys):
    for run in four_runs[:3]:
        make_run(run.name, split='test', **RIGHT[run.name])
    compare_runs(*four_runs, '--baseline', four_runs[3])
    printed = capsys.readouterr().out
    assert 'Against b0, b1:' in printed and '| a0, a1 | val top1 (mean) | +16.67 ' in printed
    assert 'test is left out: there is none for b1' in printed and 'test color' not in printed
    make_run('b1', split='test', **RIGHT['b1'])
    compare_runs(*four_runs)
    printed = capsys.readouterr().out
    assert '| b0, b1 | test top1 (mean) | -16.67 ' in printed and '6 images of val, 6 images of test' in printed


def test_one_run_has_its_row_and_no_comparison(make_run, capsys):
    compare_runs(make_run('only', **RIGHT['a1']))
    printed = capsys.readouterr().out
    assert table(printed).to_numpy().tolist() == [['only', '42', '1', '1', '66.67', '33.33', '50.00']]
    assert 'Against' not in printed and 'bootstrap' not in printed


@pytest.mark.slow
def test_figures_are_those_of_training(tmp_path, data_dir, capsys):
    """Real runs without stored predictions: they are made, and score as the evaluation of the best epoch did."""
    (data_dir / 'test.csv').write_text((data_dir / 'val.csv').read_text())
    runs = [train_run(data_dir, tmp_path / name, '--seed', str(seed), '--head', f'color:smoothing={smoothing}')
            for name, seed, smoothing in (('x', 1, 0), ('y', 2, 0), ('z', 1, 0.2))]
    capsys.readouterr()
    compare_runs(*runs)
    first = table(capsys.readouterr().out)
    assert first['runs'].tolist() == [*map(str, runs[:2]), f'{runs[0]}, {runs[1]}', str(runs[2])]
    assert first['--head color:smoothing'].tolist() == ['0', '0', '0', '0.2']
    for run, row in zip(runs, (0, 1, 3)):
        assert (run / 'predictions-val.npz').is_file() and (run / 'predictions-test.npz').is_file()
        summary = pd.read_csv(run / 'summary.csv')
        best = summary.loc[summary['eval_top1'].idxmax()]
        for title, figure in (('color top1', 'eval/color/top1'), ('shape top1', 'eval/shape/top1'),
                              ('top1 (mean)', 'eval_top1')):
            for split in ('val', 'test'):
                assert float(first[f'{split} {title}'][row]) == pytest.approx(best[figure], abs=0.0051)
        assert int(first['best epoch'][row]) == best['epoch'] + 1 and first['epochs trained'][row] == '2'
    compare_runs(*runs)  # from what is stored
    assert table(capsys.readouterr().out).equals(first)


def test_bad_input(make_run, tmp_path, capsys):
    a, b = make_run('a', **RIGHT['a0']), make_run('b', **RIGHT['b0'])
    (tmp_path / 'empty').mkdir()
    line = fails(capsys, 'compare', [a, tmp_path / 'empty'])
    assert f'{tmp_path}/empty: is no run folder (there is no args.yaml in it); name one such as' in line
    line = fails(capsys, 'compare', [a / 'model_best.pth.tar'])
    assert f'model_best.pth.tar: is no run folder (there is no args.yaml in it); name its folder, {a}' in line
    assert f'{tmp_path}/a/../a: is named twice' in fails(capsys, 'compare', [a, tmp_path / 'a' / '..' / 'a'])
    assert f'--baseline {b}: is none of the runs to compare ({a})' in fails(capsys, 'compare', [a, '--baseline', b])
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'experiments.md').write_text('mine')
    line = fails(capsys, 'compare', [a, b, '--out', tmp_path / 'out'])
    assert 'experiments.md: exists already; overwrite it with --force' in line
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['experiments.md']
    compare_runs(a, b, '--out', tmp_path / 'out', '--force')
    assert (tmp_path / 'out' / 'experiments.md').read_text().startswith('| runs')
    assert capsys.readouterr().err.startswith('Wrote ')
    for name in ('summary.csv', 'model_best.pth.tar'):
        shutil.copytree(a, tmp_path / f'without {name}', ignore=shutil.ignore_patterns(name))
        line = fails(capsys, 'compare', [b, tmp_path / f'without {name}'])
        assert f'without {name}: no epoch of this run (with phases, of its last one) is finished' in line
    (b / 'summary.csv').write_text('')
    assert f'{b}/summary.csv: cannot be read' in fails(capsys, 'compare', [a, b])
    (b / 'args.yaml').write_text('- x')
    assert f'{b}/args.yaml: expected a mapping' in fails(capsys, 'compare', [a, b])


def test_data_that_is_gone(make_run, tmp_path, capsys):
    a = make_run('a', settings={'data_dir': str(tmp_path / 'gone')}, **RIGHT['a0'])
    (a / 'predictions-val.npz').unlink()
    assert 'a: its data directory has no val (any more); name one with --data DIR' in fails(capsys, 'compare', [a])
    write_data(tmp_path / 'other')
    compare_runs(a, '--data', tmp_path / 'other')
    assert table(capsys.readouterr().out)['runs'].tolist() == ['a']


def test_same_seed_is_told(make_run, capsys):
    compare_runs(make_run('a', **RIGHT['a0']), make_run('b', **RIGHT['b0']))
    assert '- a, b: the same settings, and some of them the same seed' in capsys.readouterr().out


class Balanced(HTMLParser):
    """Checks that each tag is closed, and gathers cells."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        if tag != 'meta':
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ('td', 'th'):
            self.texts.append(data)


def test_names_that_are_code(make_run, tmp_path):
    runs = [make_run(name, settings={'aa': aa}, **RIGHT[right]) for name, aa, right in (
        ('=1+1', '<script>x</script>', 'a0'), ('x|[y](z)*', '@SUM(A1)', 'b0'))]
    compare_runs(*runs, '--out', tmp_path / 'out')
    page = Balanced()
    text = (tmp_path / 'out' / 'experiments.html').read_text()
    page.feed(text)
    assert not page.open and '<script' not in text and 'http' not in text
    assert page.texts.count('<script>x</script>') == 1 and page.texts.count('x|[y](z)*') == 4
    written = pd.read_csv(tmp_path / 'out' / 'experiments.csv')
    assert written['runs'].tolist() == ["'=1+1", 'x|[y](z)*']
    assert written['aa'].tolist() == ['<script>x</script>', "'@SUM(A1)"]
    markdown = (tmp_path / 'out' / 'experiments.md').read_text()
    assert r'| x\|\[y\](z)\*' in markdown and r'\<script\>x\</script\>' in markdown
    lines = [line for line in markdown.splitlines() if line.startswith('|')]
    assert len({len(re.findall(r'(?<!\\)\|', line)) for line in lines[:4]}) == 1


def test_settings_as_flags():
    flags = {'lr': '--lr', 'head': '--head', 'scale': '--scale', 'amp': '--amp'}
    assert flat_settings({
        'lr': 0.1, 'seed': 3, 'output': 'x', 'scale': [0.5, 1.0], 'amp': True, 'aa': None,
        'head': {'color': {'loss': 'arcface', 'scale': '30'}}, 'head_weights': {'color': 2.0},
        'phases': [{'name': 'one', 'lr': 0.2, 'head': {'color': {'drop': 0.5}}}, {'name': 'two'}],
    }, flags) == {
        '--lr': '0.1', '--scale': '0.5 1', '--amp': 'true', '--aa': '', '--head color:loss': 'arcface',
        '--head color:scale': '30', '--head_weights color': '2', 'phases': 'one two', 'one: --lr': '0.2',
        'one: --head color:drop': '0.5'}


def test_groups_and_what_differs():
    def run(**settings):
        return Run('', {f'--{name}': value for name, value in settings.items()}, '0', 0, 1)

    runs = [run(lr='1', aa=''), run(lr='2', aa='x'), run(lr='1'), run(lr='2', aa='y')]
    assert group_runs(runs) == [[0, 2], [1], [3]]
    assert differing_settings(runs) == ['--lr', '--aa'] and differing_settings([runs[0], runs[2]]) == []


def answers(space, targets, outputs, images=None):
    """RunPredictions of a run to images 0, 1, ..., or those named."""
    targets = np.array(targets, dtype=np.float32)
    images = np.arange(len(targets)) if images is None else images
    return RunPredictions.of(Predictions(
        space, np.array([''] * len(targets)), np.array([f'/x/{image}.png' for image in images]), targets,
        {name: np.array(values, dtype=np.float32) for name, values in outputs.items()}, np.zeros((len(targets), 1))))


MIXED = LabelSpace((LabelSet('c', ('x', 'y')), TagSet('t', ('p', 'q')), Quantity('n', 10.0, 2.0)))


def test_heads_of_all_kinds_with_missing_labels():
    #           c  t      n
    targets = [[0, 1, 0, 0.5], [1, 0, 1, NAN], [-1, -1, -1, 1.0], [1, 1, 1, -1.0]]
    a = answers(MIXED, targets, {
        'c': [[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8]],
        't': [[0.9, 0.4], [0.95, 0.2], [0.5, 0.5], [0.1, 0.3]], 'n': [[0.5], [9], [0], [-1.5]]})
    b = answers(MIXED, targets, {
        'c': [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.2, 0.8]],
        't': [[0.9, 0.1], [0.1, 0.9], [0.5, 0.5], [0.9, 0.9]], 'n': [[0.0], [9], [0.5], [-1.0]]})
    figures = run_metrics([a, b])
    assert figures.columns.tolist() == [('c', 'top1'), ('t', 'map'), ('n', 'mae')]  # one head has no mean
    assert figures['c', 'top1'].tolist() == pytest.approx([200 / 3, 100])
    # |0|, |1| and |0.5| standard deviations of 2
    assert figures['n', 'mae'].tolist() == pytest.approx([2 * 1.5 / 3, 2 * 1.0 / 3])
    expected = [average_precision_score([1, 0, 1], [0.9, 0.95, 0.1]), average_precision_score([0, 1, 1], [.4, .2, .3])]
    assert figures['t', 'map'].tolist() == pytest.approx([100 * np.mean(expected), 100])
    differences = compare_groups([a, b], [[0], [1]], [0, 0], 0)
    assert differences[['group', 'head', 'metric']].to_numpy().tolist() == [[1, 'c', 'top1'], [1, 'n', 'mae']]
    assert differences['difference'].tolist() == pytest.approx([100 / 3, -1 / 3])
    only_tags = LabelSpace(MIXED.heads[1:2])
    tags = answers(only_tags, [[1, 0], [0, 1]], {'t': [[0.9, 0.4], [0.2, 0.8]]})
    assert compare_groups([tags, tags], [[0], [1]], [0, 0], 0).empty


def test_a_head_without_labels_is_left_out_of_the_mean():
    space = LabelSpace((LabelSet('a', ('x', 'y')), LabelSet('b', ('x', 'y')), LabelSet('none', ('x', 'y'))))
    right, wrong = [[1, 0]] * 2, [[0, 1]] * 2
    runs = [answers(space, [[0, 0, -1]] * 2, {'a': a, 'b': wrong, 'none': right}) for a in (right, wrong)]
    figures = run_metrics(runs)
    assert figures[MEAN, 'top1'].tolist() == [50, 0] and figures['none', 'top1'].isna().all()
    differences = compare_groups(runs, [[0], [1]], [0, 0], 0)
    assert differences['head'].tolist() == [MEAN, 'a', 'b']
    assert differences['difference'].tolist() == [-50, -100, 0] and differences['p'][2] == 1


def test_images_and_heads_that_runs_share():
    def of(classes, images, targets):
        space = LabelSpace((LabelSet('c', classes), LabelSet('d', ('x', 'y'))))
        return answers(space, [[0, target] for target in targets], {'c': [[1] * len(classes)] * len(images),
                                                                    'd': [[1, 0]] * len(images)}, images)

    lines = []
    a, b = of(('x', 'y'), [1, 2, 3, 3], [0, 1, 1, 0]), of(('x', 'z'), [3, 4, 1, 3], [1, 1, 0, 0])
    assert shared_heads([a, b]) == ['d']
    shared = share([a, b], ['a', 'b'], 'val', lines.append)
    assert [each.images.tolist() for each in shared] == [['/x/1.png', '/x/3.png', '/x/3.png']] * 2
    assert [each.targets['d'].tolist() for each in shared] == [[0, 1, 0]] * 2
    assert lines == ['val: compared on the 3 images that all runs share (of a 4, b 4)']
    with pytest.raises(Exception, match="val: 1 images have another label of 'd' for c than for a, /x/1.png for one"):
        share([a, of(('x', 'y'), [1, 2], [1, 1])], ['a', 'c'], 'val', lines.append)
    with pytest.raises(Exception, match='val: no image is in the val of all runs'):
        share([a, of(('x', 'y'), [7], [1])], ['a', 'c'], 'val', lines.append)


def test_other_label_spaces(make_run, capsys):
    a, b = make_run('a', **RIGHT['a0']), make_run('b', settings={'lr': 0.3}, **RIGHT['b0'])
    stored = Predictions.load(b / 'predictions-val.npz')
    for name, classes, line in (
            ('shape', ('disc', 'ring', 'star'), 'not compared and not in the mean: shape\n'),
            ('size', ('disc', 'ring'), 'not compared and not in the mean: shape, size\n')):
        space = LabelSpace((SPACE.heads[0], LabelSet(name, classes)))
        Predictions(space, stored.rows, stored.images, stored.targets, {
            'color': stored.outputs['color'], name: np.zeros((6, len(classes)), np.float32)}, stored.features,
            stored.made_from).save(b / 'predictions-val.npz')
        compare_runs(a, b)
        printed = capsys.readouterr().out
        assert line in printed and re.search(r'\| b +\| val color top1 \| -66.67 ', printed)
        assert '(mean)' not in printed
    space = LabelSpace((LabelSet('size', ('s',)), LabelSet('shape', ('disc', 'ring', 'star'))))
    Predictions(space, stored.rows, stored.images, stored.targets * 0, {
        'size': np.ones((6, 1), np.float32), 'shape': np.ones((6, 3), np.float32)}, stored.features,
        stored.made_from).save(b / 'predictions-val.npz')
    assert 'val: the runs (a, b) share no head of the same classes' in fails(capsys, 'compare', [a, b])


def test_markdown_lines_up():
    text = markdown_table(pd.DataFrame({'a': ['1', '22'], 'long name': ['x\ny', '']}), [1])
    assert text == ('| a      | long name |\n| ------ | --------- |\n| 1      | x y       |\n| **22** |           |')
