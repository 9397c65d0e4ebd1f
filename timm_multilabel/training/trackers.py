"""What shows a run to people while it trains: TensorBoard, Weights & Biases, and others that are written like these.

None of them may end a run: what fails is said once and left out from then on.
"""
import importlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pandas as pd

from timm_multilabel.errors import UserError, printable
from timm_multilabel.files import read_json, write_atomic
from timm_multilabel.training.run_folder import running_epochs

if TYPE_CHECKING:  # which may not be installed
    from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """What is told of a run, on the first rank alone; each of its methods does nothing unless overridden."""
    name = ''

    def start(self) -> str | None:
        """Begin, or go on; a line for the user, if there is something to say."""

    def add_progress(self, phase: str | None, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of the epoch so far, as they are named in summary.csv.

        Args:
            phase: The phase, where the run has phases.
            step: Steps of the run, or of the phase.
            metrics: Metrics of this epoch by name, of the first rank.
        """

    def add_epoch(self, summary: pd.DataFrame) -> None:
        """Take the rows of summary.csv, the last of which is new."""

    def close(self) -> None:
        """End, so that what was told is kept."""


class Trackers:
    """Trackers that are told the same, and whose failure does not end the run.

    Args:
        trackers: Those to tell, not started yet.
        say: Prints a line for the user.
    """

    def __init__(self, trackers: Sequence[Tracker], say: Callable[[str], None]):
        self.trackers, self.say = list(trackers), say
        for line in self._tell('start'):
            if line:
                say(line)

    def add_progress(self, phase: str | None, step: int, metrics: dict[str, float]) -> None:
        """Tell each the metrics of the epoch so far."""
        self._tell('add_progress', phase, step, metrics)

    def add_epoch(self, summary: pd.DataFrame) -> None:
        """Tell each the rows of summary.csv."""
        self._tell('add_epoch', summary)

    def close(self) -> None:
        """Let each end."""
        self._tell('close')

    def _tell(self, method: str, *args: Any) -> list[Any]:
        """Call a method of each; one that fails is called no more."""
        results = []
        for tracker in list(self.trackers):
            try:
                results.append(getattr(tracker, method)(*args))
            except Exception as error:  # whatever such a library, a network or a disk comes up with
                self.trackers.remove(tracker)
                line = error.line if isinstance(error, UserError) else f'{type(error).__name__}: {error}'
                self.say(f'{tracker.name}: left out from here on, and the run goes on ({printable(line).strip()})')
        return results


class TensorBoardTracker(Tracker):
    """TensorBoard files in `<run folder>/tensorboard`: an epoch is a step, counted from 1 over all phases.

    The metrics of the progress line are a run of their own, `progress` or `progress-<phase>`, over steps.

    Args:
        run: The run folder.
        settings: The settings of the run, shown as hyperparameters.

    Raises:
        UserError: TensorBoard is not installed.
    """
    name = 'TensorBoard'

    def __init__(self, run: Path, settings: dict[str, Any]):
        need('tensorboard', '--log-tensorboard')
        self.folder, self.settings = run / 'tensorboard', settings
        self.writers: dict[str, SummaryWriter] = {}

    def start(self) -> str:
        return f'{self.name}: tensorboard --logdir {self.folder}'

    def add_progress(self, phase: str | None, step: int, metrics: dict[str, float]) -> None:
        self._add('progress' if phase is None else f'progress-{phase}', step, metrics)

    def add_epoch(self, summary: pd.DataFrame) -> None:
        row = numbers(summary)
        if '' not in self.writers:
            self._add_settings(row, running_epochs(summary)[-1])
        self._add('', running_epochs(summary)[-1], row)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def _writer(self, part: str, step: int) -> 'SummaryWriter':
        """The writer of a part; at its first step it takes back what an earlier try wrote of this step and later."""
        from torch.utils.tensorboard import SummaryWriter

        if part not in self.writers:
            self.writers[part] = SummaryWriter(str(self.folder / part), purge_step=step)
        return self.writers[part]

    def _add(self, part: str, step: int, metrics: dict[str, float]) -> None:
        writer = self._writer(part, step)
        for name, value in known(metrics).items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def _add_settings(self, row: dict[str, float], step: int) -> None:
        """The flags as hyperparameters of this very run; `add_hparams` would make it another one."""
        from torch.utils.tensorboard.summary import hparams

        plain = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                 for name, value in self.settings.items() if value is not None}
        shown = [f'{prefix}{mean}' for prefix in ('eval_', 'eval_ema_') for mean in ('loss', 'score', 'top1')]
        metrics = {name: row[name] for name in ('train_loss', *shown) if name in row}
        file = self._writer('', step).file_writer
        assert file is not None  # until it is closed
        for part in hparams(plain, metrics):
            file.add_summary(part)


class WandbTracker(Tracker):
    """A run of Weights & Biases, of the run folder's name, over epochs counted from 1 over all phases.

    Its id, and what it has been told, are in `<run folder>/wandb.json`: a run that goes on does not tell it twice.
    Project, entity and mode come from its own environment variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE).

    Args:
        run: The run folder.
        settings: The settings of the run, shown as its configuration.
        goes_on: Whether this run goes on from a checkpoint.

    Raises:
        UserError: W&B is not installed.
    """
    name = 'Weights & Biases'

    def __init__(self, run: Path, settings: dict[str, Any], goes_on: bool):
        self.wandb = need('wandb', '--log-wandb')
        self.folder, self.settings, self.goes_on = run, settings, goes_on
        self.path = run / 'wandb.json'
        self.known: dict[str, Any] = {'id': uuid4().hex[:8], 'epochs': 0, 'steps': {}}
        self.run: Any = None  # which `start` begins
        self.defined: set[str] = set()

    def start(self) -> str:
        wandb = self.wandb
        if self.goes_on and self.path.is_file():
            self.known |= read_json(
                self.path, 'the state of its tracker', 'remove it, and the next run begins anew there', _is_known)
        self.run = wandb.init(
            id=self.known['id'],
            resume='allow',
            project=os.environ.get('WANDB_PROJECT', 'timm-multilabel'),
            name=self.folder.name,
            dir=str(self.folder),
            config=self.settings,
            allow_val_change=True,
            # It is told metrics and flags, and shall not send the source code, or what is printed, on its own.
            settings=wandb.Settings(silent=True, console='off', disable_code=True, disable_git=True, save_code=False),
        )
        self._keep()
        if self.run.offline:
            return f'{self.name}: off line, wandb sync {Path(self.run.dir).parent}'
        return f'{self.name}: {self.run.url}'

    def add_progress(self, phase: str | None, step: int, metrics: dict[str, float]) -> None:
        part = 'progress' if phase is None else f'progress-{phase}'
        if step > self.known['steps'].get(part, 0):  # what it has been told cannot be taken back
            self._log(f'{part}/step', step, {f'{part}/{name}': value for name, value in known(metrics).items()})
            self.known['steps'][part] = step

    def add_epoch(self, summary: pd.DataFrame) -> None:
        epochs = running_epochs(summary)[-1]
        if epochs > self.known['epochs']:
            self._log('epochs', epochs, numbers(summary))
            self.known['epochs'] = epochs
        self._keep()

    def close(self) -> None:
        self._keep()
        self.run.finish()

    def _log(self, axis: str, step: int, metrics: dict[str, float]) -> None:
        """Log metrics over an axis of their own."""
        for name in metrics.keys() - self.defined:
            if '*' not in name:  # which is a pattern there
                self.run.define_metric(name, step_metric=axis, step_sync=False)
        self.defined |= metrics.keys()
        self.run.log({axis: step, **metrics})

    def _keep(self) -> None:
        write_atomic(self.path, json.dumps(self.known))


def _is_known(value: Any) -> bool:
    """Whether it is what `WandbTracker` keeps; folders are named by the id."""
    return bool(re.fullmatch(r'[\w-]{1,64}', value['id'])) and all(
        type(steps) is int and steps >= 0 for steps in (value['epochs'], *value['steps'].values()))


def need(package: str, flag: str) -> ModuleType:
    """Import an optional dependency, whose extra has its name.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{flag}: {package} is not installed (pip install '.[{package}]')") from error


def numbers(summary: pd.DataFrame) -> dict[str, float]:
    """The last row's metrics under their names; without the phase's name, and without empty cells."""
    row = pd.to_numeric(summary.drop(columns='phase', errors='ignore').iloc[-1], errors='coerce')
    return known(row.astype(float).to_dict())


def known(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}
