"""Embeddings in parts, read one part at a time: more of them than the memory holds."""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from timm_multilabel.errors import CheckpointError
from timm_multilabel.inference.embeddings import Embeddings, check_made_by, images_of_parquet
from timm_multilabel.inference.parts import Manifest, Part
from timm_multilabel.places import path_of


class Bank(Protocol):
    """Points of N images, in memory or in parts on disk."""

    @property
    def made_by(self) -> dict[str, Any]:
        """What `LoadedModel.maker` says of the model."""

    @property
    def width(self) -> int:
        """Numbers of a point."""

    def __len__(self) -> int:
        """N."""

    def chunks(self) -> Iterator[np.ndarray]:
        """All points in order, some at a time: (n, D) each, float32."""

    def names(self, indices: np.ndarray) -> np.ndarray:
        """The images of points, of the shape of their numbers."""

    def whole(self) -> Embeddings:
        """All of it in memory."""


@dataclass(frozen=True)
class EmbeddingParts:
    """A folder of parts that `embed` wrote.

    Args:
        folder: The folder.
        parts: Those of its parts that have rows, in order.
        made_by: What `LoadedModel.maker` says of the model.
        width: Numbers of a point.
    """
    folder: Path
    parts: tuple[Part, ...]
    made_by: dict[str, Any]
    width: int

    @classmethod
    def load(cls, folder: Path) -> 'EmbeddingParts':
        """Read the manifest and the first part.

        Raises:
            CheckpointError: The folder is none of embeddings, or its parts are not finished.
        """
        manifest = Manifest.read(folder)
        parts = tuple(part for part in manifest.parts if part.rows)
        made_by = manifest.plan.made_by
        try:
            check_made_by(made_by)
        except ValueError:
            parts = ()
        if manifest.plan.command != 'embed' or not parts:
            raise CheckpointError(f'{folder}: no embeddings, but parts of {manifest.plan.command}; name a folder that '
                                  'embed wrote')
        return cls(folder, parts, made_by, Embeddings.load(folder / parts[0].file).width)

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    def _read(self, part: Part) -> Embeddings:
        read = Embeddings.load(self.folder / part.file)
        if (len(read), read.width, read.made_by) != (part.rows, self.width, self.made_by):
            raise self._another(part)
        return read

    def _another(self, part: Part) -> CheckpointError:
        return CheckpointError(f'{self.folder / part.file}: not the part that the manifest names; write the parts '
                               'again with --force')

    def chunks(self) -> Iterator[np.ndarray]:
        """See `Bank`.

        Raises:
            CheckpointError: A part is missing, damaged or another one, as in `names`.
        """
        for part in self.parts:
            yield self._read(part).vectors

    def names(self, indices: np.ndarray) -> np.ndarray:
        """See `Bank`."""
        found = np.empty(indices.shape, object)
        ends = np.cumsum([part.rows for part in self.parts])
        which = np.searchsorted(ends, indices, side='right')
        for number in np.unique(which).tolist():
            here, part = which == number, self.parts[number]
            images = images_of_parquet(self.folder / part.file)
            if len(images) != part.rows:
                raise self._another(part)
            found[here] = images[indices[here] - (ends[number] - part.rows)]
        return found

    def whole(self) -> Embeddings:
        """See `Bank`."""
        read = [self._read(part) for part in self.parts]
        return Embeddings(np.concatenate([each.images for each in read]),
                          np.concatenate([each.vectors for each in read]), self.made_by)


def open_embeddings(path: str | Path) -> Bank:
    """The embeddings of a file or of a folder of parts.

    Raises:
        CheckpointError: They are missing, damaged or something else, or pyarrow is not installed.
    """
    path = path_of(path)
    return EmbeddingParts.load(path) if path.is_dir() else Embeddings.load(path)
