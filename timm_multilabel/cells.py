"""Cells as text: lists as shards have them, tags written in one text, and the words for yes and no."""
import csv
import math
from collections.abc import Iterable, Iterator
from io import StringIO
from typing import Any

import pandas as pd

from timm_multilabel.errors import DataError, shortened

TAG_SEPARATOR = '|'
"""Between the tags of a cell, unless told otherwise."""

LIST = '\udc80'
"""Before each value of a cell that was a list, and alone an empty list.

It is half of a surrogate pair, which no text that was read from a file can hold, so no label can be taken for it.
"""

_MAX_CELLS = 2 ** 27  # of a table where nearly all cells are empty
_MAX_HOLES = 100  # cells of such a table for each one that is filled
_WORDS = {'true': 1, 't': 1, 'yes': 1, 'y': 1, 'false': 0, 'f': 0, 'no': 0, 'n': 0}


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


def csv_rows(content: str, **options: Any) -> Iterator[list[str]]:
    """The rows of a CSV by `csv.reader`, with cells of any length.

    Args:
        content: The text of the file.
        options: Of `csv.reader`.
    """
    csv.field_size_limit(2 ** 31 - 1)  # of the whole process, where any library may have set another
    return csv.reader(StringIO(content, newline=''), **options)


def list_cell(texts: Iterable[str]) -> str:
    """The cell of a list of texts, none of them empty."""
    return ''.join(LIST + text for text in texts) or LIST


def cell_text(value: Any, name: str, column: str) -> str:
    """A label as the cell of a CSV would hold it, or the cell of a list.

    Args:
        value: What a table of typed values holds.
        name: What messages call its row.
        column: Its column.

    Raises:
        DataError: It is something else, such as bytes.
    """
    if value is None or isinstance(value, float) and math.isnan(value):
        return ''
    if isinstance(value, bool):
        return str(int(value))  # a tag's column of 0 and 1
    if isinstance(value, list) and not any(isinstance(part, list) for part in value):
        texts = [text for part in value if (text := cell_text(part, name, column))]
        return list_cell(texts) if texts or not value else ''  # of nulls alone nothing is known
    if isinstance(value, dict | bytes | list):
        raise DataError(f"{name}: '{shortened(column)}' is no text, number or list of tags; choose --heads without it")
    try:
        text = str(value).strip()
        text.encode()
    except ValueError as error:  # half a surrogate pair, which JSON can spell; an integer of thousands of digits
        raise DataError(f"{name}: '{shortened(column)}' cannot be written as text ({error})") from error
    return text


def too_sparse(rows: int, columns: int, filled: int) -> bool:
    """Whether a table of rows with columns of their own would not fit into memory, nearly all of it empty."""
    return rows * columns > max(_MAX_CELLS, _MAX_HOLES * filled)


def values_of_list(cell: str) -> list[str] | None:
    """The values of a cell that was a list; None of another one."""
    return [text for text in cell.split(LIST) if text] if cell.startswith(LIST) else None


def single(cell: str) -> str:
    """The text of a cell of one value, which may have been a list of one.

    Raises:
        ValueError: It was a list of none or of several.
    """
    values = values_of_list(cell)
    if values is None:
        return cell
    if len(values) != 1:
        raise ValueError(
            f'a list of {len(values)} values, where one is expected (lists are of tags: --head COLUMN:loss=tags)')
    return values[0]


def singles(cells: pd.DataFrame) -> pd.Series:
    """The texts of a column (N,), where a list of one value is that value.

    Raises:
        BadCell: A cell is a list of none or of several.
    """
    texts = cells.iloc[:, 0]
    if not any(text.startswith(LIST) for text in set(texts)):  # a column has fewer texts than rows
        return texts
    found = []
    for row, text in texts.items():
        try:
            found.append(single(text))
        except ValueError as error:
            raise BadCell(str(error), cells.columns[0], row) from error
    return pd.Series(found, texts.index, dtype=object)


def split_tags(text: str, separator: str) -> list[str]:
    """The tags of a text; a blank as the separator stands for any run of blanks."""
    parts = text.split() if separator.isspace() else map(str.strip, text.split(separator))
    return [part for part in parts if part]


def tags_of(cell: str, separator: str, none: str | None) -> list[str] | None:
    """The tags of a cell, [] where it is known to have none, None where nothing is known.

    Args:
        cell: The cell.
        separator: What is between tags; a list has none.
        none: The text that means no tag.

    Raises:
        ValueError: It says that there is no tag, and names some.
    """
    if cell == none:
        return []
    values = values_of_list(cell)
    tags = split_tags(cell, separator) if values is None else values
    if none in tags:
        if set(tags) != {none}:
            raise ValueError(f"'{shortened(none)}', which means none of the tags, stands beside tags")
        return []
    return tags if tags or values is not None else None


def truth(text: str) -> int | None:
    """1 or 0 of a text that says yes or no, -1 of one that is minus one, None of all others."""
    word = _WORDS.get(text.lower())
    if word is not None:
        return word
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number in (1, 0, -1) else None


def missing_texts(value: str | None) -> set[str]:
    """The texts that mean a missing label where `value` does: a whole number also as a column of floats writes it."""
    if value is None:
        return set()
    bare = value.removesuffix('.0')
    return {bare, f'{bare}.0'} if bare.removeprefix('-').isdecimal() else {value}


def other_separator(texts: list[str], separator: str) -> str | None:
    """What seems to be between tags in place of `separator`, if anything: a comma, `;`, `|`, or a blank.

    It is one that stands in most of the tags, or of which half of the tags that have it share parts with others: all
    their parts for a blank, which may be part of a name, and any for the other marks. Blanks do not count where
    `separator` is used.

    Args:
        texts: The cells with a label that are no lists.
        separator: What splits them.
    """
    tags = [tag for text in texts for tag in split_tags(text, separator)]
    different = set(tags)
    for mark in (',', ';', '|', ' '):
        if mark == separator or mark == ' ' and (separator.isspace() or len(tags) > len(texts)):
            continue
        parts = {tag: found for tag in different if len(found := split_tags(tag, mark)) > 1}
        if not parts:
            continue
        counts: dict[str, int] = {}
        for tag in different:
            for part in {*split_tags(tag, mark)}:
                counts[part] = counts.get(part, 0) + 1
        enough = all if mark == ' ' else any
        shared = sum(enough(counts[part] > 1 for part in found) for found in parts.values())
        if 2 * sum(tag in parts for tag in tags) > len(tags) or 2 * shared >= len(parts):
            return mark
    return None
