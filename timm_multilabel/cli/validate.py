"""Score a checkpoint on a labelled split, head by head; model and classes come from the checkpoint."""
import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist

from timm_multilabel.cli.data import check_dialect
from timm_multilabel.cli.device import choose_precision, loader_workers, start_device
from timm_multilabel.cli.flags import add_dialect_flags, add_trust_flags, count, dialect, positive, separator
from timm_multilabel.cli.knn import KNN_FIGURE, knn_figures, with_heads_of_data
from timm_multilabel.cli.output import say as print_line
from timm_multilabel.cli.splits import Splits, read_stored, split_of_run
from timm_multilabel.data.images import FilePhotos
from timm_multilabel.data.remarks import useless_labels
from timm_multilabel.data.split_names import check_folder, files_of_split, find_split
from timm_multilabel.data.streams import StreamedRows, StreamedTable, encode
from timm_multilabel.data.table import Rows, Table, describe_unknown, unknown_labels
from timm_multilabel.distributed import world
from timm_multilabel.errors import UserError, shortened
from timm_multilabel.escaping import spreadsheet_csv
from timm_multilabel.files import without_nan, write_atomic
from timm_multilabel.heads import Head, load_registry
from timm_multilabel.inference.loaded import check_finite
from timm_multilabel.labels import LabelSet, LabelSpace, TagSet, missing_row
from timm_multilabel.loading.batches import BadImages, ImageDataset
from timm_multilabel.loading.loaders import create_eval_loader
from timm_multilabel.loading.streaming import StreamedBatches, create_stream_loader
from timm_multilabel.metric_names import of_head
from timm_multilabel.metrics import MEANS, MultiLabelEvaluator, class_metrics, mean_over_heads
from timm_multilabel.reports.confusion import confusion_stems, write_confusion
from timm_multilabel.reports.results import results_lines
from timm_multilabel.task import resolve_head_weights
from timm_multilabel.training.checkpoint import Checkpoint, load_model, read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar
from timm_multilabel.training.trainer import evaluate
from timm_multilabel.views.pillow import eval_views

