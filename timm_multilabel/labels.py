"""The label space: which heads there are, what each one's labels are, and text <-> numbers.

Three kinds of labels: one class an image (`LabelSet`), several tags an image (`TagSet`), a number (`Quantity`). A row
of targets holds the columns of all heads side by side, in float32, which holds class indices up to 2^24 exactly.
"""
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from timm_multilabel.errors import UserError, shortened
from timm_multilabel.files import read_text, write_whole

MISSING = -1
"""The class index, or the 0/1 of a tag, of a label that is not there: nothing is learnt from it or scored on it."""

UNKNOWN = -2
"""What `encode` gives for a text that is no class; never leaves the data code."""

MAX_CLASSES = 2 ** 24
"""Classes of a column at most, since class indices travel as float32."""

TAG_SEPARATOR = '|'
"""Between the tags of a cell."""

_MAX_BYTES = 2 ** 29  # of a label space as JSON


class BadCell(ValueError):
    """A cell that cannot be read.

    Args:
        message: What is wrong with it.
        column: Its column.
        row: Its label in the table's index.
    """

    def __init__(self, message: str, column: str, row: Any):
        super().__init__(message)
        self.column, self.row = column, row


@dataclass(frozen=True)
class LabelSet:
    """One class an image: a column of the table and its classes, in index order."""
    name: str
    classes: tuple[str, ...]

    kind = 'classes'
    width = 1

    @classmethod
    def from_cells(cls, name: str, cells: pd.DataFrame) -> 'LabelSet':
        """The classes that occur in a column, sorted by text; an empty text is a missing label, not a class."""
        return cls(name, _sorted_texts(name, cells.iloc[:, 0]))

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def outputs(self) -> int:
        return len(self.classes)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {'': MISSING, **{text: index for index, text in enumerate(self.classes)}}

    def encode(self, cells: pd.DataFrame) -> np.ndarray:
        """Class indices (N, 1): MISSING for an empty text, UNKNOWN for one that is no class."""
        index = (self._index.get(text, UNKNOWN) for text in cells.iloc[:, 0])
        return np.fromiter(index, dtype=np.float32)[:, None]

    def unknown(self, cells: pd.DataFrame) -> dict[str, list[Any]]:
        """The texts that are no classes, with their rows."""
        return _group((row, text) for row, text in cells.iloc[:, 0].items() if text not in self._index)

    def known(self, target: torch.Tensor) -> torch.Tensor:
        """Which rows (B,) of class indices (B,), or of mixed labels (B, C), have a label."""
        return target != MISSING if target.ndim == 1 else target.sum(dim=1) > 0

    def __str__(self) -> str:
        return f'{self.name} ({len(self.classes)})'


@dataclass(frozen=True)
class TagSet:
    """Several tags an image: `a|b` in one column, or a group of 0/1 columns, one a tag.

    `group` holds the columns of a group, which are the tags; without it the head's name is the column.
    """
    name: str
    classes: tuple[str, ...]
    group: tuple[str, ...] = ()

    kind = 'tags'

    @classmethod
    def from_cells(cls, name: str, cells: pd.DataFrame) -> 'TagSet':
        """The tags that occur in a column, sorted by text."""
        texts = cells.iloc[:, 0]
        return cls(name, _sorted_texts(name, (tag for text in texts for tag in _tags(text))))

    @classmethod
    def from_group(cls, name: str, cells: pd.DataFrame) -> 'TagSet':
        """The columns of a group as tags.

        Raises:
            BadCell: A cell that is not 0, 1 or empty.
            ValueError: All cells are empty.
        """
        found = cls(name, tuple(cells.columns), tuple(cells.columns))
        if not (found.encode(cells) != MISSING).any():
            raise ValueError(f"the columns of '{shortened(name)}' have no label in any row")
        return found

    @property
    def columns(self) -> tuple[str, ...]:
        return self.group or (self.name,)

    @property
    def width(self) -> int:
        return len(self.classes)

    outputs = width

    def encode(self, cells: pd.DataFrame) -> np.ndarray:
        """0, 1 or MISSING for each tag (N, C); unknown tags are passed over, and a cell without a tag is all missing.

        Raises:
            BadCell: A cell of a group that is not 0, 1 or empty.
        """
        if self.group:
            values = {'0': 0, '1': 1, '': MISSING}
            for name in cells.columns:
                for row, text in cells[name].items():
                    if text not in values:
                        raise BadCell(f"'{shortened(text)}' is neither 0 nor 1", name, row)
            return cells.replace(values).to_numpy(dtype=np.float32)
        index = {tag: position for position, tag in enumerate(self.classes)}
        encoded = np.zeros((len(cells), len(self.classes)), dtype=np.float32)
        for row, text in zip(encoded, cells.iloc[:, 0]):
            tags = [index[tag] for tag in _tags(text) if tag in index]
            row[tags] = 1
            if not tags:
                row[:] = MISSING
        return encoded

    def unknown(self, cells: pd.DataFrame) -> dict[str, list[Any]]:
        """The tags that training does not know, with their rows."""
        if self.group:
            return {}
        known = set(self.classes)
        return _group((row, tag) for row, text in cells.iloc[:, 0].items() for tag in _tags(text) if tag not in known)

    def known(self, target: torch.Tensor) -> torch.Tensor:
        """Which rows (B,) of tags (B, C) have any label."""
        return (target != MISSING).any(dim=1)

    def __str__(self) -> str:
        return f'{self.name} ({len(self.classes)} tags)'


