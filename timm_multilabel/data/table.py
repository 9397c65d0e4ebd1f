"""CSV -> rows: image paths that exist and class indices, or one clear line about what is wrong."""
import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from timm_multilabel.cells import BadCell, csv_rows, missing_texts
from timm_multilabel.config.train import DataSettings
from timm_multilabel.config.values import WHITESPACE
from timm_multilabel.errors import DataError, listed, printable, shortened
from timm_multilabel.files import open_regular
from timm_multilabel.labels import (
    MISSING,
    UNKNOWN,
    Labels,
    LabelSet,
    LabelSpace,
    Quantity,
    TagSet,
    missing_row,
)

FIX_LABELS = 'fix them, or take them as missing with --unknown-labels ignore'
"""What to advise where labels are unknown, unless told otherwise."""

_EXAMPLES = 3  # rows, files or labels named in a message
_PART = 2 ** 26  # bytes read at once
_LINE_END = re.compile(r'\r\n|\r|\n')


@dataclass(frozen=True)
class Table:
    """A CSV read as text.

    `frame` has the file's columns, and the row numbers of the file (the header is row 1) as its index; blank lines are
    left out.
    """
    path: Path
    frame: pd.DataFrame
    image_column: str

    @cached_property
    def label_columns(self) -> list[str]:
        return [column for column in self.frame.columns if column != self.image_column]

    def has_label(self, column: str) -> bool:
        """Whether this is a label column."""
        return column != self.image_column and column in self.frame.columns

    def cells(self, columns: Sequence[str]) -> pd.DataFrame:
        """Some of the columns."""
        # One is had in a tenth of the time so, which counts where there are thousands.
        return self.frame[columns[0]].to_frame() if len(columns) == 1 else self.frame[list(columns)]


@dataclass(frozen=True)
class Rows:
    """Images with their targets, ready to load.

    `images` are paths (N,), `targets` (N, W) as `LabelSpace.split` takes them, `numbers` the rows' numbers in their
    files (N,), 0 for an image that was found in a folder. `sources` are the files or folders, the first of them the one
    that messages name, and `which` says which of them a row is of (N,).
    """
    images: np.ndarray
    targets: torch.Tensor
    numbers: np.ndarray
    sources: tuple[Path, ...]
    which: np.ndarray

    @property
    def source(self) -> Path:
        return self.sources[0]

    def __len__(self) -> int:
        return len(self.images)

    def where(self, index: int) -> str:
        """Name a row as messages do."""
        source, number = self.sources[self.which[index]], self.numbers[index]
        return f'{source} row {number}' if number else f'in {source}'

    def take(self, places: np.ndarray) -> 'Rows':
        """The rows at some places (M,), in that order."""
        return replace(
            self, images=self.images[places], targets=self.targets[torch.from_numpy(places)],
            numbers=self.numbers[places], which=self.which[places])

    def select(self, mask: np.ndarray) -> 'Rows':
        """The rows where a mask (N,) is true."""
        # Unlabelled rows share the memory of one row, and keep doing so.
        shared = len(self.targets) and self.targets.stride(0) == 0
        targets = self.targets[:mask.sum()] if shared else self.targets[torch.from_numpy(mask)]
        return replace(
            self, images=self.images[mask], targets=targets, numbers=self.numbers[mask], which=self.which[mask])


def read_table(
        path: str | Path,
        image_column: str = DataSettings.image_column,
        separator: str | None = None,
        missing_value: str | None = None,
) -> Table:
    """Read a CSV as text, so that `NA` stays a label; only an empty (or blank) cell is a missing one.

    Args:
        path: The CSV.
        image_column: The column of the image paths.
        separator: The character between cells, or `WHITESPACE`; by default a comma if the header has one outside of
            quotes, else a tab, `;` or `|` that it has.
        missing_value: A further text that means a missing label; see `missing_texts`.

    Raises:
        DataError: The file is missing, unreadable, empty, has no image column, an unnamed or a repeated column, or a
            row without an image.
    """
    path = Path(path)
    frame = read_cells(path, separator)
    if image_column not in frame.columns:
        blanks = len(frame.columns) == 1 and ' ' in frame.columns[0]
        raise DataError(
            f"{path}: no column '{image_column}' (there are: {listed(frame.columns)}); "
            'name the one that holds the image paths with --image-column' + (
                f', or the blanks between columns with --separator {WHITESPACE}' if blanks else ''))
    without = frame.index[frame[image_column] == '']
    if len(without):
        raise DataError(f"{path} row {without[0]}: no image in column '{image_column}'; name one or remove the row")
    if missing := missing_texts(missing_value):
        frame = frame.mask(frame.isin(missing) & (frame.columns != image_column), '')
    return Table(path, frame, image_column)


