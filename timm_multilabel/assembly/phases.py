"""The phases of a run: first their data, then task, optimizer and loaders, then their training."""
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import random_seed

from timm_multilabel.assembly import head_options
from timm_multilabel.assembly.checks import check_metric, check_terms, resolve_weights
from timm_multilabel.assembly.data import Data, read_data
from timm_multilabel.assembly.device import choose_precision
from timm_multilabel.assembly.loaders import Loaders, create_loaders
from timm_multilabel.assembly.model import create_model
from timm_multilabel.assembly.optimization import create_optimizer_step, create_saver
from timm_multilabel.assembly.plain_views import check_plain_views
from timm_multilabel.assembly.pseudo_labels import as_flags
from timm_multilabel.assembly.starts import Starts
from timm_multilabel.assembly.task import create_task, create_teaching, setup_ema_and_compile
from timm_multilabel.assembly.teachers import (
    create_feature_teaching,
    find_teachers,
    load_teachers,
    make_soft_labels,
    taught_heads,
)
from timm_multilabel.assembly.views import train_views
from timm_multilabel.config.train import Phase, TrainSettings
from timm_multilabel.distributed import world
from timm_multilabel.errors import UserError
from timm_multilabel.labels import LabelSpace
from timm_multilabel.log import Say, silent
from timm_multilabel.task import JointTask
from timm_multilabel.training.checkpoint import Checkpoint, resume, start_from, what_differs
from timm_multilabel.training.optimizer_step import OptimizerStep
from timm_multilabel.training.progress_bar import RunLength, fitted, line_width
from timm_multilabel.training.run_folder import RunFolder
from timm_multilabel.training.saver import WholeSaver
from timm_multilabel.training.signals import StopSignals
from timm_multilabel.training.trackers import Trackers
from timm_multilabel.training.trainer import Precision, Trainer
from timm_multilabel.training.training_progress import TrainingProgress


@dataclass(frozen=True)
class PreparedPhase:
    """A phase, or the whole of a run that has none, whose data are read.

    Args:
        phase: Its name, '' where the run has no phases, and its settings.
        recipe: The file that it stands in.
        precision: How tensors are computed.
        data: What it learns from.
    """
    phase: Phase
    recipe: str | None
    precision: Precision
    data: Data

    @property
    def name(self) -> str | None:
        return self.phase.name or None

    @property
    def settings(self) -> TrainSettings:
        return self.phase.settings

    @property
    def images_per_step(self) -> int:
        """Images of a step, over all ranks."""
        return (self.data.batch_size + self.data.pool_batch_size) * world()[1]


@dataclass(frozen=True)
class BuiltPhase:
    """A phase that can be trained.

    Args:
        prepared: Its settings and data.
        task: What is trained.
        optimizer_step: How its weights change.
        length: The epochs to train.
        loaders: Its batches.
        metric: What ranks its checkpoints.
        data_config: Input size, normalisation and resizing, as timm names them.
        start: Where training goes on.
    """
    prepared: PreparedPhase
    task: JointTask
    optimizer_step: OptimizerStep
    length: RunLength
    loaders: Loaders
    metric: str
    data_config: dict[str, Any]
    start: TrainingProgress


@contextmanager
def _named(phase: Phase, recipe: str | None) -> Iterator[None]:
    """Put the phase's name before an error."""
    try:
        yield
    except UserError as error:
        if not phase.name:
            raise
        raise UserError(f"{recipe}, phase '{phase.name}': {error.line}") from error


def prepare_phase(phase: Phase, recipe: str | None, device: torch.device, say: Say, index: int = 0) -> PreparedPhase:
    """Read the data of a phase.

    Phases with `start_from` have seeds of their own, so that several of them are several seeds of one training. The
    labelled rows are drawn with the seed of the run in all of them.

    Args:
        phase: The phase.
        recipe: The file that it stands in.
        device: Where it is trained.
        say: Tells a line.
        index: Its place among the phases, from 0.

    Raises:
        UserError: The data cannot be read, or are too few.
    """
    run, prefix = phase.settings.run, f'Phase {phase.name}: ' if phase.name else ''
    with _named(phase, recipe):
        precision = choose_precision(device, run.amp, run.amp_dtype, phase.settings.backbone.channels_last)
        if phase.chosen:
            say(f'{prefix}--pseudo-label-weight also sets {as_flags(phase.chosen)}; pass others to change that')
        data = read_data(phase.settings, lambda line: say(f'{prefix}{line}'))
        if phase.settings.backbone.start_from and index:
            seed = int(np.random.SeedSequence((run.seed, index)).generate_state(1)[0]) % 2 ** 31
            phase = replace(phase, settings=phase.settings.replace(seed=seed))
        return PreparedPhase(phase, recipe, precision, data)


