"""The report of a run: its numbers against plain references, and its page in a browser."""
import io
import json
import math
import os
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser
from common import train_run, train_settings, write_data
from PIL import Image
from sklearn.metrics import average_precision_score
from test_cli import fails

import timm_multilabel
from timm_multilabel.assembly.run_settings import read_run_settings
from timm_multilabel.assembly.stored import stored_predictions
from timm_multilabel.cli.main import run_command
from timm_multilabel.config.files import command_line
from timm_multilabel.errors import UserError
from timm_multilabel.heads import NumericHead, TagsHead
from timm_multilabel.inference.predictions import Predictions
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.metrics import class_metrics
from timm_multilabel.reports.bootstrap import bootstrap, resample, wilson
from timm_multilabel.reports.calibration import head_reliability, reliability
from timm_multilabel.reports.embedding_map import COLORS, color_points, place_points
from timm_multilabel.reports.head_section import head_section, mean_row
from timm_multilabel.reports.intervals import (
    average_precision,
    head_intervals,
    weighted_class_metrics,
    weighted_number_metrics,
    weighted_tag_metrics,
)
from timm_multilabel.reports.mistakes import confused_pairs, worst_mistakes

ABC = LabelSet('letter', ('a', 'b', 'c'))
EVIL = '<script>document.title="owned"</script>'
in_browser = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here; apt-get install chromium')


def write_report(run, *flags) -> str:
    run_command('report', 'report.py', [str(run), '-j', '0', '--device', 'cpu', *map(str, flags)])
    return (run / 'report.html').read_text(encoding='utf-8')


# Intervals


@pytest.mark.parametrize('hits, count', [(8, 10), (0, 7), (7, 7), (2400, 4000)])
def test_wilsons_ends_solve_the_equation_that_defines_them(hits, count):
    z, share = 1.959963984540054, hits / count
    for end in wilson(hits, count):
        assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count), abs=1e-8)


def test_wilson_as_published():
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert all(math.isnan(end) for end in wilson(0, 0))


def test_resamples_are_draws_with_replacement_and_the_same_each_time():
    weights = np.concatenate(list(resample(50, resamples=2000)))
    assert weights.shape == (2000, 50) and (weights.sum(axis=1) == 50).all()
    assert np.array_equal(weights, np.concatenate(list(resample(50, resamples=2000))))
    assert weights.mean(axis=0) == pytest.approx(np.ones(50), abs=0.12)
    assert weights.var() == pytest.approx(49 / 50, abs=0.03)  # of a binomial


def test_parts_of_resamples_do_not_matter(monkeypatch):
    whole = np.concatenate(list(resample(20, resamples=30)))
    monkeypatch.setattr('timm_multilabel.reports.bootstrap._CELLS', 100)
    assert np.array_equal(whole, np.concatenate(list(resample(20, resamples=30))))


def test_weighted_class_metrics_of_resamples_are_scikit_learns_of_repeated_images():
    generator = np.random.default_rng(0)
    target, predicted = generator.integers(4, size=(2, 60))
    weights = generator.multinomial(60, np.ones(60) / 60, size=5)
    made = weighted_class_metrics(target, predicted, weights)
    for row, of_row in enumerate(weights):
        expected = class_metrics(np.repeat(target, of_row), np.repeat(predicted, of_row))
        for name, value in expected.items():
            assert made[name][row] == pytest.approx(value)


def test_weighted_tag_metrics_of_resamples_are_the_heads_of_repeated_images():
    generator = np.random.default_rng(0)
    target = generator.integers(-1, 2, size=(80, 3)).astype(np.float32)
    probability = (generator.integers(11, size=(80, 3)) / 10).astype(np.float32)  # with ties
    head = TagsHead(TagSet('t', ('x', 'y', 'z')), 2)
    weights = generator.multinomial(80, np.ones(80) / 80, size=5)
    made = weighted_tag_metrics(target, probability, weights)
    for row, of_row in enumerate(weights):
        expected = head.metrics(np.repeat(target, of_row, axis=0), np.repeat(probability, of_row, axis=0))
        for name in head.metric_names:
            assert made[name][row] == pytest.approx(expected[name], rel=1e-6)


