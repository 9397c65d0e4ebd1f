"""Parquet files, read a few rows at a time and without trust in what their metadata say."""
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from timm_multilabel.data.optional import find_library
from timm_multilabel.errors import DataError, shortened
from timm_multilabel.files import open_regular

_EXPANDED = 256 * 2 ** 20  # bytes of a row group that may come of a file of any size
_EXPANSION = 100  # times the size of its file that a larger row group may take


@contextmanager
def open_parquet(path: str) -> Iterator[tuple[BinaryIO, Any]]:
    """A Parquet file, as a file and as a table.

    Raises:
        DataError: It cannot be opened, or read within the context.
    """
    pyarrow, parquet = find_library('pyarrow'), find_library('pyarrow.parquet')
    try:
        with open_regular(path) as file, parquet.ParquetFile(file) as table:
            yield file, table
    except (pyarrow.ArrowException, ValueError, OSError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
        raise DataError(f'{path}: cannot be read as Parquet ({reason}); write it anew') from error


def columns_of(table: Any, file: str) -> Any:
    """The columns of an open Parquet file as `datasets.Features`.

    Raises:
        DataError: A column is there twice, or the metadata cannot be read.
    """
    names = table.schema_arrow.names
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{file}: two columns are called '{shortened(twice[0])}'; rename or remove one")
    try:
        return find_library('datasets').Features.from_arrow_schema(table.schema_arrow)
    except Exception as error:  # whatever absurd metadata make of the reader
        reason = shortened(' '.join(str(error).split()), 200)
        raise DataError(f'{file}: its metadata of columns cannot be read ({reason}); write it anew') from error


def rows_of(
        table: Any,
        wanted: list[str],
        size: int,
        images: bool,
        places: range = range(sys.maxsize),
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a Parquet file with their numbers, so few at once that they fit into memory whatever they expand to.

    Args:
        table: The open file.
        wanted: Columns.
        size: Bytes of the file.
        images: One of the columns holds images.
        places: The numbers of the rows, from 0.

    Raises:
        ValueError: They expand out of all proportion to their size on disk.
    """
    most = max(_EXPANDED, _EXPANSION * size)
    number = 0
    for group in range(table.num_row_groups):
        rows_of_group = table.metadata.row_group(group).num_rows
        if number >= places.stop:
            return
        if number + rows_of_group <= places.start:
            number += rows_of_group
            continue
        # Not by what the footer says of each column: pyarrow ends the process where that is damaged.
        total = table.metadata.row_group(group).total_byte_size
        # A dictionary may make one large value the value of every row. Footers may lie, so images come one by one.
        rows = 1 if images else max(1, min(64, 8 * _EXPANDED // max(1, total)))
        if total <= most:
            total = 0
            # No threads, which a forked loader process has not.
            for batch in table.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False):
                total += batch.nbytes
                if total > most:
                    break
                # A batch of no columns still has rows.
                for row in batch.to_pylist() if wanted else [{}] * batch.num_rows:
                    if number in places:
                        yield number, row
                    number += 1
        if total > most:
            raise ValueError(f'row group {group + 1} expands to more than {most:,} bytes, which is out of all '
                             'proportion to the size of the file')


def class_name(value: Any, feature: Any, name: str, column: str) -> Any:
    """What a number stands for where the table's metadata say that it is a class (-1: none)."""
    feature = getattr(feature, 'feature', feature)  # of a list
    names = getattr(feature, 'names', None)
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [class_name(part, feature, name, column) for part in value]
    if not -1 <= value < len(names):
        raise DataError(f"{name}: '{shortened(column)}' is class {value}, and its metadata name {len(names)}")
    return names[value] if value >= 0 else None
