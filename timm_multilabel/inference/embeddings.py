"""Where images lie in a model's space, kept in a file with the images' paths and what made them."""
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_multilabel.arrays import check_array, check_expansion, read_arrays, write_arrays
from timm_multilabel.data.optional import find_library
from timm_multilabel.errors import CheckpointError, escaped, is_utf8
from timm_multilabel.files import atomic_write, open_regular, reading
from timm_multilabel.inference.loaded import WHAT, LoadedModel, Progress, check_finite, reason_of
from timm_multilabel.loading.batches import ImageDataset
from timm_multilabel.places import local_copy, path_of, why_missing
from timm_multilabel.training.checkpoint import WEIGHTS

SUFFIXES = ('.npz', '.parquet')
"""The kinds of files: numpy's, and Parquet with a row an image."""

_METADATA = b'timm-multilabel'  # the key in the metadata of a Parquet file
_WAY_OUT = 'write them again with timm-multilabel embed'
_BATCH = 1024  # rows that are read from one at once


@dataclass(frozen=True)
class Embeddings:
    """Points of N images.

    Args:
        images: The image files (N,).
        vectors: The points (N, D), float32.
        made_by: What `LoadedModel.maker` says of the model.
    """
    images: np.ndarray
    vectors: np.ndarray
    made_by: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def width(self) -> int:
        """Numbers of a point."""
        return int(self.vectors.shape[1])

    def chunks(self) -> Iterator[np.ndarray]:
        """All points, as one chunk."""
        yield self.vectors

    def names(self, indices: np.ndarray) -> np.ndarray:
        """The images of points, of the shape of their numbers."""
        found: np.ndarray = self.images[indices]
        return found

    def whole(self) -> 'Embeddings':
        """Themselves, which are in memory."""
        return self

    def save(self, path: str | Path) -> None:
        """Write them as .npz or .parquet.

        Raises:
            CheckpointError: pyarrow is not installed, or the file cannot be written.
        """
        if Path(path).suffix == '.parquet':
            self._save_parquet(path)
            return
        write_arrays(path, {'images': self.images.astype(str), 'embeddings': self.vectors,
                            'made_by': np.array(json.dumps(self.made_by))})

    def _save_parquet(self, path: str | Path) -> None:
        _, parquet = import_pyarrow(path)
        for image in self.images:
            if not is_utf8(image):
                raise CheckpointError(
                    f'{path}: the name of {escaped(image)} is not UTF-8, as Parquet needs it; name a .npz '
                                'file')
        table = self.table()
        with atomic_write(path) as file:
            parquet.write_table(table, file)

    def table(self) -> Any:
        """A table of pyarrow: columns image and embedding, and what made them."""
        pyarrow = find_library('pyarrow')
        vectors = pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(np.ascontiguousarray(self.vectors).reshape(-1)), self.vectors.shape[1])
        table = pyarrow.table({'image': pyarrow.array(self.images.astype(str)), 'embedding': vectors})
        return table.replace_schema_metadata({_METADATA: json.dumps(self.made_by).encode()})

    @classmethod
    def load(cls, path: str | Path) -> 'Embeddings':
        """Read what `save` wrote, without running anything that it contains.

        Raises:
            CheckpointError: The file is missing, damaged or something else, or pyarrow is not installed.
        """
        path = path_of(path)
        if not path.is_file():
            raise CheckpointError(
                f'{path}: {why_missing(path, "file of embeddings")}; write one with timm-multilabel embed')
        if path.suffix == '.parquet':
            import_pyarrow(path)
        with reading(path, 'embeddings', _WAY_OUT), local_copy(path) as file:
            images, vectors, made_by = _load_parquet(file) if path.suffix == '.parquet' else _load_npz(file)
            _check_images(images)
            check_array('embeddings', vectors, np.float32, len(images), None)
            if not vectors.size or not np.isfinite(vectors).all():
                raise ValueError('embeddings: none, or some are not finite')
            check_made_by(made_by)
        return cls(np.array(images, object), vectors, made_by)


def _load_npz(path: Path) -> tuple[list[Any], np.ndarray, Any]:
    """Images, vectors and what made them."""
    stored = read_arrays(path)
    check_array('images', stored['images'], str, None)
    return stored['images'].tolist(), stored['embeddings'], json.loads(str(stored['made_by']))


def _load_parquet(path: Path) -> tuple[list[Any], np.ndarray, Any]:
    """As `_load_npz`."""
    pyarrow, parquet = import_pyarrow(path)
    batches, size = [], 0
    # Opened here, since a path such as s3://... would be taken for an address.
    with open_regular(path) as opened, parquet.ParquetFile(opened) as file:
        # Not by what it says of its columns: pyarrow ends the process where that is damaged.
        kind = file.schema_arrow.field('embedding').type
        if not pyarrow.types.is_fixed_size_list(kind) or kind.value_type != pyarrow.float32():
            raise ValueError(f'embeddings of type {kind}')
        check_expansion(path, 4 * kind.list_size * file.metadata.num_rows)  # few bytes may stand for many values
        for batch in file.iter_batches(_BATCH, columns=['image', 'embedding']):
            size += batch.nbytes
            check_expansion(path, size)
            batches.append(batch)
        table = pyarrow.Table.from_batches(batches, file.schema_arrow)
    vectors = table['embedding'].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    made_by = json.loads((table.schema.metadata or {})[_METADATA])
    return table['image'].to_pylist(), vectors.reshape(len(table), -1).copy(), made_by


