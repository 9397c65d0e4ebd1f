"""The confusion matrix of a head, as a CSV and as a picture."""
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from timm_multilabel.files import write_whole
from timm_multilabel.labels import LabelSet

_READABLE = 20  # classes of which a matrix is legible
_PAIRS = 25  # confused pairs shown of more classes than that


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
        head: LabelSet,
        true: np.ndarray,
        predicted: np.ndarray,
) -> list[Path]:
    """Write `<stem>.csv` (rows: label, columns: prediction, counts) and `<stem>.png`.

    The picture shows the matrix; of more than 20 classes, the pairs most often confused.

    Args:
        folder: Where; it must exist.
        stem: Name of the files without suffix.
        head: The head's classes.
        true: Class indices (N,).
        predicted: Class indices (N,).

    Returns:
        The files.
    """
    matrix = confusion_matrix(true, predicted, labels=range(len(head.classes)))
    table = pd.DataFrame(matrix, index=pd.Index(head.classes, name='label \\ prediction'), columns=head.classes)
    write_whole(folder / f'{stem}.csv', table.to_csv())
    figure = _matrix(head, matrix) if len(head.classes) <= _READABLE else _pairs(head, matrix)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # the fonts at hand may lack a script
        figure.savefig(picture, format='png', dpi=120)
    write_whole(folder / f'{stem}.png', picture.getvalue())
    return [folder / f'{stem}.csv', folder / f'{stem}.png']


def _matrix(head: LabelSet, matrix: np.ndarray) -> Figure:
    """Every class: the share of each label's images that each prediction got, with counts."""
    size = 2.5 + 0.45 * len(head.classes)
    figure = Figure(figsize=(size, size), layout='constrained')
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
    ticks = range(len(head.classes))
    names = [_plain(name) for name in head.classes]
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
    names = [_plain(f'{head.classes[row]} \u2192 {head.classes[column]}') for row, column in pairs]
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
    """A text as matplotlib shows it literally: a dollar sign would start a formula."""
    return text.replace('$', r'\$')
