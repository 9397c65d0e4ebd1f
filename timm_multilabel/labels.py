"""The label space: which heads there are, what each one's labels are, and text <-> numbers.

Three kinds of labels: one class an image (`LabelSet`), several tags an image (`TagSet`), a number (`Quantity`). A row
of targets holds the columns of all heads side by side, in float32, which holds class indices up to 2^24 exactly.
"""
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from timm_multilabel.cells import TAG_SEPARATOR, BadCell, singles, tags_of, truth
from timm_multilabel.errors import DataError, shortened
from timm_multilabel.files import read_text, reading, write_atomic

MISSING = -1
"""The class index, or the 0/1 of a tag, of a label that is not there: nothing is learnt from it or scored on it."""

UNKNOWN = -2
"""What `encode` gives for a text that is no class; never leaves the data code."""

MAX_CLASSES = 2 ** 24
"""Classes of a column at most, since class indices travel as float32."""

_MAX_BYTES = 2 ** 29  # of a label space as JSON
_LISTED = 8  # tags of an image that are named


class _Classes:
    """What classes and tags share."""
    classes: tuple[str, ...]
    noun: ClassVar[tuple[str, str]]
    missing: ClassVar[float] = MISSING

    @property
    def counted(self) -> str:
        """How many there are, such as '140 classes'."""
        return f'{len(self.classes)} {self.noun[len(self.classes) != 1]}'

    @staticmethod
    def in_unit(values: Any) -> Any:
        """Probabilities as they are; of numbers those in the column's unit."""
        return values


@dataclass(frozen=True)
class LabelSet(_Classes):
    """One class an image: a column of the table and its classes, in index order."""
    name: str
    classes: tuple[str, ...]

    kind = 'classes'
    noun = 'class', 'classes'
    width = 1

    @classmethod
    def from_cells(cls, name: str, cells: pd.DataFrame) -> 'LabelSet':
        """The classes that occur in a column, sorted by text; an empty text is a missing label, not a class.

        Raises:
            BadCell: A cell is a list of none or of several.
        """
        return cls(name, _sorted_texts(name, singles(cells)))

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
        """Class indices (N, 1): MISSING for an empty text, UNKNOWN for one that is no class.

        Raises:
            BadCell: A cell is a list of none or of several.
        """
        index = (self._index.get(text, UNKNOWN) for text in singles(cells))
        return np.fromiter(index, dtype=np.float32)[:, None]

    def unknown(self, cells: pd.DataFrame) -> dict[str, list[Any]]:
        """The texts that are no classes, with their rows."""
        return _group((row, text) for row, text in singles(cells).items() if text not in self._index)

    def check(self, target: np.ndarray) -> None:
        """Raise ValueError unless targets (N,) are indices of classes or missing."""
        if ((target < MISSING) | (target >= len(self.classes))).any():
            raise ValueError(f"head '{self.name}': a class that there is not")

    def known(self, target: torch.Tensor) -> torch.Tensor:
        """Which rows (B,) of class indices (B,), or of mixed labels (B, C), have a label."""
        return target != MISSING if target.ndim == 1 else target.sum(dim=1) > 0

    def as_taken(self, columns: torch.Tensor) -> torch.Tensor:
        """Targets (B, 1) as class indices (B,)."""
        return columns[:, 0].long()

    def predicted(self, output: np.ndarray) -> np.ndarray:
        """The likeliest class (N,) of probabilities (N, C)."""
        return np.asarray(output.argmax(axis=1))

    def describe(self, target: Any) -> str:
        """A class index in words; '-' where it is missing."""
        return shortened(self.classes[target]) if target != MISSING else '-'

    def __str__(self) -> str:
        return f'{self.name} ({len(self.classes)})'


