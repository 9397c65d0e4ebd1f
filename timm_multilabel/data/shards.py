"""Shards -> samples: WebDataset tars and Parquet tables, streamed and dealt out by the libraries that they are of.

The files are opened here, never by those libraries, which would take a path such as `pipe:...` for a command.
"""
import json
import os
import random
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from timm_multilabel.cells import cell_text, list_cell, missing_texts
from timm_multilabel.data.image_names import ENDINGS
from timm_multilabel.data.images import MAX_BYTES
from timm_multilabel.data.optional import find_library
from timm_multilabel.data.parquet import class_name, columns_of, open_parquet, rows_of
from timm_multilabel.errors import DataError, escaped, listed, shortened
from timm_multilabel.files import open_regular, size_of
from timm_multilabel.places import Address, path_of

BUFFER = 1000
"""Samples among which the next one is drawn, in each loader process."""

MAX_JSON = 16 * 2 ** 20
"""Bytes of a sample's JSON at most; parsed, it may take 25 times as many."""

_MAX_HEADER = 2 ** 20  # bytes that a tar may spend on one name or one set of extended headers


_Read = tuple[str, bytes | None, dict[str, Any]]  # of a sample: its name, image and cells


class Sample(NamedTuple):
    """A sample as it lies in its shard.

    Args:
        name: Its shard and its key or row, as messages name it; no two of a split have the same.
        image: The bytes of the image file; None where only labels were asked for.
        cells: Texts by label column; empty, or not there, where the label is missing; of a list its `list_cell`.
    """
    name: str
    image: bytes | None
    cells: dict[str, str]


@dataclass(frozen=True)
class Shards:
    """The files of a split, all tars or all Parquet.

    Args:
        source: What messages call them: their pattern.
        files: The paths of the shards, in order.
        image_column: The column of the images in Parquet; `image` where there is none of this name.
        missing_value: A text that means a missing label, beside the empty one; see `missing_texts`.
        columns: The label columns to read; all when None.
    """
    source: Path
    files: tuple[str, ...]
    image_column: str
    missing_value: str | None = None
    columns: tuple[str, ...] | None = None

    @property
    def tars(self) -> bool:
        return self.files[0].endswith('.tar')

    @property
    def library(self) -> str:
        return 'webdataset' if self.tars else 'datasets'

    def can_be_dealt_out(self, workers: int, ranks: int) -> bool:
        """Whether each of so many loader processes of a rank gets about as many shards."""
        return _is_even(len(self.files) // ranks if self._by_file(ranks) else len(self.files), workers)

    def _by_file(self, ranks: int) -> bool:
        """Whether a rank reads shards of its own. Else every rank reads all, and takes its share of the samples."""
        return _is_even(len(self.files), ranks) if self.tars else len(self.files) % ranks == 0  # as `datasets` has it

    def most_samples(self) -> int:
        """A number of samples that the files hold at most; of Parquet, the number that they hold.

        Raises:
            DataError: A file cannot be read.
        """
        return sum(map(_most_in_tar if self.tars else _rows_of_parquet, self.files))

    def samples(self, rank: int = 0, ranks: int = 1, seed: int | None = None, images: bool = True) -> Iterator[Sample]:
        """The share of a rank, and of the loader process that this is called in: each sample once over all of them.

        Args:
            rank: The number of this process, from 0.
            ranks: How many processes share the samples.
            seed: Seed of the order, the same on all ranks; as they lie there when None. Shards are shuffled, and
                samples in a buffer. Each shard is read from a place of its own on, and then from its start: an epoch
                of less than a pass may see any sample.
            images: Read the images too, not the labels alone.

        Raises:
            DataError: A shard or a sample cannot be read, or a library is missing.
        """
        wanted = None if self.columns is None else set(self.columns)
        missing = missing_texts(self.missing_value)
        missing |= {list_cell([text]) for text in missing if text}
        read = self._tar_samples if self.tars else self._parquet_samples
        for name, image, cells in read(rank, ranks, seed, images):
            _check_columns(cells, name)
            texts = {column: cell_text(value, name, column) for column, value in cells.items()
                     if wanted is None or column in wanted}
            yield Sample(name, image, {
                column: '' if text in missing else text for column, text in texts.items()})

    def _tar_samples(self, rank: int, ranks: int, seed: int | None, images: bool) -> Iterator[_Read]:
        webdataset = find_library(self.library)
        files = list(self.files)
        by_file = self._by_file(ranks)
        if seed is not None:
            random.Random(seed).shuffle(files)
        stream = webdataset.shardlists.split_by_worker(files[rank::ranks] if by_file else files)
        stream = webdataset.tariterators.group_by_keys(_read_tars(stream, images, seed))
        if seed is not None:
            stream = webdataset.filters.shuffle(BUFFER, rng=random.Random(seed))(stream)
        try:
            for members in islice(stream, 0 if by_file else rank, None, 1 if by_file else ranks):
                yield _from_tar(members, images)
        except ValueError as error:
            raise DataError(f'{self.source}: cannot be read as tars ({error.args[0]})') from error

    def _parquet_samples(self, rank: int, ranks: int, seed: int | None, images: bool) -> Iterator[_Read]:
        datasets = find_library(self.library)
        # Not load_dataset('parquet'), which does not tell the file and the row of a sample. The list is dealt out.
        stream = datasets.IterableDataset.from_generator(_read_parquet, gen_kwargs={
            'files': list(self.files), 'image_column': self.image_column, 'label_columns': self.columns,
            'images': images, 'seed': seed})
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=BUFFER)
        if ranks > 1:
            stream = find_library('datasets.distributed').split_dataset_by_node(stream, rank, ranks)
        for row in stream:
            yield row['name'], row['image'], row['cells']