def read_cells(path: Path, separator: str | None = None, join_surplus: bool = False) -> pd.DataFrame:
    """The cells of a CSV as text without blanks around them: the one reader of all commands.

    Args:
        path: The CSV.
        separator: What is between cells, see `read_table`.
        join_surplus: Take cells beyond the last column as parts of it, as in Kaggle's styles.csv, where it has commas
            without quotes; and refuse a row with fewer cells than columns.

    Returns:
        The rows that are not blank, by their numbers in the file (the header is row 1).

    Raises:
        DataError: The file is missing, unreadable or empty, or has an unnamed or a repeated column.
    """
    if not path.is_file():
        raise DataError(f'{path}: no such file')
    text = _read_text(path)
    separator = separator or _find_separator(text)
    try:
        if join_surplus and separator != WHITESPACE:
            cells = _complete_rows(path, text, separator)
        else:
            # The header is read as a row: pandas would rename repeated columns and take surplus cells for an index.
            cells = pd.read_csv(
                StringIO(text), sep=r'\s+' if separator == WHITESPACE else separator, header=None, dtype=object,
                keep_default_na=False, skip_blank_lines=False).fillna('').to_numpy(dtype=object)
    except (ValueError, csv.Error) as error:  # the former pandas' parser errors
        # pandas counts rows from 0 here.
        reason = re.sub(r'\bat row (\d+)', lambda row: f'at row {int(row[1]) + 1}', ' '.join(str(error).split()))
        raise DataError(f'{path}: cannot be read as a CSV ({reason}); fix it') from error
    # As one array of objects: pandas would spend a millisecond on each of many columns.
    cells = np.frompyfunc(str.strip, 1, 1)(cells)
    frame = pd.DataFrame(cells[1:], np.arange(2, len(cells) + 1), _check_header(path, cells[0].tolist()), dtype=object)
    filled = (cells[1:] != '').any(axis=1)
    if not filled.any():
        raise DataError(f'{path}: the table has no rows')
    return frame[filled]


def _complete_rows(path: Path, text: str, separator: str) -> np.ndarray:
    """The cells (N, C) of a CSV, where cells beyond the last column are parts of it.

    Not pandas, whose way of joining cells silently drops a row that it cannot read.

    Raises:
        DataError: A row that is not blank has fewer cells than the header.
        csv.Error: It cannot be read.
    """
    rows = list(csv_rows(text, delimiter=separator))
    width = len(rows[0]) if rows else 0
    if not width:
        raise csv.Error('no columns in the first row')
    for number, row in enumerate(rows, 1):
        if any(map(str.strip, row)) and len(row) < width:
            raise DataError(f'{path} row {number}: {len(row)} cells for {width} columns; complete the row or remove it')
    last = width - 1
    padded = ([*row, *[''] * (width - len(row))] for row in rows)
    return np.array([[*row[:last], separator.join(row[last:])] for row in padded], dtype=object)


