"""What a data directory holds: its tables, and of each image file what tells it from others."""
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from timm_multilabel.cells import BadCell, singles
from timm_multilabel.data.columns import Columns, choose_columns
from timm_multilabel.data.images import open_image, read_photo
from timm_multilabel.data.pool import real_paths
from timm_multilabel.data.shards import Shards
from timm_multilabel.data.split import SPLITS
from timm_multilabel.data.split_names import check_folder, find_split, table_of_classes
from timm_multilabel.data.table import Table, find_label_space, look_for_images, read_table
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import DataError, UserError, shortened
from timm_multilabel.labels import Labels, LabelSet, LabelSpace, Quantity

UNLABELLED = 'unlabelled'
"""The split whose rows have images only."""

HeadReader = Callable[[list[Table], list[str], str], LabelSpace]

_CHUNK = 64  # images that a thread takes at once


@dataclass(frozen=True)
class Split:
    """A CSV of N rows with the files of its images.

    Args:
        name: One of train, val, test and unlabelled.
        table: The CSV as text.
        paths: Where the images are looked for (N,).
        files: The real paths of those that are there, None of the others (N,).
    """
    name: str
    table: Table
    paths: list[str]
    files: list[str | None]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def csv(self) -> str:
        return self.table.path.name

    def row(self, position: int) -> str:
        """Name a row as examples do: `val.csv row 17`."""
        number = self.table.frame.index[position]
        return f'{self.csv} row {number}' if number else self.csv  # the latter of class folders

    def image(self, position: int) -> str:
        """Name a row and its image: `val.csv row 17 (1163.jpg)`."""
        return f'{self.row(position)} ({os.path.basename(self.paths[position])})'

    def has(self, head: Labels) -> bool:
        """Whether it has the columns of a head."""
        return all(map(self.table.has_label, head.columns))

    def bad_cell(self, head: Labels) -> str | None:
        """Why training cannot read a cell of a head, or None where it can read all."""
        try:
            if self.has(head):
                head.encode(self.table.cells(head.columns))
        except BadCell as error:
            return f"{self.csv} row {error.row}, column '{shortened(error.column)}': {error}"
        return None

    def readable(self, label_space: LabelSpace) -> LabelSpace:
        """The heads whose columns it has, and of which training can read all cells."""
        return LabelSpace(tuple(head for head in label_space.heads if self.has(head) and not self.bad_cell(head)))

    def labels(self, head: Labels) -> np.ndarray | None:
        """The labels of a head as texts (N,), equal where training takes them for equal, empty where there is none.

        None where it has not the columns, or a cell cannot be read.
        """
        if not self.has(head) or self.bad_cell(head):
            return None
        cells = self.table.cells(head.columns)
        if isinstance(head, LabelSet):
            labels: np.ndarray = singles(cells).to_numpy(dtype=object)
            return labels
        encoded = head.encode(cells).copy()  # what pandas gives may be read-only
        if isinstance(head, Quantity):
            known, values = head.known(torch.from_numpy(encoded[:, 0])), encoded[:, 0] * head.std + head.mean
            texts = [f'{value:.6g}' for value in values]
        else:
            known, tags = head.known(torch.from_numpy(encoded)), np.array(head.classes, dtype=object)
            texts = [head.separator.join(tags[row == 1]) or '(no tag)' for row in encoded]
        return np.where(known.numpy(), np.array(texts, dtype=object), '')


@dataclass(frozen=True)
class Contents:
    """The tables of a data directory.

    Args:
        folder: The data directory.
        splits: The splits that have a CSV, by name.
        classes: The table that names the classes: all.csv, else train.csv; None where there is neither.
        columns: What the label columns look like, and which of them training takes.
        label_space: The heads, each with its classes.
        bad_heads: Why columns cannot be heads, by their name.
        shards: The files of the splits that are in shards, by name.
    """
    folder: Path
    splits: dict[str, Split]
    classes: Table | None
    columns: Columns
    label_space: LabelSpace
    bad_heads: dict[str, str]
    shards: dict[str, str]

    @property
    def labelled(self) -> list[Split]:
        return [split for split in self.splits.values() if split.name != UNLABELLED]

    @cached_property
    def files(self) -> dict[str, str]:
        """Each image file once, by its real path, with the row that names it first."""
        found: dict[str, str] = {}
        for split in self.splits.values():
            for position, file in enumerate(split.files):
                if file is not None and file not in found:
                    found[file] = split.row(position)
        return found


class Scan(NamedTuple):
    """What an image file holds.

    Args:
        digest: A hash of its decoded pixels, whatever the file is like otherwise.
        width: In pixels, upright.
        height: In pixels, upright.
        mode: Pillow's name of the kind of its pixels, such as RGB or L.
        format: Pillow's name of the kind of file, such as JPEG.
    """
    digest: bytes
    width: int
    height: int
    mode: str
    format: str


@dataclass(frozen=True)
class Scans:
    """What the image files hold, by their real paths: those that can be decoded, and why the others cannot."""
    good: dict[str, Scan]
    bad: dict[str, str]