def test_average_precision_is_scikit_learns():
    generator = np.random.default_rng(1)
    true, score = generator.integers(2, size=50) == 1, generator.integers(5, size=50) / 4
    weights = generator.integers(4, size=(3, 50))
    expected = [average_precision_score(true, score, sample_weight=of_row) for of_row in weights]
    assert average_precision(true, score, weights) == pytest.approx(expected)
    assert np.isnan(average_precision(np.zeros(3, bool), np.arange(3.0), np.ones((2, 3), int))).all()


def test_weighted_number_metrics_of_resamples_are_the_heads_of_repeated_images():
    generator = np.random.default_rng(0)
    target, output = generator.normal(size=(2, 40)).astype(np.float32)
    head = NumericHead(Quantity('n', 3.0, 2.5), 2)
    weights = generator.multinomial(40, np.ones(40) / 40, size=5)
    made = weighted_number_metrics(target, output, 2.5, weights)
    for row, of_row in enumerate(weights):
        expected = head.metrics(np.repeat(target, of_row)[:, None], np.repeat(output, of_row)[:, None])
        for name, value in expected.items():
            assert made[name][row] == pytest.approx(value, rel=1e-5)


def test_bootstrap_is_the_percentiles_of_a_plain_loop():
    values = np.random.default_rng(3).normal(size=30)
    made = bootstrap(lambda weights: {'mean': weights @ values / 30}, 30, resamples=400)['mean']
    means = [np.repeat(values, of_row).mean() for part in resample(30, 400) for of_row in part]
    assert made == pytest.approx((values.mean(), *np.percentile(means, [2.5, 97.5])))


def test_intervals_hold_their_figure_where_most_classes_are_rare_and_missed():
    # Without care a resample that lacks the missed classes has a balanced accuracy of twice the true one.
    target = np.array([0] * 50 + list(range(1, 31)))
    predicted = np.zeros(80, int)
    found = bootstrap(lambda weights: weighted_class_metrics(target, predicted, weights), 80)
    assert found['balanced_accuracy'] == pytest.approx((100 / 31,) * 3)
    value, low, high = found['macro_f1']
    assert low <= value <= high


def test_figures_of_a_head():
    output = np.eye(6, dtype=np.float32)[[0, 1, 2, 3]] + np.float32(0.01) * np.arange(6, dtype=np.float32)
    figures = {each.name: each for each in head_intervals(
        LabelSet('h', tuple('abcdef')), np.array([0, 1, 2, 0]), output)}
    assert [*figures] == ['top1', 'top5', 'balanced_accuracy', 'macro_f1']
    assert figures['top1'].value == 75 and figures['top5'].value == 75  # class 0 has the least of the others
    assert (figures['top1'].low, figures['top1'].high) == pytest.approx([100 * end for end in wilson(3, 4)])
    assert figures['balanced_accuracy'].value == pytest.approx(100 * (0.5 + 1 + 1) / 3)


def test_mean_over_heads():
    space = LabelSpace((LabelSet('x', ('a', 'b')), LabelSet('y', ('a', 'b'))))
    predictions = Predictions(
        space, np.array(['r'] * 4), np.array(['i'] * 4), np.array([[0, 0], [0, -1], [1, 1], [1, 1]], np.float32),
        {'x': np.eye(2)[[0, 0, 1, 1]], 'y': np.eye(2)[[1, 1, 1, 0]]}, np.zeros((4, 2), np.float32))
    # x: 4 of 4; y: 1 of 3
    assert mean_row(predictions, {'x': 1.0, 'y': 1.0})[1] == '66.67 %'
    assert mean_row(predictions, {'x': 3.0, 'y': 1.0})[1] == '83.33 %'
    assert mean_row(predictions, {'x': 0.0, 'y': 0.0}) is None


# Calibration


