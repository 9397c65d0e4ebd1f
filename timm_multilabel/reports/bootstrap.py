"""The bootstrap over images: intervals of metrics, and whether a difference between runs holds.

A difference varies on two levels. The images are resampled: as many as there are, drawn with replacement, the same for
both sides of a difference. The models vary too: another seed trains another one. Two or three seeds are too few to be
resampled (of two seeds, every second resample is one of them twice, and its intervals cover far less than 95 %), so
what other seeds would add to each resample is drawn from Student's t distribution with the standard error of the seeds.
With one run on a side that is not known: the images alone are resampled then, and nothing is said of models trained
anew. Images are taken to be independent of each other.
"""
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

RESAMPLES = 10_000
"""Resamples of a difference: a p of 0.05 is then known to some 0.004, and none is below 0.0002."""

METRIC_RESAMPLES = 1000
"""Resamples of a single metric, of which an interval is enough."""

LEVEL = 0.95
"""Confidence of an interval."""

_TAILS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]

_CELLS = 2 ** 21  # counts that are in memory at once


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share, as fractions; NaN of none."""
    if not count:
        return math.nan, math.nan
    interval = scipy.stats.binomtest(hits, count).proportion_ci(LEVEL, method='wilson')
    return float(interval.low), float(interval.high)


def resample(count: int, resamples: int = METRIC_RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of N images is drawn in each resample, a part of the resamples at a time: (R, N) int64.

    The same seed and N give the same resamples, whatever the parts.
    """
    generator = np.random.default_rng(seed)
    step = max(1, _CELLS // max(1, count))
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        drawn = generator.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)


def bootstrap(
        metrics: Callable[[np.ndarray], dict[str, np.ndarray]],
        count: int,
        resamples: int = METRIC_RESAMPLES,
        seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """Metrics of N images with percentile 95 % intervals over resamples of the images.

    Args:
        metrics: Weights of the images (R, N), whole numbers -> {metric: values (R,)}.
        count: N.
        resamples: Their number.
        seed: Of the draws.

    Returns:
        {metric: (value, low, high)}; NaN where there is none. Resamples in which a metric has no value do not count.
    """
    if not count:
        return {}
    whole = metrics(np.ones((1, count), np.int32))
    parts = [metrics(weights.astype(np.int32)) for weights in resample(count, resamples, seed)]
    found = {}
    for name, (value,) in whole.items():
        values = np.concatenate([part[name] for part in parts])
        values = values[~np.isnan(values)]
        low, high = np.quantile(values, _TAILS) if len(values) and not np.isnan(value) else (np.nan, np.nan)
        found[name] = float(value), float(low), float(high)
    return found


@dataclass(frozen=True)
class Difference:
    """A difference of means, its percentile interval, and the two-sided p of there being none."""
    value: float
    low: float
    high: float
    p: float


def resampled_means(
        values: np.ndarray,
        resamples: int = RESAMPLES,
        seed: int = 0,
        advance: Callable[[int], object] = lambda number: None,
) -> np.ndarray:
    """Column means over bootstrap resamples of the rows.

    A column's mean is over the rows that have a value in it, so an image counts for the heads it has a label of. All
    columns share the resamples: what is computed of several means of one resample is paired.

    Args:
        values: A row an image (N, K), NaN where it has no value; N is 1 or more.
        resamples: Number of resamples, R.
        seed: Of the draws; the same seed and N give the same resamples.
        advance: Called with the number of resamples that were made since the last call.

    Returns:
        The means (R, K), NaN where a resample has no row with a value.
    """
    known = ~np.isnan(values)
    masks, which = np.unique(known, axis=1, return_inverse=True)  # heads without missing labels share one
    columns = np.concatenate([np.where(known, values, 0), masks], axis=1).astype(np.float64)
    parts = []
    for counts in resample(len(values), resamples, seed):
        sums = counts.astype(np.float64) @ columns
        totals = sums[:, values.shape[1]:][:, which.reshape(-1)]
        with np.errstate(invalid='ignore'):
            parts.append(np.where(totals > 0, sums[:, :values.shape[1]] / totals, np.nan))
        advance(len(counts))
    return np.concatenate(parts)


@dataclass(frozen=True)
class SeedSpread:
    """How far a difference of means over seeds moves with the seeds: its standard error and degrees of freedom."""
    error: float
    freedom: float


def seed_spread(ours: Mapping[str, float], theirs: Mapping[str, float], step: float = 0.0) -> SeedSpread | None:
    """The spread of the difference of two means over seeds; None where a side has a single seed.

    The same seeds on both sides are pairs, since they share what the seed decides, such as the labelled rows. Other
    seeds are independent samples, with Welch's degrees of freedom. Where models do not vary, and only the images on
    which they disagree are random, those count twice, here and in the resamples: the interval is then too wide.

    Args:
        ours: A value a seed.
        theirs: Those that are subtracted.
        step: Between the values that there can be, such as 1 % of 100 images. Values that are equal may differ by so
            little that it does not show: the error is at least that of rounding two values.
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    if set(ours) == set(theirs):
        pairs = np.array([ours[seed] - theirs[seed] for seed in ours])
        return SeedSpread(max(float(scipy.stats.sem(pairs)), step / math.sqrt(6 * len(pairs))), len(pairs) - 1)
    squares = [scipy.stats.sem(list(side.values())) ** 2 for side in (ours, theirs)]
    total = sum(squares)
    least = step / math.sqrt(6 * min(len(ours), len(theirs)))
    if not total:
        return SeedSpread(least, len(ours) + len(theirs) - 2)
    welch = total ** 2 / sum(square ** 2 / (len(side) - 1) for square, side in zip(squares, (ours, theirs)))
    return SeedSpread(max(math.sqrt(total), least), float(welch))


def with_seeds(resampled: np.ndarray, spread: SeedSpread) -> np.ndarray:
    """A difference on resamples of the images (R,), each with other seeds too (R,)."""
    places = (np.arange(len(resampled)) + 0.5) / len(resampled)  # evenly spaced, so that the tails are exact
    drawn = np.random.default_rng(1).permutation(scipy.stats.t.ppf(places, spread.freedom))
    return resampled + spread.error * drawn


def describe_difference(value: float, resampled: np.ndarray) -> Difference:
    """The interval and p of a difference, from its values on bootstrap resamples.

    The interval is between percentiles. p is its inversion: twice the share of resamples on the rarer side of 0, those
    at 0 counted on both, and the observed sample as one more resample, so that p is never 0.

    Args:
        value: The difference.
        resampled: The same of each resample (R,), NaN where a resample has none.
    """
    resampled = resampled[~np.isnan(resampled)]
    if not len(resampled):
        return Difference(value, np.nan, np.nan, np.nan)
    # Sums of thirds that cancel leave some rounding, which is no difference.
    resampled = np.where(np.abs(resampled) <= 1e-12 * np.abs(resampled).max(), 0, resampled)
    low, high = np.quantile(resampled, _TAILS)
    rarer = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return Difference(value, float(low), float(high), min(1.0, 2 * (rarer + 1) / (len(resampled) + 1)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's corrected p of several comparisons: the chance of any false finding stays below the level.

    A NaN, of a comparison that could not be made, stays NaN and does not count.
    """
    from statsmodels.stats.multitest import multipletests  # here, since it takes a second to import

    corrected = np.array(ps, dtype=float)
    made = ~np.isnan(corrected)
    if made.any():
        corrected[made] = multipletests(corrected[made], method='holm')[1]
    return [float(p) for p in corrected]
