"""Features of a split's images on disk: float16, computed once, never taken for those of other images or weights."""
import errno
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
import timm
import torch

from timm_multilabel.backbones import JoinedBackbones
from timm_multilabel.data.images import FilePhotos
from timm_multilabel.data.table import Rows
from timm_multilabel.errors import CheckpointError, OutputError
from timm_multilabel.inference.loaded import Progress, add_weights
from timm_multilabel.loading.batches import ImageDataset, Views
from timm_multilabel.loading.cache import stamps_of
from timm_multilabel.loading.loaders import create_eval_loader
from timm_multilabel.places import absolute
from timm_multilabel.temporary import temporary_path
from timm_multilabel.training.trainer import Precision

FORMAT = 1  # of the files; another one is another cache
_SECONDS = 5  # after which rows are noted as done


class FeatureFile:
    """The features of a list of images by one backbone: NAME.npy (N, F) float16, to be read with `numpy.load`.

    NAME.done.npy (N, 3) says of each image which state of its file the features are of (see `stamp_of`); -1 where
    there are none. A row is noted there when its features are on the disk, so that a killed process leaves no other.

    Args:
        path: NAME.npy; its name tells backbone, preprocessing and images.
        count: N.
        width: F.
    """

    def __init__(self, path: Path, count: int, width: int):
        self.path, self.done_path = path, path.with_name(f'{path.stem}.done.npy')
        self.shape, self.pending = (count, width), dict[int, tuple[int, int, int]]()
        self.noted = time.monotonic()

    def create(self) -> None:
        """Make the files, unless they are there.

        Raises:
            OutputError: They cannot be written.
        """
        for path, shape, kind in ((self.done_path, (self.shape[0], 3), np.int64), (self.path, self.shape, np.float16)):
            if not _is_array(path, shape, kind):
                # Both: what one of them says of the other would be wrong.
                self._make()
                return

    def _make(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.done_path.unlink(missing_ok=True)
            for path, shape, kind in (
                    (self.path, self.shape, np.float16), (self.done_path, (self.shape[0], 3), np.int64)):
                temporary = temporary_path(path.parent, path.name)
                try:
                    made = np.lib.format.open_memmap(temporary, 'w+', kind, shape)
                    if kind is np.int64:
                        made[:] = -1
                    made.flush()
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f'{self.path}: cannot be written ({error.strerror or error}); name another folder with '
                              '--cache-dir') from error

    def missing(self, rows: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Which of some rows (R,) have no features of their files' present state (R,).

        Args:
            rows: Their numbers.
            stamps: `stamp_of` of their images (R, 3).
        """
        done: np.ndarray = np.load(self.done_path, mmap_mode='r')
        missing: np.ndarray = (done[rows] != stamps).any(axis=1)
        return missing

    def write(self, rows: Sequence[int], features: np.ndarray, stamps: np.ndarray) -> None:
        """Write features (B, F) of rows, whose files have these stamps (B, 3).

        Raises:
            OutputError: They cannot be written.
        """
        _write_rows(self.path, rows, features.astype(np.float16))
        self.pending |= zip(rows, stamps, strict=True)
        if time.monotonic() - self.noted >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Note what was written as done, once it is on the disk."""
        if self.pending:
            _write_rows(self.path, [], np.empty(0), sync=True)
            _write_rows(self.done_path, list(self.pending), np.array(list(self.pending.values()), np.int64),
                        sync=True)
            self.pending.clear()
        self.noted = time.monotonic()

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """The features (R, F), float16, of some rows (R,)."""
        stored: np.ndarray = np.load(self.path, mmap_mode='r')
        return torch.from_numpy(np.ascontiguousarray(stored[rows]))


def _is_array(path: Path, shape: tuple[int, ...], kind: Any) -> bool:
    """Whether a file holds an array of a shape and type."""
    try:
        found = np.load(path, mmap_mode='r')
    except (OSError, ValueError, EOFError):  # damaged, or none
        return False
    return isinstance(found, np.memmap) and found.shape == shape and found.dtype == kind


def _write_rows(path: Path, rows: Sequence[int], values: np.ndarray, sync: bool = False) -> None:
    """Write rows of the array in a file; not through a mapping, since a full disk would end the process.

    Args:
        path: The file.
        rows: Their numbers (R,).
        values: (R, F).
        sync: Wait until all that was written is on the disk.
    """
    try:
        offset = np.load(path, mmap_mode='r').offset
        with open(path, 'r+b', buffering=0) as file:
            for row, value in zip(rows, values, strict=True):
                if os.pwrite(file.fileno(), value.tobytes(), offset + row * value.nbytes) != value.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a part of it fitted
            if sync:
                os.fdatasync(file.fileno())
    except (OSError, ValueError) as error:
        raise OutputError(f'{path}: cannot be written ({getattr(error, "strerror", None) or error}); make room, or '
                          'name another folder with --cache-dir') from error


@dataclass(frozen=True)
class Embedder:
    """Backbones with what turns files into their images.

    Args:
        backbones: In evaluation mode, on the device.
        names: Their models.
        data_config: timm's, of the images.
        views: Resizes and crops as it says.
        precision: Device and precision.
        folder: Of the feature files.
    """
    backbones: JoinedBackbones
    names: Sequence[str]
    data_config: dict[str, Any]
    views: Views
    precision: Precision
    folder: Path

    @cached_property
    def digests(self) -> list[str]:
        """What tells the features of each backbone from others: weights, preprocessing, precision, decoders."""
        found = []
        for number, backbone in enumerate(self.backbones.backbones):
            config = {name: self.data_config[name] for name in ('input_size', 'interpolation', 'crop_pct', 'crop_mode')}
            if config['crop_mode'] == 'border':
                config['mean'] = self.data_config['mean']  # the color of the borders
            digest = hashlib.sha256(repr((
                FORMAT, simplejpeg.__version__, PIL.__version__, timm.__version__, torch.__version__,
                self.names[number], str(backbone), getattr(backbone, 'pretrained_cfg', None), sorted(config.items()),
                self._normalization(number), self.backbones.mirrored, str(self.precision.amp_dtype))).encode())
            add_weights(digest, backbone)
            found.append(digest.hexdigest())
        return found

    def _normalization(self, number: int) -> list[list[float]]:
        """What is done to the pixels for a backbone: x / divisor - offset, rounded as the same numbers should be."""
        mean, std = (torch.tensor(self.data_config[name], dtype=torch.float64) for name in ('mean', 'std'))
        scale, shift = (part[number].flatten().double().cpu() for part in (self.backbones.scale, self.backbones.shift))
        return [[round(value, 5) for value in part.tolist()] for part in (std / scale, mean * scale / std - shift)]

    def files(self, rows: Rows) -> list[FeatureFile]:
        """The feature file of each backbone for a list of images; none is made."""
        images = hashlib.sha256()
        for image in rows.images:
            images.update(os.fsencode(absolute(image)) + b'\0')
        stem = os.fsencode(Path(rows.source).stem)[:100].decode('utf-8', 'ignore')
        found = []
        for digest, width in zip(self.digests, self.backbones.widths, strict=True):
            key = hashlib.sha256(f'{digest} {images.hexdigest()}'.encode()).hexdigest()[:20]
            found.append(FeatureFile(self.folder / f'{stem}-{key}.npy', len(rows), width))
        return found

    @torch.inference_mode()
    def embed(
            self,
            files: Sequence[FeatureFile],
            rows: Rows,
            todo: np.ndarray,
            loader: Mapping[str, Any],
            skip_bad: torch.Tensor | None,
            progress: Progress,
    ) -> ImageDataset:
        """Compute what is missing of some rows.

        Args:
            files: Of `files`, and there.
            rows: All rows of these files.
            todo: Those to look at (R,), in order.
            loader: Arguments of `create_eval_loader`.
            skip_bad: Targets that stand in for those of an image that cannot be decoded; when None, it is an error.
            progress: Told of each batch.

        Returns:
            What was loaded, which knows the bad images.

        Raises:
            CheckpointError: Features are not finite.
            DataError: An image cannot be decoded, and bad ones are not left out.
        """
        its = rows.take(todo)
        part = ImageDataset(its, FilePhotos(its), self.views)
        if skip_bad is not None:
            part.skip_bad(stand_in=skip_bad)
        stamps = stamps_of(its.images)
        lacking = [file.missing(todo, stamps) for file in files]
        first = 0
        made: list[tuple[FeatureFile, torch.Tensor, np.ndarray, int]] = []
        try:
            for images, _ in create_eval_loader(part, **loader) if len(part) else ():
                images, here = self.precision.layout(images), slice(first, first + len(images))
                first += len(images)
                before, made = made, []
                for number, file in enumerate(files):
                    needed = lacking[number][here]
                    if needed.any():
                        some = images if needed.all() else images[torch.from_numpy(needed).to(images.device)]
                        with self.precision.autocast():
                            features = self.backbones.features(number, some)
                        made.append((file, features, np.flatnonzero(needed) + here.start, number))
                for each in before:  # while the device is at the next batch
                    self._store(*each, todo, stamps, part)
                progress.advance()
            for each in made:
                self._store(*each, todo, stamps, part)
        finally:
            for file in files:
                file.flush()
        return part

    def _store(
            self,
            file: FeatureFile,
            made: torch.Tensor,
            places: np.ndarray,
            number: int,
            todo: np.ndarray,
            stamps: np.ndarray,
            part: ImageDataset,
    ) -> None:
        """Write the features of the images at some places of a part, without the bad ones."""
        features = made.half().cpu()
        if not features.isfinite().all():
            why = 'are not finite' if not made.isfinite().all() else 'are beyond what float16 holds'
            raise CheckpointError(f'--model {self.names[number]}: its features {why}; choose another')
        if part.bad is not None:
            good = ~part.bad[torch.from_numpy(places)]
            features, places = features[good], places[good.numpy()]
        file.write(todo[places].tolist(), features.numpy(), stamps[places])
