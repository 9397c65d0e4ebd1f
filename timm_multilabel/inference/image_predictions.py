"""What a head says of an image, in words: probabilities -> labels."""
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from timm_multilabel.errors import UserError
from timm_multilabel.labels import Labels, LabelSpace, TagSet

UNKNOWN = 'unknown'
"""The label of an image none of whose classes is as probable as it must be."""

TAG_THRESHOLD = 0.5
"""The probability from which on an image has a tag, unless told otherwise."""


class Guess(NamedTuple):
    """A label that a head gives an image, with its probability; None of a number and of a kind that has none."""
    label: str | float
    probability: float | None


class ImagePrediction(NamedTuple):
    """What is said of an image: {head: guesses}, or why it could not be read."""
    image: str
    guesses: dict[str, list[Guess]]
    error: str | None = None


Thresholds = Mapping[str, float]
"""The least probability by head; for '' of all heads that are not named."""


def check_thresholds(
        thresholds: Thresholds,
        label_space: LabelSpace,
        without_probabilities: Collection[str] = (),
) -> None:
    """Raise UserError where a threshold is of a head that there is none of, or that has no probabilities.

    Args:
        thresholds: By head, or for all heads.
        label_space: The heads of the checkpoint.
        without_probabilities: Names of the heads of classes that have none.
    """
    heads = dict(zip(label_space.names, label_space.heads))
    if thresholds and all(not labels.classes or name in without_probabilities for name, labels in heads.items()):
        raise UserError('threshold: no head of the checkpoint has probabilities; leave it out')
    for name, value in thresholds.items():
        if name and name not in heads:
            raise UserError(f"threshold of '{name}': the checkpoint has no such head (it has: {', '.join(heads)})")
        if name and not heads[name].classes:
            raise UserError(f"threshold of '{name}': the head gives a number, which has no probability; leave it out")
        if name in without_probabilities:
            raise UserError(f"threshold of '{name}': this kind of head has no probabilities; leave it out")
        if not 0 <= value <= 1:
            raise UserError(f'threshold {value:g}: expected a probability, from 0 to 1')


def guess(
        labels: Labels,
        values: np.ndarray,
        top_k: int,
        thresholds: Thresholds,
        has_probabilities: bool = True,
) -> list[Guess]:
    """The labels of one image by one head.

    Of classes the likeliest, `top_k` at most, that reach the threshold (0 by default); where none does, `UNKNOWN` with
    the probability of the likeliest. Of tags all that reach it (0.5 by default), the likeliest first. Of a number the
    number, in its column's unit.

    Args:
        labels: The labels of the head.
        values: What `Head.probabilities` gives for the image: (C,), or (1,) of a number.
        top_k: How many classes to name at most.
        thresholds: The least probability of a label, by head.
        has_probabilities: False for a kind of classes of which only the predicted class is known.

    Raises:
        UserError: A value is not finite.
    """
    if not np.isfinite(values).all():
        raise UserError(f"head '{labels.name}': its outputs are not finite (did training diverge?); take another "
                        'checkpoint')
    if not labels.classes:
        return [Guess(labels.in_unit(float(values[0])), None)]
    if not has_probabilities:
        return [Guess(labels.classes[values.argmax()], None)]
    tags = isinstance(labels, TagSet)
    least = thresholds.get(labels.name, thresholds.get('', TAG_THRESHOLD if tags else 0.0))
    most = len(values) if tags else min(top_k, len(values))
    if most < len(values):  # those that reach the value of the last of them; a sort takes long for many classes
        least = max(least, np.partition(values, -most)[-most])
    reach = np.flatnonzero(values >= least)
    order = reach[np.argsort(-values[reach], kind='stable')][:most]
    found = [Guess(labels.classes[index], float(values[index])) for index in order]
    return found if tags or found else [Guess(UNKNOWN, float(values.max()))]


def guess_all(
        label_space: LabelSpace,
        outputs: Mapping[str, np.ndarray],
        top_k: int,
        thresholds: Thresholds,
        without_probabilities: Collection[str] = (),
) -> Iterator[dict[str, list[Guess]]]:
    """`guess` for each image of a batch, one after the other, and each head, from {head: (B, C)}."""
    for row in range(len(next(iter(outputs.values())))):
        yield {
            labels.name: guess(labels, outputs[labels.name][row], top_k, thresholds,
                               labels.name not in without_probabilities)
            for labels in label_space.heads}