NAME = 'validate'
HELP = 'score a checkpoint on a labelled split'


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of validation to a parser."""
    parser.add_argument('data_dir', metavar='DIR', help='folder with val.csv and the images')
    parser.add_argument('--checkpoint', required=True, metavar='FILE', help='checkpoint of a run')
    parser.add_argument('--model', metavar='NAME', help='stop if the checkpoint is of another model')
    parser.add_argument('--split', metavar='NAME',
                        help="val, test, ... or the path of a CSV (default: the run's validation split)")
    parser.add_argument('--weights', choices=('best', 'plain', 'ema'), default='best',
                        help='weights to score (default: those that made the checkpoint what it is)')
    parser.add_argument('--image-column', metavar='NAME', help='column of the image paths (default: as in training)')
    parser.add_argument('--separator', type=separator, metavar='CHAR',
                        help='between cells: a character, tab or whitespace (default: as in training)')
    parser.add_argument('--missing-value', metavar='TEXT', help='a cell that means no label (default: as in training)')
    add_dialect_flags(parser, 'as in training')
    add_trust_flags(parser)
    parser.add_argument('-b', '--batch-size', type=positive, default=128, metavar='N', help='images a batch')
    parser.add_argument('-j', '--workers', type=count, default=4, metavar='N', help='loader processes')
    parser.add_argument('--skip-bad-images', action='store_true',
                        help='leave out and report images that cannot be decoded')
    parser.add_argument('--device', metavar='NAME', help='cpu, cuda, ... (default: cuda where there is one)')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--amp-dtype', choices=('float16', 'bfloat16'), help='its lower precision')
    parser.add_argument('--channels-last', action='store_true', help='channels-last memory layout')
    parser.add_argument('--knn', type=positive, metavar='K',
                        help='also classify each row by its K nearest images of the training split (cosine of '
                        'features, nearer ones count more); of a checkpoint without heads, each label column')
    parser.add_argument('--results-file', metavar='FILE', help='write the metrics as .json or .csv')
    parser.add_argument('--confusion', nargs='?', const='', metavar='DIR',
                        help="write each head's confusion matrix as CSV and picture (default: beside the checkpoint)")


def run(args: argparse.Namespace) -> None:
    """Validate."""
    checkpoint = read_checkpoint(args.checkpoint)
    check_checkpoint(args, checkpoint)
    prepare_outputs(args)
    device = start_device(args.device)
    precision = choose_precision(device, args.amp, args.amp_dtype, args.channels_last)
    rank, ranks = world()
    say = print_line if rank == 0 else lambda line: None

    if args.knn and ranks > 1:
        raise UserError('--knn runs in one process; leave it out, or start one')
    folder = Path(args.data_dir)
    if args.split is None:
        args.split = split_of_run(folder, checkpoint.state, 'val', say)
    train_split = split_of_run(folder, checkpoint.state, 'train', say) if args.knn else None
    scored = in_dialect(args, checkpoint)
    if not scored.label_space.heads:
        scored = with_heads_of_data(args, checkpoint, train_split, say)
    rows = read_split(args, scored, say)
    for line in useless_labels(scored.label_space, rows.targets, str(rows.source), scored=True):
        say(line)
    bank = read_bank(args, scored, train_split, say) if args.knn else None
    weights = checkpoint.best_weights if args.weights == 'best' else args.weights
    model = load_model(checkpoint, weights, load_registry(args.head_module), args.allow_hub).to(device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    say(f'{checkpoint.path}: {checkpoint.arch} after {checkpoint.state.get("epoch", 0) + 1} epochs, {weights} weights'
        + (', the better ones of this checkpoint' if args.weights == 'best' else ''))

    head_weights = resolve_head_weights(scored.label_space.names, checkpoint.state.get('head_weights') or None)
    loader, part = build_loader(scored, rows, args, device)
    parts, results, predictions = [part], {'heads': {}, 'mean': {}}, {}
    started = time.perf_counter()
    if model.named_heads:
        evaluator = MultiLabelEvaluator(model.named_heads, head_weights, device)
        with ProgressBar(f'Validate {rows.source.name}', len(loader), visible=rank == 0) as progress:
            figures = evaluate(model, loader, evaluator, precision, progress)
        predictions = evaluator.predictions(distributed=ranks > 1)
        losses = [figures[of_head(name, 'loss')] for name, (target, _) in predictions.items() if len(target)]
        check_finite([torch.tensor(losses)], checkpoint.path)
        results = gather_results(model.named_heads, figures, predictions, evaluator.of_tags, head_weights)
    seconds = time.perf_counter() - started
    if args.knn:
        bank_loader, bank_part = build_loader(scored, bank, args, device)
        parts.append(bank_part)
        knn = knn_figures(
            model, scored.label_space, bank_loader, loader, args.knn, precision, checkpoint.path)
        add_knn(results, knn, head_weights)
    news = BadImages(parts).news() if args.skip_bad_images else None
    if news:
        say(news)
    if rank == 0:
        if model.named_heads:
            results['images_per_second'] = len(rows) / seconds
        results |= {'checkpoint': str(checkpoint.path), 'weights': weights, 'csv': str(rows.source)}
        print('\n'.join(results_lines(results, {name: head.kind for name, head in model.named_heads.items()})))
        if bank is not None:
            say(f'{KNN_FIGURE}: what the {args.knn} nearest of {len(bank)} images of {bank.source} vote for')
        if model.named_heads:
            say(f'{len(rows)} images, {results["images_per_second"]:.0f} images/s')
        write_outputs(args, checkpoint, results, predictions)
    if dist.is_initialized():
        dist.destroy_process_group()


def check_checkpoint(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raise UserError where a checkpoint is not the one that the flags speak of, or has nothing to score."""
    if args.model and args.model.split('.')[0] != checkpoint.arch.split('.')[0]:
        raise UserError(
            f'--model {args.model}: {checkpoint.path} is of {checkpoint.arch}; leave --model out or name another '
            'checkpoint')
    if not checkpoint.label_space.heads and not args.knn:
        raise UserError(
            f'{checkpoint.path}: trained with -wlc 0, so it has no heads to score; score its features with --knn 20, '
            'or train heads from it with --initial-checkpoint')
    if not checkpoint.label_space.heads and args.confusion is not None:
        raise UserError(f'--confusion: {checkpoint.path} was trained with -wlc 0, so it has no heads; leave it out')