def images_of_parquet(path: Path) -> np.ndarray:
    """The images of a Parquet file that `save` wrote, as texts (N,), without their points.

    Raises:
        DataError: See `Embeddings.load`.
    """
    _, parquet = import_pyarrow(path)
    with reading(path, 'embeddings', _WAY_OUT), local_copy(path) as here:
        images: list[Any] = []
        size = 0
        with open_regular(here) as opened, parquet.ParquetFile(opened) as file:
            for batch in file.iter_batches(_BATCH, columns=['image']):
                size += batch.nbytes
                check_expansion(here, size)
                images += batch['image'].to_pylist()
        _check_images(images)
    return np.array(images, object)


def _check_images(images: list[Any]) -> None:
    if not all(isinstance(image, str) and '\0' not in image for image in images):
        raise ValueError('an image without a path')


def check_made_by(made_by: Any) -> None:
    """Raise ValueError unless it is what `LoadedModel.maker` says of some model."""
    texts = isinstance(made_by, dict) and all(
        isinstance(made_by.get(name), str) for name in ('arch', 'what', 'weights', 'digest'))
    if not texts or made_by['what'] not in WHAT or made_by['weights'] not in WEIGHTS:
        raise ValueError('it does not say which model made it')


def import_pyarrow(path: str | Path, instead: str = 'a .npz file') -> tuple[Any, Any]:
    """pyarrow and its Parquet.

    Args:
        path: The file that needs it.
        instead: What may be named that does not.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CheckpointError(
            f"{path}: Parquet needs pyarrow; pip install '.[parquet]', or name {instead}") from error
    return pyarrow, pyarrow.parquet


def embed_part(
        loaded: LoadedModel,
        part: ImageDataset,
        what: str,
        batch_size: int,
        workers: int,
        progress: Progress,
) -> tuple[Embeddings, list[str]]:
    """The points of a part's images, in order, without those of bad ones.

    Args:
        loaded: The model that makes the points.
        part: The images, as `LoadedModel.part` gives them.
        what: 'features' or 'projections'.
        batch_size: Images of a batch.
        workers: Loader processes; none for a single batch.
        progress: Told of each batch.

    Returns:
        The embeddings, and a line for each bad image that the part keeps.

    Raises:
        CheckpointError: The checkpoint has no projector or its outputs are not finite, or no image can be read.
    """
    vectors = []
    for points in points_of(loaded, part, what, batch_size, workers):
        vectors.append(points)
        progress.advance()
    bad = bad_of(part)
    lines = [reason_of(part, index) for index in np.flatnonzero(bad).tolist()]
    if bad.all():
        raise CheckpointError(f'none of {len(part)} images can be read; the first: {lines[0]}')
    return embeddings_of(loaded, part, loaded.maker(what), vectors, slice(0, len(part))), lines


@torch.no_grad()
def points_of(
        loaded: LoadedModel,
        part: ImageDataset,
        what: str,
        batch_size: int,
        workers: int,
        block: int | None = None,
) -> Iterator[np.ndarray]:
    """The points (B, D), float32, of a part's images, in order, a batch at a time; see `embed_part`.

    Args:
        block: No batch has images of two blocks of so many.
    """
    embedder = loaded.embedder(what)
    for images in loaded.batches(part, batch_size, workers, block):
        with loaded.precision.autocast():
            made = embedder(images)
        yield made.float().cpu().numpy()


def bad_of(part: ImageDataset) -> np.ndarray:
    """Which images of a part turned out bad (N,)."""
    return np.zeros(len(part), dtype=bool) if part.bad is None else part.bad.numpy()


def embeddings_of(
        loaded: LoadedModel,
        part: ImageDataset,
        made_by: dict[str, Any],
        vectors: Sequence[np.ndarray],
        rows: slice,
) -> Embeddings:
    """The embeddings of some rows of a part, from their points, without those of bad images.

    Args:
        loaded: The model that made them.
        part: The images.
        made_by: What `LoadedModel.maker` says of it.
        vectors: The points of the rows, (B, D) each.
        rows: Which rows of the part they are.

    Raises:
        CheckpointError: They are not finite.
    """
    good = ~bad_of(part)[rows]
    points = np.concatenate(vectors)[good]
    check_finite([torch.from_numpy(points)], loaded.checkpoint.path)
    return Embeddings(part.rows.images[rows][good], points, made_by)


def check_maker(theirs: dict[str, Any], path: str | Path, loaded: LoadedModel) -> None:
    """Raise UserError where a model did not make embeddings: distances between its points and them mean nothing.

    Args:
        theirs: What `LoadedModel.maker` says of the model that made them.
        path: Where they are.
        loaded: The model.
    """
    ours = loaded.maker(theirs['what'])
    if theirs != ours:
        raise CheckpointError(
            f'{path}: {theirs["what"]} of another checkpoint ({theirs["arch"]}, {str(theirs["digest"])[:8]}) than '
            f'{loaded.checkpoint.path} ({ours["arch"]}, {ours["digest"][:8]}); name the one that made them, or embed '
            'the images again')
