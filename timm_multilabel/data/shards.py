"""Shards -> samples: WebDataset tars and Parquet tables, streamed and dealt out by the libraries that they are of."""
import json
import math
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape, glob
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from timm_multilabel.errors import UserError
from timm_multilabel.labels import TAG_SEPARATOR

BUFFER = 1000
"""Samples among which the next one is drawn, in each loader process."""

_IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'bmp', 'gif', 'tif', 'tiff')


class Sample(NamedTuple):
    """A sample as it lies in its shard.

    Args:
        name: Its shard and its key or row, as messages name it; no two of a split have the same.
        image: The bytes of the image file; None where only labels were asked for.
        cells: Texts by label column; empty, or not there, where the label is missing.
    """
    name: str
    image: bytes | None
    cells: dict[str, str]


@dataclass(frozen=True)
class Shards:
    """The files of a split, all tars or all Parquet.

    Args:
        source: What messages call them: their pattern.
        files: The shards.
        image_column: The column of the images in Parquet; `image` where there is none of this name.
        missing_value: A text that means a missing label, beside the empty one.
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

    def workers(self, asked: int, ranks: int) -> int:
        """The loader processes of a rank, at most so many as asked for, that the shards can be dealt out to."""
        files = len(self.files) // ranks if self._by_file(ranks) else len(self.files)
        return max((workers for workers in range(1, asked + 1) if _is_even(files, workers)), default=0)

    def _by_file(self, ranks: int) -> bool:
        """Whether a rank reads shards of its own. Else every rank reads all, and takes its share of the samples."""
        return _is_even(len(self.files), ranks) if self.tars else len(self.files) % ranks == 0  # as `datasets` has it

    def samples(self, rank: int = 0, ranks: int = 1, seed: int | None = None, images: bool = True) -> Iterator[Sample]:
        """The share of a rank, and of the loader process that this is called in: each sample once over all of them.

        Args:
            rank: This process.
            ranks: Number of processes.
            seed: Seed of the order, the same on all ranks; as they lie there when None.
            images: Read images too.

        Raises:
            UserError: A shard or a sample cannot be read, or a library is missing.
        """
        read = self._tar_samples if self.tars else self._parquet_samples
        for name, image, cells in read(rank, ranks, seed, images):
            texts = {column: _text(value, name, column) for column, value in cells.items()
                     if self.columns is None or column in self.columns}
            yield Sample(name, image, {
                column: '' if text == self.missing_value else text for column, text in texts.items()})

    def _tar_samples(self, rank: int, ranks: int, seed: int | None, images: bool) -> Iterator[tuple]:
        webdataset = find_library(self.library)
        files = list(self.files)
        by_file = self._by_file(ranks)
        if seed is not None:
            random.Random(seed).shuffle(files)
        stream = webdataset.WebDataset(
            files,
            shardshuffle=False,
            nodesplitter=(lambda urls: islice(urls, rank, None, ranks)) if by_file else None,
            empty_check=False,
            seed=0,  # used for nothing; without it the library would draw one from Python's generator
        )
        if seed is not None:
            stream = stream.shuffle(BUFFER, rng=random.Random(seed))
        try:
            for members in islice(stream, 0 if by_file else rank, None, 1 if by_file else ranks):
                yield _from_tar(members, images)
        except (tarfile.TarError, EOFError, ValueError, OSError) as error:
            shard = next((part for part in error.args[1:] if part in self.files), self.source)
            raise UserError(f'{shard}: cannot be read as a tar ({error.args[0] if error.args else error})') from error

    def _parquet_samples(self, rank: int, ranks: int, seed: int | None, images: bool) -> Iterator[tuple]:
        datasets = find_library(self.library)
        # Not load_dataset('parquet'), which does not tell the file and the row of a sample. The list is dealt out.
        stream = datasets.IterableDataset.from_generator(_read_parquet, gen_kwargs={
            'files': list(self.files), 'image_column': self.image_column, 'label_columns': self.columns,
            'images': images})
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=BUFFER)
        if ranks > 1:
            stream = find_library('datasets.distributed').split_dataset_by_node(stream, rank, ranks)
        for row in stream:
            yield row['name'], row['image'], row['cells']


def find_shards(folder: Path, name: str, image_column: str, missing_value: str | None = None) -> Shards | None:
    """The shards of a split of a data directory, or those that a path (with wildcards, if you like) names, if any.

    Args:
        folder: The data directory.
        name: NAME for NAME-000000.tar and so on, NAME/*.tar, NAME.tar, or the same of Parquet; a path that ends so.
        image_column: See `Shards`.
        missing_value: See `Shards`.
    """
    place = Path(escape(str(folder)))
    for ending in ('.tar', '.parquet'):
        if name.endswith(ending):
            patterns = [place / name, Path(name)]
        else:
            # A number follows, so that train-small-000000.tar is no shard of train.
            patterns = [place / f'{name}{rest}{ending}' for rest in ('-[0-9]*', '/*', '')]
        for pattern in patterns:
            files = sorted(glob(str(pattern)))
            if files:
                shown = Path(files[0]).with_name(pattern.name.replace('-[0-9]*', '-*'))
                return Shards(shown, tuple(files), image_column, missing_value)
    return None


def _is_even(files: int, parts: int) -> bool:
    """Whether files can be dealt out so that parts are equal, or differ by a quarter at most."""
    return files % parts == 0 or files >= 4 * parts


def find_library(name: str) -> ModuleType:
    """Import a library that only shards need.

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        extra = 'webdataset' if name == 'webdataset' else 'parquet'
        raise UserError(
            f"{name} cannot be imported ({error}), and these shards need it: pip install 'timm-multilabel[{extra}]'"
        ) from error


def _from_tar(members: dict[str, Any], images: bool) -> tuple[str, bytes | None, dict[str, Any]]:
    """Name, image and cells of the files of one key."""
    name = f'{Path(members["__url__"]).name} sample {members["__key__"]}'
    image = next((data for ending, data in members.items() if ending.rpartition('.')[2] in _IMAGES), None)
    if image is None:
        raise UserError(
            f'{name}: no image ({", ".join(_IMAGES)}) among its files, which stand side by side in the tar: '
            f'{", ".join(ending for ending in members if ending[0] != "_")}')
    try:
        cells = json.loads(members.get('json', b'{}'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{name}: its JSON cannot be read ({error}); mend it') from error
    if not isinstance(cells, dict):
        raise UserError(f'{name}: its JSON is no mapping of label columns to labels; mend it')
    return name, image if images else None, cells


def _read_parquet(files: Sequence[str], *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
    """The rows of Parquet files as `datasets` streams them."""
    parquet = find_library('pyarrow.parquet')
    for file in files:
        try:
            with parquet.ParquetFile(file) as table:
                yield from _rows(table, file, *args, **kwargs)
        except (ValueError, OSError) as error:  # pyarrow's errors of broken files are of these
            raise UserError(f'{file}: cannot be read as Parquet ({" ".join(str(error).split())})') from error


def _rows(
        table: Any,
        file: str,
        image_column: str,
        label_columns: tuple[str, ...] | None,
        images: bool,
) -> Iterator[dict[str, Any]]:
    columns = table.schema_arrow.names
    column = next((name for name in (image_column, 'image') if name in columns), None)
    if column is None:
        raise UserError(f"{file}: no column '{image_column}' or 'image' (there are: {', '.join(columns)}); "
                        'name the one that holds the images with --image-column')
    features = find_library('datasets').Features.from_arrow_schema(table.schema_arrow)
    wanted = [name for name in columns if (
        images if name == column else label_columns is None or name in label_columns)]
    number = 0
    # Small batches, since a row may hold a megabyte; no threads, which a forked loader process has not.
    for batch in table.iter_batches(batch_size=64, columns=wanted, use_threads=False):
        # A batch of no columns still has rows.
        for row in batch.to_pylist() if wanted else [{}] * batch.num_rows:
            number += 1
            name = f'{Path(file).name} row {number}'
            image = _image_bytes(row.pop(column), name, column) if images else None
            cells = {key: _class_name(value, features[key]) for key, value in row.items()}
            yield {'name': name, 'image': image, 'cells': cells}


def _image_bytes(value: Any, name: str, column: str) -> bytes:
    data = value.get('bytes') if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise UserError(f"{name}: column '{column}' holds no image bytes; write them into the table")
    return data


def _class_name(value: Any, feature: Any) -> Any:
    """What a number stands for where the table's metadata say that it is a class (-1: none)."""
    feature = getattr(feature, 'feature', feature)  # of a list
    names = getattr(feature, 'names', None)
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_class_name(part, feature) for part in value]
    return names[value] if value >= 0 else None


def _text(value: Any, name: str, column: str) -> str:
    """A label as the cell of a CSV would hold it."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return ''
    if isinstance(value, bool):
        return str(int(value))  # a tag's column of 0 and 1
    if isinstance(value, list):
        return TAG_SEPARATOR.join(filter(None, (_text(part, name, column) for part in value)))
    if isinstance(value, dict | bytes):
        raise UserError(f"{name}: '{column}' is no text, number or list of tags; choose --heads without it")
    return str(value).strip()
