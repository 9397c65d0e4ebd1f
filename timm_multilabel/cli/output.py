"""What is printed, also where nobody reads it any more: a run is more than its log."""
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO


class PatientStream:
    """A stream that goes on into nothing when its reader has gone (`train ... | tee`, and tee is killed).

    Args:
        stream: Standard output or standard error.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, or not."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        # By the descriptor, since Python flushes the stream itself once more when it ends.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.stream.fileno())
        os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def patient_streams() -> Iterator[None]:
    """Print through `PatientStream`s."""
    with redirect_stdout(PatientStream(sys.stdout)), redirect_stderr(PatientStream(sys.stderr)):
        yield
