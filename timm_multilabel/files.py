"""Files written whole or not at all, and read only where they are files."""
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from timm_multilabel.errors import UserError


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file that is written beside its final place, and renamed when all of it is on disk.

    A reader, a crash or a loss of power never meets half of it. The folder must exist.

    Raises:
        UserError: The disk is full, or the folder cannot be written to; what was there before is left as it is.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save puts its own error over it
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f'{path}: cannot be written ({cause.strerror}), and what was there before is left as it is; make room or '
            'mend that') from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file as `whole_file` does; text as UTF-8, line ends as they are."""
    with whole_file(path) as file:
        file.write(content.encode('utf-8') if isinstance(content, str) else content)


def link_whole(source: str | Path, path: str | Path) -> None:
    """Give a file another name, in place of the file that may have it; where there are no links, a copy."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        os.link(source, temporary)
    except OSError:
        write_whole(path, Path(source).read_bytes())
        return
    os.replace(temporary, path)  # does nothing where both are one file already
    temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    if hasattr(os, 'O_DIRECTORY'):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read, and never what only looks like one: a pipe or a device, which may block for ever.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    def check(state: os.stat_result) -> None:
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, 'it is a folder, a pipe, a socket or a device, not a file', str(path))

    check(os.stat(path))  # before it is opened, since that alone may do something to a device
    # Without blocking, and looked at again, since another file may have come in its place.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    try:
        check(os.fstat(descriptor))
        return os.fdopen(descriptor, 'rb')
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: str | Path, limit: int) -> str:
    """The text of a file in UTF-8.

    Raises:
        OSError: It cannot be opened, or is no regular file.
        ValueError: It is of more than `limit` bytes, or not of UTF-8.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f'more than {limit:,} bytes')
    return data.decode('utf-8')
