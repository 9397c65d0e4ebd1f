"""The training loop: an epoch of steps, its evaluation, and the epochs of a run."""
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import CheckpointSaver, NativeScaler, dispatch_clip_grad, distribute_bn, random_seed
from torch import nn

from timm_multilabel.distributed import world
from timm_multilabel.errors import UserError
from timm_multilabel.loading.batches import BadImages
from timm_multilabel.metrics import MultiLabelEvaluator, TrainingMeter, default_metric, less_is_better
from timm_multilabel.task import JointTask
from timm_multilabel.training.progress import Progress
from timm_multilabel.training.run_folder import RunFolder


@dataclass(frozen=True)
class Precision:
    """How tensors are computed and laid out.

    Args:
        device: Where.
        amp_dtype: The lower precision of autocast; none when None.
        channels_last: Channels-last images.
    """
    device: torch.device
    amp_dtype: torch.dtype | None = None
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.amp_dtype) if self.amp_dtype is not None else nullcontext()

    def layout(self, images: torch.Tensor) -> torch.Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


@dataclass
class Updater:
    """Gradients -> weights: accumulation, loss scaling, clipping, the optimizer, the EMA, a schedule of updates.

    Args:
        task: What is trained.
        optimizer: Changes its weights.
        scheduler: Learning rate schedule, or None.
        scaler: Loss scaler for float16, or None.
        accumulate: Batches an update.
        clip_grad: Clipping value, or None.
        clip_mode: 'norm', 'value' or 'agc'.
    """
    task: JointTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None = None
    scaler: NativeScaler | None = None
    accumulate: int = 1
    clip_grad: float | None = None
    clip_mode: str = 'norm'

    def updates_per_epoch(self, steps: int) -> int:
        return math.ceil(steps / self.accumulate)

    def is_update(self, step: int, steps: int) -> bool:
        """Whether the weights change after a step (from 0); the last group of an epoch may be a smaller one."""
        return (step + 1) % self.accumulate == 0 or step + 1 == steps

    def batches_in_update(self, step: int, steps: int) -> int:
        """The number of batches that the update which a step (from 0) belongs to is over."""
        return min(self.accumulate, steps - step // self.accumulate * self.accumulate)

    def backward(self, loss: torch.Tensor, update: bool) -> None:
        """Add the gradient of a loss, and change the weights if it is the update's last."""
        parameters = self.task.get_clip_parameters(exclude_head=self.clip_mode == 'agc') if self.clip_grad else None
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, self.clip_grad, self.clip_mode, parameters, need_update=update)
        else:
            loss.backward()
            if update and self.clip_grad is not None:
                dispatch_clip_grad(parameters, self.clip_grad, self.clip_mode)
            if update:
                self.optimizer.step()
        if update:
            self.optimizer.zero_grad()


def train_epoch(
        updater: Updater,
        loader: Any,
        precision: Precision,
        epoch: int,
        progress: Progress,
        log_interval: int = 50,
) -> dict[str, float]:
    """Train on every batch of a loader.

    Figures are read from the device every `log_interval` steps and at the end, nowhere else.

    Returns:
        The figures of `TrainingMeter`, over all ranks.

    Raises:
        UserError: The loss is no longer a finite number.
    """
    task = updater.task
    task.start_epoch(epoch)
    task.train()
    meter = TrainingMeter(task.terms, task.heads, precision.device)
    steps = len(loader)
    updates = epoch * updater.updates_per_epoch(steps)
    for step, (images, target) in enumerate(loader):
        update = updater.is_update(step, steps)
        with nullcontext() if update else task.no_sync():
            with precision.autocast():
                result = task(precision.layout(images), target)
            updater.backward(result['loss'] / updater.batches_in_update(step, steps), update)
        if update:
            updates += 1
            task.update_ema(step=updates)
            if updater.scheduler is not None:
                updater.scheduler.step_update(updates)
        meter.update(result)
        progress.advance()
        if (step + 1) % log_interval == 0 or step + 1 == steps:
            figures = meter.compute()
            check_finite(figures['train_loss'], f'the training loss is {figures["train_loss"]} at step {step + 1}')
            progress.show(step + 1, training_line(figures, task))
    return meter.compute(distributed=world()[1] > 1)


def check_finite(value: float, what: str) -> None:
    """Raise UserError unless a loss is a finite number."""
    if not math.isfinite(value):
        raise UserError(
            f'{what}: stopped, and the checkpoints of earlier epochs are kept; lower --lr, clip with --clip-grad 1, '
            'or leave --amp out')


def training_line(figures: dict[str, float], task: JointTask) -> str:
    """The figures of a progress line."""
    parts = [f'loss {figures["train_loss"]:.3f}']
    parts += [f'{term} {figures[f"{term}_loss"]:.3f}' for term in task.terms]
    for name in task.heads:
        accuracy = figures.get(f'train_{name}_top1', math.nan)
        passed = figures.get(f'train_{name}_pseudo_labelled')
        words = [] if math.isnan(accuracy) else [f'{accuracy:.1f}%']
        words += [] if passed is None else [f'({passed:.0f}% pass)']
        parts += [' '.join([name, *words])] if words else []
    return '  '.join(parts)


@torch.no_grad()
def evaluate(
        model: nn.Module,
        loader: Any,
        evaluator: MultiLabelEvaluator,
        precision: Precision,
        progress: Progress,
) -> dict[str, float]:
    """Score a model on every row of a loader, over all ranks."""
    model.eval()
    for images, target in loader:
        with precision.autocast():
            output = model(precision.layout(images))
        evaluator.update(output, target)
        progress.advance()
    return evaluator.compute(distributed=world()[1] > 1)


