"""Streamed samples -> whole batches on the device, in the form of `batches.py`."""
from collections.abc import Iterator
from hashlib import blake2b
from itertools import count, islice
from multiprocessing import Queue
from queue import Empty
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from timm_multilabel.data.images import EncodedPhoto
from timm_multilabel.data.shards import Sample
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.errors import DataError, UserError
from timm_multilabel.loading.batches import Batch, Views, as_it_is, can_be_decoded, empty_batch, of_views
from timm_multilabel.loading.loaders import RepeatableLoader, WatchedLoader, worker_options


class _Drawn(NamedTuple):
    """A sample, its photo, and the seed of its views."""
    sample: Sample
    photo: EncodedPhoto
    seed: int


class StreamedBatches(IterableDataset[Batch]):
    """The batches of one rank, in training as many as asked for, in evaluation those of one pass.

    In training the order depends on the seed, the epoch and the number of loader processes, and a sample's views on the
    seed, the epoch, its name and how often its rank has begun the shards again in the epoch.

    Args:
        rows: The samples, with what encodes their labels.
        make_views: Makes the views of their photos.
        views: V, the number of views of each image.
        batch_size: Images of a batch on this rank.
        seed: Of the run.
        rank: The number of this process, from 0.
        ranks: How many processes share the epoch.
        steps: Batches of an epoch; one pass in order when None.
        skip_bad: Leave out images that cannot be read.
    """

    def __init__(
            self,
            rows: StreamedRows,
            make_views: Views,
            views: int,
            batch_size: int,
            *,
            seed: int = 0,
            rank: int = 0,
            ranks: int = 1,
            steps: int | None = None,
            skip_bad: bool = False,
    ):
        self.rows, self.make_views, self.views, self.batch_size = rows, make_views, views, batch_size
        self.seed, self.rank, self.ranks, self.steps, self.skip_bad = seed, rank, ranks, steps, skip_bad
        # Shared, since loader processes that stay have this data set as it was when they started.
        self.epoch, self.first = (torch.zeros((), dtype=torch.int64).share_memory_() for _ in range(2))
        self.left_out: Queue[str] = Queue()  # by loader processes
        self.left_out_here: list[str] = []  # and by this one

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is None:
            return islice(self._batches(int(self.first)), self.steps)
        self.left_out.cancel_join_thread()  # none waits with its end for names to be read
        share = None if self.steps is None else len(range(worker.id, self.steps, worker.num_workers))
        return islice(self._batches(len(range(worker.id, int(self.first), worker.num_workers))), share)

    def _batches(self, skipped: int) -> Iterator[Batch]:
        """The batches of this process.

        Args:
            skipped: So many of the first ones were trained on already: they come without images.
        """
        draws, bad = self._draws(), 0
        drawn: list[_Drawn] = []
        while True:
            drawn += islice(draws, self.batch_size - len(drawn))
            if not drawn:
                return
            if skipped and not self.skip_bad:  # else a bad image among them tells which samples come later
                skipped -= 1
                yield torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0)
                drawn = []
                continue
            try:
                images, told = self._images(drawn)
            except UserError:
                good = [each for each in drawn if can_be_decoded(each.photo)]
                bad += len(drawn) - len(good)
                if not self.skip_bad or len(good) == len(drawn) or bad > len(self.rows):
                    raise
                for name in {each.photo.name for each in drawn} - {each.photo.name for each in good}:
                    self._leave_out(name)
                drawn = good
                continue
            targets = self.rows.encode([each.sample for each in drawn])
            yield images, of_views(targets, told, self.views).flatten(0, 1)
            drawn, bad = [], 0

    def _draws(self) -> Iterator[_Drawn]:
        """Samples whose header is well: those of one pass in order, or without end in random order."""
        folder = self.rows.source.parent
        for number in count():
            seed = self._hash(number) if self.steps is not None else None
            found = False
            for sample in self.rows.shards.samples(self.rank, self.ranks, seed):
                assert sample.image is not None  # images were asked for
                try:
                    photo = EncodedPhoto(sample.image, f'{folder}/{sample.name}')
                except UserError:
                    if not self.skip_bad:
                        raise
                    self._leave_out(f'{folder}/{sample.name}')
                    continue
                found = True
                yield _Drawn(sample, photo, self._hash(number, sample.name))
            if self.steps is None:
                return
            if not found:
                raise DataError(
                    f'{self.rows.source}: no image that can be read in the share of process {self.rank + 1} of '
                    f'{self.ranks}; fix the shards')

    def _leave_out(self, name: str) -> None:
        if get_worker_info() is None:
            self.left_out_here.append(name)
        else:
            self.left_out.put(name)

    def bad_names(self) -> list[str]:
        """The bad images found since the last call, as messages name them."""
        names, self.left_out_here = self.left_out_here, []
        while True:
            try:
                names.append(self.left_out.get(timeout=0.1))  # a thread brings them
            except Empty:
                return names

    def _images(self, drawn: list[_Drawn]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The views of samples, and what is told of them (V, B, K), if anything is."""
        images = empty_batch((self.views, len(drawn), *self.make_views.size, 3))
        told = self.make_views([each.photo for each in drawn], [each.seed for each in drawn], images.numpy())
        return images.flatten(0, 1).permute(0, 3, 1, 2), told

    def _hash(self, *parts: Any) -> int:
        text = repr((self.seed, int(self.epoch), *parts))
        return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), 'big')


class StreamLoader(RepeatableLoader):
    """timm's loader over streamed batches.

    Args:
        batches: The data set, which runs in the loader processes.
        loader: Brings the batches of those processes.
        kwargs: Further arguments of `RepeatableLoader`.
    """

    def __init__(self, batches: StreamedBatches, loader: WatchedLoader, **kwargs: Any):
        super().__init__(loader, **kwargs)
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return islice(super().__iter__(), int(self.batches.first), None)

    @property
    def order_depends_on(self) -> int:
        """The number of loader processes."""
        return self.loader.num_workers

    def __len__(self) -> int:
        """The batches of an epoch; in evaluation, where each process has a last one, about as many."""
        batches = self.batches
        if batches.steps is not None:
            return batches.steps
        return -(-len(batches.rows) // batches.ranks // batches.batch_size)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch that the next pass draws, and the first of its batches that is wanted."""
        self.batches.epoch.fill_(epoch)
        self.batches.first.fill_(first)
        if self.erasing is not None:
            self.erasing.set_epoch(epoch, 0)  # those before it come too

    def rows_of(self, epoch: int, step: int) -> list[str]:
        """Streamed rows have no numbers; the batch is named by its place."""
        return [f'batch {step + 1} of epoch {epoch + 1} of the shards {self.batches.rows.source}']


def create_stream_loader(
        rows: StreamedRows,
        make_views: Views,
        batch_size: int,
        *,
        views: int = 1,
        seed: int = 0,
        steps: int | None = None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        workers: int = 4,
        rank: int = 0,
        ranks: int = 1,
        skip_bad: bool = False,
        **random_erasing: Any,
) -> StreamLoader:
    """Batches of streamed samples; see `StreamedBatches`, and `create_train_loader` for the others.

    No more loader processes are started than shards can be dealt out to.
    """
    workers = rows.shards.workers(workers, ranks)
    batches = StreamedBatches(
        rows, make_views, views, batch_size, seed=seed, rank=rank, ranks=ranks, steps=steps, skip_bad=skip_bad)
    loader = WatchedLoader(batches, batch_size=None, collate_fn=as_it_is, **worker_options(device, workers))
    return StreamLoader(
        batches, loader, mean=mean, std=std, device=device, seed=seed, rank=rank, **random_erasing)
