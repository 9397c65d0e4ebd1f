"""From the flags of training to its parts."""
import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver

from timm_multilabel.cli.device import loader_workers
from timm_multilabel.data.loaders import MixedBatches, MultiLabelDataset, create_eval_loader, create_train_loader
from timm_multilabel.data.table import Rows
from timm_multilabel.data.views import View, eval_view, simclr_view, timm_view
from timm_multilabel.distributed import world
from timm_multilabel.errors import UserError
from timm_multilabel.labels import LabelSpace
from timm_multilabel.model import MultiLabelModel, create_backbone
from timm_multilabel.optim import create_optimizer
from timm_multilabel.task import JointTask
from timm_multilabel.training.checkpoint import Checkpoint, read_checkpoint, start_from
from timm_multilabel.training.loop import Precision, Updater, make_scaler
from timm_multilabel.training.run_folder import run_folder_path


def model(args: argparse.Namespace, label_space: LabelSpace) -> tuple[MultiLabelModel, dict[str, Any]]:
    """The model, on the CPU, and timm's data config: input size, normalisation, resizing in evaluation."""
    size = {'img_size': args.img_size, 'input_size': args.input_size}
    backbone = create_backbone(
        args.model,
        pretrained=args.pretrained and not args.resume,  # a checkpoint brings its own
        pretrained_path=None if args.resume else args.pretrained_path,
        input_size=size,
        drop_path=args.drop_path,
        model_kwargs=args.model_kwargs,
    )
    if args.grad_checkpointing:
        try:
            backbone.set_grad_checkpointing(enable=True)
        except (AttributeError, AssertionError) as error:
            raise UserError(f'--grad-checkpointing: {args.model} has none') from error
    for name in ('mean', 'std'):
        if getattr(args, name) and len(getattr(args, name)) not in (1, 3):
            raise UserError(f'--{name} takes 1 or 3 numbers, not {len(getattr(args, name))}')
    wishes = {name: getattr(args, name) for name in ('mean', 'std', 'interpolation', 'crop_pct')}
    data_config = resolve_data_config({**size, **wishes}, model=backbone)
    for name in ('input_size', 'mean', 'std'):
        data_config[name] = list(data_config[name])  # as YAML and checkpoints hold it
    try_out(args.model, backbone, data_config['input_size'])
    return MultiLabelModel(backbone, label_space, args.drop), data_config


def try_out(name: str, backbone: torch.nn.Module, input_size: list[int]) -> None:
    """Raise UserError unless a backbone gives pooled features for an image of the size."""
    size = 'x'.join(map(str, input_size))
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(1, *input_size))
        backbone.train()
    except Exception as error:  # each model has its own ways to refuse a size
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'--model {name}: it does not take images of {size} ({reason}); see --img-size') from error
    if not isinstance(features, torch.Tensor) or features.shape != (1, backbone.head_hidden_size):
        raise UserError(f'--model {name}: no pooled features come out of it; choose another, or other --model-kwargs')


def folder(args: argparse.Namespace, data_config: dict[str, Any], checkpoint: Checkpoint | None) -> Path:
    """The run folder: that of the checkpoint to resume from, or a new one."""
    if checkpoint is not None:
        return checkpoint.path.parent
    return run_folder_path(args.output, args.experiment, args.model, data_config['input_size'][-1])


