"""Table -> rows: image paths that exist and class indices, or one clear line about what is wrong."""
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from timm_multilabel.cells import BadCell, missing_texts
from timm_multilabel.config.values import WHITESPACE
from timm_multilabel.data.class_folders import read_class_folders
from timm_multilabel.data.table_files import read_cells
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import DataError, listed, printable, shortened, without_secrets
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
from timm_multilabel.places import Address, files_there, path_of, refusal
from timm_multilabel.stores import is_address

FIX_LABELS = 'fix them, or take them as missing with --unknown-labels ignore'
"""What to advise where labels are unknown, unless told otherwise."""

_ODD = re.compile(r'^/|^\.?$|\./|//|/\.?$')  # a path that pathlib would write in another way
_EXAMPLES = 3  # rows, files or labels named in a message


@dataclass(frozen=True)
class Table:
    """A table read as text.

    `frame` has the file's columns, and the row numbers of the file (the header of a CSV is row 1) as its index, 0 for
    what stands in no file; blank lines are left out. `image_root` is the folder of the images, where it is known.
    """
    path: Path
    frame: pd.DataFrame
    image_column: str
    image_root: Path | None = field(default=None, kw_only=True)

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
        return self._of(places, len(places))

    def select(self, mask: np.ndarray) -> 'Rows':
        """The rows where a mask (N,) is true."""
        return self._of(mask, int(mask.sum()))

    def _of(self, which: np.ndarray, count: int) -> 'Rows':
        # Unlabelled rows share the memory of one row, and keep doing so.
        shared = len(self.targets) and self.targets.stride(0) == 0
        targets = self.targets[:1].expand(count, -1) if shared else self.targets[torch.from_numpy(which)]
        return replace(
            self, images=self.images[which], targets=targets, numbers=self.numbers[which], which=self.which[which])


def read_table(path: str | Path, written: TableFormat | None = None) -> Table:
    """Read a table as text, so that `NA` stays a label; only an empty (or blank) cell is a missing one.

    Args:
        path: A CSV or another file that `read_cells` reads, or a folder with a folder of images for each class.
        written: How it is written.

    Raises:
        DataError: The file is missing, unreadable, empty, has no image column, an unnamed or a repeated column, or a
            row without an image.
    """
    path, written = path_of(path), written or TableFormat()
    image_column = written.image_column
    if path.is_dir():
        frame = read_class_folders(path, image_column, written.class_head)
        return Table(path, frame, image_column, image_root=path)
    frame = read_cells(path, written.separator)
    if image_column not in frame.columns:
        blanks = len(frame.columns) == 1 and ' ' in frame.columns[0]
        raise DataError(
            f"{path}: no column '{image_column}' (there are: {listed(frame.columns)}); "
            'name the one that holds the image paths with --image-column' + (
                f', or the blanks between columns with --separator {WHITESPACE}' if blanks else ''))
    without = frame.index[frame[image_column] == '']
    if len(without):
        raise DataError(f"{path} row {without[0]}: no image in column '{image_column}'; name one or remove the row")
    _check_addresses(path, frame[image_column])
    if missing := missing_texts(written.missing_value):
        frame = frame.mask(frame.isin(missing) & (frame.columns != image_column), '')
    root = path_of(written.image_root).expanduser() if written.image_root else None
    return Table(path, frame, image_column, image_root=root)


def _check_addresses(path: Path, images: pd.Series) -> None:
    """Raise DataError where a cell names an image in a way that is not read, such as file:// or chained addresses."""
    for row, text in images[images.str.contains('://', regex=False)].items():
        if wrong := refusal(text):
            raise DataError(f"{path} row {row}: '{shortened(without_secrets(text))}' is {wrong}")


