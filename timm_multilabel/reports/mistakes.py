"""What a head gets wrong: pairs of classes that it takes for each other, and the rows with the worst mistakes."""
from dataclasses import dataclass, replace

import numpy as np

from timm_multilabel.errors import shortened
from timm_multilabel.labels import MISSING, Labels, LabelSet, Quantity, TagSet


@dataclass(frozen=True)
class Pair:
    """Images of one class that were taken for another.

    Args:
        label: The class they are of.
        prediction: The one they were taken for.
        count: How many.
        of: Images of the label.
        rows: The surest of them, the surest first.
    """
    label: str
    prediction: str
    count: int
    of: int
    rows: list[int]


@dataclass(frozen=True)
class Mistake:
    """A row that a head gets wrong, in words."""
    row: int
    label: str
    prediction: str
    note: str


def confused_pairs(
        labels: LabelSet,
        target: np.ndarray,
        output: np.ndarray,
        most: int = 10,
        examples: int = 4,
) -> list[Pair]:
    """The pairs of label and prediction with the most images, ties by class.

    Args:
        labels: The classes.
        target: Class indices (N,), MISSING where there is none.
        output: Probabilities (N, C).
        most: Pairs.
        examples: Rows of a pair.
    """
    predicted, sureness = output.argmax(axis=1), output.max(axis=1)
    wrong = np.flatnonzero((target != MISSING) & (predicted != target))
    of_label = np.bincount(target[target != MISSING], minlength=len(labels.classes))
    codes, counts = np.unique(target[wrong] * len(labels.classes) + predicted[wrong], return_counts=True)
    pairs = []
    for place in np.argsort(-counts, kind='stable')[:most]:
        label, prediction = divmod(int(codes[place]), len(labels.classes))
        rows = wrong[(target[wrong] == label) & (predicted[wrong] == prediction)]
        rows = rows[np.argsort(-sureness[rows], kind='stable')][:examples].tolist()
        pairs.append(Pair(
            shortened(labels.classes[label]), shortened(labels.classes[prediction]), int(counts[place]),
            int(of_label[label]), rows))
    return pairs


def worst_mistakes(
        labels: Labels,
        target: np.ndarray,
        output: np.ndarray,
        most: int = 12,
        has_probabilities: bool = True,
) -> list[Mistake]:
    """The rows that a head is surest of and wrong, or of a number farthest from, the worst first.

    Of tags, those with the largest mean binary cross-entropy that are wrong at a probability of 0.5.

    Args:
        labels: The head's labels.
        target: As `Predictions.target` gives it (N,) or (N, C).
        output: What the head says (N, C).
        most: Rows.
        has_probabilities: False for a kind of classes that has none; its mistakes are in the order of the rows.
    """
    if isinstance(labels, LabelSet):
        found = _wrong_classes(labels, target, output, most)
        return found if has_probabilities else [replace(mistake, note='') for mistake in found]
    return _wrong_tags(labels, target, output, most) if isinstance(labels, TagSet) else _wrong_numbers(
        labels, target, output[:, 0], most)


def _worst(badness: np.ndarray, wrong: np.ndarray, most: int) -> list[int]:
    rows = np.flatnonzero(wrong)
    return [int(row) for row in rows[np.argsort(-badness[rows], kind='stable')][:most]]


def _wrong_classes(labels: LabelSet, target: np.ndarray, output: np.ndarray, most: int) -> list[Mistake]:
    predicted, sureness = output.argmax(axis=1), output.max(axis=1)
    found = []
    for row in _worst(sureness, (target != MISSING) & (predicted != target), most):
        of_label = output[row, target[row]]
        found.append(Mistake(
            row, shortened(labels.classes[target[row]]), shortened(labels.classes[predicted[row]]),
            f'{_percent(sureness[row])} sure; {_percent(of_label)} for the label'))
    return found


def _wrong_tags(labels: TagSet, target: np.ndarray, output: np.ndarray, most: int) -> list[Mistake]:
    known, said = target != MISSING, output >= 0.5
    right = np.where(target == 1, output, 1 - output).astype(np.float64)
    loss = np.where(known, -np.log(np.maximum(right, 1e-12)), 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    wrong = (known & (said != (target == 1))).any(axis=1)
    found = []
    for row in _worst(loss, wrong, most):
        missed = int((known[row] & (target[row] == 1) & ~said[row]).sum())
        found.append(Mistake(
            row, labels.listed(target[row] == 1), labels.listed(said[row]),
            f'{missed} missed, {int((known[row] & (target[row] == 0) & said[row]).sum())} wrongly found'))
    return found


def _wrong_numbers(labels: Quantity, target: np.ndarray, output: np.ndarray, most: int) -> list[Mistake]:
    error = np.abs(output - target)
    found = []
    for row in _worst(error, ~np.isnan(error), most):
        found.append(Mistake(
            row, labels.describe(target[row]), labels.describe(output[row]), f'off by {error[row] * labels.std:.4g}'))
    return found


def _percent(share: float) -> str:
    return f'{100 * share:.1f} %'
