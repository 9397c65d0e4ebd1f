"""Rows and view recipes -> batches on the device.

A batch is `(images, targets)`: images (V * B, 3, H, W) float, normalised, view-major (the B first views, then the B
second ones), and targets (V * B, W), repeated for each view. With a pool of unlabelled images the last of the B are of
the pool.
"""
import os
import signal
import threading
from collections.abc import Iterator, Sequence, Sized
from multiprocessing import active_children, parent_process
from typing import Any

import cv2
import torch
from timm.data import Mixup
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Sampler

from timm_multilabel.data.table import Rows
from timm_multilabel.labels import LabelSpace
from timm_multilabel.loading.batches import Batch, Batches, ImageDataset, TrainBatches, as_it_is
from timm_multilabel.loading.sampling import BatchesInOrder, Draw, JoinedBatches, ShuffledBatches
from timm_multilabel.seeds import ERASING, MIXING, seed_step


class WatchedLoader(DataLoader[Batch]):
    """torch's loader, which names a process that died also where it notices that by a broken connection."""

    def start(self) -> None:
        """Start the processes now, with the first batches that a pass in order has.

        Those of the evaluation would else be forked in the middle of training, and a process that is forked at the
        moment in which a thread of torch's takes a lock of Python's hangs.
        """
        if self.num_workers:
            super().__iter__()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # nobody uses more of PyTorch's class of it
        batches = super().__iter__()
        processes = active_children()
        try:
            yield from batches
        except (ConnectionError, EOFError) as error:
            for process in processes:
                process.join(1)  # its end may not have been noticed yet
            dead = [str(process.pid) for process in processes if process.exitcode]
            raise RuntimeError(f'DataLoader worker (pid {", ".join(dead)}) exited unexpectedly') from error


class RepeatableErasing:
    """Random erasing whose randomness in a batch depends on (seed, rank, epoch, number of the batch) alone.

    Args:
        erase: timm's random erasing.
        seed: Of the run.
        rank: The number of this process, from 0.
    """

    def __init__(self, erase: RandomErasing, seed: int, rank: int):
        self.erase, self.seed, self.rank = erase, seed, rank
        self.epoch = self.batch = 0

    def set_epoch(self, epoch: int, first: int) -> None:
        """Set the epoch, and the number of the batch that comes next."""
        self.epoch, self.batch = epoch, first

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seed_step(ERASING, self.seed, self.rank, self.epoch, self.batch)
        self.batch += 1
        erased: torch.Tensor = self.erase(images)
        return erased


class RepeatableLoader(PrefetchLoader):
    """timm's loader with `RepeatableErasing`.

    Args:
        loader: Makes the batches.
        seed: Of the run, for random erasing.
        rank: The number of this process, from 0.
        kwargs: Further arguments of timm's loader.
    """

    def __init__(self, loader: WatchedLoader, *, seed: int, rank: int, **kwargs: Any):
        super().__init__(loader, **kwargs)
        self.erasing = None
        if self.random_erasing is not None:
            self.erasing = RepeatableErasing(self.random_erasing, seed, rank)
            self.random_erasing = self.erasing  # type: ignore[assignment]  # timm does no more than call it

    def __iter__(self) -> Iterator[Batch]:
        batches: Iterator[Batch] = super().__iter__()  # type: ignore[no-untyped-call]  # timm's has no types
        return batches

    def __len__(self) -> int:
        return len(self.loader)