@dataclass(frozen=True)
class TagSet(_Classes):
    """Several tags an image: `a|b` in one column, or a group of 0/1 columns, one a tag.

    Args:
        name: The head; without a group the column as well.
        classes: The tags.
        group: The columns of a group, which are the tags.
        minus: Those of them in which -1 stands for 0.
        separator: What is between the tags of a cell.
        none: The text of a cell that means none of the tags, beside an empty list.
    """
    name: str
    classes: tuple[str, ...]
    group: tuple[str, ...] = ()
    # How labels are written makes no difference to what they are.
    minus: tuple[str, ...] = field(default=(), compare=False)
    separator: str = field(default=TAG_SEPARATOR, compare=False)
    none: str | None = field(default=None, compare=False)

    kind = 'tags'
    noun = 'tag', 'tags'

    @classmethod
    def from_cells(
            cls,
            name: str,
            cells: pd.DataFrame,
            separator: str = TAG_SEPARATOR,
            none: str | None = None,
    ) -> 'TagSet':
        """The tags that occur in a column, sorted by text.

        Raises:
            BadCell: A cell says that there is no tag, and names some.
        """
        found = cls(name, (), separator=separator, none=none)
        tags = (tag for _, tags in found._tags(cells) for tag in tags or ())
        return replace(found, classes=_sorted_texts(name, tags))

    @classmethod
    def from_group(cls, name: str, cells: pd.DataFrame) -> 'TagSet':
        """The columns of a group as tags.

        -1 is 0 in all columns where none has a 0 and some have both 1 and -1, else in those that have -1 and no 0.

        Raises:
            BadCell: A cell that is not 0, 1 or empty, see `truth`.
            ValueError: All cells are empty.
        """
        columns = tuple(cells.columns)
        truths = {column: {truth(text) for text in set(cells[column])} for column in columns}
        minus = tuple(column for column, found in truths.items() if -1 in found and 0 not in found)
        if not any(1 in truths[column] for column in minus):
            minus = ()
        elif not any(0 in found for found in truths.values()):
            minus = columns
        found = cls(name, columns, columns, minus)
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
        """0, 1 or MISSING for each tag (N, C); unknown tags are passed over, and an empty cell is all missing.

        Raises:
            BadCell: A cell of a group that is not 0, 1 or empty, or one that says none and names tags.
        """
        if self.group:
            return np.stack([self._truths(name, cells[name]) for name in cells.columns], axis=1)
        index = {tag: position for position, tag in enumerate(self.classes)}
        encoded = np.zeros((len(cells), len(self.classes)), dtype=np.float32)
        for row, (_, tags) in zip(encoded, self._tags(cells)):
            if tags is None:
                row[:] = MISSING
            else:
                row[[index[tag] for tag in tags if tag in index]] = 1
        return encoded

    def _truths(self, name: str, texts: pd.Series) -> np.ndarray:
        """0, 1 or MISSING for each cell (N,) of a column of a group."""
        zero = -1 if name in self.minus else 0
        meanings = {1: 1, zero: 0, None: None}
        values = {text: meanings.get(truth(text)) if text else MISSING for text in set(texts)}
        if None in values.values():
            row, text = next((row, text) for row, text in texts.items() if values[text] is None)
            hint = '; where it is a missing label, --missing-value -1' if truth(text) == -1 else ''
            raise BadCell(f"'{shortened(text)}' is neither {zero} nor 1{hint}", name, row)
        return np.asarray(texts.map(values), dtype=np.float32)

    def _tags(self, cells: pd.DataFrame) -> Iterator[tuple[Any, list[str] | None]]:
        """Each row with its tags, None where it has no label."""
        for row, text in cells.iloc[:, 0].items():
            try:
                yield row, tags_of(text, self.separator, self.none)
            except ValueError as error:
                raise BadCell(str(error), self.name, row) from error

    def unknown(self, cells: pd.DataFrame) -> dict[str, list[Any]]:
        """The tags that training does not know, with their rows."""
        if self.group:
            return {}
        known = set(self.classes)
        return _group((row, tag) for row, tags in self._tags(cells) for tag in tags or () if tag not in known)

    def check(self, target: np.ndarray) -> None:
        """Raise ValueError unless targets (N, C) are 0, 1 or missing."""
        if not np.isin(target, (MISSING, 0, 1)).all():
            raise ValueError(f"head '{self.name}': a tag that is neither 0 nor 1")

    def known(self, target: torch.Tensor) -> torch.Tensor:
        """Which rows (B,) of tags (B, C) have any label."""
        return (target != MISSING).any(dim=1)

    def as_taken(self, columns: torch.Tensor) -> torch.Tensor:
        """Targets (B, C) as they are."""
        return columns

    def predicted(self, output: np.ndarray) -> np.ndarray:
        """Probabilities (N, C) as they are."""
        return output

    def describe(self, target: Any) -> str:
        """Tags (C,) in words; '-' where all are missing."""
        return self.listed(target == 1) if (target != MISSING).any() else '-'

    def listed(self, which: np.ndarray) -> str:
        """The tags that are marked (C,), the first of them by name; 'none' where none is."""
        indices = np.flatnonzero(which)
        more = f', {len(indices) - _LISTED} more' if len(indices) > _LISTED else ''
        return ', '.join(shortened(self.classes[index]) for index in indices[:_LISTED]) + more or 'none'

    def __str__(self) -> str:
        return f'{self.name} ({len(self.classes)} tags)'


