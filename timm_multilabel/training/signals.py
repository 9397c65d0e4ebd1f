"""SIGTERM and SIGINT: end the step, save, stop."""
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

SAVED = 75
"""The exit status of a run that was told to stop, and goes on with --resume: sysexits' EX_TEMPFAIL, try again."""

SAVED_FILE = 'TIMM_MULTILABEL_SAVED_FILE'
"""The environment variable by which a launcher names a file: a process that saved and stopped makes it and ends with
status 0, since torchrun would take another one for a failure and start the run again."""

LAUNCHER_ENDS = 'TIMM_MULTILABEL_LAUNCHER_ENDS'
"""The environment variable by which a launcher that was told to stop tells so to processes that start only then."""

SAME = 2.0
"""Seconds in which signals that come again are the same one, by another way."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):  # as KeyboardInterrupt, which nobody takes for an error of his own
    """A run was told to stop, and has saved what it takes to go on, if it had begun.

    Args:
        what: What happened, in words for the user.
        resume: The checkpoint to go on from, if there is one and this is the process that says so.
    """

    def __init__(self, what: str, resume: Path | None = None):
        super().__init__(what)
        self.resume = resume

    def __str__(self) -> str:
        what = super().__str__()
        if self.resume is None:
            return what
        return f'{what}; to continue, repeat the command with --resume {shlex.quote(str(self.resume))}'


def exit_when_stopped() -> NoReturn:
    """End this process, which has saved, so that whoever started it knows."""
    with suppress(KeyError, OSError):  # no launcher, or none any more
        Path(os.environ[SAVED_FILE]).touch()
        sys.exit(0)
    sys.exit(SAVED)


def say_received(number: int, why: str = '') -> None:
    """Say what a first signal does; by the system call, since print may be what the signal has interrupted."""
    with suppress(OSError, ValueError):  # nobody reads it, perhaps
        line = f'\n{signal.Signals(number).name}{why}: ends the step and saves; once more to stop at once\n'
        if sys.__stderr__ is not None:
            os.write(sys.__stderr__.fileno(), line.encode())


class StopSignals:
    """Within it a first signal ends what is being prepared; within `noted` it is noted, and a second stops at once.

    Under the launcher, which passes signals on, one that came to all processes comes twice; there a second one counts
    after `SAME` seconds only.

    Args:
        visible: Say so, unless the launcher does.

    `orphaned`: the launcher is gone.
    """
    current: 'StopSignals | None' = None
    """Those of this process, if any."""

    def __init__(self, visible: bool):
        self.launched = SAVED_FILE in os.environ
        self.visible, self.since, self.noting = visible, 0.0, False
        self.received: int | None = None
        self.orphaned = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> 'StopSignals':
        try:
            self.before = {each: signal.signal(each, self._receive) for each in _SIGNALS}
        except ValueError:  # not in the main thread, which alone may ask
            pass
        StopSignals.current = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        StopSignals.current = None
        for each, handler in self.before.items():
            signal.signal(each, handler)
        if self.received is not None and (self.launched or self.orphaned) and isinstance(error, RuntimeError):
            # Another process has failed, and the launcher ends this one: that a collective fails is of no interest.
            self._stop(self.received)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note a signal, for a loop that looks at `received`."""
        self.noting = True
        try:
            yield
        finally:
            self.noting = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if not self.launched or now - self.since > SAME:
                self._stop(number)
            return
        self.received, self.since = number, now
        if not self.noting:
            raise Stopped('stopped before it began')
        if self.visible and (self.orphaned or not self.launched):
            say_received(number, ', since its launcher is gone' if self.orphaned else '')

    @staticmethod
    def _stop(number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