@dataclass
class Fit:
    """The epochs of a run.

    Args:
        updater: What is trained, and how.
        precision: How tensors are computed.
        train_loader: Training batches.
        eval_loader: Evaluation batches; None where no head is trained.
        images_per_step: Photos of a step, over all ranks.
        seed: Seed of the run.
        metric: The figure of the evaluation that makes a checkpoint the best.
        phase: Name of the phase, where the run has phases.
        run_folder: Where rows of figures go (first rank only, else None).
        saver: Writes checkpoints (first rank only, else None).
        bad_images: Those that are left out, where they are; else None.
        log_interval: Steps between figures.
    """
    updater: Updater
    precision: Precision
    train_loader: Any
    eval_loader: Any | None
    images_per_step: int
    seed: int
    metric: str = 'top1'
    phase: str | None = None
    run_folder: RunFolder | None = None
    saver: CheckpointSaver | None = None
    bad_images: BadImages | None = None
    log_interval: int = 50
    task: JointTask = field(init=False)

    def __post_init__(self):
        self.task = self.updater.task

    def run(self, first: int, epochs: int) -> None:
        """Train the epochs `first` to `epochs - 1`."""
        for epoch in range(first, epochs):
            self.run_epoch(epoch, (f'{self.phase}: ' if self.phase else '') + f'Epoch {epoch + 1}/{epochs}')

    def run_epoch(self, epoch: int, title: str) -> dict[str, Any]:
        """Train an epoch, evaluate it, write its row and its checkpoint."""
        rank, ranks = world()
        # What is random in an epoch depends on (seed, epoch, rank) alone, so that a run resumed at its start is the
        # run that never stopped.
        random_seed(self.seed + epoch * ranks, rank)
        self.train_loader.set_epoch(epoch)
        lrs = [group['lr'] for group in self.updater.optimizer.param_groups]
        started = time.perf_counter()
        with Progress(title, len(self.train_loader), rank == 0, self.images_per_step) as progress:
            row = train_epoch(
                self.updater, self.train_loader, self.precision, epoch, progress, self.log_interval)
        images_per_second = len(self.train_loader) * self.images_per_step / (time.perf_counter() - started)
        if ranks > 1:
            for ema in (False, True):
                module = self.task.get_trainable_module(ema=ema)
                if module is not None:
                    distribute_bn(module, ranks, reduce=True)
        row = {**({'phase': self.phase} if self.phase else {}), 'epoch': epoch, **row}
        if self.eval_loader is not None:
            row |= self.evaluate(title)
        row |= {'lr': sum(lrs) / len(lrs), 'images_per_second': images_per_second}
        if self.bad_images is not None:
            news = self.bad_images.news()
            if news:
                progress.say(news)
            row['bad_images'] = len(self.bad_images.known)
        best = self.score(row)
        if math.isnan(row.get(best, math.nan)):
            raise UserError(
                f'{best} cannot be computed from the labels of the evaluation; choose another --eval-metric, such as '
                'loss')
        if self.updater.scheduler is not None:
            self.updater.scheduler.step(epoch + 1, row[best])
        progress.say(epoch_line(title, row, self.task))
        self.task.metadata['best_weights'] = 'ema' if best == 'eval_ema_' + self.metric else 'plain'
        if self.run_folder is not None:
            self.run_folder.add_summary(row)
            self.saver.save_checkpoint(epoch, row[best])
        return row

    def evaluate(self, title: str) -> dict[str, float]:
        """The evaluation's figures of the plain weights ('eval_...') and of the EMA ('eval_ema_...')."""
        row = {}
        for prefix, ema in (('eval_', False), ('eval_ema_', True)):
            model = self.task.get_eval_model(ema=ema)
            if model is None:
                continue
            with Progress(f'{title} {prefix.strip("_")}', len(self.eval_loader), visible=world()[0] == 0) as progress:
                figures = evaluate(
                    model, self.eval_loader, self.task.create_evaluator(), self.precision, progress)
            row |= {prefix + name: value for name, value in figures.items()}
        check_finite(row['eval_loss'], f'the evaluation loss is {row["eval_loss"]}')
        return row

    def score(self, row: dict[str, Any]) -> str:
        """The column that this epoch is ranked by: of the plain or of the EMA weights, whichever is better."""
        if self.eval_loader is None:
            return 'simclr_loss'
        columns = ['eval_' + self.metric] + (['eval_ema_' + self.metric] if self.task.has_ema() else [])
        columns = [column for column in columns if column in row] or columns[:1]
        return (min if less_is_better(self.metric, self.task.heads) else max)(columns, key=row.get)


def epoch_line(title: str, row: dict[str, Any], task: JointTask) -> str:
    """The line that stays of an epoch."""
    terms = [f'{term} {row[f"{term}_loss"]:.3f}' for term in task.terms if row[f'{term}_loss']]
    parts = [title, f'loss {row["train_loss"]:.3f}' + (f' ({", ".join(terms)})' if len(terms) > 1 else '')]
    mean = default_metric(task.heads.values())
    for prefix in ('eval_', 'eval_ema_'):
        if prefix + mean in row:
            scores = '  '.join(
                f'{name} {row[f"{prefix}{name}_{head.figures[0]}"]:.1f}%'
                + ('' if head.figures[0] == 'top1' else f' {head.figures[0]}')
                for name, head in task.heads.items())
            parts.append(f'{prefix.strip("_")} {row[prefix + mean]:.2f}%  ({scores})')
    parts.append(f'lr {row["lr"]:.2g}  {row["images_per_second"]:.0f} images/s')
    return '  '.join(parts)


def make_scaler(precision: Precision) -> NativeScaler | None:
    """A loss scaler where float16 needs one."""
    return NativeScaler(device=precision.device.type) if precision.amp_dtype is torch.float16 else None


