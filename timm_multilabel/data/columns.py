"""What the columns of a table look like, so that not every column becomes a head of classes."""
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from timm_multilabel.cells import LIST, TAG_SEPARATOR, split_tags, values_of_list
from timm_multilabel.data.table import Table
from timm_multilabel.errors import listed, shortened

CLASSES, NUMBER, IDENTIFIER, TEXT, TAGS = 'classes', 'number', 'identifier', 'free text', 'tags'

LEFT_OUT = (IDENTIFIER, TEXT)
"""What no head learns unless it is asked for by name."""

MIN_LABELS = 20
"""Labels below which a column tells too little: it is taken for classes, or for tags."""

_UNIQUE = 0.9  # different labels for each label, from which they are identifiers
_UNIQUE_INTEGERS = 0.98  # of whole numbers, which may be prices in cents
_TEXT, _WORDS = 0.5, 3  # different labels for each label and words of a label, from which they are free text
_MIN_NUMBERS = 20  # different numbers up to which they are classes, such as years or grades
_PER_CLASS = 50  # labels of each whole number from which it is a class
_DENSE = 0.8  # share of 0 (or 1) to the largest number that occurs where whole numbers are indices of classes
_TAGGED = 0.05  # share of labels with a tag separator from which they are tags


@dataclass(frozen=True)
class Look:
    """What a column looks like: its kind, its number of labels, and how many of them are different."""
    kind: str
    labels: int
    different: int

    def __str__(self) -> str:
        return f'{self.kind} ({self.different:,}{"" if self.kind == CLASSES else " different"})'


@dataclass(frozen=True)
class Columns:
    """The columns of a table, and which of them to learn.

    Args:
        looks: What each column looks like that is in no group of 0/1 columns, by name.
        heads: The columns, and groups of columns, that become heads.
        left_out: Columns that are left out for what they look like.
        asked: Columns that look like numbers, of which nobody said what they are.
        as_classes: Columns that look like tags, or numbers that the user names as heads, without a word on their kind.
    """
    looks: dict[str, Look]
    heads: list[str]
    left_out: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    as_classes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What to tell of them."""
        lines = []
        if self.looks:
            lines.append('columns look like: ' + listed([
                f'{shortened(name)} {look}' for name, look in self.looks.items()]))
        if self.left_out:
            described = listed([f'{shortened(name)} ({self.looks[name].kind})' for name in self.left_out])
            lines.append(f'left out: {described}; name a column in --heads to keep it')
        return [*lines, *map(self.remark, self.as_classes)]

    def remark(self, name: str) -> str:
        """What to say of a column of `as_classes`."""
        look, name = self.looks[name], shortened(name)
        kind, loss = (TAGS, 'tags') if look.kind == TAGS else ('a number', 'numeric')
        return (f"'{name}' looks like {kind} and is learnt as {look.different:,} classes; change that with --head "
                f'{name}:loss={loss}')

    def question(self, name: str) -> str:
        """What to say of a column of `asked`."""
        look, name = self.looks[name], shortened(name)
        return (f"column '{name}' looks like a number ({look.different:,} different in {look.labels:,} labels); learn "
                f'it as one with --head {name}:loss=numeric, as classes with --head {name}:loss=softmax, or choose '
                'others with --heads')


def look_at(texts: Sequence[str], tag_separator: str = TAG_SEPARATOR) -> Look:
    """What the cells of a column look like; empty ones do not count, and a list of one value is that value."""
    counts = Counter(texts)
    del counts['']
    labels, different = counts.total(), {text.removeprefix(LIST) for text in counts}
    tagged = sum(count for text, count in counts.items() if _no_single(text, tag_separator))
    kind = TAGS if labels and tagged >= _TAGGED * labels else CLASSES
    if kind == CLASSES and labels >= MIN_LABELS:
        numbers = _numbers(different)
        kind = _kind_of_texts(different, labels) if numbers is None else _kind_of_numbers(numbers, labels)
    return Look(kind, labels, len(different))


def _no_single(text: str, tag_separator: str) -> bool:
    """Whether a cell has several tags, or is a list of none."""
    values = values_of_list(text)
    return len(split_tags(text, tag_separator)) > 1 if values is None else len(values) != 1


def _numbers(texts: Collection[str]) -> set[float] | None:
    """Texts as finite numbers, or None where one is none."""
    try:
        numbers = set(map(float, texts))
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _kind_of_texts(different: Collection[str], labels: int) -> str:
    words = sum(len(text.split()) for text in different) / len(different)
    if len(different) >= _TEXT * labels and words >= _WORDS:
        return TEXT
    return IDENTIFIER if len(different) >= _UNIQUE * labels else CLASSES


def _kind_of_numbers(different: Collection[float], labels: int) -> str:
    whole = all(map(float.is_integer, different))
    if whole and len(different) >= _UNIQUE_INTEGERS * labels:
        return IDENTIFIER
    if len(different) <= _MIN_NUMBERS:
        return CLASSES
    indices = whole and min(different) in (0, 1) and len(different) >= _DENSE * (max(different) + 1)
    return CLASSES if indices or whole and labels >= _PER_CLASS * len(different) else NUMBER


def choose_columns(
        table: Table,
        heads: list[str] | None,
        given: Mapping[str, Mapping[str, object]],
        groups: Mapping[str, Sequence[str]],
        tag_separator: str | None = None,
) -> Columns:
    """Look at the label columns of a table, and choose those that become heads.

    Args:
        table: The training table; one without rows, as of shards whose labels are not read, tells nothing.
        heads: The heads that the user names; when None, every column (or group) but those that are left out.
        given: The options of heads that the user names, '*' for every head.
        groups: The 0/1 columns of a head of tags, by its name.
        tag_separator: What is between the tags of heads whose kind the user names; `|` when None, and of the others,
            whose texts may have commas and blanks in them.
    """
    grouped = {column: name for name, columns in groups.items() for column in columns}
    names = heads
    if names is None:
        names = list(dict.fromkeys(grouped.get(column, column) for column in table.label_columns))
    said = {name for name in names if 'loss' in given.get(name, given.get('*', {}))}
    looks = {
        name: look_at(table.frame[name].tolist(), (tag_separator if name in said else None) or TAG_SEPARATOR)
        for name in names if name not in groups and table.has_label(name)} if len(table.frame) else {}
    found = Columns(looks, [])
    for name in names:
        kind = looks[name].kind if name in looks else None
        named = heads is not None or name in given
        if kind in LEFT_OUT and not named:
            found.left_out.append(name)
            continue
        found.heads.append(name)
        if kind in (NUMBER, TAGS) and name not in said:
            (found.asked if kind == NUMBER and not named else found.as_classes).append(name)
    return found
