"""What is printed: nothing in it does anything to a terminal, and a run is more than its log.

All of what a command prints goes through these streams, whoever prints it: this program, warnings, logging, progress
bars, tracebacks.
"""
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import TracebackType
from typing import Any, TextIO

from timm_multilabel.errors import one_line, printable


class PrintedStream:
    """A stream whose text is printable: escape sequences, control characters and marks of direction become blanks.

    Line ends and tabs stay, as does a carriage return at an end of what is written, by which progress bars go back.
    Letters that the encoding of the stream lacks become `\\u....`.

    Args:
        stream: Standard output or standard error.
        patient: Go on into nothing when the reader has gone (`train ... | tee`, and tee is killed); else the process
            ends with exit status 1.
    """

    def __init__(self, stream: TextIO, patient: bool = False):
        self.stream, self.patient = stream, patient

    def write(self, text: str) -> int:
        """Write, or not where nobody reads."""
        length = len(text)
        if not text.isprintable():
            inner = text.strip('\r')
            before = length - len(text.lstrip('\r'))
            text = text[:before] + printable(inner, keep='\n\t') + text[before + len(inner):]
        try:
            self._write(text)
        except BrokenPipeError:
            self._give_up()
        return length

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self.stream.write(text.encode(encoding, 'backslashreplace').decode(encoding))

    def flush(self) -> None:
        """Flush, or not where nobody reads."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        # By the descriptor, since Python flushes the stream itself once more when it ends.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.stream.fileno())
        os.close(nothing)
        if not self.patient:
            sys.exit(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printed_streams(patient: bool = False) -> Iterator[None]:
    """Print through `PrintedStream`s."""
    with redirect_stdout(PrintedStream(sys.stdout, patient)), redirect_stderr(PrintedStream(sys.stderr, patient)):
        yield


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook` whose text is printable, for errors that leave `printed_streams`."""
    with printed_streams(patient=True):
        traceback.print_exception(kind, error, trace)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line, which stays one whatever the names in it hold."""
    print(one_line(line), file=file, flush=True)


class LogLines(logging.Handler):
    """Prints what is logged, a line a record, as it is.

    Args:
        file: Where to; standard output when None, which may change.
    """

    def __init__(self, file: TextIO | None = None):
        super().__init__()
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), self.file)


def end_with_bad_images(bad: int, images: int) -> None:
    """Where images could not be read, say how many on standard error, and end with exit status 1.

    Not under torchrun, which would take that for a failure and start all processes again.
    """
    if bad:
        say(f'{bad} of {images} images could not be read', sys.stderr)
        if 'TORCHELASTIC_RUN_ID' not in os.environ:
            sys.exit(1)