@dataclass(frozen=True)
class Quantity:
    """A number an image; targets are standardised with the mean and the standard deviation of the training rows."""
    name: str
    mean: float
    std: float

    kind = 'number'
    classes: ClassVar[tuple[str, ...]] = ()
    counted = 'a number'
    missing: ClassVar[float] = math.nan
    width = 1
    outputs = 1

    @classmethod
    def from_cells(cls, name: str, cells: pd.DataFrame) -> 'Quantity':
        """Mean and standard deviation of a column's numbers.

        Raises:
            BadCell: A cell is no number.
            ValueError: There is no number at all.
        """
        values = _numbers(name, singles(cells))
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
        return ((_numbers(self.name, singles(cells)) - self.mean) / self.std).astype(np.float32)[:, None]

    def unknown(self, cells: pd.DataFrame) -> dict[str, list[Any]]:
        return {}

    def check(self, target: np.ndarray) -> None:
        """Raise ValueError unless targets (N,) are finite or missing."""
        if np.isinf(target).any():
            raise ValueError(f"head '{self.name}': a number that is not finite")

    def known(self, target: torch.Tensor) -> torch.Tensor:
        """Which rows (B,) of numbers (B,) have one."""
        return ~target.isnan()

    def as_taken(self, columns: torch.Tensor) -> torch.Tensor:
        """Targets (B, 1) as numbers (B,)."""
        return columns[:, 0]

    def predicted(self, output: np.ndarray) -> np.ndarray:
        """The number (N,) of outputs (N, 1)."""
        return output[:, 0]

    def in_unit(self, values: Any) -> Any:
        """Standardised numbers in the column's unit."""
        return values * self.std + self.mean

    def describe(self, target: Any) -> str:
        """A standardised number in the column's unit; '-' where it is missing."""
        return '-' if math.isnan(target) else f'{self.in_unit(float(target)):.4g}'

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