def in_dialect(args: argparse.Namespace, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose tags in one column are read as the flags say.

    Raises:
        UserError: It has no such tags, or one of them is the text that would mean none.
    """
    written = dialect(args)
    check_dialect(args, checkpoint.label_space, checkpoint.path)
    heads = tuple(
        replace(labels, **written) if isinstance(labels, TagSet) and not labels.group else labels
        for labels in checkpoint.label_space.heads)
    for labels in heads:
        if isinstance(labels, TagSet) and not labels.group and labels.none in labels.classes:
            raise UserError(f"--none-value '{labels.none}': this is a tag of '{shortened(labels.name)}' in "
                            f'{checkpoint.path}; leave it out')
    return replace(checkpoint, label_space=LabelSpace(heads))


def prepare_outputs(args: argparse.Namespace) -> None:
    """Find out that a file could not be written before the work, not after it."""
    if args.results_file:
        path = Path(args.results_file)
        if path.suffix not in ('.json', '.csv') or path.is_dir():
            raise UserError(f'--results-file {path}: name a .json or a .csv file')
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.confusion:
        Path(args.confusion).mkdir(parents=True, exist_ok=True)


def read_split(args: argparse.Namespace, checkpoint: Checkpoint, say) -> Rows | StreamedRows:
    """The rows to score; what cannot be scored is named."""
    folder = Path(args.data_dir)
    if not folder.is_dir() and find_split(folder, args.split) is None:
        check_folder(folder)
    state, stored = checkpoint.state, read_stored(folder)
    known = checkpoint.label_space
    if stored.label_space is None or not set(known.heads) <= set(stored.label_space.heads):
        known = None
    splits = Splits(
        stored,
        known,
        say,
        args.image_column or state.get('image_column', 'image_path'),
        args.separator or state.get('separator'),
        args.missing_value if args.missing_value is not None else state.get('missing_value'),
    )
    table = splits.read(args.split)
    path = table.path
    absent = [head.name for head in checkpoint.label_space.heads if not set(head.columns) <= set(table.label_columns)]
    if len(absent) == len(checkpoint.label_space.names):
        raise UserError(
            f"{path}: none of the checkpoint's heads ({', '.join(absent)}) is a column "
            f"(there are: {', '.join(table.frame.columns)})")
    if absent:
        say(f'{path}: no column for {", ".join(absent)}: not scored')
    _say_unknown(table, checkpoint, say)
    rows = encode(table, checkpoint.label_space, ignore_unknown=True)
    splits.save(None)
    spared = isinstance(table, StreamedTable) and table.spared
    if not spared and not checkpoint.label_space.labelled(rows.targets).any():
        raise UserError(f'{path}: no row has a label that the checkpoint knows; there is nothing to score')
    return rows


def read_bank(args: argparse.Namespace, checkpoint: Checkpoint, train_split: str, say) -> Rows | StreamedRows:
    """The rows of the training split, whose labels vote.

    Raises:
        UserError: They cannot be read, are those to score, or no head has classes to vote for.
    """
    found = [find_split(Path(args.data_dir), name) for name in (args.split, train_split)]
    if None not in found and files_of_split(found[0]) & files_of_split(found[1]):
        raise UserError(f'--knn: each row of {train_split} would find itself; score another split')
    if not any(isinstance(labels, LabelSet) for labels in checkpoint.label_space.heads):
        raise UserError(f'--knn: no head of {checkpoint.path} has classes to vote for; leave it out')
    return read_split(argparse.Namespace(**{**vars(args), 'split': train_split}), checkpoint, say)


def _say_unknown(table: Table, checkpoint: Checkpoint, say) -> None:
    unknown = unknown_labels(table, checkpoint.label_space)
    if unknown:
        say(f'{table.path}: labels that the checkpoint does not know, not scored: {describe_unknown(unknown)}')


def build_loader(
        checkpoint: Checkpoint,
        rows: Rows | StreamedRows,
        args: argparse.Namespace,
        device: torch.device,
) -> tuple[Any, ImageDataset | StreamedBatches]:
    """Batches of the rows, resized as in training's evaluation, and what knows which images were bad."""
    config = checkpoint.data_config
    views = eval_views(
        tuple(config['input_size'][-2:]), config['interpolation'], config['crop_pct'], config['crop_mode'])
    size, (rank, ranks) = checkpoint.batch_size(args.batch_size), world()
    common = {
        'mean': tuple(config['mean']),
        'std': tuple(config['std']),
        'device': device,
        'workers': loader_workers(args.workers),
        'rank': rank,
        'ranks': ranks,
    }
    if isinstance(rows, StreamedRows):
        loader = create_stream_loader(rows, views, size, skip_bad=args.skip_bad_images, **common)
        return loader, loader.loader.dataset
    part = ImageDataset(rows, FilePhotos(rows), views)
    if args.skip_bad_images:
        part.skip_bad(stand_in=missing_row(checkpoint.label_space))
    return create_eval_loader(part, size, **common), part


def gather_results(
        heads: dict[str, Head],
        figures: dict[str, float],
        predictions: dict[str, tuple[Any, Any]],
        of_tags: dict[str, dict[str, dict[str, float]]],
        head_weights: dict[str, float],
) -> dict[str, Any]:
    """The metrics of each head, with those of each tag, and the weighted means of the heads."""
    results = {}
    for name, head in heads.items():
        target, measured = predictions[name]
        results[name] = {figure: figures[of_head(name, figure)] for figure in head.metric_names}
        if isinstance(head.labels, LabelSet) and len(head.labels.classes) > 1:
            results[name] |= class_metrics(target[:, 0].astype(int), measured[:, 0].astype(int))
        results[name] |= {'loss': figures[of_head(name, 'loss')], 'labels': len(target)}
        results[name] |= {'tags': of_tags[name]} if name in of_tags else {}
    mean = {}
    for figure in (*MEANS, 'balanced_accuracy', 'macro_f1'):
        having = {name: values[figure] for name, values in results.items()
                  if values['labels'] and not math.isnan(values.get(figure, math.nan))}
        if having:
            mean[figure] = mean_over_heads(having, head_weights)
    if 'score' in figures:
        mean['score'] = figures['score']
    return {'heads': results, 'mean': mean}


def add_knn(results: dict[str, Any], knn: dict[str, tuple[float, int]], head_weights: dict[str, float]) -> None:
    """Put the k-NN accuracy and the number of labels of each head, and the mean of the first, into results."""
    for name, (accuracy, labels) in knn.items():
        results['heads'][name] = {**results['heads'].get(name, {}), KNN_FIGURE: accuracy, 'labels': labels}
    having = {name: accuracy for name, (accuracy, _) in knn.items() if not math.isnan(accuracy)}
    results['mean'][KNN_FIGURE] = mean_over_heads(having, head_weights)


def write_outputs(
        args: argparse.Namespace,
        checkpoint: Checkpoint,
        results: dict[str, Any],
        predictions: dict[str, tuple[Any, Any]],
) -> None:
    """Write the files that were asked for."""
    if args.results_file:
        path = Path(args.results_file)
        if path.suffix == '.json':
            write_atomic(path, json.dumps(without_nan(results), indent=1) + '\n')
        else:
            write_atomic(path, spreadsheet_csv(_results_csv(results), index=False))
        print_line(f'metrics: {path}')
    if args.confusion is not None:
        folder = Path(args.confusion or checkpoint.path.parent)
        stems = confusion_stems(checkpoint.label_space.names)
        for stem, labels in zip(stems, checkpoint.label_space.heads, strict=True):
            target, measured = predictions[labels.name]
            if len(target):
                print('confusion:', *write_confusion(
                    folder, stem, labels, target, measured,
                    f'{checkpoint.path.resolve().parent.name}, {args.split}'))


def _results_csv(results: dict[str, Any]) -> pd.DataFrame:
    """The results as a table: a row for each head, each followed by its tags, and one for the means."""
    rows = []
    for name, values in {**results['heads'], '': results['mean']}.items():
        tags = values.get('tags', {})
        rows += [{'head': name, 'tag': tag, **its} for tag, its in [('', values), *tags.items()]]
    table = pd.DataFrame(rows).drop(columns=[] if any(row['tag'] for row in rows) else 'tag')
    table = table.drop(columns='tags', errors='ignore')
    return table.astype({name: 'Int64' for name in ('labels', 'ones') if name in table})
