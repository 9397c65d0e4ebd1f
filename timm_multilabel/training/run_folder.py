"""The folder of a run: settings, label space, one row of figures an epoch."""
import io
import itertools
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from timm.models import safe_model_name

from timm_multilabel.errors import UserError
from timm_multilabel.files import write_whole
from timm_multilabel.labels import LabelSpace

_LAUNCH = '.launch'
"""The file that names the launch of torchrun, so that its restarts find the folder."""


def run_folder_path(output: str, experiment: str | None, model: str, size: int) -> Path:
    """Where a new run goes: `<output>/<experiment>`, by default `<output>/<stamp>-<model>-<size>`.

    Raises:
        UserError: The folder holds a run already.
    """
    if not experiment:
        # timm counts on where two runs of one second meet.
        name = f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(model)}-{size}'
        tries = (Path(output) / (f'{name}-{number}' if number else name) for number in itertools.count())
        return next(path for path in tries if not path.exists())
    path = Path(output) / experiment
    last = next(iter([*path.glob('last.pth.tar'), *sorted(path.glob('*/last.pth.tar'), reverse=True)]), None)
    if last is not None:
        raise UserError(
            f'{path}: holds a run already; go on with it (--resume {last}), choose another --experiment, or remove it')
    if path.exists() and not path.is_dir():
        raise UserError(f'{path}: is a file; choose another --experiment')
    return path


def find_launched(output: Path) -> Path | None:
    """The run folder that an earlier try of this launch of torchrun has made, if it came that far."""
    found = [path for path in output.glob(f'*/{_LAUNCH}') if path.read_text(encoding='utf-8') == _launch()]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def _launch() -> str:
    """What the processes of one launch of torchrun have in common, restarts included; '' without torchrun."""
    name = os.environ.get('TORCHELASTIC_RUN_ID', '')
    return f"{name} {os.environ.get('MASTER_PORT')}" if name == 'none' else name  # its default, of many launches


def phase_folder(run: Path, phases: Sequence[str], phase: int) -> Path:
    """Where a phase's checkpoints go: the last one's into the run folder itself, others' into folders of their own."""
    return run if phase + 1 >= len(phases) else run / f'{phase + 1}-{phases[phase]}'


class RunFolder:
    """A run's folder, written by the first rank only.

    Args:
        path: The folder; made where there is none.
        args: The settings of the run.
        label_space: Its heads.
        phases: The names of its phases, where it has some.
    """

    def __init__(self, path: Path, args: dict[str, Any], label_space: LabelSpace, phases: Sequence[str] = ()):
        self.path = path
        self.phases = list(phases)
        path.mkdir(parents=True, exist_ok=True)
        for left_over in path.glob('.*.tmp'):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        if launch := _launch():
            write_whole(path / _LAUNCH, launch)
        write_whole(path / 'args.yaml', yaml.safe_dump(args, sort_keys=False, allow_unicode=True))
        label_space.save(path / 'label_space.json')

    def add_summary(self, row: dict[str, Any]) -> None:
        """Add an epoch's figures to summary.csv, in place of what an earlier try left of this epoch and later ones.

        With phases, `row` names its own as 'phase'.
        """
        path = self.path / 'summary.csv'
        rows = _read_texts(io.StringIO(pd.DataFrame([row]).to_csv(index=False)))
        if path.is_file():
            earlier = _read_texts(path)
            before = earlier['epoch'].astype(int) < row['epoch']
            if self.phases:
                order = earlier['phase'].map(self.phases.index)
                phase = self.phases.index(row['phase'])
                before = (order < phase) | ((order == phase) & before)
            rows = pd.concat([earlier[before], rows])
        write_whole(path, rows.to_csv(index=False))


def _read_texts(file: Path | io.StringIO) -> pd.DataFrame:
    """A CSV as text, so that what is written again is what was there."""
    return pd.read_csv(file, dtype=str, keep_default_na=False)
