"""The curves of a run: what is drawn of a summary.csv, and that each epoch of a run draws them."""
import itertools

import cv2
import numpy as np
import pandas as pd
import pytest
from common import train_run, write_data
from PIL import Image

from timm_multilabel.errors import UserError
from timm_multilabel.reports import curves
from timm_multilabel.reports.curves import all_curves, write_curves
from timm_multilabel.training.run_folder import read_summary, running_epochs

NAN = float('nan')
# Machado, Oliveira and Fernandes (2009), of full severity, on linear RGB.
VISIONS = {
    'normal': np.eye(3),
    'deuteranopia': [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
    'protanopia': [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    'tritanopia': [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]],
}


def summary_of(heads, epochs, ema=False, **columns):
    """A summary.csv: of head number i, the accuracy 10 i + epoch and the loss 10 - i - epoch / 10."""
    epoch = np.arange(epochs)
    table = {'epoch': epoch, 'train_loss': 3.0 - epoch / 10, 'simclr_loss': 1.0 - epoch / 10,
             'classification_loss': np.full(epochs, 2.0)}
    for number, head in enumerate(heads):
        table |= {f'train/{head}/loss': 9.0 - number - epoch / 10, f'train/{head}/top1': 50.0}
    for prefix, more in (('eval_', 0), ('eval_ema_', 1))[:1 + ema]:
        table |= {prefix + 'loss': 10 - epoch / 10, prefix + 'top1': 5.0 + epoch + more}
        for number, head in enumerate(heads):
            table |= {f'{prefix[:-1]}/{head}/loss': 10.0 - number - epoch / 10,
                      f'{prefix[:-1]}/{head}/top1': 10.0 * number + epoch + more, f'{prefix[:-1]}/{head}/top5': 99.0}
    return pd.DataFrame({**table, 'lr': 0.1 - epoch / 100, 'images_per_second': 100.0, **columns})


def panels(summary):
    """{name: axes} of the picture of a summary."""
    return {axes.get_label(): axes for axes in all_curves(summary).axes}


def lines(axes):
    """{name: values} of the named lines, as they are drawn; the parts of a line in a list."""
    found = {}
    for line in axes.get_lines():
        if not line.get_label().startswith('_'):
            found.setdefault(line.get_label(), []).append(list(zip(*map(np.ndarray.tolist, line.get_data()))))
    return found


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_accuracy_of_each_head_and_the_mean_with_their_best_epochs():
    table = summary_of(['color', 'shape'], 3)
    table.loc[1, 'eval/color/top1'] = 77
    axes = panels(table)['accuracy']
    assert lines(axes) == {
        'color': [[(1, 0), (2, 77), (3, 2)]],
        'shape': [[(1, 10), (2, 11), (3, 12)]],
        'mean': [[(1, 5), (2, 6), (3, 7)]]}
    assert legend(axes) == ['color  77.0 (2)', 'shape  12.0 (3)', 'mean  7.00 (3)']
    marks = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines() if len(line.get_xdata()) == 1}
    assert marks == {(2, 77), (3, 12), (3, 7)}
    assert axes.get_ylabel() == 'val accuracy (%)'


def test_the_other_figures():
    figures = panels(summary_of(['color', 'shape'], 2))
    assert list(figures) == ['accuracy', 'loss', 'terms', 'head_losses', 'learning_rate']
    assert lines(figures['loss']) == {'train, all terms': [[(1, 3), (2, 2.9)]], 'val, heads': [[(1, 10), (2, 9.9)]]}
    assert legend(figures['loss']) == ['train, all terms  2.90 (2)', 'val, heads  9.90 (2)']
    assert lines(figures['terms']) == {'SimCLR': [[(1, 1), (2, 0.9)]], 'classification': [[(1, 2), (2, 2)]]}
    assert legend(figures['terms']) == ['SimCLR', 'classification']
    assert lines(figures['head_losses']) == {'color': [[(1, 10), (2, 9.9)]], 'shape': [[(1, 9), (2, 8.9)]]}
    train, = (line for line in figures['head_losses'].get_lines()
              if line.get_linestyle() == ':' and line.get_ydata()[0] == 9)
    assert train.get_ydata().tolist() == [9, 8.9] and train.get_color() == curves._COLORS[0]
    line, = figures['learning_rate'].get_lines()
    assert [axes.get_xlabel() for axes in figures.values()] == [''] * 4 + ['epoch']
    assert line.get_ydata().tolist() == pytest.approx([0.1, 0.09])


