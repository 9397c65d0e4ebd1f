"""The splits of a data directory: CSVs, or shards whose labels are read in one pass."""
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

from timm_multilabel.assembly import head_options
from timm_multilabel.config.train import DataSettings
from timm_multilabel.config.values import HeadOptions
from timm_multilabel.data.optional import find_library
from timm_multilabel.data.shards import Sample, Shards
from timm_multilabel.data.split_names import find_split, no_split
from timm_multilabel.data.streams import (
    Stored,
    StreamedTable,
    no_samples,
    read_labels,
    table_of_labels,
    table_without_labels,
)
from timm_multilabel.data.table import Table, read_table
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import UserError
from timm_multilabel.heads import Head
from timm_multilabel.labels import LabelSpace
from timm_multilabel.progress import OFF_TERMINAL


class Splits:
    """Reads the splits of a data directory.

    Args:
        stored: What its JSON files say.
        label_space: The heads, where they are known and need no pass over the labels.
        say: Prints a line.
        written: How tables and shards are written.
        columns: The label columns to read of shards; all when None.
    """

    def __init__(
            self,
            stored: Stored,
            label_space: LabelSpace | None,
            say: Callable[[str], None],
            written: TableFormat,
            columns: list[str] | None = None,
    ):
        self.stored, self.label_space, self.say = stored, label_space, say
        self.written, self.columns = written, columns
        self.counted: dict[str, int] = {}

    def read(self, name: str, spare: bool = True) -> Table:
        """Read the table of a split, or else the labels of its shards; see `find_split`.

        Args:
            name: The split.
            spare: Spare the pass over the labels of shards where their number and the heads are known.

        Raises:
            UserError: There is no such split, or it cannot be read.
        """
        shards = find_split(self.stored.folder, name, self.written)
        if shards is None:
            raise no_split(self.stored.folder, name)
        if not isinstance(shards, Shards):
            return read_table(shards, self.written)
        find_library(shards.library)  # else it would be missed by the first loader process
        shards = replace(shards, columns=None if self.columns is None else tuple(self.columns))
        if spare and self.label_space is not None and name in self.stored.rows:
            return table_without_labels(shards, self.label_space, self.stored.rows[name])
        self.say(f'{shards.source}: reading the labels')
        table = _pass_over_labels(shards)
        if self.stored.rows.get(name) != table.count:
            self.counted[name] = table.count
        return table

    def count(self, shards: Shards, name: str | None) -> int:
        """Count the samples of shards in one pass over their headers, and store it for the next run.

        Call it on all ranks, which share the pass.

        Args:
            shards: Whose library is there.
            name: What is counted, as `read` calls it; None: the count is not stored.

        Raises:
            DataError: A shard cannot be read, or there is no sample.
        """
        rank, ranks = world()
        samples = replace(shards, columns=()).samples(rank, ranks, images=False)
        counted: int = sum(all_objects(sum(1 for _ in _bar(samples, f'{shards.source}: counting', rank))))
        if not counted:
            raise no_samples(shards)
        if name is not None:
            self.counted[name] = counted
            self.save(None)
        return counted

    def save(self, label_space: LabelSpace | None) -> None:
        """Store what passes found, for the next run; the label space of all columns, if it is that.

        Call it on all ranks.
        """
        if not self.counted:
            return
        rank, ranks = world()
        if rank == 0:
            self.say(self.stored.save(label_space, self.counted))
        if ranks > 1:
            dist.barrier()  # who reads the files before they are there would make a pass alone


def read_split_table(data: DataSettings, path: Path) -> Table:
    """The table of a split, read as the settings say."""
    return read_table(path, TableFormat.of(data))


def read_stored(folder: Path) -> Stored:
    """What the JSON files of a data directory say to the first rank, so that all ranks make a pass, or none does."""
    first: Stored = all_objects(Stored.load(folder))[0]
    return replace(first, folder=folder)


def split_of_run(
        folder: Path,
        settings: Mapping[str, Any],
        usual: str,
        say: Callable[[str], None],
) -> str:
    """The training or validation split of a run by name; where it is not here, the one that is usually called so.

    Args:
        folder: The data directory, which need not be that of the run.
        settings: Of the run's checkpoint.
        usual: train or val.
        say: Prints a line.
    """
    name = settings.get(f'{usual}_split') or usual
    if name != usual and find_split(folder, name) is None and find_split(folder, usual) is not None:
        say(f"{folder}: there is no '{name}' here, which was the {usual} split of the run; '{usual}' is used instead")
        return usual
    return name


def _pass_over_labels(shards: Shards) -> StreamedTable:
    """One pass, each rank over its share."""
    rank, ranks = world()
    samples = shards.samples(rank, ranks, images=False)
    return table_of_labels(shards, all_objects(read_labels(_bar(samples, f'{shards.source}: labels', rank))))


def _bar(samples: Iterable[Sample], title: str, rank: int) -> Iterable[Sample]:
    """Samples, with a progress bar on the first rank."""
    bar: Iterable[Sample] = tqdm(samples, title, unit=' samples', disable=OFF_TERMINAL if rank == 0 else True)
    return bar


def stored_heads(
        stored: Stored,
        given: HeadOptions,
        heads: list[str] | None,
        registry: Mapping[str, type[Head]],
        dialect: Mapping[str, str],
) -> LabelSpace | None:
    """The stored label space, where it is of the heads that the flags ask for and they need no look at the labels.

    Args:
        stored: What the JSON files of the data directory say.
        given: What `--head` says.
        heads: What `--heads` says.
        registry: The kinds of heads there are.
        dialect: How tags in one column are written, see `find_label_space`.
    """
    if stored.label_space is None:
        return None
    columns = [column for labels in stored.label_space.heads for column in labels.columns]
    try:
        given = head_options.match_columns(given, columns)
    except UserError:
        return None  # what matches is among the columns that are not stored, if anywhere
    head = head_options.expand(given, columns, heads)
    if any(options.get('class_weights') == 'balanced' or options.get('loss') == 'arcface' for options in head.values()):
        return None  # these look at the labels of all samples
    return stored.choose(heads, head_options.readers(head, registry), head_options.groups(head), dialect)