@dataclass(frozen=True)
class Quantity:
    """A number an image; targets are standardised with the mean and the standard deviation of the training rows."""
    name: str
    mean: float
    std: float

    kind = 'number'
    width = 1
    outputs = 1

    @classmethod
    def from_cells(cls, name: str, cells: pd.DataFrame) -> 'Quantity':
        """Mean and standard deviation of a column's numbers.

        Raises:
            BadCell: A cell is no number.
            ValueError: There is no number at all.
        """
        values = _numbers(name, cells.iloc[:, 0])
        values = values[~np.isnan(values)]
        if not len(values):
            raise ValueError(f"column '{shortened(name)}' has no label in any row")
        with np.errstate(over='ignore', invalid='ignore'):
            mean, std = float(values.mean()), float(values.std())
        if not np.isfinite([mean, std]).all():
            raise ValueError(f"the numbers of column '{shortened(name)}' are too large")
        return cls(name, mean, std if std > 1e-12 * abs(mean) else 1.0)  # of equal numbers only rounding is left

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    def encode(self, cells: pd.DataFrame) -> np.ndarray:
        """Standardised numbers (N, 1), NaN where the cell is empty.

        Raises:
            BadCell: A cell is no number.
        """
        return ((_numbers(self.name, cells.iloc[:, 0]) - self.mean) / self.std).astype(np.float32)[:, None]

    def unknown(self, cells: pd.DataFrame) -> dict[str, list[Any]]:
        return {}

    def known(self, target: torch.Tensor) -> torch.Tensor:
        """Which rows (B,) of numbers (B,) have one."""
        return ~target.isnan()

    def __str__(self) -> str:
        return f'{self.name} (number)'


Labels = LabelSet | TagSet | Quantity


def _sorted_texts(name: str, texts: Iterable[str]) -> tuple[str, ...]:
    found = tuple(sorted(set(texts) - {''}))
    if not found:
        raise ValueError(f"column '{shortened(name)}' has no label in any row")
    if len(found) > MAX_CLASSES:
        raise ValueError(f"column '{shortened(name)}' has {len(found):,} different labels, and {MAX_CLASSES:,} are the "
                         'most')
    return found


def _tags(text: str) -> list[str]:
    return [tag for tag in map(str.strip, text.split(TAG_SEPARATOR)) if tag]


def _numbers(name: str, texts: pd.Series) -> np.ndarray:
    """Numbers (N,) in float64, NaN for an empty text."""
    numbers = pd.to_numeric(texts.replace('', '0'), errors='coerce').to_numpy(dtype=np.float64, copy=True)
    wrong = ~np.isfinite(numbers)
    if wrong.any():
        row = texts.index[wrong][0]
        raise BadCell(f"'{shortened(texts[row])}' is no number", name, row)
    numbers[(texts == '').to_numpy()] = np.nan
    return numbers