def find_images(table: Table, passing_over: bool = False) -> list[str]:
    """Find the images of a table on disk, or where its addresses lead to.

    A path is taken as written relative to the table's folder, to the parent of that folder, or to the working
    directory, or by its name under `images/` beside the table: the first of these under which any of the images exists
    serves for all. Where the table has an `image_root`, it is relative to that. An address is taken as it is.

    Args:
        table: Its image column names the files.
        passing_over: Pass over images that are missing.

    Raises:
        DataError: Images are missing, with how many and the first few.
    """
    paths, exists = look_for_images(table)
    texts = table.frame[table.image_column]
    if all(exists) or passing_over:
        return [path for path, found in zip(paths, exists) if found]
    missing = [f'{path if is_address(path) else text} (row {row})'
               for (row, text), path, found in zip(texts.items(), paths, exists) if not found]
    examples = ', '.join(missing[:_EXAMPLES]) + (', ...' if len(missing) > _EXAMPLES else '')
    on_disk = '' if any(map(is_address, paths)) else ' on disk'
    if len(missing) == len(texts):
        looked = ', '.join(_rules(table))
        raise DataError(f'{table.path}: none of its {len(texts)} images is {on_disk.strip() or "there"}: {examples}; '
                        f'looked {looked}')
    raise DataError(
        f'{table.path}: {len(missing)} of {len(texts)} images are missing{on_disk}: {examples}; '
        'add them or remove their rows')


def look_for_images(table: Table) -> tuple[list[str], list[bool]]:
    """Where the image of each row (N,) is looked for, as `find_images` says it, and whether a file is there (N,)."""
    texts = list(table.frame[table.image_column])
    there = np.zeros(len(texts), dtype=bool)
    remote = [row for row, text in enumerate(texts) if is_address(text)]  # which say nothing of where the others are
    if remote:
        there[remote] = files_there([texts[row] for row in remote])
    others = np.setdiff1d(np.arange(len(texts)), remote)
    for rule in _rules(table).values():
        paths = list(map(rule, texts))
        there[others] = files_there([paths[row] for row in others])
        if not len(others) or there[others].any():
            break
    return paths, there.tolist()


def _rules(table: Table) -> dict[str, Callable[[str], str]]:
    """Where images are looked for, in order: how a message names the place, and a cell's path there."""
    root, folder = table.image_root, table.path.parent
    if root is not None:
        return {f'in {root}': _under(root)}
    images = _under(folder / 'images')
    if isinstance(folder, Address):
        return {
            f'in {folder}': _under(folder),
            **({f'in {folder.parent}': _under(folder.parent)} if len(folder.parts) > 2 else {}),
            f'by name in {folder / "images"}': lambda text: images(text if is_address(text) else Path(text).name),
        }
    return {
        f'in {folder}': _under(folder),
        f'in {folder / ".."}': _under(folder / '..'),
        'in the working directory': _under(Path()),
        f'by name in {folder / "images"}': lambda text: images(text if is_address(text) else Path(text).name),
    }


def _under(folder: Path) -> Callable[[str], str]:
    """Path(folder, text), in a tenth of pathlib's time where there is nothing to normalize in a text."""
    start = os.path.join(folder, '') if folder != Path() else ''

    def join(text: str) -> str:
        if not _ODD.search(text):
            return start + text
        if is_address(text):
            return text
        joined = str(folder / text)
        if is_address(joined):  # stores know no '..'
            scheme, _, rest = joined.partition('://')
            joined = f'{scheme}://{posixpath.normpath(rest)}'
        return joined

    return join


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
    row = f' row {error.row}' if error.row else ''  # of class folders they have no numbers
    return DataError(f"{table.path}{row}, column '{shortened(error.column)}': {error}; fix it, or leave it empty")


def check_single_class(table: Table, name: str) -> None:
    """Raise UserError where cells of a column hold several tags."""
    several = table.frame[name][table.frame[name].str.contains('|', regex=False)]
    for row, text in several[:1].items():
        raise DataError(
            f"{table.path}{f' row {row}' if row else ''}: column '{shortened(name)}' holds several tags "
            f"('{shortened(text)}'), and ArcFace takes one class an image; for tags, --head {name}:loss=tags")


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
            where = f' ({shown})' if any(rows) else ''  # of class folders they have no numbers
            parts.append(f"{shortened(head)} '{printable(shortened(label))}' in {len(rows)} "
                         f"row{'s' if len(rows) > 1 else ''}{where}")
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
