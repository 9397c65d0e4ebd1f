"""Predictions of a run on a split, kept in its folder: made once, read by reports and comparisons."""
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from timm_multilabel.assembly.device import choose_precision
from timm_multilabel.assembly.evaluation import create_scoring_loader, read_split, splits_of_checkpoint
from timm_multilabel.assembly.run_settings import last_phase, read_run_settings
from timm_multilabel.assembly.splits import read_stored
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.folders import walk
from timm_multilabel.data.split_names import check_folder, places_of_split, split_path
from timm_multilabel.data.streams import StreamedRows, encode
from timm_multilabel.data.table import Rows
from timm_multilabel.errors import CheckpointError
from timm_multilabel.heads import load_registry
from timm_multilabel.inference.predictions import Predictions, check_size, predict_rows
from timm_multilabel.loading.batches import BadImages, ImageDataset
from timm_multilabel.log import Say
from timm_multilabel.places import Address, absolute, entry_of, path_of
from timm_multilabel.training.checkpoint import Checkpoint, load_model, read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar

_BATCH = 128  # images


def best_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run.

    Raises:
        CheckpointError: There is none yet.
    """
    path = run / 'model_best.pth.tar'
    if not path.is_file():
        earlier = sorted(run.glob('*/model_best.pth.tar'))
        way_out = (f'its last phase has none; name one of an earlier phase, such as --checkpoint {earlier[-1]}'
                   if earlier else 'train it for an epoch first')
        raise CheckpointError(f'{run}: no epoch has been finished, so there is no model_best.pth.tar; {way_out}')
    return path


def predictions_path(run: Path, split: str) -> Path:
    """Where the predictions of a run's best checkpoint on a split are kept."""
    # With the folder, since the tables of several splits may have one name: validation/metadata.csv.
    path = Path(split)
    parts = [part for part in (path.parent.name, path.stem if path.suffix == '.csv' else path.name) if part != '..']
    return run / f'predictions-{"-".join(filter(None, parts))}.npz'


def stored_predictions(
        run: Path,
        split: str,
        data_dir: Path | None,
        device: torch.device,
        workers: int,
        say: Say,
        checkpoint: Path | None = None,
        head_module: str | None = None,
        allow_hub: bool = False,
) -> Predictions:
    """What a run's best checkpoint says of a split: read from the run folder, or else made and kept there.

    What is kept counts where it is of this very checkpoint and this very file, if that is there.

    Args:
        run: The run folder.
        split: val, test, ... or the path of a CSV.
        data_dir: The data directory; that of the run when None.
        device: Where the model runs.
        workers: Loader processes.
        say: Tells a line.
        checkpoint: Another one than the best, whose predictions are not kept.
        head_module: Python file with the kinds of heads of the user's own.
        allow_hub: See `load_model`.

    Raises:
        CheckpointError: The folder is no run, it has no checkpoint yet, or the split cannot be read.
    """
    settings = last_phase(read_run_settings(run, head_module))
    folder = path_of(data_dir or settings.data.data_dir)
    model_file = checkpoint or best_checkpoint(run)
    kept, table = predictions_path(run, split), split_path(folder, split)
    now = made_from(model_file, table)  # before they are read, so that what changes meanwhile shows next time
    if checkpoint is None and kept.is_file():
        found = Predictions.load(kept)
        stale = found.own_metrics is None and settings.data.head_module  # it may hold probabilities that no head has
        places = [f'{absolute(path.resolve())} ' for path in places_of_split(folder, split)]
        table_is_gone = not table.exists() and found.made_from[0] == now[0] and (
            found.made_from[1].startswith(tuple(places)))
        if not stale and (found.made_from == now or table_is_gone):
            return found
    if not folder.is_dir():
        raise CheckpointError(f'{folder}: no such data directory, and it is that of {run}; name it with --data')
    made = _predict(read_checkpoint(model_file), settings, folder, split, device, workers, say, allow_hub)
    if checkpoint is None:
        replace(made, made_from=now).save(kept)
        say(f'predictions: {kept}')
    return made


def made_from(checkpoint: Path, table: Path) -> tuple[str, str]:
    """What tells a checkpoint, wherever it lies, and a table: length and time, and of the table its real path."""
    if isinstance(checkpoint, Address):
        of_checkpoint = '{} {}'.format(*entry_of(str(checkpoint)))
    else:
        state = checkpoint.stat()
        of_checkpoint = f'{state.st_size} {state.st_mtime_ns}'
    path = str(table.resolve())
    if isinstance(table, Address):
        return of_checkpoint, f'{path} {entry_of(path).stamp}'
    if table.is_dir():  # class folders: what is added to one or taken away gives it another time
        newest = max(os.stat(folder).st_mtime_ns for folder, _ in walk(table, Counter()))
        return of_checkpoint, f'{path} {newest}'
    if not table.is_file():
        return of_checkpoint, path
    of_table = table.stat()
    return of_checkpoint, f'{path} {of_table.st_size} {of_table.st_mtime_ns}'


def _predict(
        checkpoint: Checkpoint,
        settings: TrainSettings,
        folder: Path,
        split: str,
        device: torch.device,
        workers: int,
        say: Say,
        allow_hub: bool,
) -> Predictions:
    """Run a checkpoint over a split; images that cannot be decoded are left out where the run does so."""
    rows = _read_rows(folder, split, checkpoint, say)
    check_size(len(rows), checkpoint.label_space, checkpoint.path)
    registry = load_registry(settings.data.head_module)
    model = load_model(checkpoint, checkpoint.best_weights, registry, allow_hub).to(device)
    loader, dataset = create_scoring_loader(
        checkpoint, rows, _BATCH, workers, settings.data.skip_bad_images, device)
    with ProgressBar(f'Predict {rows.source.name}', len(loader), visible=True) as progress:
        made = predict_rows(model, loader, rows, choose_precision(device, False, None, False), progress,
                            checkpoint.path)
    news = BadImages([dataset]).news()
    if news is None or not isinstance(dataset, ImageDataset) or dataset.bad is None:
        return made
    say(news)
    return made.select((~dataset.bad).nonzero()[:, 0].numpy())


def _read_rows(folder: Path, split: str, checkpoint: Checkpoint, say: Say) -> Rows:
    """The rows of a split; of a checkpoint without heads, whatever labels they have.

    Raises:
        CheckpointError: They cannot be read, or lie in shards.
    """
    if checkpoint.label_space.heads:
        rows = read_split(folder, split, checkpoint, say)
    else:
        check_folder(folder)
        splits = splits_of_checkpoint(read_stored(folder), checkpoint.label_space, checkpoint, say)
        rows = encode(splits.read(split), checkpoint.label_space)
    if isinstance(rows, StreamedRows):
        raise CheckpointError(
            f'{rows.source}: predictions of shards are not kept; write the split as a CSV, or score it with validate')
    if not len(rows):
        raise CheckpointError(f'{rows.source}: no rows')
    return rows
