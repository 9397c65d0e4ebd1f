"""Files of tables -> cells as text: CSV, TSV, Excel, JSON lines, Parquet."""
import csv
import json
import re
import zipfile
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from timm_multilabel.cells import cell_text, csv_rows, too_sparse
from timm_multilabel.config.values import WHITESPACE
from timm_multilabel.data.optional import find_library
from timm_multilabel.data.parquet import class_name, columns_of, open_parquet, rows_of
from timm_multilabel.errors import DataError, shortened
from timm_multilabel.files import open_regular, size_of
from timm_multilabel.places import why_missing

_PART = 2 ** 26  # bytes read at once
_LINE_END = re.compile(r'\r\n|\r|\n')
_EXPANDED = 2 ** 30  # bytes that the parts of an Excel file may unpack to


def read_cells(path: Path, separator: str | None = None, join_surplus: bool = False) -> pd.DataFrame:
    """The cells of a table as text without blanks around them: the one reader of all commands.

    The ending tells the kind of file: .tsv, .xlsx (the first sheet), .jsonl (an object a line), .parquet; a CSV
    otherwise. What is no text in the last three becomes what a CSV would hold: 7, 0.5, 1 of True, nothing of null.

    Args:
        path: The file.
        separator: What is between the cells of a CSV, see `TableFormat`; other files have none.
        join_surplus: Take cells beyond the last column of a CSV as parts of it, as in Kaggle's styles.csv, where it has
            commas without quotes; and refuse a row with fewer cells than columns.

    Returns:
        The rows that are not blank, by their numbers in the file (the header of a CSV or of a sheet is row 1).

    Raises:
        DataError: The file is missing, unreadable or empty, or has an unnamed or a repeated column.
    """
    if not path.is_file():
        raise DataError(f'{path}: {why_missing(path)}')
    kind = path.suffix.lower()
    if kind in _TYPED:
        columns, numbers, cells = _TYPED[kind](path)
    else:
        columns, numbers, cells = _of_csv(path, '\t' if kind == '.tsv' else separator, join_surplus)
    # As one array of objects: pandas would spend a millisecond on each of many columns.
    cells = np.frompyfunc(str.strip, 1, 1)(cells)
    frame = pd.DataFrame(cells, numbers, _check_header(path, columns), dtype=object)
    filled = (cells != '').any(axis=1)
    if not filled.any():
        raise DataError(f'{path}: the table has no rows')
    return frame[filled]


_Cells = tuple[list[str], np.ndarray, np.ndarray]
"""Names of columns, the rows' numbers (N,), and the cells (N, C) as texts."""


def _of_csv(path: Path, separator: str | None, join_surplus: bool) -> _Cells:
    text = read_text_of(path)
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
    return list(map(str.strip, cells[0])), np.arange(2, len(cells) + 1), cells[1:]


def _of_excel(path: Path) -> _Cells:
    openpyxl = find_library('openpyxl')
    numbers: list[int] = []
    rows: list[list[Any]] = []
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:
                if sum(part.file_size for part in archive.infolist()) > _EXPANDED:
                    raise ValueError(f'it unpacks to more than {_EXPANDED:,} bytes')
            sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets[0]
            sheet.reset_dimensions()  # the file may claim any, and rows would be filled up to them
            for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
                filled = len(row) - next((place for place, cell in enumerate(row[::-1]) if cell is not None), len(row))
                if not filled:
                    continue
                if rows and filled > len(rows[0]):
                    raise ValueError(f'row {number} has more cells than the header')
                row = row[:filled]
                numbers.append(number)
                rows.append([*map(_whole, row), *[None] * (len(rows[0]) - filled if rows else 0)])
    except Exception as error:  # whatever a damaged archive makes of openpyxl
        reason = shortened(getattr(error, 'strerror', None) or ' '.join(str(error).split()), 200)
        raise DataError(f'{path}: cannot be read as an Excel file ({reason}); fix it, or save it as a CSV') from error
    if not rows:
        raise DataError(f'{path}: the first sheet is empty')
    columns = [cell_text(name, f'{path} row {numbers[0]}', 'header') for name in rows[0]]
    return columns, np.array(numbers[1:], int), _texts(path, columns, numbers[1:], rows[1:])


def _whole(value: Any) -> Any:
    """A cell of a sheet, where all numbers are floats, with whole ones as integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _of_json_lines(path: Path) -> _Cells:
    numbers, rows = [], []
    columns: dict[str, int] = {}
    filled = 0
    for number, line in enumerate(read_text_of(path).split('\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{path} row {number}: cannot be read as JSON ({error}); fix it') from error
        if not isinstance(row, dict):
            raise DataError(f'{path} row {number}: is no JSON object of columns and values; fix it')
        for name in row:
            columns.setdefault(name, len(columns))
        numbers.append(number)
        rows.append(row)
        filled += len(row)
        if too_sparse(len(rows), len(columns), filled):
            raise DataError(f'{path}: the rows up to row {number} have {len(columns):,} columns, nearly all of them '
                            'missing in each row; write such labels as a list of tags in one column')
    cells = ([row.get(name) for name in columns] for row in rows)
    return list(columns), np.array(numbers, int), _texts(path, list(columns), numbers, cells)


def _of_parquet(path: Path) -> _Cells:
    rows: list[list[Any]] = []
    with open_parquet(str(path)) as (file, table):
        features = columns_of(table, str(path))
        columns = table.schema_arrow.names
        for number, row in rows_of(table, columns, size_of(file), images=False):
            rows.append([class_name(row[name], features[name], f'{path} row {number + 1}', name) for name in columns])
    numbers = range(1, len(rows) + 1)
    return columns, np.array(numbers, int), _texts(path, columns, numbers, rows)


_TYPED = {'.xlsx': _of_excel, '.jsonl': _of_json_lines, '.parquet': _of_parquet}
ENDINGS = ('.csv', '.tsv', *_TYPED)
"""How the names of tables end; a file of another name is read as a CSV."""


def _texts(path: Path, columns: list[str], numbers: Iterable[int], rows: Iterable[list[Any]]) -> np.ndarray:
    """Cells of any type as texts (N, C)."""
    made = [[value if isinstance(value, str) and value.isascii() else cell_text(value, f'{path} row {number}', column)
             for column, value in zip(columns, row, strict=True)] for number, row in zip(numbers, rows, strict=True)]
    return np.array(made, dtype=object).reshape(len(made), len(columns))


def holds_paths(path: Path, image_column: str) -> bool:
    """Whether a Parquet file has the paths of images in a column, and not the images, as shards have them.

    Raises:
        DataError: It cannot be read.
    """
    with open_parquet(str(path)) as (_, table):
        schema, types = table.schema_arrow, find_library('pyarrow').types
        if image_column not in schema.names:
            return False
        kind = schema.field(schema.names.index(image_column)).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        return bool(types.is_string(kind) or types.is_large_string(kind))


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


def read_text_of(path: Path) -> str:
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
