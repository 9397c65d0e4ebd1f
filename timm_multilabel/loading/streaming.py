"""Samples of shards -> whole batches on the device, in the form of `batches.py`, also beside rows of a table."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, islice
from multiprocessing import Queue
from queue import Empty
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from timm_multilabel.data.fingerprints import Fingerprints
from timm_multilabel.data.images import EncodedPhoto
from timm_multilabel.data.shards import Sample, even_workers
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.distributed import all_objects
from timm_multilabel.errors import DataError, UserError
from timm_multilabel.loading.batches import (
    Batch,
    ImageDataset,
    Views,
    as_it_is,
    can_be_decoded,
    empty_batch,
    of_views,
)
from timm_multilabel.loading.loaders import RepeatableLoader, WatchedLoader, names_of, worker_options
from timm_multilabel.loading.sampling import ShuffledBatches

_FRUITLESS = 10  # passes of a loader process in a row; another pass has other shards


class _Drawn(NamedTuple):
    """A sample, its photo, and the seed of its views."""
    sample: Sample
    photo: EncodedPhoto
    seed: int


@dataclass(frozen=True)
class StreamedImages:
    """Samples of shards with what makes their views; of streams what `ImageDataset` is of rows.

    Args:
        rows: The samples, with what encodes their labels.
        views: Makes the views of their photos.
        kept_out: Images that are passed over, if any.
    """
    rows: StreamedRows
    views: Views
    kept_out: Fingerprints | None = None


class _Part(Protocol):
    """The images of one source in each batch of a rank."""
    size: int

    def begin(self, epoch: int, worker: int, workers: int) -> None:
        """Go to the first batch that a loader process makes in an epoch."""

    def skip(self, views: int) -> None:
        """Pass over a batch, of images of so many views."""

    def write(self, out: np.ndarray) -> torch.Tensor:
        """Write the views of the next batch into `out` (V, B, H, W, 3).

        Returns:
            Their targets (V, B, W), followed by what is told of each view (V, B, K), if anything is; fewer than B at
            the end of a pass in order.
        """

    def names(self, epoch: int, step: int) -> list[str]:
        """The rows of a batch, as messages name them."""

    def bad_names(self) -> list[str]:
        """The bad images, as messages name them."""


class RowsPart:
    """Rows of a table as they come without shards, whatever the number of loader processes."""

    def __init__(self, dataset: ImageDataset, draws: ShuffledBatches):
        self.dataset, self.draws, self.size = dataset, draws, draws.batch_size

    def begin(self, epoch: int, worker: int, workers: int) -> None:
        self.draws.set_epoch(epoch)
        self.left = islice(self.draws, worker, None, workers)

    def skip(self, views: int) -> None:
        next(self.left)

    def write(self, out: np.ndarray) -> torch.Tensor:
        return self.dataset.write(next(self.left), out)

    def names(self, epoch: int, step: int) -> list[str]:
        self.draws.set_epoch(epoch, step)
        return names_of([draw._replace(part=0) for draw in next(iter(self.draws))], [self.dataset.rows])

    def bad_names(self) -> list[str]:
        return self.dataset.bad_names()


class StreamedPart:
    """The samples of one rank, in training without end, in evaluation those of one pass.

    In training the order depends on the seed, the epoch and the number of loader processes, and a sample's views on the
    seed, the epoch, its name and how often its rank has begun the shards again in the epoch.

    Args:
        images: The samples.
        size: Images of a batch on this rank.
        seed: Of the run.
        rank: The number of this process, from 0.
        ranks: How many processes share the epoch.
        workers: Loader processes of this rank.
        ends: One pass in order.
        skip_bad: Leave out images that cannot be read.
        part: Its number among the parts of a batch.
    """

    def __init__(
            self,
            images: StreamedImages,
            size: int,
            *,
            seed: int,
            rank: int,
            ranks: int,
            workers: int,
            ends: bool,
            skip_bad: bool,
            part: int = 0,
    ):
        self.images, self.rows, self.size = images, images.rows, size
        self.seed, self.rank, self.ranks, self.part = (seed, *([part] if part else [])), rank, ranks, part
        self.ends, self.skip_bad = ends, skip_bad
        self.left_out: Queue[str] = Queue()  # bad images, by loader processes
        self.left_out_here: list[str] = []  # and by this one
        # Samples read in the epoch, and those of them that are kept out, by each loader process.
        self.counts = torch.zeros(max(1, workers), 2, dtype=torch.int64).share_memory_()

    def begin(self, epoch: int, worker: int, workers: int) -> None:
        if get_worker_info() is not None:
            self.left_out.cancel_join_thread()  # none waits with its end for names to be read
        self.epoch, self.count, self.alone = epoch, self.counts[worker], self.ranks * workers == 1
        self.count.zero_()
        self.left = self._draws()

    def skip(self, views: int) -> None:
        if self.skip_bad:  # a bad image among them tells which samples come later
            self.write(np.empty((views, self.size, *self.images.views.size, 3), np.uint8))
        else:
            for _ in islice(self.left, self.size):
                pass

    def write(self, out: np.ndarray) -> torch.Tensor:
        drawn, bad = list(islice(self.left, self.size)), 0
        while drawn:
            try:
                told = self.images.views(
                    [each.photo for each in drawn], [each.seed for each in drawn], out[:, :len(drawn)])
                targets = self.rows.encode([each.sample for each in drawn])
                return of_views(targets, told, len(out))
            except UserError:
                good = [each for each in drawn if can_be_decoded(each.photo)]
                bad += len(drawn) - len(good)
                if not self.skip_bad or len(good) == len(drawn) or bad > len(self.rows):
                    raise
                for name in {each.photo.name for each in drawn} - {each.photo.name for each in good}:
                    self._leave_out(name)
                drawn = [*good, *islice(self.left, self.size - len(good))]
        return torch.empty(len(out), 0, 0)

    def _draws(self) -> Iterator[_Drawn]:
        """Samples whose header is well: those of one pass in order, or without end in random order."""
        folder, kept_out, fruitless = self.rows.source.parent, self.images.kept_out, 0
        for number in count():
            seed = None if self.ends else self._hash(number)
            fruitless += 1
            for sample in self.rows.shards.samples(self.rank, self.ranks, seed):
                assert sample.image is not None  # images were asked for
                if kept_out is not None:
                    known = sample.image in kept_out
                    self.count += torch.tensor([1, known])
                    if known:
                        continue
                try:
                    photo = EncodedPhoto(sample.image, f'{folder}/{sample.name}')
                except UserError:
                    if not self.skip_bad:
                        raise
                    self._leave_out(f'{folder}/{sample.name}')
                    continue
                fruitless = 0
                yield _Drawn(sample, photo, self._hash(number, sample.name))
            if self.ends:
                return
            if fruitless == (1 if kept_out is None or self.alone else _FRUITLESS):
                share = f'in the share of process {self.rank + 1} of {self.ranks}'
                raise DataError(
                    f'{self.rows.source}: no image that can be read {share}; fix the shards' if kept_out is None else
                    f'{self.rows.source}: all images {share} are labelled or scored elsewhere, or cannot be read; name '
                    'others with --unlabelled')

    def names(self, epoch: int, step: int) -> list[str]:
        """Streamed rows have no numbers; the batch is named by its place."""
        return [f'batch {step + 1} of epoch {epoch + 1} of the shards {self.rows.source}']

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

    def _hash(self, *parts: Any) -> int:
        text = repr((*self.seed, self.epoch, *parts))
        return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), 'big')


class StreamedBatches(IterableDataset[Batch]):
    """The batches of one rank, in training as many as asked for, in evaluation those of one pass.

    Args:
        parts: What stands side by side in each batch.
        views: V, the number of views of each image.
        steps: Batches of an epoch; one pass in order when None.
    """

    def __init__(self, parts: Sequence[_Part], views: int, size: tuple[int, int], steps: int | None = None):
        self.parts, self.views, self.size, self.steps = list(parts), views, size, steps
        # Shared, since loader processes that stay have this data set as it was when they started.
        self.epoch, self.first = (torch.zeros((), dtype=torch.int64).share_memory_() for _ in range(2))

    def __iter__(self) -> Iterator[Batch]:
        process = get_worker_info()
        worker, workers = (0, 1) if process is None else (process.id, process.num_workers)
        for part in self.parts:
            part.begin(int(self.epoch), worker, workers)
        images_of_batch = sum(part.size for part in self.parts)
        for step in count(worker, workers) if self.steps is None else range(worker, self.steps, workers):
            if step < int(self.first):  # trained on already: it comes without images
                for part in self.parts:
                    part.skip(self.views)
                yield torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0)
                continue
            images = empty_batch((self.views, images_of_batch, *self.size, 3))
            written, start = [], 0
            for part in self.parts:
                written.append(part.write(images[:, start:start + part.size].numpy()))
                start += part.size
            targets = torch.cat(written, dim=1)
            if not targets.shape[1]:
                return
            yield images[:, :targets.shape[1]].flatten(0, 1).permute(0, 3, 1, 2), targets.flatten(0, 1)

    def bad_names(self) -> list[str]:
        """The bad images that parts tell of."""
        return [name for part in self.parts for name in part.bad_names()]


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
        if self.batches.steps is not None:
            return self.batches.steps
        part, = self.streamed
        return -(-len(part.rows) // part.ranks // part.size)

    @property
    def streamed(self) -> list[StreamedPart]:
        """The parts of batches that come of shards."""
        return [part for part in self.batches.parts if isinstance(part, StreamedPart)]

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch that the next pass draws, and the first of its batches that is wanted."""
        self.batches.epoch.fill_(epoch)
        self.batches.first.fill_(first)
        if self.erasing is not None:
            self.erasing.set_epoch(epoch, 0)  # those before it come too

    def rows_of(self, epoch: int, step: int) -> list[str]:
        """The rows of a batch, as messages name them."""
        return [name for part in self.batches.parts for name in part.names(epoch, step)]


