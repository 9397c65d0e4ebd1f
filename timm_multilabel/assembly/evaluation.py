"""From a checkpoint and a split to batches to score."""
from pathlib import Path
from typing import Any

import torch

from timm_multilabel.assembly.device import loader_options
from timm_multilabel.assembly.splits import Splits, read_stored
from timm_multilabel.data.images import FilePhotos
from timm_multilabel.data.split_names import check_folder, find_split
from timm_multilabel.data.streams import Stored, StreamedRows, StreamedTable, encode
from timm_multilabel.data.table import Rows, describe_unknown, unknown_labels
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import DataError
from timm_multilabel.labels import LabelSpace, missing_row
from timm_multilabel.loading.batches import EvalBatches, ImageDataset
from timm_multilabel.loading.loaders import create_eval_loader
from timm_multilabel.loading.streaming import StreamedBatches, create_stream_loader
from timm_multilabel.log import Say
from timm_multilabel.training.checkpoint import Checkpoint
from timm_multilabel.views.pillow import scoring_views


def splits_of_checkpoint(
        stored: Stored,
        known: LabelSpace | None,
        checkpoint: Checkpoint,
        say: Say,
        settings: Any = None,
) -> Splits:
    """The splits of a data directory, read as the run of a checkpoint read its own, unless told otherwise.

    Args:
        stored: What the JSON files of the data directory say.
        known: The heads, where they need no pass over the labels.
        checkpoint: It knows how the tables of its run were written.
        say: Tells a line.
        settings: What they say of tables counts before the checkpoint, see `TableFormat`.
    """
    return Splits(stored, known, say, TableFormat.of(settings, checkpoint.state))


def read_split(
        folder: Path,
        split: str,
        checkpoint: Checkpoint,
        say: Say,
        settings: Any = None,
) -> Rows | StreamedRows:
    """The rows of a split that a checkpoint can be scored on; what cannot be scored is told.

    Args:
        folder: The data directory.
        split: val, test, ... or the path of a CSV.
        checkpoint: The heads are its own.
        say: Tells a line.
        settings: See `splits_of_checkpoint`.

    Raises:
        DataError: There is no such split, or no label in it that the checkpoint knows.
    """
    if not folder.is_dir() and find_split(folder, split) is None:
        check_folder(folder)
    stored, known = read_stored(folder), checkpoint.label_space
    all_known = stored.label_space is not None and set(known.heads) <= set(stored.label_space.heads)
    splits = splits_of_checkpoint(stored, known if all_known else None, checkpoint, say, settings)
    table = splits.read(split)
    path = table.path
    absent = [head.name for head in checkpoint.label_space.heads if not set(head.columns) <= set(table.label_columns)]
    if len(absent) == len(checkpoint.label_space.names):
        raise DataError(
            f"{path}: none of the checkpoint's heads ({', '.join(absent)}) is a column "
            f"(there are: {', '.join(table.frame.columns)})")
    if absent:
        say(f'{path}: no column for {", ".join(absent)}: not scored')
    if unknown := unknown_labels(table, checkpoint.label_space):
        say(f'{path}: labels that the checkpoint does not know, not scored: {describe_unknown(unknown)}')
    rows = encode(table, checkpoint.label_space, ignore_unknown=True)
    splits.save(None)
    spared = isinstance(table, StreamedTable) and table.spared
    if not spared and not checkpoint.label_space.labelled(rows.targets).any():
        raise DataError(f'{path}: no row has a label that the checkpoint knows; there is nothing to score')
    return rows


def create_scoring_loader(
        checkpoint: Checkpoint,
        rows: Rows | StreamedRows,
        batch_size: int,
        workers: int,
        skip_bad: bool,
        device: torch.device,
) -> tuple[EvalBatches, ImageDataset | StreamedBatches]:
    """Batches of rows, resized as in training's evaluation, and what knows which images were bad.

    Args:
        checkpoint: Its data config says how images are resized.
        rows: Images and targets.
        batch_size: Images of a batch.
        workers: Loader processes that are asked for.
        skip_bad: Leave out images that cannot be decoded.
        device: Where the batches go.
    """
    views, size = scoring_views(checkpoint.data_config), checkpoint.batch_size(batch_size)
    options = loader_options(checkpoint.data_config, device, workers)
    if isinstance(rows, StreamedRows):
        loader = create_stream_loader(rows, views, size, skip_bad=skip_bad, **options)
        return loader, loader.batches
    dataset = ImageDataset(rows, FilePhotos(rows), views)
    if skip_bad:
        dataset.skip_bad(stand_in=missing_row(checkpoint.label_space))
    return create_eval_loader(dataset, size, **options), dataset