def _numbers(name: str, texts: pd.Series) -> np.ndarray:
    """Numbers (N,) in float64, NaN for an empty text."""
    filled = texts.replace('', '0')
    numbers: np.ndarray = pd.to_numeric(filled, errors='coerce').to_numpy(dtype=np.float64, copy=True)
    wrong = ~np.isfinite(numbers)
    if wrong.any():
        raise BadCell(f"'{shortened(texts.iloc[wrong.argmax()])}' is no number", name, texts.index[wrong.argmax()])
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
        if all(isinstance(head, LabelSet) for head in self.heads):
            return list(targets.long().unbind(dim=1))
        columns = targets.split(widths, dim=1)
        return [head.as_taken(column) for head, column in zip(self.heads, columns, strict=True)]

    def of(self, targets: torch.Tensor, head: str) -> torch.Tensor:
        """What `split` gives of one head."""
        return self.split(targets)[self.names.index(head)]

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
            if not isinstance(data['heads'], list | tuple):
                raise TypeError('no list of heads')
            heads = tuple(_labels_from_dict(head) for head in data['heads'])
        except ValueError:
            raise
        except Exception as error:  # whatever is wrong with data that nobody has checked
            raise ValueError('not a label space') from error
        if len({head.name for head in heads}) != len(heads):
            raise ValueError('two heads have the same name')
        return cls(heads)

    def save(self, path: str | Path) -> None:
        """Write the label space as JSON.

        Raises:
            DataError: `load` would refuse it, or the file cannot be written.
        """
        try:
            self.from_dict(self.to_dict())
        except ValueError as error:
            raise DataError(f'{path}: cannot be written ({error}); rename it in the data') from error
        write_atomic(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + '\n')

    @classmethod
    def load(cls, path: str | Path) -> 'LabelSpace':
        """Read what `save` wrote.

        Raises:
            DataError: The file is missing or holds no label space.
        """
        with reading(path, 'a label space', 'restore it, or remove it to have it made again'):
            return cls.from_dict(json.loads(read_text(path, _MAX_BYTES)))


def missing_row(label_space: LabelSpace) -> torch.Tensor:
    """The targets (W,) of an image without any label."""
    row = [head.missing for head in label_space.heads for _ in range(head.width)]
    return torch.tensor(row, dtype=torch.float32)


def _tag_set_from_dict(name: str, data: dict[str, Any]) -> TagSet:
    made = TagSet(name, tuple(data['classes']), tuple(data['group']), tuple(data.get('minus', ())),
                  data.get('separator', TAG_SEPARATOR), data.get('none'))
    if not set(made.minus) <= set(made.group):
        raise ValueError(f"head '{name}' has -1 in other columns than its own")
    written = (made.separator,) if made.none is None else (made.separator, made.none)
    if not all(isinstance(text, str) and text for text in written) or made.none in made.classes:
        raise ValueError(f"head '{name}' has no text between tags, or none that means no tag")
    return made


def _labels_from_dict(data: dict[str, Any]) -> Labels:
    kind, name = data.get('kind', LabelSet.kind), data['name']
    made: Labels
    texts: Sequence[Any] = ()
    if kind == Quantity.kind:
        made = Quantity(name, float(data['mean']), float(data['std']))
        if not math.isfinite(made.mean) or not 0 < made.std < math.inf:
            raise ValueError(f"head '{name}' has no mean and standard deviation")
    elif kind in (TagSet.kind, LabelSet.kind):
        texts = data['classes']
        if not isinstance(texts, list | tuple):
            raise ValueError(f"head '{name}' has no list of classes")
        made = LabelSet(name, tuple(texts)) if kind == LabelSet.kind else _tag_set_from_dict(name, data)
        if len(texts) > MAX_CLASSES:
            raise ValueError(f"head '{shortened(name)}' has more than {MAX_CLASSES:,} classes")
        if not texts or len(set(texts)) != len(texts) or getattr(made, 'group', ()) not in ((), made.classes):
            raise ValueError(f"head '{name}' has no classes, has one twice, or those of other columns")
    else:
        raise ValueError(f"head '{name}' is of no kind")
    for text in (name, *texts):
        if not isinstance(text, str) or not text or any('\ud800' <= letter <= '\udfff' for letter in text):
            raise ValueError('a name or a label that is no text')
    if not all(text.isprintable() for text in (name, *getattr(made, 'group', ()))):  # as `read_table` asks of columns
        raise ValueError(f'the name {shortened(name)!r} of a head, or of a column of it, holds control characters')
    return made
