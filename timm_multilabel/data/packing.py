"""Rows and their image files -> shards."""
import json
from pathlib import Path

from timm_multilabel.data.optional import find_library
from timm_multilabel.data.table import Table, find_images
from timm_multilabel.files import atomic_write


def check_packing(kind: str) -> None:
    """Raise UserError where the library of a format is missing."""
    find_library('webdataset' if kind == 'webdataset' else 'datasets')


def pack(table: Table, folder: Path, name: str, kind: str, size: int = 1000) -> list[Path]:
    """Write a table and its images as the shards of a split; what was written.

    Args:
        table: The rows, whose images must be on disk.
        folder: Where the shards go.
        name: The split, with which the names of the shards begin.
        kind: One of `SHARD_FORMATS`.
        size: Rows of a shard; the last one may have fewer.

    Raises:
        UserError: An image or a library is missing.
    """
    images = list(map(Path, find_images(table)))
    labels = [{column: text or None for column, text in zip(table.label_columns, cells)}
              for cells in table.frame[table.label_columns].to_numpy()]
    starts = range(0, len(images), size)
    write, ending = (_write_tar, 'tar') if kind == 'webdataset' else (_write_parquet, 'parquet')
    paths = []
    for number, start in enumerate(starts):
        place = f'{number:06d}' if kind == 'webdataset' else f'{number:05d}-of-{len(starts):05d}'
        paths.append(folder / f'{name}-{place}.{ending}')
        write(paths[-1], images[start:start + size], labels[start:start + size])
    return paths


def _write_tar(path: Path, images: list[Path], labels: list[dict[str, str | None]]) -> None:
    # Opened here: the library would take a path such as pipe:... for a command.
    with atomic_write(path) as file, find_library('webdataset').TarWriter(file, mtime=0) as writer:
        for image, cells in zip(images, labels):
            writer.write({
                '__key__': image.stem, image.suffix.lstrip('.'): image.read_bytes(),
                'json': json.dumps(cells, ensure_ascii=False).encode()})


def _write_parquet(path: Path, images: list[Path], labels: list[dict[str, str | None]]) -> None:
    datasets, pyarrow = find_library('datasets'), find_library('pyarrow')
    texts = {column: datasets.Value('string') for column in labels[0]}
    schema = datasets.Features({'image': datasets.Image(), **texts}).arrow_schema
    rows = [{'image': {'bytes': image.read_bytes(), 'path': image.name}, **cells}
            for image, cells in zip(images, labels)]
    with atomic_write(path) as file:
        find_library('pyarrow.parquet').write_table(pyarrow.Table.from_pylist(rows, schema), file, row_group_size=100)
