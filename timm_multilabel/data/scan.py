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

from timm_multilabel.data.images import open_image, read_photo
from timm_multilabel.data.pool import real_paths
from timm_multilabel.data.shards import find_shards
from timm_multilabel.data.split import SPLITS
from timm_multilabel.data.table import Table, find_label_space, look_for_images, read_table
from timm_multilabel.errors import UserError
from timm_multilabel.labels import LabelSpace

UNLABELLED = 'unlabelled'
"""The split whose rows have images only."""

_CHUNK = 64  # images that a thread takes at once


@dataclass(frozen=True)
class Split:
    """A CSV of N rows with the files of its images.

    Args:
        name: train, val, test or unlabelled.
        table: Its rows.
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
        return f'{self.csv} row {self.table.frame.index[position]}'

    def image(self, position: int) -> str:
        """Name a row and its image: `val.csv row 17 (1163.jpg)`."""
        return f'{self.row(position)} ({os.path.basename(self.paths[position])})'

    def labels(self, head: str) -> np.ndarray | None:
        """The texts of a head's column (N,), or None where there is no such column."""
        if not self.table.has_label(head):
            return None
        return self._cells[:, self.table.frame.columns.get_loc(head)]

    @cached_property
    def _cells(self) -> np.ndarray:
        return self.table.frame.to_numpy(dtype=object)


@dataclass(frozen=True)
class Contents:
    """The tables of a data directory.

    Args:
        folder: The directory.
        splits: By name; those that have a CSV.
        classes: The table that names the classes: all.csv, else train.csv; None where there is neither.
        label_space: The heads, each with its classes.
        bad_heads: Why columns cannot be heads, by their name.
        shards: The files of the splits that are in shards, by name.
    """
    folder: Path
    splits: dict[str, Split]
    classes: Table | None
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
        image_column: str = 'image_path',
        separator: str | None = None,
        missing_value: str | None = None,
        heads: Sequence[str] | None = None,
) -> Contents:
    """Read the CSVs of a data directory, and look where their images are.

    Args:
        folder: The directory.
        image_column: See `read_table`, as the next two.
        separator: It is between cells.
        missing_value: A label that is missing.
        heads: The label columns to look at; all when None.

    Raises:
        UserError: There is no such directory, or no CSV in it, or one that cannot be read, or no CSV has a head.
    """
    if not folder.is_dir():
        raise UserError(f'{folder}: no such data directory; it holds train.csv, val.csv and the images')
    splits, shards = {}, {}
    for name in (*SPLITS, UNLABELLED):
        path = folder / f'{name}.csv'
        if path.is_file():
            splits[name] = _read_split(name, read_table(path, image_column, separator, missing_value))
        elif (found := find_shards(folder, name, image_column)) is not None:
            shards[name] = str(found.source)
    if not splits:
        also = f'; {", ".join(shards.values())} are shards, which are not checked' if shards else ''
        raise UserError(
            f'{folder}: no {", ".join(f"{name}.csv" for name in SPLITS)} or {UNLABELLED}.csv to check{also}')
    path = folder / 'all.csv'
    tables = [read_table(path, image_column, separator, missing_value)] if path.is_file() else []
    if 'train' in splits:
        tables.append(splits['train'].table)
    classes = tables[0] if tables else None
    if not tables:  # the heads can be told, but not which of their labels are known
        tables = [split.table for split in splits.values() if split.name != UNLABELLED][:1]
    label_space, bad_heads = _find_heads(tables, heads, [split.table for split in splits.values()])
    return Contents(folder, splits, classes, label_space, bad_heads, shards)


def _read_split(name: str, table: Table) -> Split:
    paths, exists = look_for_images(table)
    real = iter(real_paths(path for path, found in zip(paths, exists) if found))
    return Split(name, table, paths, [next(real) if found else None for found in exists])


def _find_heads(
        tables: list[Table],
        heads: Sequence[str] | None,
        others: list[Table],
) -> tuple[LabelSpace, dict[str, str]]:
    """The label space of tables as training finds it, and why columns cannot be heads.

    Raises:
        UserError: A head that was asked for is a column of no table at all.
    """
    if heads is None:
        heads = tables[-1].label_columns if tables else ()
    found, bad = [], {}
    for name in dict.fromkeys(heads):
        try:
            found.extend(find_label_space(tables or others, [name]).heads)
        except UserError as error:
            if not any(table.has_label(name) for table in (*tables, *others)):
                raise
            bad[name] = error.line
    return LabelSpace(tuple(found)), bad


def scan_images(files: Mapping[str, str], workers: int, progress: Callable[[int], Any] = lambda done: None) -> Scans:
    """Decode image files, several at a time, and keep of each what tells it from others.

    Args:
        files: Where each file is named, by its path.
        workers: Threads.
        progress: Told how many more files are done.
    """
    items = list(files.items())
    chunks = [items[start:start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    scans = Scans({}, {})
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for chunk, results in zip(chunks, pool.map(lambda chunk: [_scan(*item) for item in chunk], chunks)):
                for (path, _), result in zip(chunk, results):
                    (scans.good if isinstance(result, Scan) else scans.bad)[path] = result
                progress(len(chunk))
        finally:
            pool.shutdown(cancel_futures=True)
    return scans


def _scan(path: str, where: str) -> Scan | str:
    """What a file holds, or why it cannot be decoded."""
    try:
        photo = read_photo(path, where)
        pixels = np.ascontiguousarray(photo.decode())
    except UserError as error:
        reason = str(error).removeprefix(f'{path} ({where}): ')
        return reason.rpartition('; ')[0] or reason  # the finding tells the way out
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.reshape(-1))
    try:
        with open_image(BytesIO(photo.data)) as image:
            mode, kind = image.mode, image.format
    except Exception:  # a JPEG that libjpeg-turbo decodes and Pillow does not know
        mode, kind = 'unknown', 'unknown'
    return Scan(digest.digest(), photo.width, photo.height, mode, kind)
