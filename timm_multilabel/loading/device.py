"""Batches of images that lie on the device: no loader process, no decoding, no copy in the step."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing

from timm_multilabel.data.images import REDUCTIONS
from timm_multilabel.data.table import Rows
from timm_multilabel.errors import DataError
from timm_multilabel.loading.batches import Batch, EvalBatches
from timm_multilabel.loading.cache import CachedPhotos
from timm_multilabel.loading.loaders import RepeatableErasing, names_of, shuffled_batches
from timm_multilabel.loading.sampling import ShuffledBatches, other_rows
from timm_multilabel.loading.shared import free_memory
from timm_multilabel.loading.soft_labels import SoftLabels
from timm_multilabel.views.device import make_drawn
from timm_multilabel.views.recipe import Draws, ViewRecipe, draw, view_seeds
from timm_multilabel.views.told import Told

_SHARE = 0.8  # of the device's free memory, what images may take at most
_CHUNK = 1024  # images that are copied there at once
_VIEWS = 128  # views that are made at once, at most
_BYTES = 2 ** 28  # of their images as floats, at most


@dataclass
class DeviceImages:
    """N images on a device.

    Args:
        pixels: The images (N, H_max, 3, W_max), uint8, each in the upper left corner.
        shapes: Height and width that each has there (N, 2).
        sizes: Height and width of the whole images (N, 2), larger where they are reduced.
    """
    pixels: torch.Tensor
    shapes: torch.Tensor
    sizes: torch.Tensor

    @staticmethod
    def shape_of(photos: CachedPhotos) -> tuple[int, int, int, int]:
        """The shape that the pixels would have: every image takes the room of the largest."""
        height, width = _shapes(photos).max(axis=0).tolist()
        return len(photos), height, 3, width

    @classmethod
    def copy(cls, photos: CachedPhotos, device: torch.device) -> 'DeviceImages':
        """Copy photos to a device, in the largest scale that they have; a bad one is black."""
        count, height, _, width = cls.shape_of(photos)
        pixels = torch.empty(count, height, 3, width, dtype=torch.uint8, device=device)
        for start in range(0, count, _CHUNK):
            some = torch.zeros(min(_CHUNK, count - start), height, 3, width, dtype=torch.uint8)
            for row, image in enumerate(some.numpy(), start):
                if not photos.contents.bad[row]:
                    found = next(iter(photos.pixels(row).values()))
                    image[:found.shape[0], :, :found.shape[1]] = found.transpose(0, 2, 1)
            pixels[start:start + len(some)] = some.to(device)
        shapes, sizes = (torch.from_numpy(numbers.astype(np.int64)).to(device)
                         for numbers in (_shapes(photos), photos.contents.sizes))
        return cls(pixels, shapes, sizes)


def _shapes(photos: CachedPhotos) -> np.ndarray:
    """Height and width of the largest scale that is kept of each photo (N, 2)."""
    reductions = np.array(REDUCTIONS)[photos.contents.first]
    shapes: np.ndarray = -(-photos.contents.sizes // reductions[:, None])
    return shapes


def fits(parts: Sequence[CachedPhotos], further: int, device: torch.device) -> tuple[int, float]:
    """Bytes that photos, and so many further bytes, would take on a device, and bytes that they may take."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == 'cuda' else free_memory()
    return sum(int(np.prod(DeviceImages.shape_of(photos))) for photos in parts) + further, _SHARE * free


