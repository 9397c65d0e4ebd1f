"""What a report says of one head."""
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from timm_multilabel.errors import shortened
from timm_multilabel.heads import standard_head
from timm_multilabel.heads.tags import tag_metrics
from timm_multilabel.inference.predictions import OwnMetrics, Predictions
from timm_multilabel.labels import MISSING, Labels, LabelSet, TagSet
from timm_multilabel.metric_names import Metric
from timm_multilabel.reports.bootstrap import METRIC_RESAMPLES, bootstrap
from timm_multilabel.reports.calibration import Reliability, head_reliability
from timm_multilabel.reports.confusion import READABLE, draw_confusion
from timm_multilabel.reports.intervals import Interval, head_intervals, mean_accuracy, own_intervals
from timm_multilabel.reports.mistakes import confused_pairs, worst_mistakes
from timm_multilabel.reports.pictures import Thumbnail, figure_uri, reliability_figure


@dataclass(frozen=True)
class HeadSection:
    """A head's part of a page; texts are plain, pictures data URIs.

    Args:
        name: The head.
        kind: Such as '140 classes'.
        labelled: Images with a label.
        unranked: No probability says which mistakes are the worst.
        metrics: Rows (name, value, interval, how the interval was made).
        tags: Of tags, rows (tag, AP, F1, accuracy, labels, ones); else none.
        calibration: {picture, ece, words} or None.
        confusion: The picture, or ''.
        pairs: The most confused pairs, each {label, prediction, count, of, thumbnails}.
        mistakes: Each {thumbnail, where, label, prediction, note}.
    """
    name: str
    kind: str
    labelled: int
    unranked: bool
    metrics: list[tuple[str, str, str, str]] = field(default_factory=list)
    tags: list[tuple[str, ...]] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    confusion: str = ''
    pairs: list[dict[str, Any]] = field(default_factory=list)
    mistakes: list[dict[str, Any]] = field(default_factory=list)


def head_section(
        labels: Labels,
        target: np.ndarray,
        known: np.ndarray,
        output: np.ndarray,
        rows: np.ndarray,
        thumbnail: Thumbnail,
        own: OwnMetrics | None = None,
) -> HeadSection:
    """Work out what there is to say of a head.

    Args:
        labels: Its labels.
        target: As `Predictions.target` gives it, of N rows.
        known: Which rows have a label (N,).
        output: What the head says of them (N, C).
        rows: Each row's name (N,).
        thumbnail: The pictures.
        own: Of a kind with its own metrics.
    """
    used = np.flatnonzero(known)
    of_used, said = target[used], output[used]
    has_probabilities = own is None or own.has_probabilities
    section = HeadSection(
        name=shortened(labels.name), kind=labels.counted, labelled=len(used), unranked=not has_probabilities)
    if not len(used):
        return section
    if own is None:
        kind = type(standard_head(labels))
        metrics = [_metric_row(kind.metric(each.name), each) for each in head_intervals(labels, of_used, said)]
    else:
        described = {metric.name: metric for metric in own.metrics}
        metrics = [_metric_row(described[each.name], each) for each in own_intervals(own, known)]
    found = head_reliability(labels, of_used, said) if has_probabilities else None
    pairs = []
    for pair in confused_pairs(labels, of_used, said) if isinstance(labels, LabelSet) else []:
        pairs.append({**vars(pair), 'thumbnails': [_thumbnail(used[row], rows, thumbnail) for row in pair.rows]})
    return replace(
        section,
        metrics=metrics,
        tags=_tag_rows(labels, of_used, said) if isinstance(labels, TagSet) else [],
        calibration=None if found is None else {
            'picture': figure_uri(reliability_figure(found)), 'ece': f'{100 * found.ece:.2f} %',
            'words': _calibration_words(found, isinstance(labels, TagSet))},
        confusion=_confusion(labels, of_used, said),
        pairs=pairs,
        mistakes=[{**vars(mistake), **_thumbnail(used[mistake.row], rows, thumbnail)}
                  for mistake in worst_mistakes(labels, of_used, said, has_probabilities=has_probabilities)])


def _calibration_words(found: Reliability, of_tags: bool) -> str:
    """What a reliability diagram says on the whole."""
    share = f'{100 * found.true:.1f} %'
    true = f'{share} of the tags are there' if of_tags else f'it is right in {share} of the images'
    what = 'a tag' if of_tags else 'the class that it predicts'
    return (f'On average this head gives {what} a probability of {100 * found.said:.1f} %, and {true}: '
            f'{found.verdict()}.')


def mean_row(predictions: Predictions, head_weights: dict[str, float]) -> tuple[str, str, str, str] | None:
    """The weighted mean of the heads' top-1 accuracies with its interval, as a row of a table.

    Args:
        predictions: Of a split.
        head_weights: Weight of each head.

    Returns:
        The row; None unless there are several heads, all of classes, and a head that has a label and a weight.
    """
    heads = predictions.label_space.heads
    if len(heads) < 2 or not all(isinstance(labels, LabelSet) for labels in heads):
        return None
    hits = {}
    for labels in heads:
        target = predictions.target(labels.name)
        hits[labels.name] = np.where(
            target == MISSING, np.nan, predictions.outputs[labels.name].argmax(axis=1) == target)
    names = [name for name in hits if head_weights[name] and not np.isnan(hits[name]).all()]
    if not names:
        return None
    found = bootstrap(
        lambda weights: mean_accuracy([hits[name] for name in names], [head_weights[name] for name in names], weights),
        len(predictions))
    return _metric_row(type(standard_head(heads[0])).metric('top1'), Interval('top1', *found['top1'], 'bootstrap'))


def _metric_row(metric: Metric, found: Interval) -> tuple[str, str, str, str]:
    """Title, value, interval and method as texts."""
    if math.isnan(found.value):
        return metric.title, 'none', '', ''
    value = metric.text(found.value) + metric.unit
    if math.isnan(found.low):
        return metric.title, value, '', ''
    return (metric.title, value, f'{metric.text(found.low)} to {metric.text(found.high)}{metric.unit}',
            found.method if found.method == 'Wilson' else f'bootstrap of {METRIC_RESAMPLES:,}')


def _tag_rows(labels: TagSet, target: np.ndarray, output: np.ndarray) -> list[tuple[str, ...]]:
    """The metrics of each tag as texts; a dash where its labels, without a 0 or without a 1, do not allow one."""
    rows = []
    for place, tag in enumerate(labels.classes):
        metrics = tag_metrics(target[:, place], output[:, place])
        texts = ['-' if math.isnan(metrics[name]) else f'{metrics[name]:.2f} %' for name in ('ap', 'f1', 'accuracy')]
        rows.append((shortened(tag), *texts, str(metrics['labels']), str(metrics['ones'])))
    return rows


def _thumbnail(row: int, rows: np.ndarray, thumbnail: Thumbnail) -> dict[str, str]:
    return {'thumbnail': thumbnail(int(row)), 'where': str(rows[row])}


def _confusion(labels: Labels, target: np.ndarray, output: np.ndarray) -> str:
    """The picture of what is taken for what; none of more classes than are legible, whose pairs are listed."""
    if isinstance(labels, LabelSet) and len(labels.classes) > READABLE:
        return ''
    count = len(target)
    measured = labels.predicted(output).reshape(count, -1)
    return figure_uri(draw_confusion(labels, target.reshape(count, -1), measured)[1])
