"""The folder of a run: settings, label space, one row of metrics an epoch."""
import fcntl
import itertools
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import yaml
from timm.models import safe_model_name

from timm_multilabel.cells import csv_rows
from timm_multilabel.errors import CheckpointError, OutputError
from timm_multilabel.files import read_json, read_text, reading, without_nan, write_atomic
from timm_multilabel.labels import LabelSpace
from timm_multilabel.log import Say, silent
from timm_multilabel.metric_names import current_names
from timm_multilabel.places import local_path
from timm_multilabel.temporary import RANDOM_NAME, remove_leftovers
from timm_multilabel.training.remote_run import Workplace

_LAUNCH = '.launch'
"""The file that names the launch of torchrun, so that its restarts find the folder."""

_TAGS = 'summary.json'
"""The metrics of each tag, a list with an element an epoch."""

_MOST_BYTES = 2 ** 29
"""Bytes of a summary.csv."""

_PATIENCE = 45
"""Seconds in which the other processes of a run that was killed end, and with them its lock."""


def run_folder_path(output: str, experiment: str | None, model: str, size: int, can_resume: bool = True) -> Path:
    """Where a new run goes: `<output>/<experiment>`, by default `<output>/<stamp>-<model>-<size>`.

    Raises:
        CheckpointError: The folder holds a run already.
    """
    if not experiment:
        # timm counts on where two runs of one second meet.
        name = f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(model)}-{size}'
        tries = (local_path(output) / (f'{name}-{number}' if number else name) for number in itertools.count())
        return next(path for path in tries if not path.exists())
    path = local_path(output) / experiment
    if [*path.glob('*.pth.tar'), *path.glob('[0-9]*-*/*.pth.tar')]:
        raise CheckpointError(
            f'{path}: holds a run already; {"go on with it (--resume auto), " if can_resume else ""}choose another '
            '--experiment, or remove it')
    if path.exists() and not path.is_dir():
        raise CheckpointError(f'{path}: is a file; choose another --experiment')
    return path


def launcher() -> str:
    """The torchrun that has started this process, and starts it again; '' without one."""
    return f'{socket.gethostname()} {os.getppid()}' if 'TORCHELASTIC_RUN_ID' in os.environ else ''


def find_launched(folders: Iterable[Path], launchers: Sequence[str]) -> Path | None:
    """The run folder, of several, that an earlier try of this launch of torchrun has made, if any.

    Numbers of processes come again, so it must have been written to since torchrun, the parent of this one, started.

    Args:
        folders: The run folders to look into.
        launchers: Those of all ranks; one of them is enough, since a machine may have taken another's place.
    """
    started = psutil.Process(os.getppid()).create_time() - 1  # files have coarser times
    found: dict[Path, float] = {}
    for folder in folders:
        path = folder / _LAUNCH
        with suppress(OSError):  # one that cannot be read is none of this launch
            if path.is_file() and path.stat().st_mtime >= started:
                if set(path.read_bytes().split(b'\n')) & {each.encode() for each in launchers if each}:
                    found[folder] = path.stat().st_mtime
    return max(found, key=found.__getitem__, default=None)


def read_summary(path: Path) -> pd.DataFrame:
    """summary.csv: a row an epoch, numbers as numbers, NaN where there is none, names of phases as they are.

    Raises:
        CheckpointError: There is no such file, or it is not what `RunFolder.add_summary` writes.
    """
    with reading(path, 'the summary of a run', 'correct it, or remove it'):
        return _as_numbers(_texts(read_text(path, _MOST_BYTES).removeprefix('\ufeff')))


