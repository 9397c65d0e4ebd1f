"""Shards as tables and rows: their labels from one pass, or none where the data directory's JSON files say enough."""
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pandas as pd
import torch

from timm_multilabel.cells import TAG_SEPARATOR, too_sparse
from timm_multilabel.data.fingerprints import KeptOut
from timm_multilabel.data.shards import Sample, Shards
from timm_multilabel.data.table import FIX_LABELS, Rows, Table, encode_rows, encode_targets, missing_targets
from timm_multilabel.errors import DataError, OutputError
from timm_multilabel.files import read_json, write_atomic
from timm_multilabel.labels import Labels, LabelSet, LabelSpace, TagSet

_SEEN = 50_000  # combinations of labels that are kept
_MOST = 10 ** 12  # samples of a split
_MAX_BYTES = 2 ** 20  # of rows.json


@dataclass(frozen=True)
class StreamedTable(Table):
    """The label columns of shards, by the names of their samples, images left where they are.

    Args:
        shards: Where the samples lie.
        count: How many samples there are, whether their labels were read or not.
        spared: The pass over the labels was spared: `frame` has columns and no rows.
    """
    shards: Shards
    count: int
    spared: bool = False


@dataclass(frozen=True)
class StreamedRows:
    """Samples of shards, ready to stream; to what only counts and scores the like of `Rows`.

    Args:
        shards: Where the samples lie.
        label_space: The heads that targets are made for.
        targets: The targets (N, W) of all samples; (0, W) where the pass over them was spared.
        count: N, the number of samples.
        ignore_unknown: Take a label that is no class as missing.
        is_counted: The count is no more than a bound where it is not.
        kept_out: The images that are left out, if any.
        seen: Targets by texts, since pandas takes its time for a batch, and most labels come again.
    """
    shards: Shards
    label_space: LabelSpace
    targets: torch.Tensor
    count: int
    ignore_unknown: bool = False
    is_counted: bool = True
    kept_out: KeptOut | None = None
    seen: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> Path:
        return self.shards.source

    def __len__(self) -> int:
        return self.count

    def encode(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The targets (B, W) of samples.

        Raises:
            DataError: A label is unknown, or a cell cannot be read.
        """
        if len(self.seen) > _SEEN:
            self.seen.clear()
        columns = self.shards.columns
        assert columns is not None  # `encode_streamed` names them
        labels = [tuple(sample.cells.get(column, '') for column in columns) for sample in samples]
        new = {texts: sample.name for texts, sample in zip(labels, samples) if texts not in self.seen}
        if new:
            frame = pd.DataFrame(dict(zip(columns, zip(*new))), list(new.values()), dtype=object)
            self.seen.update(zip(new, encode_targets(
                Table(self.source, frame, self.shards.image_column), self.label_space, self.ignore_unknown,
                f'fix them, or remove {Stored.LABEL_SPACE} for a new pass over the labels')))
        return torch.stack([self.seen[texts] for texts in labels])


def read_labels(samples: Iterable[Sample]) -> pd.DataFrame:
    """The cells of samples as text, by their names; one that is missing may be NaN.

    Raises:
        DataError: Each sample has label columns of its own, so that a table of them would not fit into memory.
    """
    # By parts, and equal texts as one object, which takes a tenth of the memory.
    texts: dict[str, str] = {}
    samples, frames = iter(samples), []
    columns: set[str] = set()
    rows = filled = 0
    while part := list(islice(samples, 10_000)):
        rows, filled = rows + len(part), filled + sum(len(each.cells) for each in part)
        columns.update(*(each.cells for each in part))
        if too_sparse(rows, len(columns), filled):
            raise DataError(f'{part[-1].name}: the samples up to this one have {len(columns):,} label columns, nearly '
                            'all of them empty in each sample; write such labels as a list of tags in one column')
        cells = [{column: texts.setdefault(text, text) for column, text in each.cells.items()} for each in part]
        frames.append(pd.DataFrame(cells, [each.name for each in part], dtype=object))
    return pd.concat(frames) if frames else pd.DataFrame()


def table_of_labels(shards: Shards, labels: Sequence[pd.DataFrame]) -> StreamedTable:
    """The table of what `read_labels` gave for all samples of shards, part by part.

    Raises:
        DataError: There is no sample.
    """
    labels = [part for part in labels if len(part)]
    if not labels:
        raise no_samples(shards)
    frame = pd.concat(labels).fillna('')
    return StreamedTable(shards.source, frame, shards.image_column, shards, len(frame))


def no_samples(shards: Shards) -> DataError:
    """The error of shards that hold nothing."""
    return DataError(f'{shards.source}: there are no samples in these shards')


def table_without_labels(shards: Shards, label_space: LabelSpace, count: int) -> StreamedTable:
    """A table that stands for shards whose label space and number of samples are known.

    Raises:
        DataError: The shards cannot hold so many samples.
    """
    check_count(shards, count)
    columns = [column for head in label_space.heads for column in head.columns]
    frame = pd.DataFrame(columns=list(dict.fromkeys(columns)), dtype=object)
    return StreamedTable(shards.source, frame, shards.image_column, shards, count, spared=True)


def check_count(shards: Shards, count: int) -> None:
    """Raise DataError where shards cannot hold as many samples as a stored count says."""
    most = shards.most_samples()
    if count > most:
        raise DataError(f'{shards.source}: {Stored.ROWS} says that the split has {count} samples, and these shards '
                        f'hold {"at most " if shards.tars else ""}{most}; remove {Stored.ROWS} for a new count')


def unlabelled_stream(
        shards: Shards,
        label_space: LabelSpace,
        count: int,
        is_counted: bool,
        kept_out: KeptOut,
) -> StreamedRows:
    """Samples of shards without their labels; see `StreamedRows`."""
    return StreamedRows(
        replace(shards, columns=()), label_space, missing_targets(label_space, 0), count, is_counted=is_counted,
        kept_out=kept_out)


def encode(
        table: Table,
        label_space: LabelSpace,
        ignore_unknown: bool = False,
        way_out: str = FIX_LABELS,
) -> Rows | StreamedRows:
    """`encode_rows` of any table."""
    if not isinstance(table, StreamedTable):
        return encode_rows(table, label_space, ignore_unknown, way_out)
    return encode_streamed(table, label_space, ignore_unknown, way_out)


def encode_streamed(
        table: StreamedTable,
        label_space: LabelSpace,
        ignore_unknown: bool = False,
        way_out: str = FIX_LABELS,
) -> StreamedRows:
    """The rows of a streamed table; see `encode_rows`."""
    targets = encode_targets(table, label_space, ignore_unknown, way_out)
    columns = tuple(column for head in label_space.heads for column in head.columns)
    return StreamedRows(
        replace(table.shards, columns=columns), label_space, targets, table.count, ignore_unknown)


def _in_dialect(labels: Labels, dialect: Mapping[str, str]) -> bool:
    """Whether labels are tags that are written as asked for, or none in one column."""
    if not isinstance(labels, TagSet) or labels.group:
        return True
    return (labels.separator, labels.none) == (dialect.get('separator', TAG_SEPARATOR), dialect.get('none'))


@dataclass(frozen=True)
class Stored:
    """What a data directory's label_space.json and rows.json say, which spares a pass over the labels.

    Args:
        folder: The data directory.
        label_space: The heads of all label columns, or None.
        rows: The number of samples by split.
    """
    folder: Path
    label_space: LabelSpace | None
    rows: dict[str, int]

    LABEL_SPACE = 'label_space.json'
    ROWS = 'rows.json'

    @classmethod
    def load(cls, folder: Path) -> 'Stored':
        """Read the files that are there.

        Raises:
            DataError: One cannot be read.
        """
        path = folder / cls.LABEL_SPACE
        label_space = LabelSpace.load(path) if path.is_file() else None
        path = folder / cls.ROWS
        rows = read_json(
            path, 'JSON', 'expected the number of samples by split, such as {"train": 4000}; correct or remove it',
            lambda rows: all(type(count) is int and 0 < count <= _MOST for count in rows.values()), _MAX_BYTES,
        ) if path.is_file() else {}
        return cls(folder, label_space, rows)

    def choose(
            self,
            heads: list[str] | None,
            readers: Mapping[str, type[Labels]],
            groups: Mapping[str, tuple[str, ...]],
            dialect: Mapping[str, str],
    ) -> LabelSpace | None:
        """The stored label space of the heads that `find_label_space` is asked for; None where it has other ones."""
        stored = {labels.name: labels for labels in self.label_space.heads} if self.label_space is not None else {}
        names = list(stored) if heads is None else heads
        fits = stored and {*names, *readers} <= set(stored) and all(
            type(stored[name]) is readers.get(name, LabelSet) and _in_dialect(stored[name], dialect)
            and getattr(stored[name], 'group', ()) == tuple(groups.get(name, ())) for name in names)
        return LabelSpace(tuple(stored[name] for name in names)) if fits else None

    def save(self, label_space: LabelSpace | None, rows: Mapping[str, int]) -> str:
        """Write what a pass found, but never over a label space that is there; what became of it, as a line.

        Args:
            label_space: The heads of all label columns; None where they were not asked for.
            rows: The number of samples by split.
        """
        written = []
        try:
            if label_space is not None and self.label_space is None:
                label_space.save(self.folder / self.LABEL_SPACE)
                written.append(self.LABEL_SPACE)
            write_atomic(self.folder / self.ROWS, json.dumps({**self.rows, **rows}, indent=1) + '\n')
            written.append(self.ROWS)
        except OutputError as error:
            return f'{error.line}; the next run passes over the labels too'
        return f'{self.folder}: wrote {" and ".join(written)}; remove them when the shards change'
