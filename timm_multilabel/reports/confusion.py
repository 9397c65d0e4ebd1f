"""What a head takes for what, as a CSV and as a picture."""
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from timm_multilabel.escaping import spreadsheet_text
from timm_multilabel.files import write_whole
from timm_multilabel.labels import Labels, LabelSet, Quantity, TagSet

READABLE = 20
"""Classes of which a matrix is legible."""

_PAIRS = 25  # confused pairs shown of more classes than that
_NAME = 32  # letters of a name in a picture


def confusion_stems(names: Sequence[str]) -> list[str]:
    """A file name without suffix for each head: `confusion-<head>`, with a number where two would be the same."""
    stems = []
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
) -> list[Path]:
    """Write what a head takes for what as `<stem>.csv` and `<stem>.png`.

    Of classes the matrix (rows: label, columns: prediction, counts); the picture of more than 20 shows the pairs most
    often confused. Of tags, how often each is rightly found, missed and wrongly found at a probability of 0.5. Of
    numbers, label and prediction of each image.

    Args:
        folder: Where; it must exist.
        stem: Name of the files without suffix.
        labels: The head's labels.
        target: What they encode, of the labelled rows (N, W).
        measured: What the head kept of each row, the prediction first (N, K).

    Returns:
        The files.
    """
    table, figure = draw_confusion(labels, target, measured)
    write_whole(folder / f'{stem}.csv', _escaped(table).to_csv())
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # the fonts at hand may lack a script
        figure.savefig(picture, format='png', dpi=120)
    write_whole(folder / f'{stem}.png', picture.getvalue())
    return [folder / f'{stem}.csv', folder / f'{stem}.png']


def draw_confusion(labels: Labels, target: np.ndarray, measured: np.ndarray) -> tuple[pd.DataFrame, Figure]:
    """The table and the picture that `write_confusion` writes, of the same arguments."""
    if isinstance(labels, TagSet):
        return _tags(labels, target, measured)
    if isinstance(labels, Quantity):
        return _numbers(labels, target[:, 0], measured[:, 0])
    matrix = np.zeros((len(labels.classes),) * 2, dtype=int)
    np.add.at(matrix, (target[:, 0].astype(int), measured[:, 0].astype(int)), 1)
    table = pd.DataFrame(matrix, index=pd.Index(labels.classes, name='label \\ prediction'), columns=labels.classes)
    return table, _matrix(labels, matrix) if len(labels.classes) <= READABLE else _pairs(labels, matrix)


def _escaped(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose names of rows and columns no spreadsheet computes."""
    return table.rename(
        index=lambda name: spreadsheet_text(name) if isinstance(name, str) else name, columns=spreadsheet_text)


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


def _matrix(head: LabelSet, matrix: np.ndarray) -> Figure:
    """Every class: the share of each label's images that each prediction got, with counts."""
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
    axes.set(xlabel='prediction', ylabel='label', title=f'{_plain(head.name)}: {_accuracy(matrix)}')
    return figure


def _pairs(head: LabelSet, matrix: np.ndarray) -> Figure:
    """The pairs of label and prediction with the most images."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind='stable')[::-1][:_PAIRS]
    pairs = [(row, column) for row, column in zip(*np.unravel_index(order, wrong.shape)) if wrong[row, column]]
    figure = Figure(figsize=(9, 2 + 0.28 * len(pairs)), layout='constrained')
    axes = figure.subplots()
    counts = [wrong[pair] for pair in pairs]
    bars = axes.barh(range(len(pairs)), counts, color='#4477aa')
    of_label = matrix.sum(axis=1)
    axes.bar_label(bars, [f'{wrong[pair]} of {of_label[pair[0]]}' for pair in pairs], padding=3, fontsize=8)
    names = [f'{_plain(head.classes[row])} \u2192 {_plain(head.classes[column])}' for row, column in pairs]
    axes.set_yticks(range(len(pairs)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[['top', 'right']].set_visible(False)
    axes.set(
        xlabel='images', ylabel='label \u2192 prediction',
        title=f'{_plain(head.name)}: {_accuracy(matrix)}; the most frequent confusions of {len(head.classes)} classes')
    return figure


def _accuracy(matrix: np.ndarray) -> str:
    return f'{100 * np.trace(matrix) / max(matrix.sum(), 1):.1f} % of {matrix.sum()} right'


def _plain(text: str) -> str:
    """A text as matplotlib shows it literally and at no great length: a dollar sign would start a formula."""
    short = text if len(text) <= _NAME else text[:_NAME - 1] + '\u2026'
    return short.replace('$', r'\$')
