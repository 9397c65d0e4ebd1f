"""What a report says of one head."""
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from timm_multilabel.errors import shortened
from timm_multilabel.heads.tags import tag_metrics
from timm_multilabel.inference.predictions import Predictions
from timm_multilabel.labels import MISSING, Labels, LabelSet, TagSet
from timm_multilabel.reports.bootstrap import METRIC_RESAMPLES, bootstrap
from timm_multilabel.reports.calibration import Reliability, head_reliability
from timm_multilabel.reports.confusion import READABLE, draw_confusion
from timm_multilabel.reports.intervals import Figure, head_figures, mean_accuracy
from timm_multilabel.reports.mistakes import confused_pairs, listed, worst_mistakes
from timm_multilabel.reports.pictures import Thumbnail, figure_uri, reliability_figure

NAMES = {
    'top1': 'top-1 accuracy', 'top5': 'top-5 accuracy', 'balanced_accuracy': 'balanced accuracy',
    'macro_f1': 'macro F1', 'map': 'mean average precision', 'f1': 'F1 (mean over tags)',
    'micro_f1': 'F1 (over all labels)', 'accuracy': 'accuracy (mean over tags)',
    'r2': 'explained variance (R²)', 'mae': 'mean absolute error'}


@dataclass(frozen=True)
class HeadSection:
    """A head's part of a page; texts are plain, pictures data URIs.

    Args:
        name: The head.
        kind: Such as '140 classes'.
        labelled: Images with a label.
        unranked: No probability says which mistakes are the worst.
        figures: Rows (name, value, interval, how the interval was made).
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
    figures: list[tuple[str, str, str, str]]
    tags: list[tuple[str, ...]]
    calibration: dict[str, Any] | None
    confusion: str
    pairs: list[dict[str, Any]]
    mistakes: list[dict[str, Any]]


def head_section(
        labels: Labels,
        target: np.ndarray,
        known: np.ndarray,
        output: np.ndarray,
        rows: np.ndarray,
        thumbnail: Thumbnail,
        own_metrics: Mapping[str, float] | None = None,
) -> HeadSection:
    """Work out what there is to say of a head.

    Args:
        labels: Its labels.
        target: As `Predictions.target` gives it, of N rows.
        known: Which rows have a label (N,).
        output: What the head says of them (N, C).
        rows: Each row's name (N,).
        thumbnail: The pictures.
        own_metrics: Of a kind that has no probabilities.
    """
    used = np.flatnonzero(known)
    of_used, said = target[used], output[used]
    section = {'name': shortened(labels.name), 'kind': _kind(labels), 'labelled': len(used),
               'unranked': own_metrics is not None,
               'tags': _tag_rows(labels, of_used, said) if len(used) else []}
    if not len(used):
        return HeadSection(**section, figures=[], calibration=None, confusion='', pairs=[], mistakes=[])
    if own_metrics is None:
        figures = [_figure_row(figure) for figure in head_figures(labels, of_used, said)]
        found = head_reliability(labels, of_used, said)
    else:
        figures = [(name, f'{value:.2f}', '', '') for name, value in own_metrics.items()]
        found = None
    calibration = found and {
        'picture': figure_uri(reliability_figure(found)), 'ece': f'{100 * found.ece:.2f} %',
        'words': _calibration_words(found, isinstance(labels, TagSet))}
    pairs = []
    for pair in confused_pairs(labels, of_used, said) if isinstance(labels, LabelSet) else []:
        pairs.append({**vars(pair), 'thumbnails': [_thumbnail(used[row], rows, thumbnail) for row in pair.rows]})
    mistakes = [{**vars(mistake), **_thumbnail(used[mistake.row], rows, thumbnail)}
                for mistake in worst_mistakes(labels, of_used, said, has_probabilities=own_metrics is None)]
    return HeadSection(**section, figures=figures, calibration=calibration,
                       confusion=_confusion(labels, of_used, said), pairs=pairs, mistakes=mistakes)


def _calibration_words(found: Reliability, of_tags: bool) -> str:
    """What a reliability diagram says on the whole."""
    share = f'{100 * found.true:.1f} %'
    true = f'{share} of the tags are there' if of_tags else f'it is right in {share} of the images'
    what = 'a tag' if of_tags else 'the class that it predicts'
    return (f'On average this head gives {what} a probability of {100 * found.said:.1f} %, and {true}: '
            f'{found.verdict()}.')


def describe_target(labels: Labels, target: Any) -> str:
    """A label in words: an element of `Predictions.target`; '-' where it is missing."""
    if isinstance(labels, LabelSet):
        return shortened(labels.classes[target]) if target != MISSING else '-'
    if isinstance(labels, TagSet):
        return listed(labels.classes, target == 1) if (target != MISSING).any() else '-'
    return '-' if math.isnan(target) else f'{target * labels.std + labels.mean:.4g}'


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
    return _figure_row(Figure('top1', *found['top1'], 'bootstrap'))


def _kind(labels: Labels) -> str:
    if isinstance(labels, LabelSet | TagSet):
        one, many = ('class', 'classes') if isinstance(labels, LabelSet) else ('tag', 'tags')
        return f'{len(labels.classes)} {one if len(labels.classes) == 1 else many}'
    return 'a number'


def _figure_row(figure: Figure) -> tuple[str, str, str, str]:
    """Name, value, interval and method as texts."""
    unit = '' if figure.name == 'mae' else ' %'
    def text(value: float) -> str:
        return f'{value:.4g}' if figure.name == 'mae' else f'{value:.2f}'
    if math.isnan(figure.value):
        return NAMES[figure.name], 'none', '', ''
    return (NAMES[figure.name], text(figure.value) + unit, f'{text(figure.low)} to {text(figure.high)}{unit}',
            figure.method if figure.method == 'Wilson' else f'bootstrap of {METRIC_RESAMPLES:,}')


def _tag_rows(labels: Labels, target: np.ndarray, output: np.ndarray) -> list[tuple[str, ...]]:
    """The metrics of each tag as texts; a dash where its labels, without a 0 or without a 1, do not allow one."""
    rows = []
    for place, tag in enumerate(labels.classes if isinstance(labels, TagSet) else []):
        metrics = tag_metrics(target[:, place], output[:, place])
        texts = ['-' if math.isnan(metrics[name]) else f'{metrics[name]:.2f} %' for name in ('ap', 'f1', 'accuracy')]
        rows.append((shortened(tag), *texts, str(metrics['labels']), str(metrics['ones'])))
    return rows


def _thumbnail(row: int, rows: np.ndarray, thumbnail: Thumbnail) -> dict[str, str]:
    return {'thumbnail': thumbnail(int(row)), 'where': str(rows[row])}


def _confusion(labels: Labels, target: np.ndarray, output: np.ndarray) -> str:
    """The picture of what is taken for what; none of more classes than are legible, whose pairs are listed."""
    if isinstance(labels, LabelSet):
        if len(labels.classes) > READABLE:
            return ''
        measured = output.argmax(axis=1)[:, None]
        return figure_uri(draw_confusion(labels, target[:, None], measured)[1])
    target = target if isinstance(labels, TagSet) else target[:, None]
    return figure_uri(draw_confusion(labels, target, output)[1])
