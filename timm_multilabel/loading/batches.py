"""Draws -> whole batches: images (V * B, 3, H, W) uint8, view-major, and targets (V * B, W)."""
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from timm_multilabel.compat import shared_bytes
from timm_multilabel.data.images import DecodedPhoto, FilePhotos, Photo, Photos
from timm_multilabel.data.table import Rows
from timm_multilabel.distributed import all_objects
from timm_multilabel.errors import DataError, UserError, without_secrets
from timm_multilabel.loading.sampling import Draw, other_rows
from timm_multilabel.loading.soft_labels import SoftLabels
from timm_multilabel.places import AT_ONCE

S = TypeVar('S')
T = TypeVar('T')

_NAMED = 10  # bad images in a line
_TRIES = 100  # at another image in place of a bad one


Batch = tuple[torch.Tensor, torch.Tensor]
"""Images and targets."""


class EvalBatches(Protocol):
    """The batches of an evaluation."""

    def __len__(self) -> int:
        """How many they are."""

    def __iter__(self) -> Iterator[Batch]: ...


class TrainBatches(EvalBatches, Protocol):
    """The batches of training, epoch after epoch."""

    @property
    def order_depends_on(self) -> int | None:
        """What the order of rows depends on beside seed, epoch and rank, if anything."""

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch that the next pass draws, and the first of its batches."""

    def rows_of(self, epoch: int, step: int) -> list[str]:
        """The rows of a batch, as messages name them."""


class Views(Protocol):
    """Makes the views of images. `size` is (H, W)."""
    size: tuple[int, int]

    def __call__(self, photos: Sequence[Photo], seeds: Sequence[int], out: np.ndarray) -> torch.Tensor | None:
        """Write the views of N images into `out` (V, N, H, W, 3); what is told of them (V, N, K), if anything is."""


def of_views(targets: torch.Tensor, told: torch.Tensor | None, views: int) -> torch.Tensor:
    """Targets (B, W) of images for each of their views (V, B, W + K), followed by what is told of these (V, B, K)."""
    repeated = targets.expand(views, *targets.shape)
    return repeated if told is None else torch.cat([repeated, told], dim=2)


@dataclass
class ImageDataset:
    """A data set: rows, their photos, and what makes the photos' views.

    Args:
        rows: The image paths, and the targets that belong to them.
        photos: A photo for each row.
        views: Makes the photos' views.
        bad: Rows (N,) whose image turned out bad, where such rows are to be left out; None where one ends the run. It
            lies in memory that the workers of a loader share.
        stand_in: Targets (W,) of the black picture that takes the place of a bad image; when None, another row does.
        soft_labels: What teachers say of the rows, which comes after their targets.
    """
    rows: Rows
    photos: Photos
    views: Views
    bad: torch.Tensor | None = None
    stand_in: torch.Tensor | None = None
    soft_labels: SoftLabels | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def skip_bad(self, stand_in: torch.Tensor | None = None) -> 'ImageDataset':
        """This part, leaving out bad images from now on."""
        self.bad, self.stand_in = torch.zeros(len(self), dtype=torch.bool).share_memory_(), stand_in
        return self

    def write(self, draws: Sequence[Draw], out: np.ndarray) -> torch.Tensor:
        """Write the views of draws into `out` (V, B, H, W, 3).

        Returns:
            Their targets (V, B, W), followed by S soft labels, and by what is told of each view, where there are any.

        Raises:
            DataError: An image cannot be read, and bad ones are not left out.
        """
        rows, seeds = [draw.row for draw in draws], [draw.seed for draw in draws]
        if self.bad is None:
            told = self.views(self._each(self.photos.__getitem__, rows), seeds, out)
            return of_views(self.targets_of(rows), told, len(out))
        good = self._each(self._find_good, draws)
        try:
            told = self.views([photo for _, photo, _ in good], seeds, out)
        except UserError:  # a header was well, and the rest is not
            found = [row for row, photo, _ in good if row is not None and not can_be_decoded(photo)]
            if not found:
                raise
            self.bad[found] = True
            return self.write(draws, out)
        return of_views(torch.stack([target for *_, target in good]), told, len(out))

    def targets_of(self, rows: Sequence[int]) -> torch.Tensor:
        """The targets of rows, and after them their soft labels if there are any."""
        targets = self.rows.targets[rows]
        return targets if self.soft_labels is None else torch.cat([targets, self.soft_labels.of(rows)], dim=1)

    def _each(self, work: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """What some work gives for each item; images that are fetched from elsewhere are asked for together."""
        if not isinstance(self.photos, FilePhotos) or not self.photos.are_remote:
            return list(map(work, items))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(work, items))

    def _find_good(self, draw: Draw) -> tuple[int | None, Photo, torch.Tensor]:
        """The row, photo and targets (W,) of a draw; where that is bad, of another one, the same for the same draw."""
        bad = self.bad
        assert bad is not None  # bad ones are left out
        for row in islice(chain([draw.row], other_rows(draw.seed, len(self))), _TRIES):
            if not bad[row]:
                try:
                    return row, self.photos[row], self.targets_of([row])[0]
                except UserError:
                    bad[row] = True
            if self.stand_in is not None:
                return None, DecodedPhoto(np.zeros((1, 1, 3), np.uint8)), self.stand_in
        raise DataError(f'{self.rows.source}: {int(bad.sum())} of {len(self)} images are bad, too many to leave out')

    def bad_names(self) -> list[str]:
        """The bad images found so far, as messages name them; checkpoints keep them, so without secrets."""
        bad = [] if self.bad is None else self.bad.nonzero().flatten().tolist()
        return [f'{without_secrets(str(self.rows.images[row]))} ({self.rows.where(row)})' for row in bad]


def can_be_decoded(photo: Photo) -> bool:
    """Whether the pixels of a photo, whose header is well, can be had."""
    try:
        photo.decode()
    except UserError:
        return False
    return True


class Batches(Dataset[Batch]):
    """Whole batches by their draws, of several parts side by side.

    Args:
        parts: The data sets; a draw says which one it is of, and draws of one part stand together.
        views: V, the number of views of each image.
    """

    def __init__(self, parts: Sequence[ImageDataset], views: int):
        self.parts, self.views = list(parts), views

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        images = empty_batch((self.views, len(draws), *self.parts[0].views.size, 3))
        targets, start = [], 0
        for number, part in enumerate(self.parts):
            its = [draw for draw in draws if draw.part == number]
            targets.append(part.write(its, images[:, start:start + len(its)].numpy()))
            start += len(its)
        # Colors last in memory, as they were made: moving them is left to the device.
        return images.flatten(0, 1).permute(0, 3, 1, 2), torch.cat(targets, dim=1).flatten(0, 1)


def empty_batch(shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes for a batch: in a worker of the memory that goes to the main process without another copy."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, np.uint8))  # which takes large pages where there are some
    return shared_bytes(shape)


class LeavesOutBad(Protocol):
    """A data set that leaves out bad images."""

    def bad_names(self) -> list[str]:
        """The bad images, as messages name them: all found so far, or those since the last call."""


class BadImages:
    """The images that turned out bad and were left out, over all ranks.

    Args:
        parts: The data sets that leave them out.
    """

    def __init__(self, parts: Sequence[LeavesOutBad]):
        self.parts = list(parts)
        self.known: set[str] = set()

    def news(self) -> str | None:
        """One line about those that were found since the last call, if any. All ranks call it together."""
        mine = [name for part in self.parts for name in part.bad_names()]
        new = sorted(set().union(*all_objects(mine)) - self.known)
        self.known.update(new)
        if not new:
            return None
        return (f'{len(new)} image{"s" * (len(new) > 1)} that cannot be decoded, left out ({len(self.known)} so far): '
                + ', '.join(new[:_NAMED]) + (', ...' if len(new) > _NAMED else ''))


def as_it_is(batch: T) -> T:
    """What a loader has to do with a batch that is one already."""
    return batch
