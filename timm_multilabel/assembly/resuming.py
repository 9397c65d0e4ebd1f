"""Runs that go on: from which checkpoint and where, what differs from what they had, and what has no effect."""
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from timm_multilabel.assembly.phases import PreparedPhase
from timm_multilabel.config.files import read_yaml
from timm_multilabel.config.train import RunSettings, TrainSettings
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import CheckpointError, UserError
from timm_multilabel.log import Say
from timm_multilabel.training.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from timm_multilabel.training.run_folder import RunLock, find_launched, phase_folder, run_folder_path

_AT_START = ('pretrained', 'pretrained_path', 'initial_checkpoint')
"""The flags that say what a run starts from."""


def find_checkpoint(
        run: RunSettings,
        launchers: Sequence[str],
        lock: RunLock,
        say: Say,
) -> Checkpoint | None:
    """The checkpoint to go on from: that of --resume, or, where torchrun starts a run again, its newest one.

    All ranks call it; the first one decides.

    Raises:
        CheckpointError: There is none, or it is not whole.
    """
    restarted = any(all_objects(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))))  # a machine may have joined
    path: Path | None = None
    lines: list[str] = []
    wrong: str | None = None
    if world()[0] == 0:
        try:
            path, lines = choose_checkpoint(run, restarted, launchers, lock)
        except UserError as error:
            wrong = error.line
    path, lines, wrong = all_objects((path, lines, wrong))[0]
    if wrong is not None:
        raise CheckpointError(wrong)
    for line in lines:
        say(line)
    return None if path is None else read_or_offer(path)


