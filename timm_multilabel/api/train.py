"""Train a timm backbone on several labels at once, together with SimCLR and with images that have no label."""
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch.distributed as dist

from timm_multilabel.api.arguments import Data, api_function, refuse_launched, train_values
from timm_multilabel.api.processes import train_in_processes
from timm_multilabel.api.training_run import TrainingRun
from timm_multilabel.assembly.checks import check_phases, without_effect
from timm_multilabel.assembly.device import start_device
from timm_multilabel.assembly.phases import (
    BuiltPhase,
    build_phase,
    free_memory,
    heads_of,
    prepare_phase,
    rehearse,
    train_phase,
)
from timm_multilabel.assembly.resuming import (
    find_checkpoint,
    find_folder,
    find_phase,
    settings_of_resumed,
    with_first_weights,
)
from timm_multilabel.assembly.starts import Starts
from timm_multilabel.config.files import args_yaml, build, check_no_users
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import SettingError, UserError, escaped, is_utf8
from timm_multilabel.log import say
from timm_multilabel.places import absolute
from timm_multilabel.training.checkpoint import Checkpoint, read_checkpoint, set_aside_later
from timm_multilabel.training.remote_run import at_workplace, workplace_at
from timm_multilabel.training.run_folder import RunFolder, RunLock, best_of_phases, launcher, phase_folder
from timm_multilabel.training.saver import WholeSaver
from timm_multilabel.training.signals import StopSignals
from timm_multilabel.training.trackers import TensorBoardTracker, Tracker, Trackers, WandbTracker, need


@api_function(TrainSettings)
def train(
        data: Data = None,
        *,
        train: pd.DataFrame | None = None,
        val: pd.DataFrame | None = None,
        test: pd.DataFrame | None = None,
        devices: int = 1,
        **settings: Any,
) -> TrainingRun:
    """Train a backbone on the labels of a folder of tables, or of pandas DataFrames.

    `KeyboardInterrupt` leaves a run that `resume=run_folder` goes on with from its newest checkpoint.

    Args:
        data: The data directory; None where `train` and `val` are given.
        train: The rows to train on, in place of a data directory. Relative paths of images are relative to the current
            directory. `unlabelled` may be a DataFrame too.
        val: The rows to score.
        test: The rows of the test split.
        devices: Processes to start, one a GPU; 1 trains in this process.
        **settings: The settings, named as the flags; `config` may name a recipe.

    Returns:
        The run: its folder, metrics and checkpoints.

    Raises:
        UserError: Data or settings do not allow it.
    """
    refuse_launched()
    if not isinstance(devices, int) or devices < 1:
        raise SettingError(f'devices: {devices!r}, expected a whole number of 1 or more')
    given = train_values(data, {'train': train, 'val': val, 'test': test}, settings)
    made = build(TrainSettings, given)
    if devices > 1:
        return train_in_processes(given, devices)
    run = run_training(made)
    assert run is not None  # only ranks other than the first have none
    return run


