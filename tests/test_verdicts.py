"""Verdicts on differences: seeds count as images do, one run says nothing of others, and what is worse is called so.

And the pictures: what stands in them, and where."""
import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from browser import browser
from matplotlib.colors import to_rgb
from PIL import Image
from test_curves import summary_of
from test_grid import results
from test_report import in_browser, section

from timm_multilabel.data.sample import draw_preview
from timm_multilabel.labels import LabelSet, Quantity, TagSet
from timm_multilabel.reports.bootstrap import describe_difference, resampled_means, seed_spread, with_seeds
from timm_multilabel.reports.calibration import reliability
from timm_multilabel.reports.confusion import draw_confusion, write_confusion
from timm_multilabel.reports.curves import all_curves
from timm_multilabel.reports.embedding_map import COLORS, color_points
from timm_multilabel.reports.experiment_pages import (
    Experiments,
    SplitResult,
    experiments_csv,
    experiments_html,
    experiments_markdown,
)
from timm_multilabel.reports.experiments import Run, RunPredictions, compare_groups
from timm_multilabel.reports.grid import draw_grid, grid_markdown
from timm_multilabel.reports.page import Page, render
from timm_multilabel.reports.pictures import jpeg_uri, reliability_figure

IMAGES = 1000


def right(count):
    """The answers of a run that is right on the first `count` of 1,000 images."""
    said = (np.arange(IMAGES) >= count).astype(int)
    return RunPredictions(
        np.arange(IMAGES).astype(str),
        {'color': LabelSet('color', ('a', 'b'))},
        {'color': np.zeros(IMAGES, int)},
        {'color': said},
    )


def off(distance):
    """The answers of a run that is wrong by about a distance everywhere."""
    return RunPredictions(
        np.arange(IMAGES).astype(str), {'size': Quantity('size', 0.0, 1.0)}, {'size': np.zeros(IMAGES)},
        {'size': distance + np.arange(IMAGES) / 1e6})


def experiments(base, ours, seeds):
    """Two groups of runs as `compare` has them."""
    answers, groups = [*base, *ours], [list(range(len(base))), list(range(len(base), len(base) + len(ours)))]
    runs = [Run(f'r{number}', {'--lr': '1' if number < len(base) else '2'}, seed, 1, 1)
            for number, seed in enumerate(seeds)]
    differences = compare_groups(answers, groups, seeds, 0)
    return Experiments(runs, groups, 0, [SplitResult.of('val', answers, differences)])


def verdicts(found):
    """The verdict of each row, which CSV, Markdown and page share."""
    row = pd.read_csv(pd.io.common.StringIO(experiments_csv(found))).filter(like='verdict').iloc[-1]
    for verdict in row:
        assert f'| {verdict} ' in experiments_markdown(found) and f'<td>{verdict}</td>' in experiments_html(found)
    return row.tolist()


def test_seeds_that_contradict_each_other_hold_nothing():
    """-21.1 in one seed and +8.5 in the other: the images alone made that a p of 0.0002."""
    found = experiments([right(700), right(600)], [right(489), right(685)], ['0', '1', '0', '1'])
    row = found.splits[0].differences.iloc[0]
    assert row['difference'] == pytest.approx(-6.3) and row['over'] == 'seeds and images'
    # The images matter little: a t of one degree of freedom, with a standard error of 14.8.
    assert row['p'] == pytest.approx(2 * scipy.stats.t.cdf(-6.3 / 14.8, 1), abs=0.01)
    assert (row['low'], row['high']) == (-100, 100)  # no accuracy differs by more
    assert verdicts(found) == ['no difference shown']


@pytest.mark.slow
def test_what_is_worse_is_called_worse_and_has_another_color():
    seeds = ['0', '1', '2'] * 2
    low, high = [right(count) for count in (600, 602, 604)], [right(count) for count in (701, 702, 703)]
    for base, ours, verdict in ((low, high, 'better'), (high, low, 'worse')):
        found = experiments(base, ours, seeds)
        assert verdicts(found) == [verdict] and f'<tr class="{verdict}">' in experiments_html(found)
    near, far = [off(0.1 + seed / 1000) for seed in range(3)], [off(0.3 + seed / 1000) for seed in range(3)]
    assert verdicts(experiments(near, far, seeds)) == ['worse']  # of an error less is better
    assert verdicts(experiments(far, near, seeds)) == ['better']