def choose_checkpoint(
        run: RunSettings,
        restarted: bool,
        launchers: Sequence[str],
        lock: RunLock,
) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, and lines about the choice.

    Raises:
        CheckpointError: No checkpoint of the run folder is whole, or another process trains in it.
    """
    named = None if run.resume in ('auto', None) else Path(run.resume)
    experiment = Path(run.output) / run.experiment if run.experiment else None
    folder = None
    if restarted:
        folder = find_launched([named, *named.absolute().parents[:2]] if named else
                               [experiment] if experiment else Path(run.output).glob('*'), launchers)
    if folder is None and named is not None and not named.is_dir():
        return named, []
    if folder is None and run.resume is not None:
        folder = named or experiment
    if folder is None or not folder.is_dir():
        return None, []
    lock.take(folder)  # else another process may write while this one chooses
    path, damaged = newest_checkpoint(folder)
    if path is None and (damaged or named is not None):
        raise CheckpointError(
            f'{folder}: no whole checkpoint in this run folder; start anew under another --experiment')
    return path, [f'{line}: passed over' for line in damaged] + [f'{path}: goes on from here'] * (path is not None)


def read_or_offer(path: Path) -> Checkpoint:
    """Read a checkpoint; where it is damaged, the error names the newest whole one beside it."""
    try:
        return read_checkpoint(path)
    except UserError as error:
        before, _ = newest_checkpoint(path.parent)
        if before is None:
            raise
        raise CheckpointError(f'{error.line}; the newest whole one beside it: --resume {before}') from error


def find_phase(checkpoint: Checkpoint, names: list[str]) -> int:
    """The phase that a checkpoint is of.

    Args:
        checkpoint: Which may be of a run with other phases.
        names: The phases of this run.

    Raises:
        CheckpointError: The run that it is of has other phases.
    """
    theirs = checkpoint.state.get('phases') or []
    if theirs != names:
        described = [f'a run with the phases {", ".join(each)}' if each else 'a run without phases'
                     for each in (theirs, names)]
        raise CheckpointError(
            f'{checkpoint.path}: a checkpoint of {described[0]}, and this is {described[1]}; resume with what it was '
            'trained with (-c args.yaml of its run folder)')
    phase: int = checkpoint.state.get('phase', 0)
    return phase


def find_folder(
        settings: TrainSettings,
        side: int,
        checkpoint: Checkpoint | None,
        names: list[str],
        index: int,
) -> Path:
    """The run folder: that of the checkpoint to resume from, or a new one.

    Args:
        settings: They name the output folder, the experiment and the model.
        side: Pixels of a side of its images, for the name of a new folder.
        checkpoint: What it goes on from.
        names: Its phases.
        index: The phase that it goes on with.

    Raises:
        CheckpointError: The checkpoint lies where its run would not have put it.
    """
    run = settings.run
    if checkpoint is None:
        return run_folder_path(run.output, run.experiment, settings.backbone.model, side)
    folder = checkpoint.path.absolute().parent
    whole = folder if index + 1 >= len(names) else folder.parent
    if phase_folder(whole, names, index) != folder:
        raise CheckpointError(
            f"{checkpoint.path}: a checkpoint of phase '{names[index]}' that lies elsewhere than its run put it; put "
            f'it back into the folder {phase_folder(whole, names, index).name} of a run folder')
    return whole


def with_first_weights(phases: Sequence[PreparedPhase], folder: Path) -> list[PreparedPhase]:
    """Phases of a run that goes on, with the first weights that args.yaml of the run names: those that start anew need
    them.

    Args:
        phases: As the command line has them now.
        folder: The run folder; phases stay as they are where its args.yaml cannot be read.
    """
    try:
        before = read_yaml(folder / 'args.yaml')
    except (OSError, UserError):
        return list(phases)
    of_phases = before.get('phases')
    theirs = of_phases if isinstance(of_phases, list) and len(of_phases) == len(phases) else [{}] * len(phases)
    changed = []
    for prepared, its in zip(phases, theirs, strict=True):
        found = {name: {**before, **(its if isinstance(its, dict) else {})}.get(name) for name in _AT_START}
        fits = all(value is None or isinstance(value, bool if name == 'pretrained' else str)
                   for name, value in found.items())
        phase = prepared.phase
        changed.append(replace(prepared, phase=replace(phase, settings=phase.settings.replace(
            **{**found, 'pretrained': bool(found['pretrained'])}))) if fits else prepared)
    return changed


def settings_of_resumed(
        settings: TrainSettings,
        flags: dict[str, Any],
        folder: Path,
        say: Say,
) -> dict[str, Any]:
    """The flags that args.yaml of a run that goes on holds; lines say what differs, and what has no effect.

    Args:
        settings: What the command line says now.
        flags: The same as args.yaml would hold it.
        folder: The run folder, with the args.yaml from before, if there is one.
        say: Tells a line.
    """
    before: Mapping[str, Any] = {}
    path = folder / 'args.yaml'
    if path.is_file():
        try:
            before = read_yaml(path)
        except UserError as error:
            say(f'{error.line}: cannot tell which flags differ')
    for name in _AT_START:
        if flags[name] and flags[name] != before.get(name):
            say(f'--{name.replace("_", "-")} has no effect: the run goes on with the weights of its checkpoint')
    run = settings.run
    if run.experiment or run.output != RunSettings.output:  # its default, with which --resume may name any folder
        named = Path(run.output) / (run.experiment or folder.name)
        if named.absolute() != folder.absolute():
            say(f'--output, --experiment have no effect: the run goes on in {folder}')
    kept = {name: before[name] for name in (*_AT_START, 'output', 'experiment') if name in before}
    flags = {**flags, **kept}
    differs = _differences(before, yaml.safe_load(yaml.safe_dump(flags)))
    if differs:
        say(f'{path}: goes on with other flags: {"; ".join(differs)}')
    return flags


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], phase: str = '') -> list[str]:
    """Each flag that differs, with its value before and now."""
    found = [
        f'{phase}{_option(name)} {_text(value)} ({_text(before[name])} before)' for name, value in now.items()
        if name in before and before[name] != value and name not in ('phases', 'name')]
    phases = [each.get('phases') for each in (before, now)]
    if all(isinstance(each, list) for each in phases):
        for theirs, ours in zip(*phases):  # their names are the same
            missing = dict.fromkeys([*theirs, *ours])
            found += _differences({**missing, **theirs}, {**missing, **ours}, f"phase '{ours.get('name')}': ")
    return found


def _option(name: str) -> str:
    return 'DIR' if name == 'data_dir' else f'--{name.replace("_", "-")}'


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ' '.join(map(str, value))
    return 'unset' if value in (None, {}) else str(value).lower() if isinstance(value, bool) else str(value)
