"""What is worth saying of labels before training: how they were read, and which cannot teach or score anything."""
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from timm_multilabel.cells import LIST, other_separator
from timm_multilabel.data.table import Table
from timm_multilabel.errors import listed, shortened
from timm_multilabel.labels import MISSING, Labels, LabelSet, LabelSpace, Quantity, TagSet

_MARKS = {',': 'commas', ';': "';'", '|': "'|'", ' ': 'blanks'}
_WORDS = {',': ',', ';': "';'", '|': "'|'", ' ': 'whitespace'}  # as a shell takes them


def how_read(table: Table, label_space: LabelSpace) -> list[str]:
    """Lines on labels that may mean something else than what they were read as: separators of tags, and -1 for 0.

    Args:
        table: The training table.
        label_space: The heads as they were read from it.
    """
    lines = []
    for head in label_space.heads:
        if not isinstance(head, TagSet) or not set(head.columns) <= set(table.frame.columns):
            continue
        if head.minus:
            lines.append(f"{table.path}: '{shortened(head.name)}': -1 was read as 0 in {_some(head.minus)}, which have "
                         'no 0; if it is a missing label, pass --missing-value -1')
        if head.group:
            continue
        texts = [text for text in table.frame[head.name] if text and text != head.none and not text.startswith(LIST)]
        if line := _other_dialect(texts, head.separator):
            lines.append(f"{table.path}: '{shortened(head.name)}' {line}")
    return lines


def _other_dialect(texts: list[str], separator: str) -> str | None:
    """What cells of tags look like, where that is not how they were read."""
    lists = [text for text in texts if text[0] + text[-1] in ('[]', '{}')]
    if 2 * len(lists) > len(texts):
        return (f"looks like lists written by a program, such as '{shortened(lists[0])}', whose brackets and quotes "
                f"were read as parts of tags; write them as a{separator}b")
    mark = other_separator(texts, separator)
    if mark is None:
        return None
    example = next(text for text in texts if mark in text)
    return (f"looks like tags with {_MARKS[mark]} between them, such as '{shortened(example)}', which was read as one "
            f'tag; if so, pass --tag-separator {_WORDS[mark]}')


def useless_labels(label_space: LabelSpace, targets: torch.Tensor, source: str, scored: bool) -> list[str]:
    """A line for each head whose labels in a split cannot teach anything, or cannot tell a good model from a bad one.

    Args:
        label_space: The heads that the targets are of.
        targets: The targets (N, W) of the split; none where the labels were not read.
        source: What the lines call the split.
        scored: The split is one to score, not to learn from.
    """
    if not len(targets):
        return []
    lines = []
    for head, target in zip(label_space.heads, label_space.split(targets), strict=True):
        what = '; '.join(_useless(head, target.numpy(), scored))
        if what:
            lines.append(f"{source}: '{shortened(head.name)}' {what}")
    return lines


def _useless(head: Labels, target: np.ndarray, scored: bool) -> Iterator[str]:
    effect = 'not scored' if scored else 'nothing to learn'
    known = target != MISSING if head.classes else ~np.isnan(target)
    if not known.any():
        yield f'has no label: {effect}'
    elif isinstance(head, LabelSet):
        found = np.unique(target[known])
        if len(head.classes) == 1:
            yield f'has one class: {effect}'
        elif len(found) == 1:
            yield f"has labels of one class, '{shortened(head.classes[found[0]])}': " + (
                'a model that always says it is right' if scored else effect)
    elif isinstance(head, Quantity):
        if len(np.unique(target[known])) == 1:
            yield 'has the same number in every row: ' + ('r2 is not defined' if scored else effect)
    else:
        zeros, ones = (target == 0).any(axis=0), (target == 1).any(axis=0)
        for which, lack in ((~zeros & ones, 'without a 0'), (zeros & ~ones, 'without a 1'),
                            (~zeros & ~ones, 'without any label')):
            if which.any():
                names = [tag for tag, lacks in zip(head.classes, which) if lacks]
                yield f'has {len(names)} of {len(head.classes)} tags {lack} ({_some(names)}): {effect}'


def can_be_scored(head: Labels, target: torch.Tensor) -> bool:
    """Whether the main metric of a head has a value: two classes to tell apart, a tag with 0 and 1, or two numbers.

    Args:
        head: The labels of the head.
        target: Its targets in the evaluation, as `LabelSpace.split` gives them.
    """
    if isinstance(head, TagSet):
        return bool(((target == 0).any(dim=0) & (target == 1).any(dim=0)).any())
    known = target[head.known(target)]
    if isinstance(head, LabelSet):
        return len(head.classes) > 1 and len(known) > 0
    return len(known.unique()) > 1


def _some(names: Sequence[str]) -> str:
    return listed(names[:5]) + (', ...' if len(names) > 5 else '')
