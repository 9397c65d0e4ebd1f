"""Metrics of a head with confidence intervals: Wilson's of accuracies, the bootstrap over images of all others."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from timm_multilabel.inference.predictions import OwnMetrics
from timm_multilabel.labels import MISSING, Labels, LabelSet, TagSet
from timm_multilabel.reports.bootstrap import bootstrap, wilson


@dataclass(frozen=True)
class Interval:
    """A metric of a head with its interval.

    Args:
        name: Such as 'top1'.
        value: A percentage, or of 'mae' in the column's unit; NaN where the labels do not allow it.
        low: Lower end of the 95 % interval, NaN where there is none.
        high: Upper end.
        method: 'Wilson' or 'bootstrap'.
    """
    name: str
    value: float
    low: float
    high: float
    method: str


def head_intervals(labels: Labels, target: np.ndarray, output: np.ndarray) -> list[Interval]:
    """The metrics of a head, as our kinds measure it, over its labelled images.

    Args:
        labels: The head's labels.
        target: As `Predictions.target` gives it, of labelled rows only.
        output: What the head says of them (N, C).
    """
    accuracies = []
    if isinstance(labels, LabelSet):
        if len(labels.classes) == 1:  # every answer is right
            return [Interval('top1', math.nan, math.nan, math.nan, 'Wilson')]
        ranks = (output > output[np.arange(len(target)), target][:, None]).sum(axis=1)
        predicted = output.argmax(axis=1)
        accuracies = [_accuracy('top1', predicted == target)]
        if len(labels.classes) > 5:
            accuracies.append(_accuracy('top5', ranks < 5))
        found = bootstrap(lambda weights: weighted_class_metrics(target, predicted, weights), len(target))
    elif isinstance(labels, TagSet):
        found = bootstrap(lambda weights: weighted_tag_metrics(target, output, weights), len(target))
    else:
        std = labels.std
        found = bootstrap(lambda weights: weighted_number_metrics(target, output[:, 0], std, weights), len(target))
    return accuracies + [Interval(name, *values, 'bootstrap') for name, values in found.items()]


def own_intervals(own: OwnMetrics, known: np.ndarray) -> list[Interval]:
    """The metrics of a head of a kind with its own ones; those that are no means over images have no interval.

    Args:
        own: The metrics.
        known: Which images have a label (N,).
    """
    of_images = {name: values[known].astype(np.float64) for name, values in own.of_rows.items()}
    found = bootstrap(
        lambda weights: {name: weights @ values / weights.sum(axis=1) for name, values in of_images.items()},
        int(known.sum()))
    return [Interval(name, value, *found.get(name, (value, math.nan, math.nan))[1:], 'bootstrap')
            for name, value in own.values.items()]


def _accuracy(name: str, hits: np.ndarray) -> Interval:
    share = 100 * float(hits.mean()) if len(hits) else math.nan
    low, high = wilson(int(hits.sum()), len(hits))
    return Interval(name, share, 100 * low, 100 * high, 'Wilson')


def mean_accuracy(
        hits: Sequence[np.ndarray],
        head_weights: Sequence[float],
        weights: np.ndarray,
) -> dict[str, np.ndarray]:
    """'top1' in percent, the weighted mean over heads, of weighted images.

    Args:
        hits: For each head whether it is right (N,), NaN where a label is missing.
        head_weights: A weight each.
        weights: Of the images (R, N).
    """
    accuracies = []
    for of_head in hits:
        known = ~np.isnan(of_head)
        with np.errstate(invalid='ignore', divide='ignore'):
            accuracies.append(weights[:, known] @ of_head[known] / weights[:, known].sum(axis=1))
    return {'top1': 100 * np.average(accuracies, axis=0, weights=head_weights)}


def weighted_class_metrics(
        target: np.ndarray,
        predicted: np.ndarray,
        weights: np.ndarray,
) -> dict[str, np.ndarray]:
    """'balanced_accuracy' and 'macro_f1' in percent, as `metrics.class_metrics` has them, of weighted images.

    A class without weight counts with its metric of all images: left out, it would make resamples better than the
    whole, since rare classes have low metrics.

    Args:
        target: Class indices (N,).
        predicted: Class indices (N,).
        weights: Of the images (R, N).
    """
    occurring, places = np.unique([target, predicted], return_inverse=True)  # others count in neither metric
    (target, predicted), classes = places.reshape(2, -1), len(occurring)

    def totals(indices: np.ndarray, which: np.ndarray) -> np.ndarray:
        """The weight of each class that occurs (C, R) over some of the images."""
        images = np.flatnonzero(which)
        members = csr_array((np.ones(len(images), np.int32), (indices[images], images)), shape=(classes, len(which)))
        found: np.ndarray = members @ weights.T
        return found

    everywhere = np.ones(len(target), bool)
    true, said = totals(target, everywhere), totals(predicted, everywhere)
    right = totals(target, predicted == target)
    all_true, all_said, all_right = (
        np.bincount(indices, minlength=classes)[:, None] for indices in (
            target, predicted, target[predicted == target]))
    recall = _share(right, true, all_right, all_true)
    f1 = _share(2 * right, true + said, 2 * all_right, all_true + all_said)
    return {'balanced_accuracy': 100 * _mean(recall), 'macro_f1': 100 * _mean(f1)}


def _share(part: np.ndarray, whole: np.ndarray, all_part: np.ndarray, all_whole: np.ndarray) -> np.ndarray:
    """part / whole (C, R); where that is 0 / 0, the share of all images, from (C, 1); NaN where that is so as well."""
    with np.errstate(invalid='ignore', divide='ignore'):
        return np.asarray(np.where(whole > 0, part / whole, all_part / all_whole))


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean (R,) over those of (C, R) that are numbers."""
    there = ~np.isnan(values)
    with np.errstate(invalid='ignore', divide='ignore'):
        return np.asarray(np.where(there, values, 0).sum(axis=0) / there.sum(axis=0))