def _as_numbers(texts: pd.DataFrame) -> pd.DataFrame:
    """The numbers of a summary's texts; raises ValueError where something else stands there."""
    if 'epoch' not in texts:
        raise ValueError("there is no column 'epoch'")
    made = {}
    for name, cells in texts.items():
        if name == 'phase':
            made[name] = cells
            continue
        made[name] = pd.to_numeric(cells.where(cells != ''), errors='coerce')
        if made[name].dtype.kind == 'f':  # it may get the last digit wrong
            made[name] = cells.where(made[name].notna(), 'nan').astype(float)
        wrong = made[name].isna() & ~cells.str.lower().isin(['', 'nan'])
        if name == 'epoch':
            wrong |= ~cells.str.fullmatch('[0-9]{1,9}')
            made[name] = made[name].where(~wrong, 0).astype(int)
        if wrong.any():
            row = int(wrong.to_numpy().argmax())
            raise ValueError(f"row {row + 2}: '{cells.iloc[row][:50]}' in column '{name}' is no number of an epoch")
    summary = pd.DataFrame(made)
    phases = texts['phase'] if 'phase' in texts else pd.Series('', texts.index)
    begins = phases != phases.shift()
    if phases[begins].duplicated().any() or ((summary['epoch'].diff() <= 0) & ~begins).any():
        raise ValueError('its epochs are not in order')
    return summary


def running_epochs(summary: pd.DataFrame) -> list[int]:
    """The number of each row's epoch, from 1, over all phases: in summary.csv each phase counts its own, from 0."""
    numbers: list[int] = []
    before, last = 0, None
    phases = summary['phase'] if 'phase' in summary else [None] * len(summary)
    for phase, epoch in zip(phases, summary['epoch'], strict=True):
        if phase != last:
            before, last = numbers[-1] if numbers else 0, phase
        numbers.append(before + int(epoch) + 1)
    return numbers


def phase_folder(run: Path, phases: Sequence[str], phase: int) -> Path:
    """Where a phase's checkpoints go: the last one's into the run folder itself, others' into folders of their own."""
    return run if phase + 1 >= len(phases) else run / f'{phase + 1}-{phases[phase]}'


def best_of_phases(run: Path, phases: Sequence[str], before: int) -> dict[str, Path]:
    """The best checkpoint of each phase before the one of a number, by the phase's name."""
    return {phases[index]: phase_folder(run, phases, index) / 'model_best.pth.tar' for index in range(before)}