def task(
        args: argparse.Namespace,
        model: MultiLabelModel,
        data_config: dict[str, Any],
        device: torch.device,
        say: Callable[[str], None],
) -> JointTask:
    """The task on its device, with first weights, EMA, compilation and synchronised batch norm as asked for."""
    if args.sync_bn:
        if device.type != 'cuda':
            raise UserError(f'--sync-bn needs CUDA, and the device is {device}; leave it out')
        model = convert_sync_batchnorm(model)
    model.to(device=device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    made = JointTask(
        model,
        simclr_weight=args.simclr_loss_weight,
        classification_weight=args.classification_loss_weight,
        temperature=args.temperature,
        projection_dim=args.projection_dim,
        smoothing=args.smoothing,
        head_weights=args.head_weights,
        first_view_only=args.classify_views == 'first',
        metadata={
            'arch': args.model,
            'model_kwargs': args.model_kwargs,
            'opt': args.opt,
            'data_config': data_config,
            'best_weights': 'plain',
            'head_weights': args.head_weights,
            'image_column': args.image_column,
        },
        device=device,
    )
    if args.initial_checkpoint and not args.resume:
        start = read_checkpoint(args.initial_checkpoint)
        say(start_from(made, start, start.best_weights))
    if args.model_ema:
        made.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if args.torchcompile:
        try:
            made.compile(backend=args.torchcompile)
            if args.model_ema:
                made.compile_ema(backend=args.torchcompile)
        except RuntimeError as error:
            raise UserError(f'--torchcompile {args.torchcompile}: {" ".join(str(error).split())[:200]}') from error
    return made


def warmup_epochs(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """The epochs of warm-up: those asked for, but fewer than the run has, which would else end before its real rate."""
    epochs = min(args.warmup_epochs, args.epochs - 1)
    if epochs < args.warmup_epochs:
        say(f'--warmup-epochs {args.warmup_epochs} does not fit into --epochs {args.epochs}: warms up for {epochs}')
    return epochs


def updater(
        args: argparse.Namespace,
        task: JointTask,
        precision: Precision,
        steps: int,
        say: Callable[[str], None],
) -> tuple[Updater, int]:
    """The optimizer with what surrounds it, and the number of epochs that its schedule has.

    Args:
        steps: Batches of an epoch.
    """
    further = dict(args.opt_kwargs)
    if args.opt_eps is not None:
        further['eps'] = args.opt_eps
    if args.opt_betas is not None:
        further['betas'] = args.opt_betas
    try:
        optimizer = create_optimizer(
            task,
            args.opt,
            lr=args.lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            layer_decay=args.layer_decay,
            gradient_centralization=args.gradient_centralization,
            **further,
        )
    except (ValueError, TypeError, AssertionError, LookupError) as error:
        raise UserError(f'--opt {args.opt}: {" ".join(str(error).split())}') from error
    made = Updater(
        task,
        optimizer,
        scaler=make_scaler(precision),
        accumulate=args.grad_accum_steps,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
    )
    decreasing = args.eval_metric.endswith('loss') or not args.classification_loss_weight
    try:
        made.scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=args.sched,
            num_epochs=args.epochs,
            decay_epochs=args.decay_epochs,
            decay_milestones=args.decay_milestones,
            cooldown_epochs=args.cooldown_epochs,
            patience_epochs=args.patience_epochs,
            decay_rate=args.decay_rate,
            min_lr=args.min_lr,
            warmup_lr=args.warmup_lr,
            warmup_epochs=warmup_epochs(args, say),
            plateau_mode='min' if decreasing else 'max',
            step_on_epochs=not args.sched_on_updates,
            updates_per_epoch=made.updates_per_epoch(steps),
        )
    except ValueError as error:
        raise UserError(f'--sched {args.sched}: {error}') from error
    return made, epochs


def train_view(args: argparse.Namespace, data_config: dict[str, Any]) -> View:
    """The recipe of a training view."""
    size = tuple(data_config['input_size'][-2:])
    crop = {
        'scale': args.scale,
        'ratio': args.ratio,
        'hflip': args.hflip,
        'vflip': args.vflip,
        'interpolation': args.train_interpolation,
    }
    if args.views == 'simclr':
        return simclr_view(size, **crop)
    jitter = args.color_jitter or [0.4]
    try:
        return timm_view(
            size,
            **crop,
            color_jitter=jitter[0] if len(jitter) == 1 else tuple(jitter),
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob or 0.0,
            gaussian_blur_prob=args.gaussian_blur_prob or 0.0,
            auto_augment=args.aa,
            mean=tuple(data_config['mean']),
        )
    except (AssertionError, ValueError, KeyError) as error:
        if not args.aa:
            raise
        raise UserError(f'--aa {args.aa}: timm knows no such policy') from error


def loaders(
        args: argparse.Namespace,
        task: JointTask,
        data_config: dict[str, Any],
        device: torch.device,
        train_rows: Rows,
        eval_rows: Rows | None,
) -> tuple[Any, Any]:
    """Training batches, and evaluation batches or None."""
    rank, ranks = world()
    common = {
        'mean': tuple(data_config['mean']),
        'std': tuple(data_config['std']),
        'device': device,
        'workers': loader_workers(args.workers),
        'rank': rank,
        'ranks': ranks,
    }
    train_loader = create_train_loader(
        MultiLabelDataset(train_rows, train_view(args, data_config), task.views),
        args.batch_size,
        seed=args.seed,
        limit_steps=args.limit_steps,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        **common,
    )
    if args.mixup or args.cutmix:
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=0.0,  # the heads' losses smooth
            num_classes=sum(task.label_space.sizes),
            multi_label=True,  # targets are one-hot rows of all heads
        )
        train_loader = MixedBatches(train_loader, mixup, task.label_space)
    if eval_rows is None:
        return train_loader, None
    view = eval_view(
        tuple(data_config['input_size'][-2:]),
        data_config['interpolation'],
        data_config['crop_pct'],
        data_config['crop_mode'],
    )
    batch_size = args.validation_batch_size or args.batch_size
    return train_loader, create_eval_loader(MultiLabelDataset(eval_rows, view), batch_size, **common)


def saver(
        task: JointTask,
        updater: Updater,
        folder: Path,
        checkpoint: Checkpoint | None,
        args: argparse.Namespace,
) -> CheckpointSaver:
    """timm's checkpoint saver, with the history of the run that goes on."""
    made = CheckpointSaver(
        model=task.get_eval_model(),
        task=task,
        optimizer=updater.optimizer,
        amp_scaler=updater.scaler,
        checkpoint_dir=str(folder),
        decreasing=args.eval_metric.endswith('loss') or not args.classification_loss_weight,
        max_history=args.checkpoint_hist,
    )
    if checkpoint is not None:
        made.load_state_dict(checkpoint.state['saver'])
    return made