def even_workers(streams: Sequence[Shards], asked: int, ranks: int) -> int:
    """The loader processes of a rank, at most so many as asked for, that all of some shards can be dealt out to."""
    return max((workers for workers in range(1, asked + 1)
                if all(shards.can_be_dealt_out(workers, ranks) for shards in streams)), default=0)


def find_shards(folder: Path, name: str, image_column: str, missing_value: str | None = None) -> Shards | None:
    """The shards of a split of a data directory, or those that a path (with wildcards, if you like) names, if any.

    Args:
        folder: The data directory.
        name: NAME for NAME-000000.tar and so on, NAME/*.tar, NAME.tar, or the same of Parquet; a path that ends so.
        image_column: Of Parquet files, see `Shards`.
        missing_value: A further text that means a missing label, see `Shards`.
    """
    for ending in ('.tar', '.parquet'):
        if name.endswith(ending):
            patterns = [_escaped(folder) / name, path_of(name)]
        else:
            # A number follows, so that train-small-000000.tar is no shard of train.
            patterns = [_escaped(folder) / f'{name}{rest}{ending}' for rest in ('-[0-9]*', '/*', '')]
        for pattern in patterns:
            # A file of just this name comes first, so that one that is called a[1].tar can be named.
            files = [str(path_of(name))] if pattern == path_of(name) and pattern.is_file() else _matches(pattern)
            if files:
                shown = path_of(files[0]).with_name(pattern.name.replace('-[0-9]*', '-*'))
                return Shards(shown, tuple(files), image_column, missing_value)
    return None


def _escaped(folder: Path) -> Path:
    """A folder as part of a pattern."""
    return folder if isinstance(folder, Address) else Path(escape(str(folder)))  # of the former only names are matched


def _matches(pattern: Path) -> list[str]:
    if isinstance(pattern, Address):
        return sorted(map(str, pattern.parent.glob(pattern.name)))
    return sorted(glob(str(pattern)))


def _most_in_tar(path: str) -> int:
    try:
        with open_regular(path) as file:
            return size_of(file) // tarfile.BLOCKSIZE  # a header is of one block
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror})') from error


def _rows_of_parquet(path: str) -> int:
    with open_parquet(path) as (_, table):
        rows: int = table.metadata.num_rows
    return rows


def _is_even(files: int, parts: int) -> bool:
    """Whether files can be dealt out so that parts are equal, or differ by a quarter at most."""
    return files % parts == 0 or files >= 4 * parts


def _beginning(path: str, seed: int | None) -> float:
    """The share of a shard that is read last; the rest of it comes first."""
    return 0.0 if seed is None else random.Random(os.fsencode(f'{seed} {Path(path).name}')).random()


def _read_tars(files: Iterable[str], images: bool, seed: int | None) -> Iterator[dict[str, Any]]:
    """The members of tars as `group_by_keys` takes them, {} after each part of a tar.

    Raises:
        DataError: A tar cannot be read, or is compressed.
    """
    for path in files:
        try:
            with open_regular(path) as file:
                first = int(_beginning(path, seed) * size_of(file))
                for places in [range(first, sys.maxsize), *([range(first)] if first else [])]:
                    file.seek(0)
                    for name, data in _members(file, images, places):
                        yield {'fname': name, 'data': data, '__url__': path}
                    yield {}
        except (tarfile.TarError, RecursionError, EOFError, ValueError, OSError) as error:
            reason = getattr(error, 'strerror', None) or error
            raise DataError(f'{path}: cannot be read as a tar ({reason}); write it as a plain one, not '
                            'compressed') from error


class _Headers:
    """A file from which `tarfile` can read headers of a sane size, whatever size they claim to have."""

    def __init__(self, file: BinaryIO):
        self._read, self.seek, self.tell = file.read, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f'a header of {size:,} bytes')
        return self._read(size)