def test_ece_by_hand():
    # Bins of 15: 0.05 -> 0, 0.5 and 0.51 -> 7 (0.4667, 0.5333], 0.97 twice -> 14.
    found = reliability(np.array([0.05, 0.5, 0.51, 0.97, 0.97]), np.array([0, 1, 0, 1, 1]))
    assert found.count.tolist() == [1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 2]
    assert found.accuracy[[0, 7, 14]].tolist() == [0, 0.5, 1]
    assert found.confidence[[0, 7, 14]] == pytest.approx([0.05, 0.505, 0.97])
    assert found.ece == pytest.approx((0.05 + 2 * 0.005 + 2 * 0.03) / 5)
    assert np.isnan(found.accuracy[1])


def test_edges_of_bins_belong_to_the_bin_below():
    assert reliability(np.array([0.0, 0.25, 0.5, 1.0]), np.ones(4), bins=4).count.tolist() == [2, 1, 0, 1]


def test_reliability_of_kinds():
    classes = head_reliability(ABC, np.array([0, 2]), np.array([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3]]))
    assert classes.ece == pytest.approx((0.4 + 0.5) / 2)
    tags = head_reliability(TagSet('t', ('x', 'y')), np.array([[1, -1], [0, 1]]), np.array([[0.9, 0.2], [0.2, 0.9]]))
    assert tags.ece == pytest.approx((2 * 0.1 + 0.2) / 3)
    assert head_reliability(Quantity('n', 0.0, 1.0), np.zeros(2), np.zeros((2, 1))) is None


# Mistakes


def test_confused_pairs_and_worst_mistakes_of_classes():
    target = np.array([0, 0, 1, 2, -1, 0])
    output = np.array([[.3, .6, .1], [.1, .8, .1], [.9, .05, .05], [.1, .1, .8], [1, 0, 0], [.9, .1, 0]])
    pairs = confused_pairs(ABC, target, output)
    assert [(pair.label, pair.prediction, pair.count, pair.of, pair.rows) for pair in pairs] == [
        ('a', 'b', 2, 3, [1, 0]), ('b', 'a', 1, 1, [2])]
    assert [(each.row, each.label, each.prediction) for each in worst_mistakes(ABC, target, output)] == [
        (2, 'b', 'a'), (1, 'a', 'b'), (0, 'a', 'b')]
    assert worst_mistakes(ABC, target, output, most=1)[0].note == '90.0 % sure; 5.0 % for the label'


def test_worst_mistakes_of_tags_and_numbers():
    tags = worst_mistakes(TagSet('t', ('x', 'y')), np.array([[1, 0], [1, 1], [0, -1]]),
                          np.array([[.9, .1], [.1, .6], [.7, .9]]))
    assert [(each.row, each.label, each.prediction, each.note) for each in tags] == [
        (1, 'x, y', 'y', '1 missed, 0 wrongly found'), (2, 'none', 'x, y', '0 missed, 1 wrongly found')]
    numbers = worst_mistakes(
        Quantity('n', 10.0, 2.0), np.array([0.0, 1.0, np.nan]), np.array([[0.5], [-1.0], [0.0]]), most=2)
    assert [(each.row, each.label, each.prediction, each.note) for each in numbers] == [
        (1, '12', '8', 'off by 4'), (0, '10', '11', 'off by 1')]


# The map


@pytest.mark.slow
def test_map_places_alike_images_near_each_other_and_is_the_same_each_time():
    centers = np.random.default_rng(0).normal(size=(3, 64)) * 20
    features = (centers[np.arange(60) % 3] + np.random.default_rng(1).normal(size=(60, 64))).astype(np.float32)
    features[7] = np.nan
    rows, places = place_points(features)
    assert rows.tolist() == [row for row in range(60) if row != 7]
    assert places.min(axis=0).tolist() == [0, 0] and places.max(axis=0).tolist() == [1, 1]
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(59)
    assert (rows[distances.argmin(axis=1)] % 3 == rows % 3).all()
    assert np.array_equal(places, place_points(features)[1])


@pytest.mark.parametrize('features', [np.zeros((20, 8)), np.eye(4), np.zeros((0, 8)), np.full((20, 8), np.nan)])
def test_no_map_of_what_does_not_differ(features):
    assert place_points(features.astype(np.float32)) is None