@pytest.mark.slow
def test_one_run_says_nothing_of_others():
    for base, ours, seeds, verdict in (
            ([right(500)], [right(700)], '00', 'one run each: nothing said of other runs'),
            ([right(500), right(501)], [right(700)], '010', 'one run on a side: nothing said of other runs'),
            ([right(500)] * 2, [right(700)] * 2, '3333', 'one run each: nothing said of other runs')):  # a seed twice
        found = experiments(base, ours, list(seeds))
        assert verdicts(found) == [verdict] and found.splits[0].differences['over'].tolist() == ['images']
        assert 'class="better"' not in experiments_html(found)


def test_spread_of_seeds_is_that_of_the_t_tests():
    ours, theirs = np.array([61.0, 64.5, 60.2]), np.array([59.0, 61.1, 60.9])
    for names, test in ((('a', 'b', 'c'), scipy.stats.ttest_rel(ours, theirs)),
                        (('d', 'e', 'a'), scipy.stats.ttest_ind(ours, theirs, equal_var=False))):
        spread = seed_spread(dict(zip('abc', ours)), dict(zip(names, theirs)))
        assert spread.freedom == pytest.approx(test.df)
        assert (ours.mean() - theirs.mean()) / spread.error == pytest.approx(test.statistic)
        drawn = describe_difference(ours.mean() - theirs.mean(), with_seeds(
            np.full(10_000, ours.mean() - theirs.mean()), spread))
        assert drawn.p == pytest.approx(test.pvalue, abs=2e-3)
        interval = test.confidence_interval()
        assert (drawn.low, drawn.high) == pytest.approx((interval.low, interval.high), rel=0.01)
    assert seed_spread({'a': 1.0}, {'a': 2.0, 'b': 3.0}) is None
    assert seed_spread({'a': 1.0, 'b': 1.0}, {'c': 2.0, 'd': 2.0}).error == 0


@pytest.mark.slow
@pytest.mark.parametrize('seeds', [2, 3])
@pytest.mark.parametrize('pairs', [True, False])
def test_coverage(seeds, pairs):
    """Of 400 experiments without a difference, whose models vary with the seed, 95 % or some more of the intervals
    hold 0; those over the images alone far fewer."""
    generator, images, cases = np.random.default_rng(seeds), 300, 400
    ease = generator.normal(0.5, 1, (images, cases))  # an image that is hard for one model is hard for the other
    skill = generator.normal(0, 0.4, (2, seeds, 1, cases))
    hits = 100.0 * (generator.random((2, seeds, images, cases)) < 1 / (1 + np.exp(-ease - skill)))
    differences = hits[0].mean(axis=0) - hits[1].mean(axis=0)
    resampled, of_runs = resampled_means(differences, 2000), hits.mean(axis=2)
    names = [list(range(seeds)), list(range(seeds)) if pairs else list(range(seeds, 2 * seeds))]
    covered = {'images': 0, 'both': 0}
    for case in range(cases):
        spread = seed_spread(*(dict(zip(names[side], of_runs[side, :, case])) for side in range(2)))
        value = differences[:, case].mean()
        for over, drawn in (('images', resampled[:, case]), ('both', with_seeds(resampled[:, case], spread))):
            found = describe_difference(value, drawn)
            covered[over] += found.low <= 0 <= found.high
    assert 0.93 < covered['both'] / cases < 0.995 and covered['images'] / cases < 0.65


