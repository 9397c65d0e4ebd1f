"""Files written whole or not at all, read only where they are files, and temporary ones that nobody leaves for ever."""
import errno
import fcntl
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
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
    remove_left_over(path.parent.glob(f'.{glob.escape(path.name)}.*.tmp'))
    try:
        descriptor, _ = make_locked(lambda: (os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), temporary))
        with open(descriptor, 'wb') as file:
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


def make_locked(make: Callable[[], tuple[int, str | Path]]) -> tuple[int, str | Path]:
    """Make a temporary file or folder that `remove_left_over` spares until its descriptor is closed.

    Args:
        make: Makes it; its open descriptor and its path.

    Returns:
        What `make` returned.
    """
    while True:
        descriptor, path = make()
        with suppress(OSError):  # a file system without locks, where nothing that is left over is removed either
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.path.exists(path):  # else it was removed before it was locked
            return descriptor, path
        os.close(descriptor)


def remove_left_over(paths: Iterable[Path]) -> None:
    """Remove temporary files and folders of this user that no process has locked: their processes were killed."""
    for path in paths:
        with suppress(OSError):  # it is another user's, or in use, or has just been removed
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


def hold(folder: Path) -> None:
    """Have `remove_left_over` spare another process's folder until this one ends."""
    with suppress(OSError):
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)


@contextmanager
def temporary_folder(prefix: str, parent: Path) -> Iterator[Path]:
    """A new folder that is removed at the end, or, where its process is killed, when the next one is made there.

    Args:
        prefix: What its name begins with; all such folders in `parent` must be of this function.
        parent: Where it is made.
    """
    def make() -> tuple[int, str]:
        path = tempfile.mkdtemp(prefix=prefix, dir=parent)
        return os.open(path, os.O_RDONLY), path

    remove_left_over(parent.glob(f'{prefix}*'))
    descriptor, path = make_locked(make)
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


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