def build_phase(
        prepared: PreparedPhase,
        start: Checkpoint | None,
        checkpoint: Checkpoint | None,
        say: Say,
        earlier: Mapping[str, LabelSpace],
        made: Mapping[str, Path],
        rehearsal: bool = False,
) -> BuiltPhase:
    """Make task, optimizer and loaders of a phase.

    Args:
        prepared: The phase.
        start: A checkpoint whose weights it starts from.
        checkpoint: One of its own, to go on from.
        say: Tells a line.
        earlier: The heads of the phases before it.
        made: The best checkpoints of those that are done.
        rehearsal: It will not be trained: caches stay closed, and teachers may be of phases that are not done.

    Raises:
        UserError: Settings, data or checkpoint do not allow it.
    """
    with _named(prepared.phase, prepared.recipe):
        return _build(prepared, start, checkpoint, say, earlier, made, rehearsal)


def _build(
        prepared: PreparedPhase,
        start: Checkpoint | None,
        checkpoint: Checkpoint | None,
        say: Say,
        earlier: Mapping[str, LabelSpace],
        made: Mapping[str, Path],
        rehearsal: bool,
) -> BuiltPhase:
    settings, data, precision = prepared.settings, prepared.data, prepared.precision
    random_seed(settings.run.seed, 0)  # the same first weights on every rank
    targets = data.label_space.split(data.train_rows.targets)
    options, weights = head_options.resolve(data.head, data.registry, data.label_space, targets)
    weights = resolve_weights(settings, data, weights)
    model, data_config = create_model(settings, data, options, checkpoint is None and start is None, say)
    for name, head in model.named_heads.items():
        if head.remark:
            say(f"head '{name}': {head.remark}")
    check_terms(settings, model.named_heads.values())
    metric = check_metric(settings, data, model.named_heads.values(), weights, say)
    teachers, teaching = None, None
    if settings.teaching.teacher:
        found = find_teachers(settings.teaching.teacher, earlier, made)
        taught = taught_heads(settings, data, model.named_heads, found, say)
        if all(teacher.checkpoint is not None for teacher in found):
            teachers = load_teachers(settings, data, data_config, found, taught, precision, say)
        teaching = create_teaching(settings.teaching, taught, teachers)
    feature_teaching = create_feature_teaching(settings, data_config, precision, say)
    task = create_task(settings, model, data, data_config, weights, precision.device, teaching, feature_teaching)
    task.metadata['eval_metric'] = metric
    if start is not None:
        say(start_from(task, start, start.best_weights))
    backbone = settings.backbone
    if (backbone.lora or backbone.freeze_backbone) and start is None and checkpoint is None and not (
            backbone.pretrained or backbone.pretrained_path):
        say(f'{"--lora" if backbone.lora else "--freeze-backbone"}: the backbone has random weights and keeps them; '
            'start it from --pretrained, --pretrained-path or --initial-checkpoint')
    if backbone.lora:
        say(task.add_adapters(backbone.lora, data_config['input_size']))
    updates = settings.schedule.epochs * -(-data.steps // settings.optimizer.grad_accum_steps)
    setup_ema_and_compile(backbone, task, updates, say)
    optimizer_step, length = create_optimizer_step(
        settings.optimizer, settings.schedule, task, precision, data.steps, metric, say)
    progress = TrainingProgress(0)
    if checkpoint is not None:
        progress = resume(checkpoint, task, optimizer_step, data.steps)
    check_plain_views(
        settings, tuple(sorted(task.plain_views.names)) if task.told.plain else (),
        train_views(settings, data_config, task.views, bool(settings.augmentation.weak_first_view)), say)
    soft_labels = []
    if teachers is not None and not settings.teaching.teacher_views and not rehearsal:
        soft_labels = make_soft_labels(settings, data, teachers, say)
        del teachers
        free_memory(precision.device)
    loaders = create_loaders(
        settings, data, data_config, task.views, precision.device, say, not rehearsal, soft_labels, task.told)
    if checkpoint is not None:
        differs = what_differs(
            checkpoint, ranks=world()[1], images_per_step=prepared.images_per_step,
            accumulate=settings.optimizer.grad_accum_steps, seed=settings.run.seed,
            loader_processes=loaders.train.order_depends_on)
        if differs:
            say(differs)
    return BuiltPhase(prepared, task, optimizer_step, length, loaders, metric, data_config, progress)


def rehearse(
        phases: list[PreparedPhase],
        starts: Starts,
        checkpoint: Checkpoint | None,
        first: int,
) -> list[str]:
    """Make phases from the `first` on without training them: what is wrong with a later one shows now, not after hours.

    Returns:
        The metric that ranks the checkpoints of each.
    """
    metrics = []
    for index, prepared in enumerate(phases[first:], first):
        start = starts.of(index) if checkpoint is None else None
        built = build_phase(prepared, start, checkpoint, silent, heads_of(phases[:index]), {}, rehearsal=True)
        metrics.append(built.metric)
        starts.done(index, built.task)
        checkpoint = None
        del built, start
        free_memory(prepared.precision.device)
    return metrics


def heads_of(phases: Sequence[PreparedPhase]) -> dict[str, LabelSpace]:
    """The heads of phases by the phases' names."""
    return {each.phase.name: each.data.label_space for each in phases}


def free_memory(device: torch.device) -> None:
    """Give back the memory of tasks that nothing holds any more."""
    if device.type == 'cuda':
        gc.collect()
        torch.cuda.empty_cache()  # else the next phase's --cache device would take it for used


def train_phase(
        built: BuiltPhase,
        folder: Path,
        writer: RunFolder | None,
        trackers: Trackers | None,
        checkpoint: Checkpoint | None,
        signals: StopSignals | None,
        say: Say,
) -> WholeSaver | None:
    """Train a phase.

    Args:
        built: The phase.
        folder: Where its checkpoints go.
        writer: The run folder, on the first rank.
        trackers: What else is told of the run, there.
        checkpoint: What it goes on from, for the history of the best.
        signals: What may tell it to stop.
        say: Tells a line.

    Returns:
        The saver of its checkpoints, on the first rank.
    """
    prepared, task = built.prepared, built.task
    settings, data, device, ranks = prepared.settings, prepared.data, prepared.precision.device, world()[1]
    if ranks > 1:
        task.prepare_distributed(device_ids=[device.index] if device.type == 'cuda' else None)
    title = f'Phase {prepared.name}: ' if prepared.name else ''
    title += f'{settings.backbone.model}, {built.length}, heads: '
    heads = list(map(str, data.label_space.heads)) or ['no heads']
    say(title + fitted(heads, line_width() - len(title), ', '))
    say(f'{data}, {ranks} x {device}, {data.steps} step{"s" * (data.steps > 1)} an epoch, run folder {folder}')
    saver = None
    if writer is not None:
        folder.mkdir(exist_ok=True)
        saver = create_saver(
            settings.run.checkpoint_hist, task, built.optimizer_step, built.metric, folder, checkpoint)
    trainer = Trainer(
        built.optimizer_step,
        prepared.precision,
        built.loaders.train,
        built.loaders.eval,
        images_per_step=prepared.images_per_step,
        seed=settings.run.seed,
        metric=built.metric,
        phase=prepared.name,
        run_folder=writer,
        trackers=trackers,
        saver=saver,
        bad_images=built.loaders.bad,
        kept_out=built.loaders.kept_out,
        log_interval=settings.run.log_interval,
        save_interval=settings.run.checkpoint_steps,
        signals=signals,
    )
    if checkpoint is not None and built.loaders.bad is not None:
        built.loaders.bad.known.update(checkpoint.state.get('run', {}).get('bad_images', []))
    with signals.noted() if signals is not None else nullcontext():
        trainer.run(built.start, built.length)
    return saver