def test_the_weights_that_did_better():
    better = summary_of(['color', 'shape'], 2, ema=True)
    axes = panels(better)['accuracy']
    assert lines(axes)['shape'] == [[(1, 11), (2, 12)]] and 'heads of EMA' in axes.get_ylabel()
    assert legend(axes)[2:] == ['mean  6.00 (2)', 'mean of EMA  7.00 (2)']
    worse = better.assign(eval_ema_top1=0.5)
    axes = panels(worse)['accuracy']
    assert lines(axes)['shape'] == [[(1, 10), (2, 11)]] and 'EMA' not in axes.get_ylabel()


def test_phases_begin_at_a_line_and_break_curves():
    first = summary_of([], 2).drop(columns=['eval_loss', 'eval_top1']).assign(classification_loss=0.0)
    table = pd.concat([first.assign(phase='pretrain'), summary_of(['color', 'shape'], 3, ema=True).assign(phase='NA'),
                       summary_of(['color'], 1).assign(phase='heads')], ignore_index=True)
    assert running_epochs(table) == [1, 2, 3, 4, 5, 6]
    figures = panels(table)
    drawn = lines(figures['accuracy'])
    assert [[x for x, y in part if y == y] for part in drawn['color']] == [[], [3, 4, 5], [6]]
    assert drawn['color'][1:] == [[(3, 1), (4, 2), (5, 3)], [(6, 0)]]  # EMA, and plain weights where there is none
    assert [text.get_text() for text in figures['accuracy'].texts] == ['pretrain', 'NA', 'heads']
    begins = {line.get_xdata()[0] for line in figures['loss'].get_lines() if line.get_xdata()[0] % 1}
    assert begins == {2.5, 5.5}
    assert legend(figures['loss'])[0] == 'train, all terms'  # of several objectives the least is not the best


def test_epochs_of_a_resumed_run_whose_first_rows_are_lost():
    assert running_epochs(pd.DataFrame({'epoch': [4, 5]})) == [5, 6]


def test_names_of_phases_are_read_as_they_are(tmp_path):
    (tmp_path / 'summary.csv').write_text('phase,epoch,train_loss,eval_loss\nNA,0,1.5,\n1,0,2,3\n')
    table = read_summary(tmp_path / 'summary.csv')
    assert table['phase'].tolist() == ['NA', '1'] and np.isnan(table['eval_loss'][0]) and table['eval_loss'][1] == 3


def test_simclr_alone():
    table = summary_of([], 3).drop(columns=['eval_loss', 'eval_top1']).assign(classification_loss=0.0)
    figures = panels(table)
    assert list(figures) == ['loss', 'learning_rate'] and legend(figures['loss']) == ['train, all terms  2.80 (3)']


def test_no_row_no_figure(tmp_path):
    assert all_curves(summary_of(['color'], 0)) is None
    write_curves(summary_of(['color'], 0), tmp_path / 'curves.png')
    assert not (tmp_path / 'curves.png').exists()


def test_tags_and_numbers_and_columns_without_a_number():
    table = summary_of(['color', 'tags', 'price'], 3).rename(columns={
        'eval/tags/top1': 'eval/tags/map', 'eval/price/top1': 'eval/price/r2', 'eval_top1': 'eval_score'})
    table['eval/color/top1'] = NAN
    table['eval/price/r2'] = [-5000, np.inf, 40]
    axes = panels(table)['accuracy']
    assert legend(axes) == ['tags, map  12.0 (3)', 'price, r2  40.0 (3)', 'mean  7.00 (3)']
    assert axes.get_ylabel() == 'val metric (%)' and axes.get_ylim()[0] == 0
    assert np.isnan(lines(axes)['price, r2'][0][1][1])