def _check_header(path: Path, header: list[str]) -> pd.Index:
    """The names of the columns.

    Raises:
        DataError: One is empty, cannot be shown or is there twice.
    """
    seen: set[str] = set()
    for position, name in enumerate(header, 1):
        if not name:
            raise DataError(f'{path} row 1: column {position} has no name; name it or remove it')
        if not name.isprintable():
            raise DataError(f'{path} row 1: the name of column {position} holds a character that cannot be shown; '
                            'rename it')
        if name in seen:
            raise DataError(f"{path} row 1: two columns are called '{shortened(name)}'; rename or remove one")
        seen.add(name)
    return pd.Index(header, dtype=object)


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark.

    Raises:
        DataError: It cannot be read, or is something else.
    """
    parts = []
    try:
        with open_regular(path) as file:
            while part := file.read(_PART):
                parts.append(part)
                if b'\0' in part:  # the rest may be terabytes of them, which take no room on disk
                    break
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror})') from error
    data = b''.join(parts)
    try:
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        row = len(_LINE_END.split(data[:error.start].decode('latin-1')))
        utf_16 = ' (it looks like UTF-16)' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else ''
        raise DataError(
            f'{path} row {row}: byte 0x{data[error.start]:02x} is not UTF-8{utf_16}; save the file as UTF-8') from error
    if '\0' in text:
        row = len(_LINE_END.split(text[:text.index('\0')]))
        raise DataError(f'{path} row {row}: holds a zero byte, so this is no text; save the table as a CSV in UTF-8')
    return text


def _find_separator(text: str) -> str:
    header = re.sub('"[^"]*"', '', _LINE_END.split(text, maxsplit=1)[0])
    return next((mark for mark in ',\t;|' if mark in header), ',')


def find_images(table: Table, passing_over: bool = False) -> list[str]:
    """Find the images of a table on disk.

    A path is taken as written relative to the CSV's folder, to the parent of that folder, or to the working directory,
    or by its name under `images/` beside the CSV: the first of these under which any of the images exists serves for
    all.

    Args:
        table: A CSV whose image column names the files.
        passing_over: Pass over images that are missing.

    Raises:
        DataError: Images are missing, with how many and the first few.
    """
    paths, exists = look_for_images(table)
    texts = table.frame[table.image_column]
    if all(exists) or passing_over:
        return [path for path, found in zip(paths, exists) if found]
    missing = [f'{text} (row {row})' for (row, text), found in zip(texts.items(), exists) if not found]
    examples = ', '.join(missing[:_EXAMPLES]) + (', ...' if len(missing) > _EXAMPLES else '')
    if len(missing) == len(texts):
        looked = ', '.join(_rules(table.path.parent))
        raise DataError(f'{table.path}: none of its {len(texts)} images is on disk: {examples}; looked {looked}')
    raise DataError(
        f'{table.path}: {len(missing)} of {len(texts)} images are missing on disk: {examples}; '
        'add them or remove their rows')


def look_for_images(table: Table) -> tuple[list[str], list[bool]]:
    """Where the image of each row (N,) is looked for, as `find_images` says it, and whether a file is there (N,)."""
    for rule in _rules(table.path.parent).values():
        paths = [str(rule(text)) for text in table.frame[table.image_column]]
        exists = [os.path.isfile(path) for path in paths]
        if any(exists):
            break
    return paths, exists


def _rules(folder: Path) -> dict[str, Callable[[str], Path]]:
    """Where images are looked for, in order: how a message names the place, and a cell's path there."""
    return {
        f'in {folder}': lambda text: folder / text,
        f'in {folder / ".."}': lambda text: folder / '..' / text,
        'in the working directory': lambda text: Path(text),
        f'by name in {folder / "images"}': lambda text: folder / 'images' / Path(text).name,
    }


def find_label_space(
        tables: list[Table],
        heads: list[str] | None,
        readers: Mapping[str, type[Labels]] | None = None,
        groups: Mapping[str, tuple[str, ...]] | None = None,
        dialect: Mapping[str, Any] | None = None,
) -> LabelSpace:
    """The label space of a data directory: its heads from the last table, their classes and tags from the first.

    Args:
        tables: all.csv, where there is one, and train.csv.
        heads: The heads to learn; when None, every column but the image's and those of groups, and every group.
        readers: What a head's labels are, by its name; classes where not named.
        groups: The 0/1 columns of a head of tags, by its name.
        dialect: How tags in one column are written: 'separator' and 'none' of `TagSet`.

    Raises:
        DataError: A head that is no column, a column without labels, or a cell that cannot be read.
    """
    train, readers, groups = tables[-1], readers or {}, groups or {}
    grouped = {column: name for name, columns in groups.items() for column in columns}
    names = heads
    if names is None:  # a group stands where its first column does
        names = list(dict.fromkeys(grouped.get(column, column) for column in train.label_columns))
    found: list[Labels] = []
    counts = Counter(names)
    for name in names:
        if counts[name] > 1:
            raise DataError(f"--heads: '{shortened(name)}' is named twice")
        columns = list(groups.get(name, (name,)))
        for table in tables:
            for column in columns:
                if not table.has_label(column):
                    raise DataError(
                        f"{table.path}: no label column '{shortened(column)}' (there are: "
                        f"{listed(table.label_columns) or 'none'}); choose columns with --heads")
        reader = readers.get(name, LabelSet)
        # A mean over validation and test rows too would tell the model of them.
        source = train if reader is Quantity else tables[0]
        cells = source.cells(columns)
        try:
            if name in groups:
                found.append(TagSet.from_group(name, cells))
            elif reader is TagSet:
                found.append(TagSet.from_cells(name, cells, **(dialect or {})))
            else:
                found.append(reader.from_cells(name, cells))
        except BadCell as error:
            raise _bad_cell(source, error) from error
        except ValueError as error:
            raise DataError(f'{source.path}: {error}; leave it out with --heads') from error
    return LabelSpace(tuple(found))


