"""From settings to the optimizer step, the schedule and the saver of checkpoints."""
from pathlib import Path

from timm.scheduler import create_scheduler_v2

from timm_multilabel.config.train import OptimizerSettings, ScheduleSettings
from timm_multilabel.errors import SettingError
from timm_multilabel.log import Say
from timm_multilabel.metrics import less_is_better
from timm_multilabel.optim import create_optimizer
from timm_multilabel.task import JointTask
from timm_multilabel.training.checkpoint import Checkpoint
from timm_multilabel.training.optimizer_step import OptimizerStep
from timm_multilabel.training.progress_bar import RunLength
from timm_multilabel.training.saver import WholeSaver
from timm_multilabel.training.trainer import Precision, make_scaler


def warmup_epochs(schedule: ScheduleSettings, say: Say) -> int:
    """The epochs of warm-up: those asked for, but fewer than the run has, which would else end before its real rate."""
    epochs = min(schedule.warmup_epochs, schedule.epochs - 1)
    if epochs < schedule.warmup_epochs:
        say(f'--warmup-epochs {schedule.warmup_epochs} does not fit into --epochs {schedule.epochs}: warms up for '
            f'{epochs}')
    return epochs


def cooldown_epochs(schedule: ScheduleSettings) -> int:
    """The epochs of cooldown: those asked for, else a tenth of the epochs, 10 at most."""
    return min(schedule.epochs // 10, 10) if schedule.cooldown_epochs is None else schedule.cooldown_epochs


def create_optimizer_step(
        wanted: OptimizerSettings,
        schedule: ScheduleSettings,
        task: JointTask,
        precision: Precision,
        steps: int,
        metric: str,
        say: Say,
) -> tuple[OptimizerStep, RunLength]:
    """The optimizer with what surrounds it, and the epochs to train.

    Args:
        steps: Batches of an epoch.
        metric: The metric that ranks checkpoints.
    """
    further = dict(wanted.opt_kwargs)
    if wanted.opt_eps is not None:
        further['eps'] = wanted.opt_eps
    if wanted.opt_betas is not None:
        further['betas'] = wanted.opt_betas
    try:
        optimizer = create_optimizer(
            task,
            wanted.opt,
            lr=schedule.lr,
            weight_decay=wanted.weight_decay,
            momentum=wanted.momentum,
            layer_decay=wanted.layer_decay,
            gradient_centralization=wanted.gradient_centralization,
            join_heads=True,
            **further,
        )
    except (ValueError, TypeError, AssertionError, LookupError) as error:
        raise SettingError(f'--opt {wanted.opt}: {" ".join(str(error).split())}') from error
    made = OptimizerStep(
        task,
        optimizer,
        scaler=make_scaler(precision),
        accumulate=wanted.grad_accum_steps,
        clip_grad=wanted.clip_grad,
        clip_mode=wanted.clip_mode,
    )
    try:
        made.scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=schedule.sched,
            num_epochs=schedule.epochs,
            decay_epochs=schedule.decay_epochs,
            decay_milestones=schedule.decay_milestones,
            cooldown_epochs=cooldown_epochs(schedule),
            patience_epochs=schedule.patience_epochs,
            decay_rate=schedule.decay_rate,
            min_lr=schedule.min_lr,
            warmup_lr=schedule.warmup_lr,
            warmup_epochs=warmup_epochs(schedule, say),
            plateau_mode='min' if less_is_better(metric, task.heads) else 'max',
            step_on_epochs=not schedule.sched_on_updates,
            updates_per_epoch=made.updates_per_epoch(steps),
        )
    except ValueError as error:
        raise SettingError(f'--sched {schedule.sched}: {error}') from error
    length = RunLength(schedule.epochs, epochs - schedule.epochs)
    if schedule.cooldown_epochs and not length.cooldown:
        say(f'--cooldown-epochs {schedule.cooldown_epochs}: --sched {schedule.sched} has no cooldown; trains {length}')
    return made, length


def create_saver(
        keep: int,
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
        max_history=keep,
    )
    if checkpoint is not None:
        made.go_on(checkpoint.path, checkpoint.state)
    return made