@pytest.mark.parametrize('epochs', [1, 2, 3, 7, 110])
def test_epochs_are_whole_numbers(epochs):
    axes = panels(summary_of(['color', 'shape'], epochs))['learning_rate']  # the lowest, which names them
    axes.figure.draw_without_rendering()
    shown = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    assert len(shown) >= min(epochs, 3) and all(tick in range(1, epochs + 1) for tick in shown)
    labels = {tick: label.get_text() for tick, label in zip(axes.get_xticks(), axes.get_xticklabels())}
    assert [labels[tick] for tick in shown] == [str(int(tick)) for tick in shown]


@pytest.mark.slow
def test_ten_heads_differ_and_stay_within_the_figure():
    names = [f'a head of a very long name {number}' for number in range(8)] + ['_hidden', '$x$']
    for name, axes in panels(summary_of(names, 4, ema=True)).items():
        axes.figure.draw_without_rendering()
        looks = {(line.get_color(), line.get_marker()) for line in axes.get_lines() if len(line.get_xdata()) > 1}
        assert len(looks) == {'accuracy': 12, 'loss': 3, 'terms': 2, 'head_losses': 10, 'learning_rate': 1}[name]
        if axes.get_legend() is not None:
            box = axes.get_legend().get_window_extent()
            assert box.x1 <= axes.figure.bbox.x1 and box.y0 >= 0 and box.y1 <= axes.figure.bbox.y1, name
    assert legend(panels(summary_of(names, 4))['head_losses'])[7:] == [
        'a head of…ong name 7  2.70 (4)', ' _hidden  1.70 (4)', r'\$x\$  0.700 (4)']


@pytest.mark.parametrize('vision', VISIONS)
def test_colors_differ_for_the_color_blind(vision):
    """The distance of colors in CIELAB: 2 is what the eye just tells apart."""
    srgb = np.array([[int(color[start:start + 2], 16) / 255 for start in (1, 3, 5)] for color in curves._COLORS])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.transpose(VISIONS[vision])).clip(0, 1)
    seen = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = cv2.cvtColor(seen[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    for number, least in ((2, 75), (3, 30), (7, 24), (10, 14)):
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab[:number], 2)) > least, number


def test_picture_is_written_whole(tmp_path):
    path = tmp_path / 'curves.png'
    write_curves(summary_of(['color', 'shape'], 3), path)
    with Image.open(path) as picture:
        assert picture.format == 'PNG' and picture.width == 1200 and 1000 < picture.height < 1800
    before = path.read_bytes()
    with pytest.raises(UserError, match='cannot be written'):
        write_curves(summary_of(['color'], 3), tmp_path)  # a folder
    assert [each.name for each in tmp_path.iterdir()] == ['curves.png'] and path.read_bytes() == before


@pytest.mark.slow
def test_each_epoch_of_a_run_draws_its_curves(data_dir, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        curves, 'write_curves', lambda summary, path: (drawn.append(len(summary)), write_curves(summary, path)))
    folder = train_run(data_dir, tmp_path, epochs=3)
    assert drawn == [1, 2, 3]
    with Image.open(folder / 'curves.png') as picture:
        assert picture.width == 1200


def test_a_picture_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fail(summary, path):
        raise RuntimeError('no\nfont')

    monkeypatch.setattr(curves, 'write_curves', fail)
    folder = train_run(write_data(tmp_path / 'data'), tmp_path, epochs=2)
    assert len(pd.read_csv(folder / 'summary.csv')) == 2 and not (folder / 'curves.png').exists()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('Curves')]
    assert said == ['Curves: left out from here on, and the run goes on (RuntimeError: no font)']