class KeptOutOfPool:
    """How many samples of shards are passed over, over all ranks.

    Args:
        part: Passes over them.
    """

    def __init__(self, part: StreamedPart):
        self.part, self.told = part, False

    def news(self) -> str | None:
        """A line on the first epoch that is done, if some were passed over in it. All ranks call it together."""
        if self.told:
            return None
        self.told = True
        read, kept_out = sum(all_objects(self.part.counts.sum(dim=0)))
        if not kept_out:
            return None
        return (f'{self.part.rows.source}: {kept_out:,} of the {read:,} samples read in this epoch are images that are '
                'labelled, or of the val or test split: left out')


def create_stream_loader(
        rows: StreamedRows,
        make_views: Views,
        batch_size: int,
        **kwargs: Any,
) -> StreamLoader:
    """Batches of streamed samples alone; see `create_joined_loader`, and `create_train_loader` for the others."""
    return create_joined_loader([(StreamedImages(rows, make_views), batch_size)], **kwargs)


def create_joined_loader(
        parts: Sequence[tuple[StreamedImages | ImageDataset, int]],
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
    """Batches of several sources side by side, some of which are streamed.

    No more loader processes are started than shards can be dealt out to.

    Args:
        parts: Images, and how many of them a batch has on each rank.
        views: V, the number of views of each image.
        seed: Of the run.
        steps: Batches of an epoch; one pass in order when None, for streamed samples alone.
        skip_bad: Leave out streamed images that cannot be decoded; data sets of rows know that themselves.
        random_erasing: `re_prob`, `re_mode`, `re_count` and `re_num_splits` as in timm.
    """
    streams = [images.rows.shards for images, _ in parts if isinstance(images, StreamedImages)]
    workers = even_workers(streams, workers, ranks)
    made: list[_Part] = []
    for number, (images, size) in enumerate(parts):
        if isinstance(images, StreamedImages):
            made.append(StreamedPart(
                images, size, seed=seed, rank=rank, ranks=ranks, workers=workers, ends=steps is None,
                skip_bad=skip_bad, part=number))
        else:
            made.append(RowsPart(images, ShuffledBatches(len(images), size, seed, rank, ranks, steps, number)))
    batches = StreamedBatches(made, views, parts[0][0].views.size, steps)
    loader = WatchedLoader(batches, batch_size=None, collate_fn=as_it_is, **worker_options(device, workers))
    return StreamLoader(
        batches, loader, mean=mean, std=std, device=device, seed=seed, rank=rank, **random_erasing)