def test_colors_go_to_the_most_frequent_classes():
    labels = LabelSet('many', tuple(f'c{number:02}' for number in range(20)))
    target = np.array([number for number in range(20) for _ in range(number + 1)] + [-1])
    coloring = color_points(labels, target)
    assert coloring.names[0] == 'c19 (20)' and len(coloring.names) == len(COLORS) == 12
    assert coloring.rest == '8 other classes, no label'
    assert coloring.of_point[-2] == 0 and coloring.of_point[0] == -1 and coloring.of_point[-1] == -1


def test_colors_of_tags_and_numbers():
    tags = color_points(TagSet('t', ('x', 'y')), np.array([[0, 1], [1, 1], [1, 0], [0, 1], [-1, -1]]))
    assert tags.names == ['y (3)', 'x (2)'] and tags.of_point.tolist() == [0, 0, 1, 0, -1]
    numbers = color_points(Quantity('n', 5.0, 2.0), np.array([0.0, 1.0, np.nan, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert numbers.of_point[2] == -1 and numbers.of_point[0] == 0 and numbers.of_point[-1] == 5
    assert numbers.names[0].startswith('5 to 7') and numbers.rest == 'no label'
    equal = color_points(Quantity('n', 5.0, 1.0), np.zeros(6))
    assert equal.names == ['5 to 5 (6)'] and set(equal.of_point) == {0}


# Heads


def section(labels, target, output, known=None):
    known = np.ones(len(target), bool) if known is None else known
    return head_section(labels, target, known, output, np.array([f'row {row}' for row in range(len(target))]),
                        lambda row: f'data:{row}')


@pytest.mark.slow
def test_a_head_of_one_class():
    made = section(LabelSet('only', ('x',)), np.zeros(5, int), np.ones((5, 1), np.float32))
    assert [row[:2] for row in made.metrics] == [('top-1 accuracy', 'none')]
    assert made.pairs == made.mistakes == [] and made.calibration['ece'] == '0.00 %' and made.confusion


@pytest.mark.slow
def test_rows_without_label():
    target, output = np.array([0, 1, -1]), np.array([[.9, .1, 0], [.2, .1, .7], [1, 0, 0]])
    made = section(ABC, target, output, target >= 0)
    assert made.labelled == 2 and made.metrics[0][1] == '50.00 %'
    assert [(each['where'], each['thumbnail']) for each in made.mistakes] == [('row 1', 'data:1')]
    nothing = section(ABC, np.full(2, -1), output[:2], np.zeros(2, bool))
    assert nothing.metrics == [] and nothing.calibration is None


def test_numbers_that_are_all_equal():
    made = section(Quantity('n', 5.0, 1.0), np.zeros(4, np.float32), np.zeros((4, 1), np.float32))
    assert made.metrics[0][:2] == ('explained variance (R²)', 'none')
    assert made.metrics[1][:3] == ('mean absolute error', '0', '0 to 0')


# Commands and stored predictions


def test_the_command_line_of_a_run_means_its_flags():
    args = train_settings(
        "my data's", '--heads', 'a b', 'c', '--head', 'a b:loss=arcface,scale=20', '-wls', '0.25', '--head-weights',
        'a b=2', '--no-gradient-centralization', '--scale', '0.5', '1', '--opt-kwargs', 'x=1', '--cache', 'ram',
        '--missing-value=-', '--amp')
    line = command_line(args)
    assert line.startswith("timm-multilabel train 'my data'\"'\"'s' \\\n    --missing-value=- \\\n")
    assert train_settings(*shlex.split(line.replace('\\\n', ''))[2:]) == args


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run on a column of classes that are markup, one of tags and one of numbers."""
    folder = tmp_path_factory.mktemp('report')
    data = folder / f'data <b>{"x" * 60}'
    (data / 'images').mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 16)):
        lines = [f'image_path,{EVIL},"tags & ""co""",price']
        for number in range(count):
            name = f'images/{split}{number}<img src=x onerror=alert(1)>.png'
            Image.fromarray(generator.integers(256, size=(40, 30, 3), dtype=np.uint8)).save(data / name)
            label = ('<script>alert(1)</script>', '"quoted" & \'more\'', '$x^2$')[number % 3]
            cells = [name, label.replace('"', '""'), ('red|<i>', 'red', '')[number % 3], str(number)]
            lines.append(','.join(f'"{cell}"' for cell in cells))
        (data / f'{split}.csv').write_text('\n'.join(lines) + '\n')
    run = train_run(data, folder, '--head', 'tags & "co":loss=tags', 'price:loss=numeric', '-vb', '8')
    return data, run


@pytest.mark.slow
def test_predictions_are_kept_and_made_again_when_the_checkpoint_is_another(trained, monkeypatch, capsys):
    _, run = trained
    lines = []
    def get(**kwargs):
        return stored_predictions(run, 'val', None, torch.device('cpu'), 0, lines.append, **kwargs)
    first = get()
    assert lines == [f'predictions: {run}/predictions-val.npz'] and len(first) == 16
    state = torch.load(run / 'model_best.pth.tar', weights_only=True)
    assert first.label_space.to_dict() == state['label_space']
    again = get()
    assert len(lines) == 1 and np.array_equal(again.features, first.features)
    os.utime(run / 'model_best.pth.tar', (1, 1))  # another one, as a copy that keeps its old time is
    get()
    assert len(lines) == 2
    get(checkpoint=run / 'last.pth.tar')  # is not kept: the file is of the best one
    assert len(lines) == 2


def test_predictions_of_a_csv_elsewhere_are_not_those_of_a_split_of_its_name(trained, tmp_path):
    data, run = trained
    (tmp_path / 'val.csv').write_text('\n'.join(  # paths as they are in the data directory
        line.replace('images/', f'{data}/images/') for line in (data / 'val.csv').read_text().split('\n')[:4]) + '\n')
    device = torch.device('cpu')
    assert len(stored_predictions(run, 'val', None, device, 0, print)) == 16
    assert len(stored_predictions(run, str(tmp_path / 'val.csv'), None, device, 0, print)) == 3
    assert len(stored_predictions(run, 'val', None, device, 0, print)) == 16


# The page


@pytest.mark.slow
def test_the_page_escapes_all_that_is_the_users(trained):
    data, run = trained
    html = write_report(run, '--force')
    markup = re.sub(r'="[^"]*"', '', html)
    assert '<script' not in html and 'onerror=' not in markup.replace('onerror=alert', '')
    assert '<img src=x' not in html and '<b>' not in html and '<i>' not in html
    assert '&lt;script&gt;alert(1)&lt;/script&gt;' in html and '&lt;img src=x onerror=alert(1)&gt;' in html
    assert 'http:' not in html and 'https:' not in html and html.count('src="data:image/') > 40


@pytest.mark.slow
def test_the_figures_are_those_of_validation(trained, tmp_path):
    data, run = trained
    run_command('validate', 'validate.py', [
        str(data), '--checkpoint', str(run / 'model_best.pth.tar'), '-j', '0', '--device', 'cpu', '--results-file',
        str(tmp_path / 'x.json')])
    heads = json.loads((tmp_path / 'x.json').read_text())['heads']
    html = write_report(run, '--force')
    for head, names in ((EVIL, ('top1', 'balanced_accuracy', 'macro_f1')),
                        ('tags & "co"', ('map', 'f1', 'micro_f1', 'accuracy'))):
        for name in names:
            assert f'>{heads[head][name]:.2f} %<' in html, name
    assert f'>{heads["price"]["mae"]:.4g}<' in html


@pytest.mark.slow
@in_browser
def test_the_page_in_a_browser(trained, tmp_path):
    _, run = trained
    write_report(run, '--force')
    (run / 'moved').mkdir(exist_ok=True)
    page = (run / 'report.html').rename(run / 'moved' / 'report.html')  # nothing beside it is needed
    with browser() as tab:
        for width in (390, 1280):
            tab.open(page, width)
            assert tab.evaluate('innerWidth') == width
            assert tab.evaluate('document.documentElement.scrollWidth') <= width
            assert tab.evaluate('document.scripts.length') == 0
            assert tab.evaluate('[...document.images].every(image => image.complete && image.naturalWidth > 0)')
        assert tab.evaluate('document.title') == 'Report of run on val'
        titles = '[...document.querySelectorAll("section[id^=head] h2")].map(title => title.firstChild.data.trim())'
        assert tab.evaluate(titles) == [EVIL, 'tags & "co"', 'price']
        color = 'getComputedStyle(document.querySelector("circle.h0c0")).fill'
        assert tab.evaluate(color) == 'rgb(68, 119, 170)'
        tab.evaluate('document.querySelectorAll("label[for^=map]")[2].click()')
        assert tab.evaluate(color) != 'rgb(68, 119, 170)'
        legends = '[...document.querySelectorAll(".legend")].map(legend => getComputedStyle(legend).display)'
        assert tab.evaluate(legends) == ['none', 'none', 'grid']
        # What escaping might miss would not run either.
        tab.evaluate('document.body.insertAdjacentHTML("beforeend", "<img src=x: onerror=document.title=1>")')
        assert tab.complaints and 'Content Security Policy' in tab.complaints[0]
        assert tab.evaluate('document.title') == 'Report of run on val'


@pytest.mark.slow
@in_browser
def test_the_page_has_nothing_to_complain_of(trained):
    _, run = trained
    write_report(run, '--force')
    with browser() as tab:
        tab.open(run / 'report.html', 1280)
        tab.evaluate('document.querySelectorAll("label[for^=map]")[1].click()')
        assert tab.complaints == []


@pytest.mark.slow
def test_simclr_alone(tmp_path, data_dir):
    for number, image in enumerate((data_dir / 'images').iterdir()):
        Image.new('RGB', (32, 32), (14 * number, 200, 99)).save(image)  # a map is of images that differ
    run = train_run(data_dir, tmp_path, '-wlc', '0')
    html = write_report(run)
    assert '<h2>Metrics' not in html and '<h2>Curves' in html and html.count('<circle') == 6
    assert html.count('alt="View 2 of a photo"') == 12
    (data_dir / 'val.csv').unlink()
    assert write_report(run, '--force').count('<circle') == 12  # of train.csv


@pytest.mark.slow
def test_phases_show_the_views_of_the_last_one_with_simclr(tmp_path, data_dir):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('phases:\n- {name: pretrain, epochs: 1, classification_loss_weight: 0}\n'
                      '- {name: heads, epochs: 1, simclr_loss_weight: 0, freeze_backbone: true}\n')
    run = train_run(data_dir, tmp_path, '-c', str(recipe))
    html = write_report(run)
    assert 'in the first epoch of phase pretrain: 32x32 pixels, made by --views simclr' in html
    assert html.count('alt="View 2 of a photo"') == 12 and f'train -c {run}/args.yaml' in html


@pytest.mark.slow
def test_views_are_the_runs_without_simclr_one_a_photo(tmp_path, data_dir):
    run = train_run(data_dir, tmp_path, '-wls', '0', '--mixup', '0.2')
    html = write_report(run)
    assert html.count('alt="View 1 of a photo"') == 12 and 'alt="View 2' not in html


@pytest.mark.slow
def test_a_data_directory_that_has_moved(tmp_path, data_dir, capsys):
    run = train_run(data_dir, tmp_path)
    write_report(run)
    moved = data_dir.rename(tmp_path / 'moved')
    html = write_report(run, '--force', '--data', moved)
    assert 'alt="View 2' in html and 'no image' not in html
    capsys.readouterr()
    gone = write_report(run, '--force', '--data', write_data(tmp_path / 'other', train=1, val=1))
    assert 'They could not be made again' in gone
    assert 'views: ' in capsys.readouterr().out


@pytest.mark.slow
def test_images_that_are_gone_leave_a_gap(tmp_path, data_dir, capsys):
    run = train_run(data_dir, tmp_path)
    write_report(run)
    for image in (data_dir / 'images').iterdir():
        image.unlink()
    html = write_report(run, '--force')  # predictions are kept
    assert 'no image' in html and 'images cannot be shown, the first: ' in capsys.readouterr().out


@pytest.mark.slow
def test_bad_images_are_left_out_where_the_run_left_them_out(tmp_path, data_dir):
    run = train_run(data_dir, tmp_path, '--skip-bad-images')
    (data_dir / 'images' / '13.png').write_bytes(b'no image')
    lines = []
    made = stored_predictions(run, 'val', None, torch.device('cpu'), 0, lines.append)
    assert [Path(image).name for image in made.images] == ['12.png', '14.png', '15.png', '16.png', '17.png']
    assert len(made.features) == len(made.outputs['color']) == len(made.targets) == 5
    assert '13.png' in lines[0]


# Bad input


def test_what_is_no_run(tmp_path, data_dir, capsys):
    assert 'not a run folder (no such folder)' in fails(capsys, 'report', [tmp_path / 'none'])
    assert 'not a run folder (holds no args.yaml)' in fails(capsys, 'report', [data_dir])


@pytest.mark.slow
def test_a_run_without_a_finished_epoch(tmp_path, data_dir, capsys):
    run = train_run(data_dir, tmp_path, epochs=1)
    summary = (run / 'summary.csv').read_text()
    (run / 'summary.csv').write_text(summary.split('\n')[0] + '\n')
    assert 'no epoch has been finished' in fails(capsys, 'report', [run])
    (run / 'summary.csv').unlink()
    assert 'no epoch has been finished' in fails(capsys, 'report', [run])
    (run / 'summary.csv').write_text(summary)
    (run / 'model_best.pth.tar').unlink()
    assert 'no model_best.pth.tar' in fails(capsys, 'report', [run])
    assert not [*run.glob('*.npz'), *run.glob('*.html')]


@pytest.mark.slow
def test_a_page_that_is_there(tmp_path, data_dir, capsys):
    run = train_run(data_dir, tmp_path, epochs=1)
    (run / 'report.html').write_text('mine')
    assert 'is there already; write over it with --force' in fails(capsys, 'report', [run])
    assert 'is a folder; name a file' in fails(capsys, 'report', [run, '--out', tmp_path])
    assert (run / 'report.html').read_text() == 'mine'
    assert '<h2>Metrics' in write_report(run, '--force')


@pytest.mark.slow
def test_shards_are_told_of(tmp_path, data_dir, capsys):
    pytest.importorskip('webdataset')
    run = train_run(data_dir, tmp_path, epochs=1)
    (data_dir / 'val.csv').unlink()
    with tarfile.open(data_dir / 'val.tar', 'w') as tar:
        for name, content in (('a.png', (data_dir / 'images' / '0.png').read_bytes()),
                              ('a.json', b'{"color": "red", "shape": "disc"}')):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    assert 'predictions of shards are not kept' in fails(capsys, 'report', [run, '--device', 'cpu'])


@pytest.mark.slow
def test_a_split_that_is_none(tmp_path, data_dir, capsys):
    run = train_run(data_dir, tmp_path, epochs=1)
    assert 'test.csv' in fails(capsys, 'report', [run, '--split', 'test', '--device', 'cpu'])
    assert 'no such data directory' in fails(capsys, 'report', [run, '--data', tmp_path / 'x', '--device', 'cpu'])
    with pytest.raises(UserError, match='no such checkpoint'):
        timm_multilabel.report(run, checkpoint=tmp_path / 'x', device='cpu')


@pytest.mark.slow
def test_args_that_are_changed_by_hand(tmp_path, data_dir, capsys):
    run = train_run(data_dir, tmp_path, epochs=1)
    with open(run / 'args.yaml', 'a') as file:
        file.write('no_such_flag: 1\n')
    assert "args.yaml: there is no flag 'no_such_flag'" in fails(capsys, 'report', [run])
    with pytest.raises(UserError):
        read_run_settings(run)
