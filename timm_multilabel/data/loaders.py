"""Rows and view recipes -> batches on the device.

A batch is `(images, targets)`: images (V * B, 3, H, W) float, normalised, view-major (the B first views, then the B
second ones), and targets (V * B, H) of class indices, repeated for each view. That is the form that timm's collate
function and prefetcher give.
"""
import random
from collections.abc import Iterator
from contextlib import contextmanager
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
    """A row of the data set and the seed of its random views in this epoch."""
    index: int
    seed: int


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
    """Rows as (views, targets): V views of an image from one decode, and its class indices (H,).

    An item is asked for by its index, or by a `Draw` that also seeds its views. `transform` may be set later, as
    `timm.data.create_loader` does.

    Args:
        rows: Images and targets.
        transform: The view recipe.
        views: Views of each image; one gives a tensor, more give a tuple.
    """

    def __init__(self, rows: Rows, transform: View | None = None, views: int = 1):
        self.rows = rows
        self.transform = transform
        self.views = views

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | Draw) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor]:
        index = item.index if isinstance(item, Draw) else item
        image = read_image(str(self.rows.images[index]), self.rows.where(index))
        if isinstance(item, Draw):
            with seeded(item.seed):
                views = tuple(self.transform(image) for _ in range(self.views))
        else:
            views = tuple(self.transform(image) for _ in range(self.views))
        return (views if self.views > 1 else views[0]), self.rows.targets[index]


class ShuffledSampler(Sampler[Draw]):
    """One rank's share of an epoch in random order; order and seeds depend on (seed, epoch) alone.

    Every rank gets the same number of rows and no row comes twice, so up to `ranks - 1` rows sit an epoch out.

    Args:
        length: Rows of the data set.
        seed: Seed of the run.
        rank: This process.
        ranks: Number of processes.
        limit: Rows a rank gives at most.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, ranks: int = 1, limit: int | None = None):
        self.length, self.seed, self.rank, self.ranks = length, seed, rank, ranks
        self.share = length // ranks if limit is None else min(length // ranks, limit)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.share

    def __iter__(self) -> Iterator[Draw]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(self.length)
        seeds = generator.integers(2 ** 32, size=self.length)
        mine = order[self.rank::self.ranks][:self.share]
        return (Draw(int(index), int(seeds[index])) for index in mine)


class MixedBatches:
    """A loader whose images are mixed in pairs (Mixup, CutMix), with targets mixed alike for every head at once.

    The targets become dense: (B, C) float32 with C the classes of all heads in a row, each head's part one-hot times
    its share, and zero where the label is missing.
    """

    def __init__(self, loader: PrefetchLoader, mixup: Mixup, label_space: LabelSpace):
        self.loader, self.mixup, self.label_space = loader, mixup, label_space

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def sampler(self) -> Sampler:
        return self.loader.sampler

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
        limit_steps: int | None = None,
        **random_erasing: Any,
) -> PrefetchLoader:
    """Shuffled batches of `batch_size` images a rank; a last, smaller batch is left out.

    Args:
        limit_steps: Batches an epoch has at most.
        random_erasing: `re_prob`, `re_mode` and `re_count` as in timm.
    """
    limit = None if limit_steps is None else limit_steps * batch_size
    sampler = ShuffledSampler(len(dataset), seed, rank, ranks, limit)
    loader = _create_loader(dataset, batch_size, sampler, device, workers, drop_last=True)
    return PrefetchLoader(loader, mean, std, device=device, **random_erasing)


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
    loader = _create_loader(dataset, batch_size, range(rank, len(dataset), ranks), device, workers, drop_last=False)
    return PrefetchLoader(loader, mean, std, device=device)


def _create_loader(
        dataset: MultiLabelDataset,
        batch_size: int,
        sampler: Sampler | range,
        device: torch.device,
        workers: int,
        drop_last: bool,
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=drop_last,
        collate_fn=fast_collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == 'cuda',
        generator=torch.Generator(),  # else starting workers, once a run, would draw from the run's own generator
    )