def _group(pairs: Iterable[tuple[Any, str]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row, text in pairs:
        found.setdefault(text, []).append(row)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class LabelSpace:
    """All heads' labels, in the order of their columns; classes are sorted by text, whatever the order of rows."""
    heads: tuple[Labels, ...]

    @classmethod
    def from_columns(cls, columns: Mapping[str, Iterable[str]]) -> 'LabelSpace':
        """The label space of class texts by column, each column a `LabelSet`.

        Raises:
            ValueError: A column without any label.
        """
        return cls(tuple(LabelSet(name, _sorted_texts(name, texts)) for name, texts in columns.items()))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(head.name for head in self.heads)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of outputs of each head: its classes, its tags, or 1."""
        return tuple(head.outputs for head in self.heads)

    def split(self, targets: torch.Tensor) -> list[torch.Tensor]:
        """Targets (B, W) as each head takes them.

        Class indices (B,) as int64, tags (B, C), numbers (B,); or, where all heads have classes and the targets are of
        Mixup or CutMix, (B, C) each.
        """
        widths = [head.width for head in self.heads]
        if targets.shape[1] != sum(widths):
            return list(targets.split(self.sizes, dim=1))
        columns = targets.split(widths, dim=1)
        return [_as_taken(head, column) for head, column in zip(self.heads, columns, strict=True)]

    def labelled(self, targets: torch.Tensor) -> torch.Tensor:
        """Which labels are there: (B, H) for targets (B, W)."""
        known = [head.known(column) for head, column in zip(self.heads, self.split(targets), strict=True)]
        return torch.stack(known, dim=1) if known else torch.zeros(len(targets), 0, dtype=torch.bool)

    def __str__(self) -> str:
        return ', '.join(map(str, self.heads)) or 'no heads'

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON and for checkpoints that load with `weights_only=True`."""
        return {'heads': [
            {key: list(value) if isinstance(value, tuple) else value for key, value in vars(head).items()
             if key in head.__dataclass_fields__} | {'kind': head.kind}
            for head in self.heads]}

    @classmethod
    def from_dict(cls, data: Any) -> 'LabelSpace':
        """The inverse of `to_dict`.

        Raises:
            ValueError: The data is not that of a label space.
        """
        try:
            heads = tuple(_labels_from_dict(head) for head in data['heads'])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError('not a label space') from error
        if len({head.name for head in heads}) != len(heads):
            raise ValueError('two heads have the same name')
        return cls(heads)

    def save(self, path: str | Path) -> None:
        """Write the label space as JSON."""
        write_whole(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + '\n')

    @classmethod
    def load(cls, path: str | Path) -> 'LabelSpace':
        """Read what `save` wrote.

        Raises:
            UserError: The file is missing or holds no label space.
        """
        try:
            return cls.from_dict(json.loads(read_text(path, _MAX_BYTES)))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f'{path}: cannot be read as a label space ({error})') from error


def missing_row(label_space: LabelSpace) -> torch.Tensor:
    """The targets (W,) of an image without any label."""
    row = [math.nan if isinstance(head, Quantity) else MISSING for head in label_space.heads for _ in range(head.width)]
    return torch.tensor(row, dtype=torch.float32)


def _as_taken(head: Labels, column: torch.Tensor) -> torch.Tensor:
    if isinstance(head, TagSet):
        return column
    return column[:, 0].long() if isinstance(head, LabelSet) else column[:, 0]


def _labels_from_dict(data: dict[str, Any]) -> Labels:
    data = dict(data)
    kind, name = data.pop('kind', LabelSet.kind), data['name']
    if kind == Quantity.kind:
        made = Quantity(name, float(data['mean']), float(data['std']))
        texts = (name,)
        if not (math.isfinite(made.mean) and math.isfinite(made.std) and made.std > 0):
            raise ValueError(f"head '{shortened(str(name))}' has a mean of {made.mean} and a deviation of {made.std}")
    elif kind == TagSet.kind:
        made = TagSet(name, tuple(data['classes']), tuple(data['group']))
        texts = (name, *made.classes, *made.group)
        if made.group not in ((), made.classes):
            raise ValueError(f"the columns of head '{shortened(str(name))}' are not its tags")
    else:
        made = LabelSet(name, tuple(data['classes']))
        texts = (name, *made.classes)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError('not a label space')
    ''.join(texts).encode()  # raises where JSON spells half a surrogate pair, which could not be written again
    if made.kind != Quantity.kind and len(made.classes) > MAX_CLASSES:
        raise ValueError(f"head '{shortened(name)}' has more than {MAX_CLASSES:,} classes")
    if made.kind != Quantity.kind and (not made.classes or len(set(made.classes)) != len(made.classes)):
        raise ValueError(f"head '{shortened(name)}' has no classes or has one twice")
    return made