def run_training(settings: TrainSettings, signals: StopSignals | None = None) -> TrainingRun | None:
    """Train as settings say, in this process and perhaps in others that run the same.

    Args:
        settings: Of the whole run, with its phases.
        signals: What may tell it to stop.

    Returns:
        The run; None on ranks other than the first.

    Raises:
        UserError: Data or settings do not allow it.
        Stopped: It was told to stop, and the state is saved.
    """
    phases = check_phases(settings)
    check_no_users('settings', args_yaml(settings))
    run = settings.run
    for package in ('tensorboard', 'wandb'):
        if {'tensorboard': run.log_tensorboard, 'wandb': run.log_wandb}[package]:
            need(package, f'--log-{package}')
            path = absolute(os.path.join(run.output, run.experiment or '', run.resume or ''))
            if not is_utf8(path):  # else the tracker would fail once training has begun
                raise UserError(f'--log-{package}: the path {escaped(path)} is not UTF-8, as {package} needs it; name '
                                'another with --output and --experiment')
    with ExitStack() as stack:
        device = start_device(run.device)
        for note in (*sorted(settings.notes), *without_effect(phases)):
            say(note)
        lock = stack.enter_context(closing(RunLock()))
        settings = at_workplace(settings, lock.take, say)
        run = settings.run
        prepared = [prepare_phase(each, settings.config, device, say, index) for index, each in enumerate(phases)]
        launchers = all_objects(launcher())
        checkpoint = find_checkpoint(run, launchers, lock, say)
        names = [each.name for each in phases] if settings.phases else []
        first = find_phase(checkpoint, names) if checkpoint is not None else 0
        anew = any(each.settings.backbone.start_from == 'initial' for each in prepared[first + 1:])
        resumed = find_folder(settings, 0, checkpoint, names, first) if checkpoint is not None else None
        if resumed is not None and anew:
            prepared = with_first_weights(prepared, resumed)
        initial = _initial(prepared[-1].settings) if checkpoint is None or anew else None
        metrics = rehearse(prepared, Starts(phases, initial, resumed), checkpoint, first) if len(phases) > 1 else []
        starts = Starts(phases, initial, resumed)
        initial = None  # which `starts` holds for as long as it is needed

        folder: Path | None = None
        writer: RunFolder | None = None
        trackers: Trackers | None = None
        finished: TrainingRun | None = None
        for index in range(first, len(phases)):
            before = folder or resumed
            made = best_of_phases(before, names, index) if before is not None else {}
            start = starts.of(index) if checkpoint is None else None
            built = build_phase(prepared[index], start, checkpoint, say, heads_of(prepared[:index]), made)
            built.task.metadata |= {'phase': index, 'phases': names}
            start = None  # whose weights the task has now
            if folder is None:
                # One for all: the name of a new one has the time in it.
                folder = all_objects(
                    find_folder(settings, built.data_config['input_size'][-1], checkpoint, names, index))[0]
                if world()[0] == 0:
                    lock.take(folder)
                    if checkpoint is not None and (line := set_aside_later(folder, checkpoint)):
                        say(line)
                    named = _with_metrics(settings, first, metrics or [built.metric], built)
                    values, workplace = args_yaml(named), workplace_at(folder, settings)
                    if workplace is not None:
                        say(f'{workplace.address}: run folder, worked on in {folder}')
                        values['output'] = str(workplace.address.parent)
                    if checkpoint is not None:
                        values = settings_of_resumed(settings, values, folder, say)
                    writer = RunFolder(
                        folder, values, prepared[-1].data.label_space, names, launchers, workplace, say)
                    trackers = stack.enter_context(closing(
                        Trackers(_choose_trackers(named, folder, checkpoint is not None), say)))
            saver = train_phase(
                built, phase_folder(folder, names, index), writer, trackers, checkpoint, signals, say)
            starts.done(index, built.task)
            checkpoint = None
            if saver is not None:
                finished = _finished(folder, built, saver)
            length = built.length
            del built
            free_memory(device)
    if writer is not None and writer.workplace is not None:
        writer.workplace.finish()
    say(f'{folder}: {"all phases" if names else length} done')
    if dist.is_initialized():
        dist.destroy_process_group()
    return finished


def _initial(settings: TrainSettings) -> Checkpoint | None:
    """What a run starts from, where that is a checkpoint."""
    path = settings.backbone.initial_checkpoint
    return read_checkpoint(path) if path else None


def _with_metrics(
        settings: TrainSettings,
        first: int,
        metrics: Sequence[str],
        built: BuiltPhase,
) -> TrainSettings:
    """Settings whose `eval_metric` is called as it is now; earlier versions may have called it otherwise."""
    scored = built.prepared.data.eval_rows is not None
    if not settings.phases:
        return settings.replace(eval_metric=metrics[0]) if settings.run.eval_metric and scored else settings
    phases = list(settings.phases)
    for index, metric in enumerate(metrics, first):
        of_phase = phases[index].settings
        if of_phase.run.eval_metric and of_phase.objective.classification_loss_weight:
            phases[index] = replace(phases[index], settings=of_phase.replace(eval_metric=metric))
    return settings.replace(phases=tuple(phases))


def _finished(folder: Path, built: BuiltPhase, saver: WholeSaver) -> TrainingRun:
    best, scored = saver.best_metric, built.prepared.data.eval_rows
    return TrainingRun(
        folder, built.metric, best, None if best is None else saver.best_epoch,
        Path(saver.last if best is None else saver.best), Path(saver.last),
        bool(built.task.heads), isinstance(scored, StreamedRows))


def _choose_trackers(settings: TrainSettings, folder: Path, goes_on: bool) -> list[Tracker]:
    """What is told of the run beside its summary.csv: its curves, always, and the trackers that are asked for."""
    from timm_multilabel.reports.curves import CurvesTracker  # here: other ranks need no pictures, which take a second
    trackers: list[Tracker] = [CurvesTracker(folder / 'curves.png')]
    if settings.run.log_tensorboard:
        trackers.append(TensorBoardTracker(folder, args_yaml(settings)))
    if settings.run.log_wandb:
        trackers.append(WandbTracker(folder, args_yaml(settings), goes_on))
    return trackers