@dataclass
class DeviceDataset:
    """A data set on a device.

    Args:
        images: The images, decoded.
        targets: Their targets (N, W), on the device.
        recipes: The recipe of each view.
        bad: Rows whose image is bad (N,), on the host; another row takes the place of each.
        rows: The same rows on the host, which messages name.
        told: What is told of each view.
    """
    images: DeviceImages
    targets: torch.Tensor
    recipes: Sequence[ViewRecipe]
    bad: np.ndarray
    rows: Rows
    told: Told = Told()

    @classmethod
    def copy(
            cls,
            photos: CachedPhotos,
            recipes: Sequence[ViewRecipe],
            device: torch.device,
            soft_labels: SoftLabels | None = None,
            told: Told = Told(),  # noqa: B008 (frozen)
    ) -> 'DeviceDataset':
        """Copy photos and their targets, with their soft labels if there are any, to a device.

        Raises:
            DataError: All are bad.
        """
        if photos.contents.bad.all():
            raise DataError(f'{photos.files.rows.source}: all of its {len(photos)} images are bad')
        targets = photos.files.rows.targets.to(device)
        if soft_labels is not None:
            targets = torch.cat([targets, soft_labels.of(slice(None)).to(device)], dim=1)
        return cls(DeviceImages.copy(photos, device), targets, recipes, photos.contents.bad, photos.files.rows, told)

    def __len__(self) -> int:
        return len(self.targets)

    def make(self, view: int, rows: torch.Tensor, seeds: torch.Tensor) -> Batch:
        """One view of rows (B,): (B, 3, H, W) of 0 to 255, and its targets with what is told of it (B, W + K)."""
        its, recipe, sizes = self.images, self.recipes[view], self.images.sizes[rows]
        draws, targets = draw(recipe, view_seeds(seeds, view), *sizes.unbind(1)), self.targets[rows]
        if self.told:
            targets = torch.cat([targets, self.told.of(draws, *sizes.unbind(1))], dim=1)
        views = max(1, min(_VIEWS, _BYTES // (4 * its.pixels[0].numel())))
        return torch.cat([
            make_drawn(recipe, its.pixels[some], its.shapes[some], its.sizes[some], Draws(*drawn))
            for some, *drawn in zip(rows.split(views), *(each.split(views) for each in draws))]), targets

    def replace_bad(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Rows (S, B) with another one in place of each bad one, the one that a loader would take."""
        rows = rows.copy()
        for place in np.argwhere(self.bad[rows]).tolist():
            stand_ins = other_rows(int(seeds[tuple(place)]), len(self))
            rows[tuple(place)] = next(row for row in stand_ins if not self.bad[row])
        return rows


def _of_bytes(numbers: Sequence[float]) -> torch.Tensor:
    """Mean or std of each channel for pixels of 0 to 255 (1, 3, 1, 1), rounded to float32 where timm's loader does."""
    return torch.tensor([255 * number for number in numbers]).view(1, -1, 1, 1)


class DeviceTrainLoader:
    """`create_train_loader` for images on a device: the same batches of the same views, but for roundings of pixels.

    Args:
        parts: The (labelled) images and how many of them a batch has on each rank; the same of the pool, if any.
        views: V, the number of views of each image.
        seed: Of the run; with the epoch it decides on the order of rows and on what is random of a view.
        mean: Of each channel, for pixels of 0 to 1, to normalise with.
        std: Likewise the standard deviation.
        rank: The number of this process, from 0.
        ranks: How many processes share the epoch.
        steps: Batches of an epoch; those of one pass over the images when None.
        random_erasing: `re_prob`, `re_mode`, `re_count` and `re_num_splits` as in timm.
    """
    order_depends_on = None

    def __init__(
            self,
            parts: Sequence[tuple[DeviceDataset, int]],
            *,
            views: int,
            seed: int,
            mean: tuple[float, ...],
            std: tuple[float, ...],
            rank: int = 0,
            ranks: int = 1,
            steps: int | None = None,
            re_prob: float = 0.0,
            re_mode: str = 'const',
            re_count: int = 1,
            re_num_splits: int = 0,
    ):
        self.parts, self.views = [part for part, _ in parts], views
        self.samplers = shuffled_batches(parts, seed, rank, ranks, steps)
        self.device = self.parts[0].targets.device
        self.mean, self.std = (_of_bytes(numbers).to(self.device) for numbers in (mean, std))
        self.erase = None
        if re_prob:
            self.erase = RepeatableErasing(RandomErasing(
                re_prob, mode=re_mode, max_count=re_count, num_splits=re_num_splits, device=self.device), seed, rank)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch that the next pass draws, and the first of its batches."""
        self.samplers.set_epoch(epoch, first)
        if self.erase is not None:
            self.erase.set_epoch(epoch, first)

    def rows_of(self, epoch: int, step: int) -> list[str]:
        """The rows of a batch, as messages name them; a bad image's place has been taken by another."""
        self.set_epoch(epoch, step)
        return names_of(next(iter(self.samplers)), [part.rows for part in self.parts])

    def __len__(self) -> int:
        return len(self.samplers)

    def __iter__(self) -> Iterator[Batch]:
        passes = [self._draws(*each) for each in zip(self.parts, self.samplers.samplers)]
        for draws in zip(*passes):
            images, targets = (torch.cat(each) for each in zip(*(
                part.make(view, rows, seeds) for view in range(self.views)
                for part, (rows, seeds) in zip(self.parts, draws))))
            images.sub_(self.mean).div_(self.std)
            if self.erase is not None:
                images = self.erase(images)
            yield images, targets

    def _draws(self, part: DeviceDataset, sampler: ShuffledBatches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows and seeds of each batch; those of a pass come to the device at once."""
        for rows, seeds in sampler.passes():
            rows = part.replace_bad(rows, seeds)
            yield from zip(*(torch.from_numpy(numbers).to(self.device) for numbers in (rows, seeds)))


class DeviceEvalLoader:
    """An evaluation loader whose batches stay on the device, as bytes, once they have been made.

    Args:
        loader: Makes them: normalised images, targets.
        mean: Of each channel, for pixels of 0 to 1, that they are normalised with.
        std: Likewise the standard deviation.
    """

    def __init__(self, loader: EvalBatches, mean: tuple[float, ...], std: tuple[float, ...]):
        self.loader = loader
        self.kept: list[Batch] = []
        self.mean, self.std = _of_bytes(mean), _of_bytes(std)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self.kept:
            for images, targets in self.kept:
                yield images.float().sub_(self.mean).div_(self.std), targets
            return
        kept = []
        for images, targets in self.loader:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
            kept.append(((images * self.std + self.mean).round().to(torch.uint8), targets))
            yield images, targets
        self.kept = kept
