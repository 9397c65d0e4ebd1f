"""What each head of a checkpoint makes of images: labels with their probabilities."""
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from timm_multilabel.api.arguments import api_function, make_settings, refuse_launched
from timm_multilabel.assembly.in_parts import write_in_parts
from timm_multilabel.assembly.reading import (
    batches_of,
    check_names,
    in_one_process,
    load_checkpoint_model,
    new_file,
    read_rows,
    workers_of,
)
from timm_multilabel.config.commands import PredictSettings
from timm_multilabel.data.table import Rows
from timm_multilabel.errors import UserError
from timm_multilabel.inference.embeddings import import_pyarrow
from timm_multilabel.inference.image_predictions import ImagePrediction, check_thresholds
from timm_multilabel.inference.parts import Manifest, Plan, folder_of, refuse_part_rows
from timm_multilabel.inference.predictor import ImageLike, Predictor
from timm_multilabel.labels import LabelSpace
from timm_multilabel.loading.batches import ImageDataset
from timm_multilabel.reports.prediction_formats import FORMATS, csv_columns
from timm_multilabel.reports.prediction_tables import prediction_table
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar


@dataclass(frozen=True)
class Prediction:
    """What the heads say of images.

    Args:
        images: For each image {head: guesses, the likeliest first}, or why it could not be read.
    """
    images: Sequence[ImagePrediction]

    @property
    def table(self) -> pd.DataFrame:
        """A row for each image, head and guess: image, head, rank, label, probability, error."""
        rows: list[tuple[object, ...]] = []
        for each in self.images:
            if not any(each.guesses.values()):  # not read, or no tag is probable enough
                rows.append((each.image, None, None, None, None, each.error))
            rows += [(each.image, head, rank, guess.label, guess.probability, None)
                     for head, guesses in each.guesses.items() for rank, guess in enumerate(guesses, 1)]
        columns = ['image', 'head', 'rank', 'label', 'probability', 'error']
        return pd.DataFrame(rows, columns=columns).astype({'rank': 'Int64'})


@api_function(PredictSettings, 'format', 'out', 'force', 'part_rows')
def predict(checkpoint: str | Path, images: ImageLike | Sequence[ImageLike], **settings: Any) -> Prediction:
    """Say what each head of a checkpoint makes of images.

    Args:
        checkpoint: A checkpoint of a run.
        images: Files, folders, globs or CSVs; or a list with PIL images or pixels (H, W, 3), uint8, in it, where every
            path is that of a file, and the first one that cannot be read is an error.
        **settings: The settings, named as the flags; `threshold` may be a number or {head: number}.

    Raises:
        UserError: Checkpoint, images or settings do not allow it.
    """
    refuse_launched()
    given = dict(settings)
    threshold = given.pop('threshold', None)
    by_head = threshold if isinstance(threshold, dict) else {} if threshold is None else {'': threshold}
    given['threshold'] = [f'{head}={value}' if head else str(value) for head, value in by_head.items()]
    named = [images] if isinstance(images, ImageLike) else list(images)
    if all(isinstance(image, str | Path) for image in named):
        made = make_settings(PredictSettings, {**given, 'checkpoint': checkpoint, 'images': list(map(str, named))})
        with open_prediction(made, 'jsonl') as prediction:
            return Prediction(list(prediction.images))
    made = make_settings(PredictSettings, {**given, 'checkpoint': checkpoint, 'images': ['-']})
    predictor = Predictor(load_checkpoint_model(made, read_checkpoint(checkpoint), made.weights))
    guesses = predictor.of_list(named, made.top_k, dict(made.threshold))
    return Prediction([
        ImagePrediction(str(image) if isinstance(image, str | Path) else f'image {number}', of_image)
        for number, (image, of_image) in enumerate(zip(named, guesses, strict=True))])


@dataclass(frozen=True)
class OpenPrediction:
    """Predictions that are made while they are read.

    Args:
        images: What is said of each image, a batch at a time.
        label_space: The heads.
        without_probabilities: The heads whose kind has none.
        path: The file to write to, if one is asked for.
        dataset: The images, of which bad ones are noted.
    """
    images: Iterator[ImagePrediction]
    label_space: LabelSpace
    without_probabilities: Collection[str]
    path: Path | None
    dataset: ImageDataset

    @property
    def bad(self) -> int:
        """Images that could not be read, so far."""
        return 0 if self.dataset.bad is None else int(self.dataset.bad.sum())


