"""Train a timm backbone on several labels at once, together with SimCLR."""
import argparse
from pathlib import Path
from typing import Any

import torch.distributed as dist
from timm.utils import random_seed

from timm_multilabel.cli import build, train_flags
from timm_multilabel.cli.device import choose_precision, start_device
from timm_multilabel.data.table import Rows, encode_rows, find_label_space, read_table
from timm_multilabel.distributed import world
from timm_multilabel.errors import UserError
from timm_multilabel.labels import MISSING, LabelSpace
from timm_multilabel.task import resolve_head_weights
from timm_multilabel.training.checkpoint import read_checkpoint, resume
from timm_multilabel.training.loop import Fit
from timm_multilabel.training.run_folder import RunFolder

NAME = 'train'
HELP = 'train a backbone on the labels of a CSV, together with SimCLR'

add_flags = train_flags.add_flags


def run(args: argparse.Namespace) -> None:
    """Train."""
    check_flags(args)
    device = start_device(args.device)
    say = print if world()[0] == 0 else lambda line: None
    if args.old_amp:
        args.amp = True
        say('--apex-amp and --native-amp are read as --amp: PyTorch has mixed precision of its own')
    precision = choose_precision(device, args.amp, args.amp_dtype, args.channels_last)

    label_space, train_rows, eval_rows = read_data(args)
    check_label_space(args, label_space)
    if eval_rows is not None:
        check_scored(args, label_space, eval_rows)
    check_batches(args, train_rows)
    checkpoint = read_checkpoint(args.resume) if args.resume else None

    random_seed(args.seed, 0)  # the same first weights on every rank
    model, data_config = build.model(args, label_space)
    folder = build.folder(args, data_config, checkpoint)
    task = build.task(args, model, data_config, device, say)
    steps = steps_per_epoch(args, len(train_rows))
    updater, epochs = build.updater(args, task, precision, steps, say)
    first = resume(checkpoint, task, updater.optimizer, updater.scaler) if checkpoint else 0
    if updater.scheduler is not None and first:
        updater.scheduler.step(first)
        updater.scheduler.step_update(first * updater.updates_per_epoch(steps))
    if world()[1] > 1:
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None)
    train_loader, eval_loader = build.loaders(args, task, data_config, device, train_rows, eval_rows)

    say(f'{args.model}, heads: {label_space}')
    say(f'{len(train_rows)} images to train on, {len(eval_rows) if eval_rows is not None else 0} to evaluate on, '
        f'{world()[1]} x {device}, {epochs} epochs of {steps} steps, run folder {folder}')
    fit = Fit(
        updater,
        precision,
        train_loader,
        eval_loader,
        images_per_step=args.batch_size * world()[1],
        seed=args.seed,
        metric=args.eval_metric,
        log_interval=args.log_interval,
    )
    if world()[0] == 0:
        fit.run_folder = RunFolder(folder, settings(args), label_space)
        fit.saver = build.saver(task, updater, folder, checkpoint, args)
    fit.run(first, epochs)
    say(f'{folder}: {epochs} epochs done')
    if dist.is_initialized():
        dist.destroy_process_group()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as args.yaml and checkpoints hold them: what `-c` takes, without what names this one start."""
    return {key: value for key, value in vars(args).items()
            if key not in ('config', 'old_amp', 'resume')}


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself, before anything is read.

    Raises:
        UserError: Flags that do not go together.
    """
    if not args.simclr_loss_weight and not args.classification_loss_weight:
        raise UserError('-wls 0 with -wlc 0 leaves nothing to train; make one of them more than 0')
    if args.simclr_loss_weight and args.batch_size == 1:
        raise UserError('-b 1: SimCLR contrasts the images of a batch, so it needs 2 or more; raise -b, or pass -wls 0')
    mixing = args.mixup or args.cutmix
    if mixing and args.simclr_loss_weight:
        raise UserError(
            '--mixup and --cutmix make one picture of two photos, which SimCLR would take for one photo: '
            'pass -wls 0 with them')
    if mixing and args.batch_size % 2:
        raise UserError(f'-b {args.batch_size}: --mixup and --cutmix mix pairs, so they need an even batch')
    timm_only = ('aa', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob')
    for name in timm_only if args.views == 'simclr' else ():
        if getattr(args, name) is not None:
            flag = '--' + name.replace('_', '-')
            raise UserError(f"{flag} shapes timm's views; leave it out with --views simclr, which has its own recipe")
    if args.color_jitter and (len(args.color_jitter) not in (1, 3, 4) or max(args.color_jitter[3:], default=0) > 0.5):
        raise UserError('--color-jitter takes 1, 3 or 4 numbers, the fourth (hue) 0.5 at most')
    if args.aa and args.color_jitter and '3a' not in args.aa:
        raise UserError('--aa has colors of its own, and timm then leaves --color-jitter out; pass one of them')
    if args.layer_decay and args.sched == 'none':
        raise UserError('--layer-decay works through the schedule; pass --sched constant in place of none')
    of_heads = {
        '--heads': args.heads,
        '--head-weights': args.head_weights,
        '--classify-views first': args.classify_views == 'first',
        '--eval-metric': args.eval_metric != 'top1',
    }
    for flag, given in of_heads.items() if not args.classification_loss_weight else ():
        if given:
            raise UserError(f'{flag} speaks of heads, and -wlc 0 trains none; leave it out')
    if args.sched == 'plateau' and args.sched_on_updates:
        raise UserError('--sched plateau goes by epochs; leave --sched-on-updates out')
    if args.input_size and args.input_size[0] != 3:
        raise UserError(f'--input-size {args.input_size[0]} ...: images are RGB, so the first number is 3')


def read_data(args: argparse.Namespace) -> tuple[LabelSpace, Rows, Rows | None]:
    """The label space, the training rows, and the evaluation rows unless SimCLR is alone."""
    folder = Path(args.data_dir)
    if not folder.is_dir():
        raise UserError(f'{folder}: no such data directory; it holds train.csv, val.csv and the images')
    train = read_table(folder / 'train.csv', args.image_column)
    if not args.classification_loss_weight:
        label_space = LabelSpace(())
        return label_space, encode_rows(train, label_space), None
    tables = [read_table(folder / 'all.csv', args.image_column)] if (folder / 'all.csv').is_file() else []
    label_space = find_label_space([*tables, train], args.heads)
    if not label_space.heads:
        raise UserError(
            f"{train.path}: no label column beside '{args.image_column}'; add one, or pass -wlc 0 for SimCLR alone")
    val = read_table(folder / 'val.csv', args.image_column)
    for name in label_space.names:
        if name not in val.label_columns:
            raise UserError(f"{val.path}: no column '{name}', which is a head; add it, or choose others with --heads")
    train_rows = encode_rows(train, label_space, way_out=f'add rows with them to {folder / "all.csv"}, or mend them')
    return label_space, train_rows, encode_rows(val, label_space, args.unknown_labels == 'ignore')


def check_label_space(args: argparse.Namespace, label_space: LabelSpace) -> None:
    """Check the flags that speak of heads.

    Raises:
        UserError: A weight or a metric of a head that there is none of.
    """
    try:
        weights = resolve_head_weights(label_space.names, args.head_weights)
    except ValueError as error:
        raise UserError(f'--head-weights: {error}') from error
    metrics = ['loss', 'top1', 'top5']
    metrics += [f'{head}_{metric}' for head in weights for metric in metrics]
    if args.eval_metric not in metrics:
        raise UserError(f"--eval-metric '{args.eval_metric}': no such figure (there are: {', '.join(metrics)})")


def check_scored(args: argparse.Namespace, label_space: LabelSpace, rows: Rows) -> None:
    """Raise UserError where the evaluation has no label that the best checkpoint could be chosen by."""
    labelled = (rows.targets != MISSING).any(dim=0).tolist()
    weights = resolve_head_weights(label_space.names, args.head_weights)
    scored = [name for name, found in zip(label_space.names, labelled, strict=True) if found and weights[name]]
    if not scored:
        raise UserError(f'{rows.source}: no row has a label of a head with a weight; there is nothing to score')
    head = args.eval_metric.rpartition('_')[0]
    if head and head not in scored:
        raise UserError(
            f"--eval-metric {args.eval_metric}: {rows.source} has no label of '{head}'; choose another figure")


def steps_per_epoch(args: argparse.Namespace, rows: int) -> int:
    steps = rows // world()[1] // args.batch_size
    return steps if args.limit_steps is None else min(steps, args.limit_steps)


def check_batches(args: argparse.Namespace, rows: Rows) -> None:
    """Raise UserError where the training rows do not fill a batch."""
    if not steps_per_epoch(args, len(rows)):
        raise UserError(
            f'{rows.source}: {len(rows)} rows do not fill a batch of {args.batch_size} on each of {world()[1]} '
            'processes; lower -b')
