"""From the flags of training to its parts."""
import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.scheduler import create_scheduler_v2

from timm_multilabel.cli import head_options
from timm_multilabel.cli.data import Data
from timm_multilabel.errors import UserError
from timm_multilabel.metrics import less_is_better
from timm_multilabel.model import MultiLabelModel, create_backbone
from timm_multilabel.model_names import check_arguments, plain_model
from timm_multilabel.optim import create_optimizer
from timm_multilabel.task import JointTask, Pool
from timm_multilabel.training.checkpoint import Checkpoint
from timm_multilabel.training.checkpoint_checks import is_data_config
from timm_multilabel.training.optimizer_step import OptimizerStep
from timm_multilabel.training.progress_bar import RunLength
from timm_multilabel.training.saver import WholeSaver
from timm_multilabel.training.trainer import Precision, make_scaler


def model(
        args: argparse.Namespace,
        data: Data,
        options: head_options.Options,
        fresh: bool = True,
        say: Callable[[str], None] = print,
) -> tuple[MultiLabelModel, dict[str, Any]]:
    """The model, on the CPU, and timm's data config: input size, normalisation, resizing in evaluation.

    Args:
        args: The flags.
        data: The rows.
        options: Options of the heads.
        fresh: Load pretrained weights as asked for; not where a checkpoint or an earlier phase brings its own.
        say: Prints a line.
    """
    try:
        check_arguments(args.model_kwargs)  # now: some would have timm read other files, or ask other hosts
    except ValueError as error:
        raise UserError(f'--model-kwargs: {error}') from error
    size = {'img_size': args.img_size, 'input_size': args.input_size}
    backbone = create_backbone(
        args.model,
        pretrained=args.pretrained and fresh,
        pretrained_path=args.pretrained_path if fresh else None,
        input_size=size,
        drop_path=args.drop_path,
        model_kwargs=args.model_kwargs,
        say=say,
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
    if not is_data_config(data_config):
        raise UserError(
            f'--img-size, --crop-pct, --mean, --std: {data_config} is out of the range that a checkpoint may hold')
    alone = try_out(args.model, backbone, data_config['input_size'])
    if alone and data.batch_size + data.pool_batch_size == 1 and _one_view(args) and not (
            args.freeze_backbone or args.sync_bn):
        raise UserError(
            f'-b 1: {args.model} has batch norm that sees one number a channel of one image of '
            f'{"x".join(map(str, data_config["input_size"]))}, and no statistics come of that; raise -b or --img-size')
    try:
        made = MultiLabelModel(
            backbone, data.label_space, args.drop, args.smoothing, options, data.registry, args.projection_dim)
    except ValueError as error:
        raise UserError(f'--head: {error}') from error
    return made, data_config


def _one_view(args: argparse.Namespace) -> bool:
    return not args.simclr_loss_weight and not args.pseudo_label_weight


def try_out(name: str, backbone: torch.nn.Module, input_size: list[int]) -> bool:
    """Run a backbone on one image.

    Returns:
        Whether a batch norm gets one number a channel of it, from which it could not train.

    Raises:
        UserError: It takes no images of the size, or gives no pooled features.
    """
    size = 'x'.join(map(str, input_size))
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    alone: list[bool] = []
    hooks = [norm.register_forward_pre_hook(lambda norm, inputs: alone.append(inputs[0].numel() == norm.num_features))
             for norm in norms]
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(1, *input_size))
        backbone.train()
    except Exception as error:  # each model has its own ways to refuse a size
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'--model {name}: it does not take images of {size} ({reason}); see --img-size') from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(features, torch.Tensor) or features.shape != (1, backbone.head_hidden_size):
        raise UserError(f'--model {name}: no pooled features come out of it; choose another, or other --model-kwargs')
    return any(alone)