@contextmanager
def open_prediction(settings: PredictSettings, form: str) -> Iterator[OpenPrediction]:
    """Check settings and images, and predict as the predictions are read.

    Args:
        settings: What to predict with and on.
        form: The format that they will be written in, some of which cannot hold everything.

    Raises:
        UserError: Checkpoint, images or settings do not allow it.
    """
    checkpoint = read_checkpoint(settings.checkpoint)
    thresholds = dict(settings.threshold)
    predictor = Predictor(
        load_checkpoint_model(settings, checkpoint, settings.weights, in_one_process(settings.out)))
    without = predictor.without_probabilities
    check_thresholds(thresholds, checkpoint.label_space, without)
    if form == 'csv':
        csv_columns(checkpoint.label_space, settings.top_k, without)
    rows = read_rows(settings, checkpoint, checkpoint.label_space)
    if form == 'csv':
        check_names(rows, 'a CSV', 'pass --format jsonl')
    path = None
    if settings.out is not None:
        path = new_file(settings.out, '--out', (Path(settings.out).suffix,), settings.force)
    dataset = predictor.loaded.part(rows, keep_bad=True)

    def predictions(progress: ProgressBar) -> Iterator[ImagePrediction]:
        for batch in predictor.answer(
                dataset, settings.batch_size, workers_of(settings), settings.top_k, thresholds):
            yield from batch
            progress.advance()

    with ProgressBar('Predict', batches_of(settings, checkpoint, rows), visible=True) as progress:
        yield OpenPrediction(predictions(progress), predictor.label_space, without, path, dataset)


def predict_in_parts(settings: PredictSettings) -> Manifest | None:
    """Predict into the folder `settings.out`, also in several processes.

    Returns:
        What was written; None on ranks other than the first.

    Raises:
        UserError: Checkpoint, images or settings do not allow it.
    """
    folder = folder_of(settings.out or '')
    if settings.format is not None:
        raise UserError(f'--format {settings.format}: --out {folder} is a folder, which gets Parquet parts; leave the '
                        'format out, or name a file')
    import_pyarrow(folder, 'a .csv or .jsonl file')
    checkpoint = read_checkpoint(settings.checkpoint)
    thresholds = dict(settings.threshold)
    loaded = load_checkpoint_model(settings, checkpoint, settings.weights, '')
    predictor = Predictor(loaded)
    check_thresholds(thresholds, checkpoint.label_space, predictor.without_probabilities)
    csv_columns(checkpoint.label_space, settings.top_k, predictor.without_probabilities, 'a part')

    def read() -> Rows:
        rows = read_rows(settings, checkpoint, checkpoint.label_space)
        check_names(rows, f'{folder}, a folder of Parquet files,', 'name a .jsonl file')
        return rows

    labels = json.dumps(checkpoint.label_space.to_dict(), sort_keys=True)
    made_by = {'arch': checkpoint.arch, 'weights': loaded.weights, 'digest': loaded.digest(loaded.model),
               'labels': hashlib.sha256(labels.encode()).hexdigest()}
    plan = partial(Plan, 'predict', made_by, {
        '--top-k': settings.top_k, '--threshold': thresholds, '--amp': settings.amp}, part_rows=settings.part_rows)
    return write_in_parts(folder, read, plan, loaded, _Answers(settings, predictor), settings.force)


@dataclass(frozen=True)
class _Answers:
    """Makes predictions in parts; see `Work`."""
    settings: PredictSettings
    predictor: Predictor

    def batches(self, part: ImageDataset, block: int) -> Iterator[list[ImagePrediction]]:
        its = self.settings
        return map(list, self.predictor.answer(
            part, its.batch_size, workers_of(its), its.top_k, dict(its.threshold), block))

    def table(self, part: ImageDataset, made: Sequence[list[ImagePrediction]], rows: slice) -> Any:
        return prediction_table(
            list(chain.from_iterable(made)), self.predictor.label_space, self.settings.top_k,
            self.predictor.without_probabilities)


def choose_format(settings: PredictSettings) -> str:
    """The format that settings ask for.

    Raises:
        UserError: The file has another ending, and no format is named.
    """
    refuse_part_rows(settings.changed())
    if settings.format is not None:
        return settings.format
    ending = Path(settings.out or '').suffix.lower()[1:]
    if settings.out is not None and ending not in FORMATS:
        raise UserError(
            f'--out {settings.out}: the ending is none of {", ".join(FORMATS)}; name the format with --format, or a '
            f'folder for Parquet parts: {os.path.splitext(settings.out)[0]}/')
    return ending or 'table'
