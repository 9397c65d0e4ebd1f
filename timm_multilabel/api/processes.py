"""Training in several processes, started by torch's elastic launcher from wherever Python runs, a notebook too."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from timm_multilabel.api.training_run import TrainingRun
from timm_multilabel.errors import UserError
from timm_multilabel.log import say
from timm_multilabel.temporary import temporary_folder
from timm_multilabel.training.parent import LAUNCHER
from timm_multilabel.training.signals import SAVED

_PATHS = ('folder', 'best_checkpoint', 'last_checkpoint')


def train_in_processes(given: Mapping[str, Any], devices: int) -> TrainingRun:
    """Train in so many processes of this machine.

    Args:
        given: Checked settings by name.
        devices: Processes, one a GPU.

    Raises:
        UserError: Data or settings do not allow it.
        RuntimeError: A process failed.
        KeyboardInterrupt: Also where it came from outside; the run is saved, and goes on with `resume`.
    """
    with temporary_folder('timm-multilabel-train-', Path(tempfile.gettempdir())) as folder:
        (folder / 'settings.json').write_text(json.dumps(given, default=sorted), encoding='utf-8')
        # A process of its own, since the launcher takes signals, and a session of its own, since a Ctrl-C in a terminal
        # would reach it twice.
        launcher = subprocess.Popen(
            [sys.executable, '-m', 'timm_multilabel.cli.launch', '--nproc_per_node', str(devices), '-m',
             'timm_multilabel.cli.worker', str(folder)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env={**os.environ, LAUNCHER: str(os.getpid())})  # the launcher, too, ends when this process is gone
        errors: list[str] = []
        readers = [threading.Thread(target=_tell, args=(launcher.stdout, None), daemon=True),
                   threading.Thread(target=_tell, args=(launcher.stderr, errors), daemon=True)]
        for reader in readers:
            reader.start()
        interrupted = False
        while launcher.poll() is None:
            try:
                launcher.wait()
            except KeyboardInterrupt:
                interrupted = True
                launcher.send_signal(signal.SIGINT)
        for reader in readers:
            reader.join()
        if interrupted or launcher.returncode == SAVED:
            raise KeyboardInterrupt
        line = next((each for each in reversed(errors) if each.strip()), '').strip()
        if launcher.returncode == 2:
            raise UserError(line.rpartition('error: ')[2])
        if launcher.returncode:
            raise RuntimeError(f'a training process ended with status {launcher.returncode}: {line}')
        return read_result(folder)


def _tell(stream: IO[bytes], lines: list[str] | None) -> None:
    """Tell what a process prints, or keep it too."""
    for line in stream:
        text = line.decode(errors='replace').rstrip()
        if lines is not None:
            lines.append(text)
        if text:
            say(text)


def write_result(run: TrainingRun, folder: Path) -> None:
    """Write what a training process returns."""
    values = {name: str(value) if name in _PATHS else value for name, value in asdict(run).items()}
    (folder / 'result.json').write_text(json.dumps(values), encoding='utf-8')


def read_result(folder: Path) -> TrainingRun:
    """What the first training process has returned."""
    values = json.loads((folder / 'result.json').read_text(encoding='utf-8'))
    values.update({name: Path(values[name]) for name in _PATHS})
    return TrainingRun(**values)