def _members(file: BinaryIO, images: bool, places: range) -> Iterator[tuple[str, bytes]]:
    """Name and content of a tar's files; b'' for those that nobody reads.

    Args:
        file: The tar, at its start.
        images: Read the images too.
        places: Where the samples begin whose files are wanted, in bytes.

    Raises:
        tarfile.TarError: It cannot be read, or a member of it is out of all proportion.
    """
    # 'r:' and not 'r': a compressed tar may hold more than fits into memory. Names in another encoding stay printable.
    tar = tarfile.open(  # type: ignore[call-overload]  # it reads, seeks and tells, whatever else its types ask for
        fileobj=_Headers(file), mode='r:', encoding='utf-8', errors='backslashreplace')
    key, taken, end = None, 0, 0
    sample, begins = None, 0
    while (member := tar.next()) is not None:
        tar.members.clear()
        if tar.offset <= end:  # a negative size would lead back
            raise tarfile.ReadError(f'{member.name!r} ends before it begins')
        end = tar.offset
        # Members with names such as __url__ are metadata of the archive, or would pass for what webdataset notes.
        if not member.isreg() or re.search(r'^__[^/]*__($|/)|\.__[^/.]*__$', member.name):
            continue
        folder, slash, name = member.name.rpartition('/')
        stem = folder + slash + name.partition('.')[0]
        if stem != sample and name.find('.') > 0:  # as webdataset tells a new sample
            sample, begins = stem, member.offset
        if begins >= places.stop:
            return
        if begins < places.start:
            continue
        ending = f".{name.partition('.')[2].rpartition('.')[2].lower()}"
        if ending != '.json' and not (images and ending in ENDINGS):
            yield member.name, b''
            continue
        key, taken = stem, member.size + (taken if stem == key else 0)
        limit = MAX_JSON if ending == '.json' else MAX_BYTES
        if member.issparse():
            raise tarfile.ReadError(f'{member.name!r} is a sparse file')
        if member.size > limit or taken > MAX_BYTES:
            raise tarfile.ReadError(f'{member.name!r} makes more than {min(limit, MAX_BYTES):,} bytes')
        file.seek(member.offset_data)
        data = file.read(member.size)
        if len(data) < member.size:
            raise tarfile.ReadError(f'{member.name!r} is cut off')
        yield member.name, data


def _from_tar(members: dict[str, Any], images: bool) -> _Read:
    """Name, image and cells of the files of one key."""
    name = f'{escaped(Path(members["__url__"]).name)} sample {shortened(members["__key__"], 200)}'
    image = next((data for ending, data in members.items() if f".{ending.rpartition('.')[2]}" in ENDINGS), None)
    if image is None:
        raise DataError(
            f'{name}: no image ({", ".join(sorted(ENDINGS))}) among its files, which stand side by side in the tar: '
            f'{listed([ending for ending in members if ending[0] != "_"])}')
    try:
        cells = json.loads(members.get('json', b'{}'))
    except (ValueError, RecursionError) as error:
        raise DataError(f'{name}: its JSON cannot be read ({error}); fix it') from error
    if not isinstance(cells, dict):
        raise DataError(f'{name}: its JSON is no mapping of label columns to labels; fix it')
    return name, image if images else None, cells


def _read_parquet(files: Sequence[str], seed: int | None, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
    """The rows of Parquet files as `datasets` streams them."""
    for path in files:
        with open_parquet(path) as (file, table):
            first = int(_beginning(path, seed) * table.metadata.num_rows)
            for places in [range(first, sys.maxsize), *([range(first)] if first else [])]:
                yield from _rows(table, path, size_of(file), places, *args, **kwargs)


def _rows(
        table: Any,
        file: str,
        size: int,
        places: range,
        image_column: str,
        label_columns: tuple[str, ...] | None,
        images: bool,
) -> Iterator[dict[str, Any]]:
    columns = table.schema_arrow.names
    column = next((name for name in (image_column, 'image') if name in columns), None)
    if column is None:
        raise DataError(f"{file}: no column '{image_column}' or 'image' (there are: {listed(columns)}); "
                        'name the one that holds the images with --image-column')
    features = columns_of(table, file)
    labels = set(columns if label_columns is None else label_columns)
    wanted = [name for name in columns if (images if name == column else name in labels)]
    for number, row in rows_of(table, wanted, size, images, places):
        name = f'{escaped(Path(file).name)} row {number + 1}'
        image = _image_bytes(row.pop(column), name, column) if images else None
        cells = {key: class_name(value, features[key], name, key) for key, value in row.items()}
        yield {'name': name, 'image': image, 'cells': cells}


def _image_bytes(value: Any, name: str, column: str) -> bytes:
    data = value.get('bytes') if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        way_out = f'if it holds paths, pass --image-column {column}' if isinstance(data, str) else (
            'write them into the table')
        raise DataError(f"{name}: column '{column}' holds no image bytes; {way_out}")
    return data


def _check_columns(cells: dict[str, Any], name: str) -> None:
    for column in cells:
        if not column.strip():
            raise DataError(f'{name}: a label column without a name; name it or remove it')
        if not column.isprintable():
            raise DataError(f'{name}: the name of a label column, {shortened(ascii(column))}, holds a character that '
                            'cannot be shown; rename it')