class TrainLoader(RepeatableLoader):
    """timm's loader over draws of an epoch.

    Args:
        draws: Which rows an epoch draws, batch by batch.
        parts: The data sets that they are drawn from.
        loader: Makes the batches of those draws.
        kwargs: Further arguments of `RepeatableLoader`.
    """

    order_depends_on = None
    """What the order of rows depends on beside seed, epoch and rank: nothing."""

    def __init__(self, draws: JoinedBatches, parts: Sequence[ImageDataset], loader: WatchedLoader, **kwargs: Any):
        super().__init__(loader, **kwargs)
        self.draws, self.parts = draws, parts

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch that the next pass draws, and the first of its batches."""
        self.draws.set_epoch(epoch, first)
        if self.erasing is not None:
            self.erasing.set_epoch(epoch, first)

    def rows_of(self, epoch: int, step: int) -> list[str]:
        """The rows of a batch, as messages name them."""
        self.set_epoch(epoch, step)
        return names_of(next(iter(self.draws)), [part.rows for part in self.parts])


def names_of(draws: Sequence[Draw], rows: Sequence[Rows]) -> list[str]:
    """The rows of draws, by part, as messages name them."""
    return [rows[draw.part].where(draw.row) if rows[draw.part].numbers[draw.row] else
            str(rows[draw.part].images[draw.row]) for draw in draws]


class MixedBatches:
    """A loader whose images are mixed in pairs (Mixup, CutMix), with targets mixed alike for every head at once.

    The targets become dense: (B, C) float32 with C the classes of all heads in a row, each head's part one-hot times
    its share, and zero where the label is missing.
    """

    def __init__(self, loader: TrainBatches, mixup: Mixup, label_space: LabelSpace, seed: int, rank: int = 0):
        self.loader, self.mixup, self.label_space = loader, mixup, label_space
        self.seed, self.rank, self.epoch, self.first = seed, rank, 0, 0

    @property
    def order_depends_on(self) -> int | None:
        return self.loader.order_depends_on

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch that the next pass draws, and the first of its batches."""
        self.epoch, self.first = epoch, first
        self.loader.set_epoch(epoch, first)

    def rows_of(self, epoch: int, step: int) -> list[str]:
        """The rows of a batch, as messages name them."""
        return self.loader.rows_of(epoch, step)

    def __iter__(self) -> Iterator[Batch]:
        for batch, (images, targets) in enumerate(self.loader, self.first):
            seed_step(MIXING, self.seed, self.rank, self.epoch, batch)
            yield self.mixup(images, one_hot(targets, self.label_space))


def one_hot(targets: torch.Tensor, label_space: LabelSpace) -> torch.Tensor:
    """Class indices (B, H) as one-hot rows (B, C) of all heads side by side, zero where a label is missing."""
    parts = [
        (column[:, None] == torch.arange(size, device=targets.device)).float()
        for column, size in zip(targets.unbind(1), label_space.sizes, strict=True)
    ]
    return torch.cat(parts, dim=1)


def create_train_loader(
        parts: Sequence[tuple[ImageDataset, int]],
        *,
        views: int,
        seed: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        workers: int = 4,
        rank: int = 0,
        ranks: int = 1,
        steps: int | None = None,
        **random_erasing: Any,
) -> TrainLoader:
    """Shuffled batches of images with their views.

    Args:
        parts: The (labelled) images and how many of them a batch has on each rank; the same of the pool, if any.
        views: V, the number of views of each image.
        steps: Batches of an epoch; those of one pass over the images when None.
        random_erasing: `re_prob`, `re_mode`, `re_count` and `re_num_splits` as in timm.
    """
    draws, data_sets = shuffled_batches(parts, seed, rank, ranks, steps), [part for part, _ in parts]
    loader = _data_loader(data_sets, views, draws, device, workers)
    return TrainLoader(
        draws, data_sets, loader, mean=mean, std=std, device=device, seed=seed, rank=rank, **random_erasing)


def shuffled_batches(
        parts: Sequence[tuple[Sized, int]],
        seed: int,
        rank: int,
        ranks: int,
        steps: int | None,
) -> JoinedBatches:
    """The batches of an epoch: of each part so many images."""
    return JoinedBatches([
        ShuffledBatches(len(part), size, seed, rank, ranks, steps, number)
        for number, (part, size) in enumerate(parts)
    ])


def create_eval_loader(
        part: ImageDataset,
        batch_size: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        workers: int = 4,
        rank: int = 0,
        ranks: int = 1,
        block: int | None = None,
) -> PrefetchLoader:
    """Every row once and in order, each rank its share; shares differ by one row at most; see `BatchesInOrder`."""
    sampler = BatchesInOrder(len(part), batch_size, rank, ranks, block)
    return PrefetchLoader(_data_loader([part], 1, sampler, device, workers), mean, std, device=device)


def _data_loader(
        parts: Sequence[ImageDataset],
        views: int,
        sampler: Sampler[list[Draw]],
        device: torch.device,
        workers: int,
) -> WatchedLoader:
    return WatchedLoader(
        Batches(parts, views),
        batch_sampler=sampler,
        collate_fn=as_it_is,
        **worker_options(device, workers),
    )


def worker_options(device: torch.device, workers: int) -> dict[str, Any]:
    """How a loader starts its processes, and hands over what they make."""
    return {
        'num_workers': workers,
        'persistent_workers': workers > 0,
        'pin_memory': device.type == 'cuda',
        'worker_init_fn': _start_worker,
        'generator': torch.Generator(),  # else starting workers, once a run, would draw from the run's own generator
    }


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # a worker is one of many, and OpenCV's threads do not survive the fork that made it
    # Signals to the whole process group are for the main process, which has its last batches made before it stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None and hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(parent.pid,), daemon=True).start()


def _end_when_told_by(process: int) -> None:
    """End this process at a SIGTERM of that one, which waits for it, and not of others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)