def read_contents(
        folder: Path,
        written: TableFormat | None = None,
        heads: Sequence[str] | None = None,
        given: Mapping[str, Mapping[str, Any]] | None = None,
        groups: Callable[[list[str]], Mapping[str, Sequence[str]]] = lambda columns: {},
        read_head: HeadReader = lambda tables, heads, name: find_label_space(tables, [name]),
        names: Mapping[str, str] | None = None,
        tag_separator: str | None = None,
) -> Contents:
    """Read the CSVs of a data directory, and look where their images are.

    Args:
        folder: The data directory.
        written: How they are written.
        heads: The label columns to look at; all that training takes when None.
        given: The options of heads that the user names.
        groups: The 0/1 columns of a head of tags, by its name, of the label columns.
        read_head: The label space of one head, from tables, the names of all heads and its own; UserError as training.
        names: What the splits train and val are called, where they have other names.
        tag_separator: See `choose_columns`.

    Raises:
        DataError: There is no such directory, or no CSV in it, or one that cannot be read, or no CSV has a head.
    """
    check_folder(folder)
    splits, shards = {}, {}
    for name in (*SPLITS, UNLABELLED):
        found = find_split(folder, names.get(name, name) if names else name, written)
        if isinstance(found, Path) and not (name == UNLABELLED and found.is_dir()):
            splits[name] = _read_split(name, read_table(found, written))
        elif isinstance(found, Shards):
            shards[name] = str(found.source)
    if not splits:
        also = f'; {", ".join(shards.values())} are shards, which are not checked' if shards else ''
        raise DataError(
            f'{folder}: no {", ".join(f"{name}.csv" for name in SPLITS)} or {UNLABELLED}.csv to check{also}')
    path = table_of_classes(folder, written)
    tables = [read_table(path, written)] if path.is_file() else []
    if 'train' in splits:
        tables.append(splits['train'].table)
    classes = tables[0] if tables else None
    if not tables:  # the heads can be told, but not which of their labels are known
        tables = [split.table for split in splits.values() if split.name != UNLABELLED][:1]
    columns = Columns({}, list(heads or ()))
    if tables:
        columns = choose_columns(
            tables[-1], None if heads is None else list(heads), given or {}, groups(tables[-1].label_columns),
            tag_separator)
    label_space, bad_heads = _find_heads(tables, columns, [split.table for split in splits.values()], read_head)
    return Contents(folder, splits, classes, columns, label_space, bad_heads, shards)


def _read_split(name: str, table: Table) -> Split:
    paths, exists = look_for_images(table)
    real = iter(real_paths(path for path, found in zip(paths, exists) if found))
    return Split(name, table, paths, [next(real) if found else None for found in exists])


def _find_heads(
        tables: list[Table],
        columns: Columns,
        others: list[Table],
        read_head: HeadReader,
) -> tuple[LabelSpace, dict[str, str]]:
    """The label space of tables as training finds it, and why columns cannot be heads.

    Raises:
        DataError: A head that was asked for is a column of no table at all.
    """
    found: list[Labels] = []
    bad: dict[str, str] = {}
    for name in dict.fromkeys(columns.heads):
        if name in columns.asked:
            continue
        try:
            found.extend(read_head(tables or others, columns.heads, name).heads)
        except UserError as error:
            if not any(table.has_label(name) for table in (*tables, *others)):
                raise
            bad[name] = error.line
    return LabelSpace(tuple(found)), bad


def scan_images(files: Mapping[str, str], workers: int, progress: Callable[[int], Any] = lambda done: None) -> Scans:
    """Decode image files, several at a time, and keep of each what tells it from others.

    Args:
        files: Where each file is named, by its path.
        workers: Threads that decode.
        progress: Told how many more files are done.
    """
    items = list(files.items())
    chunks = [items[start:start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    scans = Scans({}, {})
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for chunk, results in zip(chunks, pool.map(lambda chunk: [_scan(*item) for item in chunk], chunks)):
                for (path, _), result in zip(chunk, results):
                    if isinstance(result, Scan):
                        scans.good[path] = result
                    else:
                        scans.bad[path] = result
                progress(len(chunk))
        finally:
            pool.shutdown(cancel_futures=True)
    return scans


def merge_scans(files: Mapping[str, str], shares: Sequence[Scans]) -> Scans:
    """The scans of several processes as one has them, in the order of the files."""
    good, bad = ({path: scan for share in shares for path, scan in getattr(share, name).items()}
                 for name in ('good', 'bad'))
    return Scans({path: good[path] for path in files if path in good},
                 {path: bad[path] for path in files if path in bad})


def _scan(path: str, where: str) -> Scan | str:
    """What a file holds, or why it cannot be decoded."""
    try:
        photo = read_photo(path, where)
        pixels = np.ascontiguousarray(photo.decode())
    except UserError as error:
        reason = str(error).removeprefix(f'{path} ({where}): ')
        return reason.rpartition('; ')[0] or reason  # the finding tells the way out
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.reshape(-1).data)
    try:
        with open_image(BytesIO(photo.data)) as image:
            mode, kind = image.mode, image.format
    except Exception:  # a JPEG that libjpeg-turbo decodes and Pillow does not know
        mode, kind = 'unknown', 'unknown'
    return Scan(digest.digest(), photo.width, photo.height, mode, kind)
