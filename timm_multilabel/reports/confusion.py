"""What a head takes for what, as a CSV and as a picture."""
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_multilabel.escaping import picture_text, spreadsheet_csv
from timm_multilabel.files import write_atomic
from timm_multilabel.labels import Labels, LabelSet, Quantity, TagSet
from timm_multilabel.reports.pictures import png

READABLE = 20
"""Classes of which a matrix is legible."""

MATRIX = 1000
"""Classes of which the CSV is a matrix; its cells grow with their square."""

_PAIRS = 25  # confused pairs shown of more classes than that
_NAME = 32  # letters of a name in a picture
_TITLE = 60  # letters of a run and a split


def confusion_stems(names: Sequence[str]) -> list[str]:
    """A file name without suffix for each head: `confusion-<head>`, with a number where two would be the same."""
    stems: list[str] = []
    for name in names:
        stem = 'confusion-' + re.sub(r'[^\w.-]+', '_', name)[:100]
        taken = sum(other.rpartition('~')[0] == stem or other == stem for other in stems)
        stems.append(f'{stem}~{taken + 1}' if taken else stem)
    return stems


def write_confusion(
        folder: Path,
        stem: str,
        labels: Labels,
        target: np.ndarray,
        measured: np.ndarray,
        of: str = '',
) -> list[Path]:
    """Write what a head takes for what as `<stem>.csv` and `<stem>.png`.

    Of classes the matrix (rows: label, columns: prediction, counts), and of more than 1,000 classes the pairs of label
    and prediction that occur, a row each; the picture of more than 20 shows the pairs most often confused. Of tags, how
    often each is rightly found, missed and wrongly found at a probability of 0.5. Of numbers, label and prediction of
    each image.

    Args:
        folder: Where; it must exist.
        stem: Name of the files without suffix.
        labels: The head's labels.
        target: What they encode, of the labelled rows (N, W).
        measured: What the head kept of each row, the prediction first (N, K).
        of: Run and split, for the picture's title.

    Returns:
        The files.
    """
    table, figure = draw_confusion(labels, target, measured)
    if of:
        figure.suptitle(picture_text(of, _TITLE), fontsize=10, color='#555555')
    write_atomic(folder / f'{stem}.csv', spreadsheet_csv(table))
    write_atomic(folder / f'{stem}.png', png(figure, 120))
    return [folder / f'{stem}.csv', folder / f'{stem}.png']


def draw_confusion(labels: Labels, target: np.ndarray, measured: np.ndarray) -> tuple[pd.DataFrame, Figure]:
    """The table and the picture that `write_confusion` writes, of the same arguments."""
    if isinstance(labels, TagSet):
        return _tags(labels, target, measured)
    if isinstance(labels, Quantity):
        return _numbers(labels, target[:, 0], measured[:, 0])
    pairs = pd.DataFrame({'label': target[:, 0].astype(int), 'prediction': measured[:, 0].astype(int)})
    pairs = pairs.value_counts(sort=False).sort_index().rename('images').reset_index()
    return _table(labels, pairs), _matrix(labels, pairs) if len(labels.classes) <= READABLE else _pairs(labels, pairs)


def _table(labels: LabelSet, pairs: pd.DataFrame) -> pd.DataFrame:
    """Pairs of class indices that occur, with their 'images', as a matrix, or of many classes as they are."""
    if len(labels.classes) <= MATRIX:
        return pd.DataFrame(_dense(labels, pairs), index=pd.Index(labels.classes, name='label \\ prediction'),
                            columns=labels.classes)
    names = {column: [labels.classes[index] for index in pairs[column]] for column in ('label', 'prediction')}
    return pd.DataFrame({**names, 'images': pairs['images']}).set_index(['label', 'prediction'])


def _dense(labels: LabelSet, pairs: pd.DataFrame) -> np.ndarray:
    """The matrix (C, C)."""
    matrix = np.zeros((len(labels.classes),) * 2, dtype=int)
    matrix[pairs['label'], pairs['prediction']] = pairs['images']
    return matrix