class RunFolder:
    """A run's folder, written by the first rank only, which has its `RunLock`.

    Args:
        path: The folder; made where there is none.
        args: The settings of the run, written to args.yaml.
        label_space: The heads, written to label_space.json.
        phases: The names of its phases, where it has some.
        launchers: What `launcher` gives on each rank.
        workplace: Where its files are sent, if they are.
        say: Tells a line.
    """

    def __init__(
            self,
            path: Path,
            args: dict[str, Any],
            label_space: LabelSpace,
            phases: Sequence[str] = (),
            launchers: Sequence[str] = (),
            workplace: Workplace | None = None,
            say: Say = silent,
    ):
        self.path, self.workplace, self.say = path, workplace, say
        self.phases = list(phases)
        path.mkdir(parents=True, exist_ok=True)
        folders = [path, *(each for each in path.iterdir() if each.is_dir() and not each.is_symlink())]
        remove_leftovers(left for folder in folders for left in folder.glob(f'.*-{RANDOM_NAME}') if not left.is_dir())
        self._earlier(), self._earlier_tags()  # what is wrong with them shows now, and not when an epoch is done
        if any(launchers):
            write_atomic(path / _LAUNCH, '\n'.join(launchers))
        write_atomic(path / 'args.yaml', yaml.safe_dump(args, sort_keys=False, allow_unicode=True))
        label_space.save(path / 'label_space.json')
        if workplace is not None and (line := workplace.send()):  # what cannot be sent shows before training
            raise OutputError(line)

    def saved(self) -> None:
        """Send what was saved to where the run folder is, if that is elsewhere; what fails is sent the next time."""
        if self.workplace is not None and (line := self.workplace.send()):
            self.say(f'{line}; tried again at the next save')

    def _earlier(self) -> pd.DataFrame | None:
        """summary.csv as text, if there is one.

        Raises:
            CheckpointError: It is none, or that of other phases.
        """
        path = self.path / 'summary.csv'
        if not path.is_file():
            return None
        with reading(path, 'the summary of this run', 'correct it, or remove it to begin a new one'):
            texts = _texts(path.read_text(encoding='utf-8-sig'))
            _as_numbers(texts)
            wrong = [name for name in texts.get('phase', [None] * len(texts)) if name not in self._names()]
            if wrong:
                raise ValueError(f"its phase '{wrong[0]}' is none of {', '.join(self.phases)}" if self.phases and
                                 wrong[0] is not None else 'the run has phases, or the summary has, and not both')
        return texts

    def add_summary(self, row: dict[str, Any], tags: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Add an epoch's metrics to summary.csv, in place of what an earlier try left of this epoch and later ones.

        Args:
            row: The metrics by column; with phases, `row` names its own as 'phase'.
            tags: Those of each tag, {'eval': {head: {tag: {metric: value}}}}, which go to summary.json.

        Returns:
            The whole of summary.csv.

        Raises:
            CheckpointError: A file cannot be read or written.
        """
        if tags or (self.path / _TAGS).is_file():
            self._add_tags(row, tags or {})
        path = self.path / 'summary.csv'
        rows = _texts(pd.DataFrame([row]).to_csv(index=False))
        earlier = self._earlier()
        if earlier is not None:
            phases = earlier['phase'] if self.phases else [None] * len(earlier)
            order = map(self._order, phases, earlier['epoch'].astype(int))
            rows = pd.concat([earlier[[each < self._order(row.get('phase'), row['epoch']) for each in order]], rows])
        write_atomic(path, rows.to_csv(index=False))
        return read_summary(path)

    def _add_tags(self, row: dict[str, Any], tags: Mapping[str, Any]) -> None:
        """Add an epoch's metrics of each tag to summary.json, as `add_summary` does."""
        found = [{name: row[name] for name in ('phase', 'epoch') if name in row} | without_nan(tags)] if tags else []
        place = self._order(row.get('phase'), row['epoch'])
        rows = [each for each in self._earlier_tags() if self._order(each.get('phase'), each['epoch']) < place]
        write_atomic(self.path / _TAGS, json.dumps([*rows, *found], indent=1) + '\n')

    def _earlier_tags(self) -> list[dict[str, Any]]:
        """The epochs of summary.json; none where there is no such file.

        Raises:
            CheckpointError: It is damaged, or that of other phases.
        """
        path = self.path / _TAGS
        found: list[dict[str, Any]] = read_json(
            path, 'the metrics of the tags of this run', 'correct it, or remove it to begin a new one',
            lambda rows: all(type(row['epoch']) is int and self._order(row.get('phase'), 0) for row in rows),
        ) if path.is_file() else []
        return found

    def _order(self, phase: str | None, epoch: int) -> tuple[int, int]:
        """What epochs are in the order of; raises ValueError where there is no such phase."""
        return self._names().index(phase), epoch

    def _names(self) -> Sequence[str | None]:
        """What epochs name as their phase."""
        return self.phases or [None]


class RunLock:
    """Keeps other runs out of a run folder, where the file system has locks, until it is closed or its process ends."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.descriptor: int | None = None

    def take(self, path: Path, busy: str = 'another process trains in this folder; stop it first, or choose another '
                                           '--experiment') -> None:
        """Take the folder, which is made where there is none; once is enough.

        Args:
            path: The folder.
            busy: What the error says.

        Raises:
            CheckpointError: Another process has it.
        """
        path.mkdir(parents=True, exist_ok=True)
        if self.path == path.resolve():
            return
        self.close()
        self.path, self.descriptor = path.resolve(), os.open(path, os.O_RDONLY)
        for _ in range(_PATIENCE):
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(1)
            except OSError:  # a file system without locks
                return
        raise CheckpointError(f'{path}: {busy}')

    def close(self) -> None:
        """Let other runs in."""
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.path, self.descriptor = None, None


def _texts(content: str) -> pd.DataFrame:
    """A CSV as text, so that what is written again is what was there; raises ValueError or csv.Error.

    Columns have their names of this version.
    """
    header, *rows = [row for row in csv_rows(content, strict=True) if row] or [[]]
    header = current_names(header)
    if not header or len(set(header)) != len(header):
        raise ValueError('two columns have one name' if header else 'it is empty')
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f'row {number}: {len(row)} cells for {len(header)} columns')
    return pd.DataFrame(rows, columns=header, dtype=object)
