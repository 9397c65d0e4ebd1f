"""A head of a million classes: nothing grows with their square, or with rows times classes without bound."""
import numpy as np
import pandas as pd
import pytest
import torch
from common import train_run, write_data
from test_cli import fails

from timm_multilabel.errors import UserError
from timm_multilabel.exports.card import model_card
from timm_multilabel.exports.exportable import Exportable, describe
from timm_multilabel.inference import predictions
from timm_multilabel.inference.image_predictions import Guess, ImagePrediction, guess
from timm_multilabel.inference.neighbours import vote
from timm_multilabel.inference.predictions import check_size
from timm_multilabel.labels import LabelSet, LabelSpace
from timm_multilabel.reports import confusion
from timm_multilabel.reports.confusion import draw_confusion, write_confusion
from timm_multilabel.reports.intervals import head_intervals, weighted_class_metrics
from timm_multilabel.reports.mistakes import confused_pairs
from timm_multilabel.reports.prediction_formats import csv_columns, table_lines
from timm_multilabel.training.checkpoint import load_model, read_checkpoint

MANY = 1_000_000


@pytest.fixture(scope='module')
def labels():
    return LabelSet('id', tuple(f'c{number:06}' for number in range(MANY)))


@pytest.mark.slow
def test_the_confusion_of_a_million_classes_is_a_row_a_pair(labels, tmp_path):
    """Of 8 TB before."""
    target = np.array([[5], [5], [999_999], [5], [7.0]])
    measured = np.array([[5], [6], [0], [6], [8.0]])
    write_confusion(tmp_path, 'c', labels, target, measured)
    assert (tmp_path / 'c.csv').read_text() == (
        'label,prediction,images\nc000005,c000005,1\nc000005,c000006,2\nc000007,c000008,1\nc999999,c000000,1\n')
    assert (tmp_path / 'c.png').stat().st_size < 100_000
    _, figure = draw_confusion(labels, target, measured)
    axes = figure.axes[0]
    assert axes.get_title() == 'id: accuracy 20.0 % of 5 images; the most frequent confusions of 1000000 classes'
    assert [text.get_text() for text in axes.get_yticklabels()][0] == 'c000005 \u2192 c000006'
    assert [text.get_text() for text in axes.texts][0] == '2 of 3'


@pytest.mark.slow
def test_pairs_and_matrix_say_the_same(tmp_path, monkeypatch):
    labels = LabelSet('id', ('a', 'b', '=c'))
    rng = np.random.default_rng(0)
    target, measured = rng.integers(0, 3, (2, 50, 1)).astype(float)
    write_confusion(tmp_path, 'matrix', labels, target, measured)
    monkeypatch.setattr(confusion, 'MATRIX', 2)
    write_confusion(tmp_path, 'pairs', labels, target, measured)
    matrix = pd.read_csv(tmp_path / 'matrix.csv', index_col=0)
    pairs = pd.read_csv(tmp_path / 'pairs.csv')
    assert len(pairs) == 9 and {*pairs['label']} == {'a', 'b', "'=c"}
    assert all(matrix.loc[row.label, row.prediction] == row.images for row in pairs.itertuples())


def test_votes_take_memory_by_neighbours_not_by_classes():
    """1,000 queries took 4 GB of votes."""
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(1000, 7, generator=generator).sort(dim=1, descending=True).values
    few = torch.randint(0, 5, (1000, 7), generator=generator)
    names = torch.tensor([3, 40, 999_999, 123_456_789_012, 2 ** 62])  # in the order of the few
    weights = ((cosines - cosines[:, :1]) / 0.07).exp().double()
    expected = torch.zeros(1000, 5, dtype=torch.float64).scatter_add_(1, few, weights).argmax(dim=1)
    assert vote(cosines, few).tolist() == expected.tolist()
    assert vote(cosines, names[few]).tolist() == names[expected].tolist()