def _tags(labels: TagSet, target: np.ndarray, measured: np.ndarray) -> tuple[pd.DataFrame, Figure]:
    """Found, missed and wrong counts of each tag; the picture shows those that occur most."""
    found = measured[:, :target.shape[1]] >= 0.5
    table = pd.DataFrame({
        'found': ((target == 1) & found).sum(axis=0),
        'missed': ((target == 1) & ~found).sum(axis=0),
        'wrong': ((target == 0) & found).sum(axis=0),
        'rightly not found': ((target == 0) & ~found).sum(axis=0),
    }, index=pd.Index(labels.classes, name='tag'))
    shown = table.loc[(table['found'] + table['missed']).sort_values(ascending=False, kind='stable').index[:_PAIRS]]
    figure = Figure(figsize=(9, 2 + 0.28 * len(shown)), layout='constrained')
    axes = figure.subplots()
    left = np.zeros(len(shown))
    for name, color in (('found', '#4477aa'), ('missed', '#bbbbbb'), ('wrong', '#ee6677')):
        axes.barh(range(len(shown)), shown[name], left=left, color=color, label=name)
        left = left + shown[name].to_numpy()
    axes.set_yticks(range(len(shown)), [_plain(name) for name in shown.index])
    axes.invert_yaxis()
    axes.legend(frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[['top', 'right']].set_visible(False)
    more = f'; the {len(shown)} most frequent of {len(table)} tags' if len(shown) < len(table) else ''
    axes.set(xlabel='images', ylabel='tag', title=f'{_plain(labels.name)}: tags at a probability of 0.5{more}')
    return table, figure


def _numbers(labels: Quantity, target: np.ndarray, measured: np.ndarray) -> tuple[pd.DataFrame, Figure]:
    """Label and prediction of each image, in the column's unit."""
    table = pd.DataFrame({'label': target, 'prediction': measured}).astype(float) * labels.std + labels.mean
    table.index.name = 'image'
    figure = Figure(figsize=(5, 5), layout='constrained')
    axes = figure.subplots()
    axes.scatter(table['label'], table['prediction'], s=8, color='#4477aa', alpha=0.5)
    ends = [table.min().min(), table.max().max()]
    axes.plot(ends, ends, color='black', linewidth=0.8)
    axes.spines[['top', 'right']].set_visible(False)
    error = (table['label'] - table['prediction']).abs().mean()
    axes.set(xlabel='label', ylabel='prediction', title=f'{_plain(labels.name)}: mean absolute error {error:.3g}')
    return table, figure


def _matrix(head: LabelSet, pairs: pd.DataFrame) -> Figure:
    """Every class: the share of each label's images that each prediction got, with counts."""
    matrix = _dense(head, pairs)
    names = [_plain(name) for name in head.classes]
    size = 1.5 + 0.45 * len(names) + max(1.0, 0.09 * max(map(len, names)))
    figure = Figure(figsize=(size, size), layout='constrained')
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    for row in ticks:
        for column in ticks:
            if matrix[row, column]:
                color = 'white' if share[row, column] > 0.5 else 'black'
                axes.text(column, row, matrix[row, column], ha='center', va='center', color=color, fontsize=8)
    axes.set(xlabel='prediction', ylabel='label', title=f'{_plain(head.name)}: {_accuracy(pairs)}')
    return figure


def _pairs(head: LabelSet, pairs: pd.DataFrame) -> Figure:
    """The pairs of label and prediction with the most images."""
    of_label = pairs.groupby('label')['images'].sum()
    wrong = pairs[pairs['label'] != pairs['prediction']].iloc[::-1]
    wrong = wrong.sort_values('images', ascending=False, kind='stable')[:_PAIRS]
    figure = Figure(figsize=(9, 2 + 0.28 * len(wrong)), layout='constrained')
    axes = figure.subplots()
    bars = axes.barh(range(len(wrong)), wrong['images'], color='#4477aa')
    axes.bar_label(bars, [f'{row.images} of {of_label[row.label]}' for row in wrong.itertuples()], padding=3,
                   fontsize=8)
    names = [f'{_plain(head.classes[row.label])} \u2192 {_plain(head.classes[row.prediction])}'
             for row in wrong.itertuples()]
    axes.set_yticks(range(len(wrong)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[['top', 'right']].set_visible(False)
    axes.set(
        xlabel='images', ylabel='label \u2192 prediction',
        title=f'{_plain(head.name)}: {_accuracy(pairs)}; the most frequent confusions of {len(head.classes)} classes')
    return figure


def _accuracy(pairs: pd.DataFrame) -> str:
    right = pairs.loc[pairs['label'] == pairs['prediction'], 'images'].sum()
    return f'accuracy {100 * right / max(pairs["images"].sum(), 1):.1f} % of {pairs["images"].sum()} images'


def _plain(text: str) -> str:
    return picture_text(text, _NAME)
