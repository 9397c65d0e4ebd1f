"""SIGTERM and SIGINT: end the step, save, stop."""
import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

SAVED = 75
"""The exit status of a run that was told to stop, and goes on with --resume: sysexits' EX_TEMPFAIL, try again."""

SAVED_FILE = 'TIMM_MULTILABEL_SAVED_FILE'
"""The environment variable by which a launcher names a file: a process that saved and stopped makes it and ends with
status 0, since torchrun would take another one for a failure and start the run again."""

LAUNCHER_ENDS = 'TIMM_MULTILABEL_LAUNCHER_ENDS'
"""The environment variable by which a launcher that was told to stop tells so to processes that start only then."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run was told to stop, and has saved what it takes to go on."""


def exit_when_stopped() -> NoReturn:
    """End this process, which has saved, so that whoever started it knows."""
    if SAVED_FILE in os.environ:
        Path(os.environ[SAVED_FILE]).touch()
        sys.exit(0)
    sys.exit(SAVED)


def say_received(number: int) -> None:
    """Say what a first signal does; by the system call, since print may be what the signal has interrupted."""
    os.write(sys.__stderr__.fileno(), f'\n{signal.Signals(number).name}: ends the step and saves; once more to stop at '
             'once\n'.encode())


class StopSignals:
    """Within it the first signal is noted, and a second one stops at once.

    Args:
        visible: Say so, unless the launcher does.
    """

    def __init__(self, visible: bool):
        self.visible, self.received = visible and SAVED_FILE not in os.environ, None
        self.before = {}

    def __enter__(self) -> 'StopSignals':
        try:
            self.before = {each: signal.signal(each, self._receive) for each in _SIGNALS}
        except ValueError:  # not in the main thread, which alone may ask
            pass
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)
        if error is not None and self.received is not None and not isinstance(error, Stopped):
            # Another process has failed, and the launcher ends this one: its own error is of no interest.
            self._stop(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._stop(number)
        self.received = number
        if self.visible:
            say_received(number)

    @staticmethod
    def _stop(number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
