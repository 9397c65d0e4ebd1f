"""The label space: which heads there are, which classes each has, and text <-> index."""
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from timm_multilabel.errors import UserError
from timm_multilabel.files import write_whole

MISSING = -1
"""The class index of a label that is not there: nothing is learnt from it and nothing is scored on it."""

UNKNOWN = -2
"""What `LabelSet.encode` gives for a text that is no class; never leaves the data code."""


@dataclass(frozen=True)
class LabelSet:
    """The labels of one head: a column of the table and its classes, in index order."""
    name: str
    classes: tuple[str, ...]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {'': MISSING, **{text: index for index, text in enumerate(self.classes)}}

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """Class indices (int64) of label texts: MISSING for an empty text, UNKNOWN for one that is no class."""
        return np.fromiter((self._index.get(text, UNKNOWN) for text in texts), dtype=np.int64)


@dataclass(frozen=True)
class LabelSpace:
    """All heads, in the order of their columns; classes are sorted by text, so the order never depends on the rows."""
    heads: tuple[LabelSet, ...]

    @classmethod
    def from_columns(cls, columns: Mapping[str, Iterable[str]]) -> 'LabelSpace':
        """The label space of label texts by column. An empty text is a missing label, not a class.

        Raises:
            ValueError: A column without any label.
        """
        heads = []
        for name, texts in columns.items():
            classes = tuple(sorted(set(texts) - {''}))
            if not classes:
                raise ValueError(f"column '{name}' has no label in any row")
            heads.append(LabelSet(name, classes))
        return cls(tuple(heads))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(head.name for head in self.heads)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of classes of each head."""
        return tuple(len(head.classes) for head in self.heads)

    def __str__(self) -> str:
        return ', '.join(f'{head.name} ({len(head.classes)})' for head in self.heads) or 'no heads'

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for JSON and for checkpoints that load with `weights_only=True`."""
        return {'heads': [{'name': head.name, 'classes': list(head.classes)} for head in self.heads]}

    @classmethod
    def from_dict(cls, data: Any) -> 'LabelSpace':
        """The inverse of `to_dict`.

        Raises:
            ValueError: The data is not that of a label space.
        """
        try:
            heads = tuple(LabelSet(head['name'], tuple(head['classes'])) for head in data['heads'])
        except (TypeError, KeyError) as error:
            raise ValueError('not a label space') from error
        for head in heads:
            if not isinstance(head.name, str) or not all(isinstance(text, str) and text for text in head.classes):
                raise ValueError('not a label space')
            if not head.classes or len(set(head.classes)) != len(head.classes):
                raise ValueError(f"head '{head.name}' has no classes or has one twice")
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
            return cls.from_dict(json.loads(Path(path).read_text(encoding='utf-8')))
        except (OSError, ValueError) as error:
            raise UserError(f'{path}: cannot be read as a label space ({error})') from error
