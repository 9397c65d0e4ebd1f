"""Which rows come when, and the seed of each one's views."""
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """A row of a data set, the seed of its random views in this epoch, and which data set: labelled 0, pool 1."""
    row: int
    seed: int
    part: int = 0


class ShuffledBatches(Sampler[list[Draw]]):
    """One rank's share of an epoch in random order, in batches; order and seeds depend on (seed, part, epoch) alone.

    Every rank gets the same number of rows and, in a pass over the data, no row comes twice; rows that do not fill a
    batch on every rank sit a pass out. An epoch of more batches than a pass has goes on with another pass, reshuffled.

    Args:
        length: Rows of the data set.
        batch_size: Rows of a batch on this rank.
        seed: Of the run.
        rank: The number of this process, from 0.
        ranks: How many processes share the epoch.
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
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch that the next pass draws, and the first of its batches."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return self.steps

    def passes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The passes of the epoch from its first batch on: rows (S, B) of S batches, and their seeds (S, B)."""
        generator = np.random.default_rng((self.seed, self.epoch, *([self.part] if self.part else [])))
        left, skipped = self.steps, self.first
        while left:
            order = generator.permutation(self.length)[self.rank::self.ranks]
            seeds = generator.integers(2 ** 59, size=self.length)  # so many that no two are alike
            batches = min(left, self.batches_of_pass)
            rows = order[:batches * self.batch_size].reshape(batches, self.batch_size)[skipped:]
            if len(rows):
                yield rows, seeds[rows]
            left -= batches
            skipped = max(0, skipped - batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        for rows, seeds in self.passes():
            for batch in zip(rows.tolist(), seeds.tolist()):
                yield [Draw(row, seed, self.part) for row, seed in zip(*batch)]


class JoinedBatches(Sampler[list[Draw]]):
    """Batches of several samplers side by side."""

    def __init__(self, samplers: list[ShuffledBatches]):
        self.samplers = samplers

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch that the next pass draws, and the first of its batches."""
        for sampler in self.samplers:
            sampler.set_epoch(epoch, first)

    def __len__(self) -> int:
        return min(map(len, self.samplers))

    def __iter__(self) -> Iterator[list[Draw]]:
        return (sum(batches, []) for batches in zip(*self.samplers))


class BatchesInOrder(Sampler[list[Draw]]):
    """One rank's share of all rows, in order; shares differ by one row at most.

    Args:
        length: Rows of the data set.
        batch_size: Rows of a batch.
        rank: The number of this process, from 0.
        ranks: How many processes share the rows.
        block: No batch has rows of two blocks of so many rows of the share.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, ranks: int = 1, block: int | None = None):
        self.rows, self.batch_size = range(rank, length, ranks), batch_size
        self.block = block or max(1, length)

    def __len__(self) -> int:
        blocks, rest = divmod(len(self.rows), self.block)
        return blocks * -(-self.block // self.batch_size) - (-rest // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        for first in range(0, len(self.rows), self.block):
            rows = self.rows[first:first + self.block]
            for start in range(0, len(rows), self.batch_size):
                yield [Draw(row, 0) for row in rows[start:start + self.batch_size]]


def other_rows(seed: int, length: int) -> Iterator[int]:
    """Rows that may take the place of a draw whose image is bad: endless, and the same for the same seed."""
    generator = np.random.default_rng(seed)
    while True:
        yield int(generator.integers(length))
