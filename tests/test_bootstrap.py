"""The paired bootstrap and Holm's correction, against plain references."""
import itertools

import numpy as np
import pytest
import scipy.stats

from timm_multilabel.reports import bootstrap
from timm_multilabel.reports.bootstrap import Difference, describe_difference, holm, resampled_means

NAN = np.nan


def test_all_resamples_of_three_images():
    """Of three images there are 27 resamples; shares, interval and p are those of the enumeration."""
    values = np.array([2.0, -1.0, 0.5])
    every = np.array([np.mean(drawn) for drawn in itertools.product(values, repeat=3)])
    means = resampled_means(values[:, None], 100_000)[:, 0]
    for mean in np.unique(every):
        share = (every == mean).mean()
        assert np.isclose(means, mean).mean() == pytest.approx(share, abs=4 * np.sqrt(share / 100_000))
    found = describe_difference(0.5, means)
    # 10 of 27 are 0 or less: -1 in one way, (-1, -1, 0.5), (-1, -1, 2) and (-1, 0.5, 0.5) in three each.
    assert (every <= 1e-12).sum() == 10 and (every >= -1e-12).sum() == 23
    assert found.p == pytest.approx(2 * 10 / 27, abs=0.01)
    assert (found.low, found.high) == (-1, 2)  # each in a 27th of the resamples, more than 2.5 %


def test_missing_labels_and_pairs_as_in_a_plain_loop():
    generator = np.random.default_rng(3)
    values = generator.normal(size=(7, 4))
    values[generator.random((7, 4)) < 0.3] = NAN
    draws = np.random.default_rng(5).integers(7, size=(50, 7))
    with np.errstate(invalid='ignore'):
        expected = np.stack([[column[~np.isnan(column)].mean() if (~np.isnan(column)).any() else NAN
                              for column in values[drawn].T] for drawn in draws])
    np.testing.assert_allclose(resampled_means(values, 50, seed=5), expected, rtol=1e-12)


def test_parts_change_nothing(monkeypatch):
    values, advanced = np.random.default_rng(0).normal(size=(11, 3)), []
    whole = resampled_means(values, 100)
    monkeypatch.setattr(bootstrap, '_CELLS', 40)
    np.testing.assert_allclose(resampled_means(values, 100, advance=advanced.append), whole, rtol=1e-12)
    assert advanced == [3] * 33 + [1]


def test_interval_is_that_of_scipy():
    values = np.random.default_rng(1).exponential(size=(150, 2))
    difference = values[:, 0] - values[:, 1]
    theirs = scipy.stats.bootstrap(
        (values[:, 0], values[:, 1]), lambda a, b, axis: (a - b).mean(axis=axis), paired=True, method='percentile',
        n_resamples=20_000, rng=np.random.default_rng(2))
    ours = describe_difference(difference.mean(), resampled_means(difference[:, None], 20_000)[:, 0])
    assert ours.value == difference.mean()
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.01)
    both = theirs.bootstrap_distribution
    assert ours.p == pytest.approx(2 * min((both <= 0).mean(), (both >= 0).mean()), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['right or wrong', 'seeds', 'numbers', 'missing'])
def test_calibration(kind):
    """Where there is no difference, p is below 0.05 in 5 % of the cases, and the interval misses 0 in as many."""
    generator = np.random.default_rng(7)
    shape = (250, 1500)  # images, cases
    if kind == 'numbers':
        values = generator.normal(size=shape)
    else:
        seeds = 3 if kind == 'seeds' else 1
        # An image that is hard for one model is hard for the other.
        ease = generator.random(shape)
        right = [(generator.random((seeds, *shape)) < ease).mean(axis=0) for _ in range(2)]
        values = right[0] - right[1]
    if kind == 'missing':
        values[generator.random(shape) < 0.4] = NAN
    means = resampled_means(values, 4000)
    found = [describe_difference(np.nanmean(column), resampled) for column, resampled in zip(values.T, means.T)]
    assert 0.035 < np.mean([each.p < 0.05 for each in found]) < 0.065
    assert 0.035 < np.mean([not each.low <= 0 <= each.high for each in found]) < 0.065
    assert 0.43 < np.mean([each.p < 0.5 for each in found]) < 0.55  # ties at 0 count as no difference, on both sides


def test_certain_cases():
    def of(values):
        return describe_difference(np.mean(values), resampled_means(np.array(values, dtype=float)[:, None])[:, 0])

    assert of([0] * 9) == Difference(0, 0, 0, 1)
    assert of([1] * 9) == Difference(1, 1, 1, 2 / 10_001)
    assert of([3]) == Difference(3, 3, 3, 2 / 10_001)
    nothing = describe_difference(NAN, np.full(10, NAN))
    assert np.isnan([nothing.low, nothing.high, nothing.p]).all()
    # Thirds that cancel are a tie, whatever their rounding.
    assert describe_difference(0, np.array([1, 1 / 3 + 1 / 3 - 2 / 3 + 1e-17, -1e-17])).p == 1


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.02]) == [0.02] and holm([]) == []
    corrected = holm([0.01, NAN, 0.04])
    assert corrected[0] == 0.02 and np.isnan(corrected[1]) and corrected[2] == 0.04