def _bad_cell(table: Table, error: BadCell) -> DataError:
    return DataError(
        f"{table.path} row {error.row}, column '{shortened(error.column)}': {error}; fix it, or leave it empty")


def check_single_class(table: Table, name: str) -> None:
    """Raise UserError where cells of a column hold several tags."""
    several = table.frame.index[table.frame[name].str.contains('|', regex=False)]
    if len(several):
        raise DataError(
            f"{table.path} row {several[0]}: column '{shortened(name)}' holds several tags "
            f"('{shortened(table.frame[name][several[0]])}'), "
            f'and ArcFace takes one class an image; for tags, --head {name}:loss=tags')


def unknown_labels(table: Table, label_space: LabelSpace) -> dict[str, dict[str, list[int]]]:
    """The labels of a table that are no classes: {head: {label: rows}}, without the heads that have none.

    Raises:
        DataError: A cell cannot be read.
    """
    found = {}
    for head in label_space.heads:
        cells = _cells(table, head)
        try:
            strange = {} if cells is None else head.unknown(cells)
        except BadCell as error:
            raise _bad_cell(table, error) from error
        if strange:
            found[head.name] = strange
    return found


def _cells(table: Table, head: Labels) -> pd.DataFrame | None:
    """The columns of a head, or None where the table has not all of them."""
    return table.cells(head.columns) if all(column in table.frame.columns for column in head.columns) else None


def describe_unknown(unknown: dict[str, dict[str, list[int]]]) -> str:
    """One line on what `unknown_labels` found."""
    parts = []
    for head, labels in unknown.items():
        for label, rows in labels.items():
            shown = ', '.join(str(row) for row in rows[:_EXAMPLES]) + (', ...' if len(rows) > _EXAMPLES else '')
            parts.append(f"{shortened(head)} '{printable(shortened(label))}' in {len(rows)} "
                         f"row{'s' if len(rows) > 1 else ''} ({shown})")
    more = len(parts) - 2 * _EXAMPLES
    return '; '.join(parts[:2 * _EXAMPLES]) + (f'; and {more} more labels' if more > 0 else '')


def encode_rows(
        table: Table,
        label_space: LabelSpace,
        ignore_unknown: bool = False,
        way_out: str = FIX_LABELS,
) -> Rows:
    """Find a table's images and turn its labels into targets, see `encode_targets`.

    Raises:
        DataError: Images are missing, a label is unknown, or a cell cannot be read.
    """
    targets = encode_targets(table, label_space, ignore_unknown, way_out)
    return Rows(
        images=np.array(find_images(table)),
        targets=targets,
        numbers=table.frame.index.to_numpy(),
        sources=(table.path,),
        which=np.zeros(len(table.frame), dtype=np.int8),
    )


def encode_targets(table: Table, label_space: LabelSpace, ignore_unknown: bool, way_out: str) -> torch.Tensor:
    """The targets (N, W) of a table's labels.

    A head that the table has no column for is missing in every row.

    Args:
        table: A CSV with columns of labels.
        label_space: The heads, and the classes that they know.
        ignore_unknown: Take a label that is no class as missing; a tag that is none is passed over.
        way_out: What to advise where such a label is an error.

    Raises:
        DataError: A label is unknown, or a cell cannot be read.
    """
    unknown = unknown_labels(table, label_space)
    if unknown and not ignore_unknown:
        raise DataError(
            f'{table.path}: labels that training does not know: {describe_unknown(unknown)}; {way_out}')
    targets = missing_targets(label_space, len(table.frame)).numpy().copy()
    left = 0
    for head in label_space.heads:
        cells = _cells(table, head)
        if cells is not None:
            try:
                encoded = head.encode(cells)
            except BadCell as error:
                raise _bad_cell(table, error) from error
            if isinstance(head, LabelSet):
                encoded = np.where(encoded == UNKNOWN, MISSING, encoded)
            targets[:, left:left + head.width] = encoded
        left += head.width
    return torch.from_numpy(targets)


def missing_targets(label_space: LabelSpace, rows: int) -> torch.Tensor:
    """Targets (N, W) of images without any label; they take the memory of one row."""
    row = missing_row(label_space)
    return row.expand(rows, len(row))