def test_figures_are_over_the_classes_that_occur():
    rng = np.random.default_rng(0)
    target, predicted = rng.integers(0, 4, (2, 60))
    weights = rng.integers(0, 3, (50, 60)).astype(np.int32)
    few = weighted_class_metrics(target, predicted, weights)
    many = weighted_class_metrics(target * 10 ** 15, predicted * 10 ** 15, weights)
    for name in ('balanced_accuracy', 'macro_f1'):
        np.testing.assert_array_equal(few[name], many[name])


def test_a_head_of_many_classes_has_figures(labels):
    """Resamples of all classes took 8 GB a matrix."""
    output = np.zeros((6, MANY), np.float32)
    output[np.arange(6), [1, 2, 3, 4, 5, 6]] = 0.9
    target = np.array([1, 2, 3, 4, 7, 8])
    figures = {figure.name: figure.value for figure in head_intervals(labels, target, output)}
    assert figures['top1'] == pytest.approx(400 / 6) and figures['macro_f1'] == 50
    assert [(pair.label, pair.prediction) for pair in confused_pairs(labels, target, output)] == [
        ('c000007', 'c000005'), ('c000008', 'c000006')]


def test_guesses_of_a_million_classes(labels):
    values = np.zeros(MANY, np.float32)
    values[[10, 999_999, 500]] = 0.2, 0.5, 0.2
    assert [each.label for each in guess(labels, values, 3, {})] == ['c999999', 'c000010', 'c000500']
    assert [each.label for each in guess(labels, values, 2, {})] == ['c999999', 'c000010']  # ties by class
    assert [each.label for each in guess(labels, values, 4, {})] == ['c999999', 'c000010', 'c000500', 'c000000']
    assert guess(labels, values, 9, {'': 0.6}) == [('unknown', 0.5)]


def test_many_labels_of_an_image(labels):
    space = LabelSpace((labels,))
    with pytest.raises(UserError, match=r'--top-k 1000000: the CSV would have 2,000,002 columns, .* --format jsonl'):
        csv_columns(space, MANY)
    assert len(csv_columns(space, 8000)) == 16_002
    guesses = [Guess(name, 0.5) for name in labels.classes[:20_000]]
    line = list(table_lines([ImagePrediction('i', {'id': guesses})], space, MANY))[1]
    assert len(line) < 220 and line.startswith('i      c000000 0.500, c000001 0.500, ')
    assert line.endswith('c000012 0.500, 19987 more')


@pytest.mark.slow
def test_predictions_that_would_not_fit_are_refused_before_the_work(labels, tmp_path, capsys, monkeypatch):
    check_size(268, LabelSpace((labels,)), 'x')
    with pytest.raises(UserError, match='x: predictions of 4,000 rows x 1,000,000 .* would take 16.0 GB, .* 268 rows'):
        check_size(4000, LabelSpace((labels,)), 'x')
    data = write_data(tmp_path / 'data')
    run = train_run(data, tmp_path, epochs=1)
    monkeypatch.setattr(predictions, '_CELLS', 29)  # of 6 rows and 5 classes
    line = fails(capsys, 'report', [run, '-j', 0, '--device', 'cpu'])
    assert 'predictions of 6 rows x 5 classes' in line and 'a split of at most 5 rows' in line
    assert not (run / 'report.html').exists() and not list(run.glob('predictions*'))


@pytest.mark.slow
def test_a_card_names_some_classes(tmp_path):
    data = write_data(tmp_path / 'data')
    with open(data / 'all.csv', 'w', encoding='utf-8') as file:
        file.write((data / 'train.csv').read_text())
        file.writelines(f'images/{number % 12}.png,color {number:04},disc\n' for number in range(600))
    run = train_run(data, tmp_path, epochs=1)
    checkpoint = read_checkpoint(run / 'last.pth.tar')
    model = load_model(checkpoint, 'plain')
    card = model_card(Exportable(checkpoint, model, describe(checkpoint, 'plain', model), None), None)
    assert 'color 0498, and 103 more, see multilabel.json\n' in card and 'color 0499' not in card