def test_grid_reads_verdicts_from_its_tables():
    found = results('labelled_rows')
    found.differences['difference'] = [5.0, -5.0]
    assert re.findall(r'(better|worse) +\|\n', grid_markdown(found)) == ['better', 'worse']
    assert 'images alone were resampled' not in grid_markdown(found)
    found.differences['over'] = 'images'  # made before seeds were resampled
    assert grid_markdown(found).count('| images alone resampled: nothing said of other runs |') == 2
    found = dataclasses.replace(found, runs=found.runs[found.runs['seed'] == 0])
    assert grid_markdown(found).count('| one run each: nothing said of other runs |') == 2
    assert 'the images alone were resampled' in grid_markdown(found)


# Pictures


def test_curves_share_edges_and_epochs():
    figure = all_curves(summary_of(['color', 'a head with a long name'], 5))
    figure.draw_without_rendering()
    assert len(figure.axes) > 3
    places = [axes.get_position() for axes in figure.axes]
    assert len({(round(place.x0, 6), round(place.x1, 6)) for place in places}) == 1
    assert {axes.get_xlim() for axes in figure.axes} == {figure.axes[0].get_xlim()}


def test_a_bin_of_one_image_is_a_point_with_a_long_interval():
    found = reliability(np.array([0.4] + [0.9] * 10), np.array([1] + [1] * 9 + [0]))
    axes, counts = reliability_figure(found).axes
    assert not axes.patches  # no bars
    points, _, (bars,) = axes.containers[0]
    assert points.get_ydata().tolist() == pytest.approx([1, 0.9])
    ends = np.array([[low[1], high[1]] for low, high in bars.get_segments()])
    # Wilson's: 1 / (1 + z^2) to 1 of one image, and of 9 in 10.
    assert ends == pytest.approx(np.array([[0.2065, 1], [0.5958, 0.9821]]), abs=1e-4)
    assert all(float(tick).is_integer() for tick in counts.get_yticks())


@pytest.mark.slow
@pytest.mark.parametrize('probability, words', [
    (0.9, 'are too high'), (0.2, 'are too low'), (0.45, 'can be taken at their word')])
def test_calibration_is_said_in_words(probability, words):
    output = np.array([[probability, 1 - probability]] * 40)
    if probability < 0.5:
        output = np.array([[probability] + [(1 - probability) / 9] * 9] * 40)
    target = np.array([0, 1] * 20)
    calibration = section(LabelSet('c', tuple('abcdefghij')[:output.shape[1]]), target, output).calibration
    assert calibration['words'] == (
        f'On average this head gives the class that it predicts a probability of {100 * probability:.1f} %, and it is '
        f'right in 50.0 % of the images: on the whole, its probabilities {words}.')


def test_errors_that_cancel_are_no_calibration():
    """100 images at 95 % and 100 at 25 %, 60 of which are right in both."""
    probability, true = np.repeat([0.95, 0.25], 100), np.tile(np.arange(100) < 60, 2)
    assert reliability(probability, true).verdict() == (
        'on average, its probabilities are right, but some are too high and others too low')
    fits = np.tile(np.arange(100) < 95, 2) * (np.arange(200) < 100) + np.tile(np.arange(100) < 25, 2) * (
        np.arange(200) >= 100)
    assert reliability(probability, fits > 0).verdict().endswith('can be taken at their word')


def test_equal_differences_of_two_seeds_are_no_certainty():
    """Accuracies of 20 images come in steps of 5 %, and those that are equal may be of models that are not."""
    spread = seed_spread({'0': 70.0, '1': 75.0}, {'0': 50.0, '1': 55.0}, step=5.0)
    assert (spread.error, spread.freedom) == (pytest.approx(5 / 12 ** 0.5), 1)
    assert seed_spread({'0': 70.0, '1': 74.0}, {'0': 50.0, '1': 44.0}, step=0.1).error == pytest.approx(5)


def colors_of(*names):
    labels = LabelSet('color', names)
    return dict(zip(names, color_points(labels, np.arange(len(names))).colors))


