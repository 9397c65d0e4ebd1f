"""Rows and view recipes -> batches on the device.

A batch is `(images, targets)`: images (V * B, 3, H, W) float, normalised, view-major (the B first views, then the B
second ones), and targets (V * B, W), repeated for each view. That is the form that timm's collate function and
prefetcher give. With a pool of unlabelled images the last of the B are of the pool.
"""
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from timm_multilabel.data.images import read_image
from timm_multilabel.data.table import Rows
from timm_multilabel.data.views import View
from timm_multilabel.labels import LabelSpace


class Draw(NamedTuple):
    """A row of a data set, the seed of its random views in this epoch, and which data set: labelled 0, pool 1."""
    index: int
    seed: int
    part: int = 0


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random generators that augmentations use, so that a view depends on its draw alone.

    In a loader's worker they are seeded for each image anyway; in the main process they also serve dropout and random
    erasing, so they get their state back.
    """
    in_main_process = get_worker_info() is None
    if in_main_process:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if in_main_process:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class MultiLabelDataset(Dataset):
    """Rows as (views, targets): V views of an image from one decode, and its targets (W,).

    An item is asked for by its index, or by a `Draw` that also seeds its views. `transform` may be set later, as
    `timm.data.create_loader` does.

    Args:
        rows: Images and targets.
        transform: The view recipe.
        views: Views of each image; one gives a tensor, more give a tuple.
        first_transform: The recipe of the first view, where it is another one.
    """

    def __init__(
            self,
            rows: Rows,
            transform: View | None = None,
            views: int = 1,
            first_transform: View | None = None,
    ):
        self.rows = rows
        self.transform = transform
        self.views = views
        self.first_transform = first_transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | Draw) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor]:
        index = item.index if isinstance(item, Draw) else item
        image = read_image(str(self.rows.images[index]), self.rows.where(index))
        recipes = [self.first_transform or self.transform] + [self.transform] * (self.views - 1)
        with seeded(item.seed) if isinstance(item, Draw) else nullcontext():
            views = tuple(recipe(image) for recipe in recipes)
        return (views if self.views > 1 else views[0]), self.rows.targets[index]


class JoinedDataset(Dataset):
    """The labelled rows and the pool, asked for by draws."""

    def __init__(self, parts: list[MultiLabelDataset]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, draw: Draw) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        return self.parts[draw.part][draw]


class ShuffledBatches(Sampler[list[Draw]]):
    """One rank's share of an epoch in random order, in batches; order and seeds depend on (seed, part, epoch) alone.

    Every rank gets the same number of rows and, in a pass over the data, no row comes twice; rows that do not fill a
    batch on every rank sit a pass out. An epoch of more batches than a pass has goes on with another pass, reshuffled.

    Args:
        length: Rows of the data set.
        batch_size: Rows of a batch.
        seed: Seed of the run.
        rank: This process.
        ranks: Number of processes.
        steps: Batches of an epoch; those of one pass when None.
        part: The data set that the draws are of.
    """

    def __init__(
            self,
            length: int,
            batch_size: int,
            seed: int,
            rank: int = 0,
            ranks: int = 1,
            steps: int | None = None,
            part: int = 0,
    ):
        self.length, self.batch_size, self.seed, self.rank, self.ranks = length, batch_size, seed, rank, ranks
        self.batches_of_pass = length // ranks // batch_size
        self.steps = self.batches_of_pass if steps is None else steps
        self.part = part
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = np.random.default_rng((self.seed, self.epoch, *([self.part] if self.part else [])))
        for step in range(self.steps):
            batch = step % self.batches_of_pass
            if not batch:
                order = generator.permutation(self.length)[self.rank::self.ranks]
                seeds = generator.integers(2 ** 32, size=self.length)
            rows = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            yield [Draw(int(row), int(seeds[row]), self.part) for row in rows]


class JoinedBatches(Sampler[list[Draw]]):
    """Batches of several samplers side by side."""

    def __init__(self, samplers: list[ShuffledBatches]):
        self.samplers = samplers

    def set_epoch(self, epoch: int) -> None:
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return min(map(len, self.samplers))

    def __iter__(self) -> Iterator[list[Draw]]:
        return (sum(batches, []) for batches in zip(*self.samplers))


class TrainLoader(PrefetchLoader):
    """timm's loader over draws of an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next pass draws."""
        self.loader.batch_sampler.set_epoch(epoch)


class MixedBatches:
    """A loader whose images are mixed in pairs (Mixup, CutMix), with targets mixed alike for every head at once.

    The targets become dense: (B, C) float32 with C the classes of all heads in a row, each head's part one-hot times
    its share, and zero where the label is missing.
    """

    def __init__(self, loader: PrefetchLoader, mixup: Mixup, label_space: LabelSpace):
        self.loader, self.mixup, self.label_space = loader, mixup, label_space

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, targets in self.loader:
            yield self.mixup(images, one_hot(targets, self.label_space))


def one_hot(targets: torch.Tensor, label_space: LabelSpace) -> torch.Tensor:
    """Class indices (B, H) as one-hot rows (B, C) of all heads side by side, zero where a label is missing."""
    parts = [
        (column[:, None] == torch.arange(size, device=targets.device)).float()
        for column, size in zip(targets.unbind(1), label_space.sizes, strict=True)
    ]
    return torch.cat(parts, dim=1)


def create_train_loader(
        dataset: MultiLabelDataset,
        batch_size: int,
        *,
        seed: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        workers: int = 4,
        rank: int = 0,
        ranks: int = 1,
        steps: int | None = None,
        pool: MultiLabelDataset | None = None,
        pool_batch_size: int = 0,
        **random_erasing: Any,
) -> TrainLoader:
    """Shuffled batches of `batch_size` images a rank, and behind them in each view `pool_batch_size` of the pool.

    Args:
        dataset: The (labelled) images.
        steps: Batches of an epoch; those of one pass over the images when None.
        pool: The unlabelled images.
        random_erasing: `re_prob`, `re_mode`, `re_count` and `re_num_splits` as in timm.
    """
    parts = [(dataset, batch_size)] + ([(pool, pool_batch_size)] if pool is not None else [])
    samplers = [
        ShuffledBatches(len(rows), size, seed, rank, ranks, steps, part) for part, (rows, size) in enumerate(parts)]
    loader = DataLoader(
        JoinedDataset([rows for rows, _ in parts]),
        batch_sampler=JoinedBatches(samplers),
        **_common(device, workers),
    )
    return TrainLoader(loader, mean, std, device=device, **random_erasing)


def create_eval_loader(
        dataset: MultiLabelDataset,
        batch_size: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        workers: int = 4,
        rank: int = 0,
        ranks: int = 1,
) -> PrefetchLoader:
    """Every row once and in order, each rank its share; shares differ by one row at most."""
    loader = DataLoader(
        dataset, batch_size, sampler=range(rank, len(dataset), ranks), **_common(device, workers))
    return PrefetchLoader(loader, mean, std, device=device)


def _common(device: torch.device, workers: int) -> dict[str, Any]:
    return {
        'collate_fn': fast_collate,
        'num_workers': workers,
        'persistent_workers': workers > 0,
        'pin_memory': device.type == 'cuda',
        'generator': torch.Generator(),  # else starting workers, once a run, would draw from the run's own generator
    }
