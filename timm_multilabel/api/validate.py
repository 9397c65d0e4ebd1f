"""Score a checkpoint on a labelled split, head by head; model and classes come from the checkpoint."""
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist

from timm_multilabel.api.arguments import api_function, make_settings, refuse_launched, write_frames
from timm_multilabel.assembly.data import check_dialect
from timm_multilabel.assembly.device import choose_precision, start_device
from timm_multilabel.assembly.evaluation import create_scoring_loader, read_split
from timm_multilabel.assembly.head_options import dialect
from timm_multilabel.assembly.knn import KNN_FIGURE, knn_figures, with_heads_of_data
from timm_multilabel.assembly.splits import split_of_run
from timm_multilabel.config.commands import ValidateSettings
from timm_multilabel.config.train import DataSettings
from timm_multilabel.data.remarks import useless_labels
from timm_multilabel.data.split_names import files_of_split, find_split
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.data.table import Rows
from timm_multilabel.distributed import world
from timm_multilabel.errors import SettingError, UserError, shortened
from timm_multilabel.escaping import spreadsheet_csv
from timm_multilabel.files import without_nan, write_atomic
from timm_multilabel.heads import Head, load_registry
from timm_multilabel.inference.loaded import check_finite
from timm_multilabel.labels import LabelSet, LabelSpace, TagSet
from timm_multilabel.loading.batches import BadImages
from timm_multilabel.log import say
from timm_multilabel.metric_names import of_head
from timm_multilabel.metrics import MEANS, MultiLabelEvaluator, class_metrics, mean_over_heads
from timm_multilabel.places import local_path, path_of
from timm_multilabel.reports.confusion import confusion_stems, write_confusion
from timm_multilabel.task import resolve_head_weights
from timm_multilabel.training.checkpoint import Checkpoint, load_model, read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar
from timm_multilabel.training.trainer import evaluate


@dataclass(frozen=True)
class Validation:
    """What a checkpoint scores on a split.

    Args:
        results: The metrics as the JSON file has them: `heads`, `mean`, and what was scored.
        kinds: The kind of each head.
        images: Rows scored.
        notes: Lines on how metrics were made.
        files: Lines on the files that were written.
    """
    results: Mapping[str, Any]
    kinds: Mapping[str, str]
    images: int
    notes: Sequence[str] = field(default=(), repr=False)
    files: Sequence[str] = ()

    @property
    def heads(self) -> pd.DataFrame:
        """The metrics of each head and of each tag, and in the last row their means."""
        return results_table(self.results)

    @property
    def mean(self) -> dict[str, float]:
        """The weighted means over the heads."""
        return dict(self.results['mean'])


@api_function(ValidateSettings, 'data_dir')
def validate(data: str | Path | pd.DataFrame, checkpoint: str | Path, **settings: Any) -> Validation:
    """Score a checkpoint on a labelled split.

    Args:
        data: The data directory, or the rows to score as a DataFrame.
        checkpoint: A checkpoint of a run.
        **settings: The settings, named as the flags.

    Raises:
        UserError: Data, checkpoint or settings do not allow it.
    """
    refuse_launched()
    given = {**settings, 'checkpoint': checkpoint}
    if not isinstance(data, pd.DataFrame):
        return _scored(make_settings(ValidateSettings, {**given, 'data_dir': data}))
    if settings.get('knn'):
        raise SettingError('knn: the training split votes, and there is none beside a DataFrame; name a data directory')
    state = read_checkpoint(checkpoint).state
    column = str(settings.get('image_column') or state.get('image_column', DataSettings.image_column))
    with tempfile.TemporaryDirectory() as folder:
        written = write_frames({'val': data}, Path(folder), column, settings.get('tag_separator') or '|')
        return _scored(make_settings(ValidateSettings, {
            **given, 'separator': ',', 'data_dir': written, 'split': 'val'}))


def _scored(settings: ValidateSettings) -> Validation:
    found = run_validation(settings)
    assert found is not None  # only ranks other than the first have none
    return found