def task(
        args: argparse.Namespace,
        model: MultiLabelModel,
        data: Data,
        data_config: dict[str, Any],
        head_weights: dict[str, float],
        device: torch.device,
) -> JointTask:
    """The task on its device."""
    if args.sync_bn:
        if device.type != 'cuda':
            raise UserError(f'--sync-bn needs CUDA, and the device is {device}; leave it out')
        model = convert_sync_batchnorm(model)
    check_pieces(args, model, data)
    arch, model_kwargs = plain_model(args.model, args.model_kwargs)
    model.to(device=device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    return JointTask(
        model,
        simclr_weight=args.simclr_loss_weight,
        classification_weight=args.classification_loss_weight,
        temperature=args.temperature,
        projection_dim=args.projection_dim,
        head_weights=head_weights,
        first_view_only=args.classify_views == 'first',
        pool=Pool(
            data.pool_batch_size,
            args.entropy_weight,
            args.entropy_ramp_up,
            args.marginal_entropy_weight,
            args.pseudo_label_weight,
            args.pseudo_label_threshold,
        ) if data.pool_rows is not None else Pool(),
        freeze_backbone=args.freeze_backbone,
        micro_batch=args.micro_batch,
        metadata={
            'arch': arch,
            'model_kwargs': model_kwargs,
            'head_module': args.head_module,
            'opt': args.opt,
            'data_config': data_config,
            'best_weights': 'plain',
            'head_weights': head_weights,
            'head_options': model.head_options,
            'projection_dim': args.projection_dim,
            'train_split': args.train_split,
            'val_split': args.val_split,
            'image_column': args.image_column,
            'separator': args.separator,
            'missing_value': args.missing_value,
        },
        device=device,
    )


def check_pieces(args: argparse.Namespace, model: MultiLabelModel, data: Data) -> None:
    """Raise UserError where batch norm would have to take its statistics from one input."""
    images = data.batch_size + data.pool_batch_size
    if args.micro_batch is None or args.micro_batch >= images or args.freeze_backbone or not _one_view(args):
        return
    least = images // -(-images // args.micro_batch)
    if least == 1 and any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise UserError(
            f'--micro-batch {args.micro_batch}: {args.model} has batch norm, whose statistics are over 2 images or '
            f'more, and of {images} images a step some would go through it alone; choose another')


def setup_ema_and_compile(args: argparse.Namespace, made: JointTask) -> None:
    """EMA and compilation of a task that has its first weights."""
    if args.model_ema:
        made.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if args.torchcompile:
        try:
            made.compile(backend=args.torchcompile)
            if args.model_ema:
                made.compile_ema(backend=args.torchcompile)
        except RuntimeError as error:
            raise UserError(f'--torchcompile {args.torchcompile}: {" ".join(str(error).split())[:200]}') from error


def warmup_epochs(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """The epochs of warm-up: those asked for, but fewer than the run has, which would else end before its real rate."""
    epochs = min(args.warmup_epochs, args.epochs - 1)
    if epochs < args.warmup_epochs:
        say(f'--warmup-epochs {args.warmup_epochs} does not fit into --epochs {args.epochs}: warms up for {epochs}')
    return epochs


def cooldown_epochs(args: argparse.Namespace) -> int:
    """The epochs of cooldown: those asked for, else a tenth of the epochs, 10 at most."""
    return min(args.epochs // 10, 10) if args.cooldown_epochs is None else args.cooldown_epochs


def optimizer_step(
        args: argparse.Namespace,
        task: JointTask,
        precision: Precision,
        steps: int,
        metric: str,
        say: Callable[[str], None],
) -> tuple[OptimizerStep, RunLength]:
    """The optimizer with what surrounds it, and the epochs to train.

    Args:
        steps: Batches of an epoch.
        metric: The figure that ranks checkpoints.
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
    made = OptimizerStep(
        task,
        optimizer,
        scaler=make_scaler(precision),
        accumulate=args.grad_accum_steps,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
    )
    try:
        made.scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=args.sched,
            num_epochs=args.epochs,
            decay_epochs=args.decay_epochs,
            decay_milestones=args.decay_milestones,
            cooldown_epochs=cooldown_epochs(args),
            patience_epochs=args.patience_epochs,
            decay_rate=args.decay_rate,
            min_lr=args.min_lr,
            warmup_lr=args.warmup_lr,
            warmup_epochs=warmup_epochs(args, say),
            plateau_mode='min' if less_is_better(metric, task.heads) else 'max',
            step_on_epochs=not args.sched_on_updates,
            updates_per_epoch=made.updates_per_epoch(steps),
        )
    except ValueError as error:
        raise UserError(f'--sched {args.sched}: {error}') from error
    length = RunLength(args.epochs, epochs - args.epochs)
    if args.cooldown_epochs and not length.cooldown:
        say(f'--cooldown-epochs {args.cooldown_epochs}: --sched {args.sched} has no cooldown; trains {length}')
    return made, length


def saver(
        args: argparse.Namespace,
        task: JointTask,
        optimizer_step: OptimizerStep,
        metric: str,
        folder: Path,
        checkpoint: Checkpoint | None,
) -> WholeSaver:
    """timm's checkpoint saver, with the history of the run that goes on."""
    made = WholeSaver(
        model=task.get_eval_model(),
        task=task,
        optimizer=optimizer_step.optimizer,
        amp_scaler=optimizer_step.scaler,
        checkpoint_dir=str(folder),
        decreasing=less_is_better(metric, task.heads),
        max_history=args.checkpoint_hist,
    )
    if checkpoint is not None:
        made.go_on(checkpoint.path, checkpoint.state)
    return made