def test_classes_called_as_colors_have_these_colors():
    found = colors_of('red', 'Navy Blue', 'NA', 'yellow', 'Multi')
    red, navy, none, yellow, other = (np.array(to_rgb(color)) for color in found.values())
    assert red[0] > 0.8 and red[1:].max() < 0.2 and navy.max() == navy[2] and navy.max() < 0.5
    assert np.ptp(none) < 0.01 and yellow[:2].min() > 0.9
    assert found['Multi'] in COLORS and min(np.linalg.norm(other - each) for each in (red, navy, none, yellow)) > 0.3
    assert list(colors_of('rose', 'circle', 'star').values()) == list(COLORS[:3])  # a color by chance
    grays = colors_of('gray', 'grey', 'NA', 'red')
    assert len(set(grays.values())) == 4


def test_counts_have_integer_ticks_and_titles_say_accuracy(tmp_path):
    tags = draw_confusion(TagSet('t', ('x', 'y')), np.array([[1, 0]]), np.array([[0.9, 0.1]]))[1].axes[0]
    many = LabelSet('c', tuple(map(str, range(30))))
    pairs = draw_confusion(many, np.array([[0], [1]]), np.array([[1], [1]]))[1].axes[0]
    for axes in (tags, pairs):
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert pairs.get_title().startswith('c: accuracy 50.0 % of 2 images')
    inks = []
    for of in ('', 'a run, test'):
        write_confusion(tmp_path, 'c', many, np.array([[0], [1]]), np.array([[1], [1]]), of)
        inks.append(np.asarray(Image.open(tmp_path / 'c.png').convert('L'))[:25].min())
    assert inks == [0, 85]  # the head's title in black, but in its place run and split in gray, and it below


def test_error_bars_do_not_hide_each_other():
    rows = [{'setting': f's{order}', 'labelled_rows': rows, 'seed': seed, 'color': 50.0 + seed, 'mean': 50.0 + seed,
             'minutes': 1, 'cpu_minutes': 1, 'commit': '', 'machine': '', 'torch': '', 'command': ''}
            for order in range(9) for rows in (250, 1000, 32000) for seed in (0, 1)]
    found = dataclasses.replace(results('labelled_rows'), runs=pd.DataFrame(rows),
                                settings=[f's{order}' for order in range(9)])
    figure = draw_grid(found)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    places = [axes.transData.transform(container[0].get_xydata())[0, 0] for container in axes.containers]
    assert np.diff(places).min() > 3  # pixels, of whiskers one pixel wide
    assert figure.get_suptitle() == 'Title: top-1 on val; bars are one standard deviation over the seeds'


def test_gray_is_called_so_in_the_preview(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    row = {'image_path': 'a.png', 'shape': 's', 'texture': 't'}
    sheets = [np.asarray(draw_preview(tmp_path, [{**row, 'color': color}])) for color in ('NA', 'NA (gray)', 'N')]
    assert (sheets[0] == sheets[1]).all() and (sheets[0] != sheets[2]).any()


@pytest.mark.slow
@in_browser
def test_no_table_of_a_report_is_cut_on_a_phone(tmp_path):
    names = ('a class of several words', 'rectangle', 'Sunglasses')
    output = np.random.default_rng(0).dirichlet(np.ones(3), 60)
    made = section(LabelSet('a head', names), np.arange(60) % 3, output)
    photo = jpeg_uri(np.zeros((96, 96, 3), np.uint8))
    pairs = [{**pair, 'thumbnails': [{**each, 'thumbnail': photo} for each in pair['thumbnails']]}
             for pair in made.pairs]
    page = Page('Report of run on val', [], [], '', '', '', False, photo, made.metrics[0],
                [dataclasses.replace(made, pairs=pairs, mistakes=[])], 'none', [], '')
    (tmp_path / 'page.html').write_text(render(page))
    with browser() as tab:
        tab.open(tmp_path / 'page.html', 360)
        widths = ('[...document.querySelectorAll(".scroll")].filter(each => each.querySelector("table"))'
                  '.map(each => [each.scrollWidth, each.clientWidth])')
        found = tab.evaluate(widths)
        assert len(found) == 2 and all(inner <= outer for inner, outer in found), found