def run_validation(
        settings: ValidateSettings,
        show: Callable[[Validation], None] | None = None,
) -> Validation | None:
    """Score a checkpoint, in this process and perhaps in others that run the same; None on ranks other than the first.

    Args:
        settings: What to score, and on what.
        show: Called with the metrics before files are written, which may fail.

    Raises:
        UserError: Data, checkpoint or settings do not allow it.
    """
    checkpoint = read_checkpoint(settings.checkpoint)
    _check_checkpoint(settings, checkpoint)
    _prepare_outputs(settings)
    device = start_device(settings.device)
    precision = choose_precision(device, settings.amp, settings.amp_dtype, settings.channels_last)
    rank, ranks = world()
    if settings.knn and ranks > 1:
        raise UserError('--knn runs in one process; leave it out, or start one')
    folder = path_of(settings.data_dir)
    split = settings.split or split_of_run(folder, checkpoint.state, 'val', say)
    scored, bank = _in_dialect(settings, checkpoint), None
    train_split = split_of_run(folder, checkpoint.state, 'train', say) if settings.knn else ''
    if not scored.label_space.heads:
        scored = with_heads_of_data(settings, checkpoint, train_split, say)
    rows = _read(settings, split, scored)
    for line in useless_labels(scored.label_space, rows.targets, str(rows.source), scored=True):
        say(line)
    if settings.knn:
        bank = _read_bank(settings, split, scored, train_split)
    weights = checkpoint.best_weights if settings.weights == 'best' else settings.weights
    model = load_model(checkpoint, weights, load_registry(settings.head_module), settings.allow_hub).to(device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    say(f'{checkpoint.path}: {checkpoint.arch} after {checkpoint.state.get("epoch", 0) + 1} epochs, {weights} weights'
        + (', the better ones of this checkpoint' if settings.weights == 'best' else ''))

    head_weights = resolve_head_weights(scored.label_space.names, checkpoint.state.get('head_weights') or None)
    reading = settings.batch_size, settings.workers, settings.skip_bad_images, device
    loader, dataset = create_scoring_loader(scored, rows, *reading)
    datasets = [dataset]
    predictions: dict[str, tuple[Any, Any]] = {}
    results: dict[str, Any] = {'heads': {}, 'mean': {}}
    started = time.perf_counter()
    if model.named_heads:
        evaluator = MultiLabelEvaluator(model.named_heads, head_weights, device)
        with ProgressBar(f'Validate {rows.source.name}', len(loader), visible=rank == 0) as progress:
            metrics = evaluate(model, loader, evaluator, precision, progress)
        predictions = evaluator.predictions(distributed=ranks > 1)
        losses = [metrics[of_head(name, 'loss')] for name, (target, _) in predictions.items() if len(target)]
        check_finite([torch.tensor(losses)], checkpoint.path)
        results = gather_results(model.named_heads, metrics, predictions, evaluator.of_tags, head_weights)
    seconds = time.perf_counter() - started
    if bank is not None and settings.knn:
        bank_loader, bank_dataset = create_scoring_loader(scored, bank, *reading)
        datasets.append(bank_dataset)
        knn = knn_figures(
            model, scored.label_space, bank_loader, loader, settings.knn, precision, checkpoint.path)
        _add_knn(results, knn, head_weights)
    news = BadImages(datasets).news() if settings.skip_bad_images else None
    if news:
        say(news)
    found = None
    if rank == 0:
        notes = []
        if bank is not None:
            notes.append(
                f'{KNN_FIGURE}: what the {settings.knn} nearest of {len(bank)} images of {bank.source} vote for')
        if model.named_heads:
            results['images_per_second'] = len(rows) / seconds
            notes.append(f'{len(rows)} images, {results["images_per_second"]:.0f} images/s')
        results |= {'checkpoint': str(checkpoint.path), 'weights': weights, 'csv': str(rows.source)}
        found = Validation(results, {name: head.kind for name, head in model.named_heads.items()}, len(rows), notes)
        if show is not None:
            show(found)
        found = replace(found, files=_write_outputs(settings, split, checkpoint, results, predictions))
    if dist.is_initialized():
        dist.destroy_process_group()
    return found


def _read(settings: ValidateSettings, split: str, checkpoint: Checkpoint) -> Rows | StreamedRows:
    return read_split(path_of(settings.data_dir), split, checkpoint, say, settings)


def _check_checkpoint(settings: ValidateSettings, checkpoint: Checkpoint) -> None:
    """Raise UserError where a checkpoint is not the one that the flags speak of, or has nothing to score."""
    if settings.model and settings.model.split('.')[0] != checkpoint.arch.split('.')[0]:
        raise UserError(
            f'--model {settings.model}: {checkpoint.path} is of {checkpoint.arch}; leave --model out or name another '
            'checkpoint')
    if not checkpoint.label_space.heads and not settings.knn:
        raise UserError(
            f'{checkpoint.path}: trained with -wlc 0, so it has no heads to score; score its features with --knn 20, '
            'or train heads from it with --initial-checkpoint')
    if not checkpoint.label_space.heads and settings.confusion is not None:
        raise UserError(f'--confusion: {checkpoint.path} was trained with -wlc 0, so it has no heads; leave it out')


def _in_dialect(settings: ValidateSettings, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose tags in one column are read as the flags say.

    Raises:
        UserError: It has no such tags, or one of them is the text that would mean none.
    """
    written = dialect(settings)
    check_dialect(written, settings.missing_value, checkpoint.label_space, checkpoint.path)
    heads = tuple(
        replace(labels, separator=written.get('separator', labels.separator), none=written.get('none', labels.none))
        if isinstance(labels, TagSet) and not labels.group else labels
        for labels in checkpoint.label_space.heads)
    for labels in heads:
        if isinstance(labels, TagSet) and not labels.group and labels.none in labels.classes:
            raise UserError(f"--none-value '{labels.none}': this is a tag of '{shortened(labels.name)}' in "
                            f'{checkpoint.path}; leave it out')
    return replace(checkpoint, label_space=LabelSpace(heads))


def _prepare_outputs(settings: ValidateSettings) -> None:
    """Find out that a file could not be written before the work, not after it."""
    if settings.results_file:
        path = path_of(settings.results_file)
        if path.suffix not in ('.json', '.csv') or path.is_dir():
            raise UserError(f'--results-file {path}: name a .json or a .csv file')
        path.parent.mkdir(parents=True, exist_ok=True)
    if settings.confusion:
        local_path(settings.confusion).mkdir(parents=True, exist_ok=True)


def _read_bank(settings: ValidateSettings, split: str, checkpoint: Checkpoint, train_split: str) -> Rows | StreamedRows:
    """The rows of the training split, whose labels vote.

    Raises:
        UserError: They cannot be read, are those to score, or no head has classes to vote for.
    """
    scored, voting = (find_split(path_of(settings.data_dir), name) for name in (split, train_split))
    if scored is not None and voting is not None and files_of_split(scored) & files_of_split(voting):
        raise UserError(f'--knn: each row of {train_split} would find itself; score another split')
    if not any(isinstance(labels, LabelSet) for labels in checkpoint.label_space.heads):
        raise UserError(f'--knn: no head of {checkpoint.path} has classes to vote for; leave it out')
    return _read(settings, train_split, checkpoint)


def gather_results(
        heads: dict[str, Head],
        metrics: dict[str, float],
        predictions: dict[str, tuple[Any, Any]],
        of_tags: dict[str, dict[str, dict[str, float]]],
        head_weights: dict[str, float],
) -> dict[str, Any]:
    """The metrics of each head, with those of each tag, and the weighted means of the heads."""
    results: dict[str, dict[str, Any]] = {}
    for name, head in heads.items():
        target, measured = predictions[name]
        results[name] = {metric: metrics[of_head(name, metric)] for metric in head.metric_names}
        if isinstance(head.labels, LabelSet) and len(head.labels.classes) > 1:
            results[name] |= class_metrics(target[:, 0].astype(int), measured[:, 0].astype(int))
        results[name] |= {'loss': metrics[of_head(name, 'loss')], 'labels': len(target)}
        results[name] |= {'tags': of_tags[name]} if name in of_tags else {}
    mean = {}
    for metric in (*MEANS, 'balanced_accuracy', 'macro_f1'):
        having = {name: values[metric] for name, values in results.items()
                  if values['labels'] and not math.isnan(values.get(metric, math.nan))}
        if having:
            mean[metric] = mean_over_heads(having, head_weights)
    if 'score' in metrics:
        mean['score'] = metrics['score']
    return {'heads': results, 'mean': mean}


def _add_knn(results: dict[str, Any], knn: dict[str, tuple[float, int]], head_weights: dict[str, float]) -> None:
    """Put the k-NN accuracy and the number of labels of each head, and the mean of the first, into results."""
    for name, (accuracy, labels) in knn.items():
        results['heads'][name] = {**results['heads'].get(name, {}), KNN_FIGURE: accuracy, 'labels': labels}
    having = {name: accuracy for name, (accuracy, _) in knn.items() if not math.isnan(accuracy)}
    results['mean'][KNN_FIGURE] = mean_over_heads(having, head_weights)


def _write_outputs(
        settings: ValidateSettings,
        split: str,
        checkpoint: Checkpoint,
        results: dict[str, Any],
        predictions: dict[str, tuple[Any, Any]],
) -> list[str]:
    """Write the files that were asked for; a line on each."""
    lines = []
    if settings.results_file:
        path = path_of(settings.results_file)
        if path.suffix == '.json':
            write_atomic(path, json.dumps(without_nan(results), indent=1) + '\n')
        else:
            write_atomic(path, spreadsheet_csv(results_table(results), index=False))
        lines.append(f'metrics: {path}')
    if settings.confusion is not None:
        folder = local_path(settings.confusion or checkpoint.path.parent)
        stems = confusion_stems(checkpoint.label_space.names)
        for stem, labels in zip(stems, checkpoint.label_space.heads, strict=True):
            target, measured = predictions[labels.name]
            if len(target):
                paths = write_confusion(
                    folder, stem, labels, target, measured, f'{checkpoint.path.resolve().parent.name}, {split}')
                lines.append(f'confusion: {" ".join(map(str, paths))}')
    return lines


def results_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The results as a table: a row for each head, each followed by its tags, and one for the means."""
    rows = []
    for name, values in {**results['heads'], '': results['mean']}.items():
        tags = values.get('tags', {})
        rows += [{'head': name, 'tag': tag, **its} for tag, its in [('', values), *tags.items()]]
    table = pd.DataFrame(rows).drop(columns=[] if any(row['tag'] for row in rows) else 'tag')
    table = table.drop(columns='tags', errors='ignore')
    return table.astype({name: 'Int64' for name in ('labels', 'ones') if name in table})