def weighted_tag_metrics(target: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """'map', 'f1', 'micro_f1' and 'accuracy' in percent, as `TagsHead.metrics` has them, of weighted images.

    A tag of which the weighted images have no 1, or no 0, counts with its metrics of all images.

    Args:
        target: 0, 1 or MISSING (N, C).
        probability: Of each tag (N, C).
        weights: Of the images (R, N).
    """
    each, sums = [], np.zeros((3, len(weights)))
    for tag in range(target.shape[1]):
        known = target[:, tag] != MISSING
        true, of_tag = target[known, tag] == 1, probability[known, tag]
        its, found = weights[:, known], of_tag >= 0.5
        counts = np.stack([its[:, true & found].sum(axis=1), its[:, true].sum(axis=1), its[:, found].sum(axis=1)])
        sums += counts
        if true.all() or not true.any():
            continue
        both = (counts[1] > 0) & (counts[1] < its.sum(axis=1))
        whole = _one_tag(true, of_tag, np.ones((1, len(true)), np.int32))
        each.append(np.where(both, _one_tag(true, of_tag, its), whole))
    if not each:
        return dict.fromkeys(('map', 'f1', 'micro_f1', 'accuracy'), np.full(len(weights), np.nan))
    with np.errstate(invalid='ignore', divide='ignore'):
        micro = np.nan_to_num(2 * sums[0] / (sums[1] + sums[2]))
    f1, precision, accuracy = 100 * _mean(np.array(each))
    return {'map': precision, 'f1': f1, 'micro_f1': 100 * micro, 'accuracy': accuracy}


def _one_tag(true: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 at 0.5, average precision, and accuracy at 0.5 of a tag (3, R), NaN without a weighted positive."""
    found = score >= 0.5
    positive = weights[:, true].sum(axis=1)
    with np.errstate(invalid='ignore', divide='ignore'):
        f1 = 2 * weights[:, true & found].sum(axis=1) / (positive + weights[:, found].sum(axis=1))
        accuracy = weights[:, true == found].sum(axis=1) / weights.sum(axis=1)
    return np.where(positive > 0, [f1, average_precision(true, score, weights), accuracy], np.nan)


def average_precision(true: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision (R,) as scikit-learn has it, of weighted images; NaN without a weighted positive.

    Args:
        true: Which images are positive (N,).
        score: Of each image (N,).
        weights: Of the images (R, N).
    """
    if not len(true):
        return np.full(len(weights), np.nan)
    order = np.argsort(-score, kind='stable')
    last = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)  # of images with one score
    weights = weights[:, order]
    everything = np.cumsum(weights, axis=1)[:, last]
    positive = np.cumsum(weights * true[order], axis=1)[:, last]
    with np.errstate(invalid='ignore', divide='ignore'):
        precision = np.nan_to_num(positive / everything)
        return np.asarray((np.diff(positive, axis=1, prepend=0) * precision).sum(axis=1) / positive[:, -1])


def weighted_number_metrics(
        target: np.ndarray,
        output: np.ndarray,
        std: float,
        weights: np.ndarray,
) -> dict[str, np.ndarray]:
    """'r2' in percent and 'mae' in the column's unit, as `NumericHead.metrics` has them, of weighted images.

    Args:
        target: Standardised numbers (N,).
        output: Standardised predictions (N,).
        std: Standard deviation of the column.
        weights: Of the images (R, N).
    """
    target, total = target.astype(np.float64), weights.sum(axis=1)
    error = output.astype(np.float64) - target
    mean, square = weights @ target / total, weights @ (target - target.mean()) ** 2 / total
    variance = square - (mean - target.mean()) ** 2
    with np.errstate(invalid='ignore', divide='ignore'):
        r2 = np.where(variance > 1e-12, 100 * (1 - weights @ error ** 2 / total / variance), np.nan)
    return {'r2': r2, 'mae': std * (weights @ np.abs(error)) / total}
