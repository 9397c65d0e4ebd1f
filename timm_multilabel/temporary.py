"""Temporary files and folders under names that nobody can foresee, and that a killed process does not leave forever."""
import fcntl
import glob
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RANDOM_NAME = f'{"[0-9a-f]" * 16}.tmp'
"""How the name of a temporary file ends, for `glob`."""

_DAY = 86_400  # seconds


def temporary_file(folder: Path, name: str) -> tuple[int, Path]:
    """A new file '.NAME-....tmp' that no one else has, with the permissions that the umask allows.

    It is locked until its descriptor is closed, by which `remove_leftovers` knows that it is in use. What killed
    processes left of the same name is removed.

    Returns:
        Its open descriptor, and its path.
    """
    remove_leftovers(folder.glob(glob.escape(_start(name)) + RANDOM_NAME))
    while True:
        path = temporary_path(folder, name)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        lock(descriptor)
        if os.fstat(descriptor).st_nlink:  # else it was removed before it was locked
            return descriptor, path
        os.close(descriptor)


def temporary_path(folder: Path, name: str) -> Path:
    """A name that nobody can foresee and that is short enough, whatever the name that it begins with."""
    return folder / f'{_start(name)}{secrets.token_hex(8)}.tmp'


def _start(name: str) -> str:
    return f'.{os.fsencode(name)[:200].decode("utf-8", "ignore")}-'


@contextmanager
def temporary_folder(prefix: str, parent: Path) -> Iterator[Path]:
    """A new folder that is removed at the end, or, where its process is killed, when the next one is made there.

    Args:
        prefix: What its name begins with; all such folders in `parent` must be of this function.
        parent: Where it is made.
    """
    remove_leftovers(parent.glob(f'{prefix}*'))
    descriptor = None
    while descriptor is None:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        descriptor = hold(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def hold(folder: Path) -> int | None:
    """Have `remove_leftovers` spare a folder, perhaps of another process, until this one ends.

    Returns:
        The descriptor that does so while it is open; None where the folder is gone.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    lock(descriptor, fcntl.LOCK_SH)
    if folder.exists():  # else it was removed before it was locked
        return descriptor
    os.close(descriptor)
    return None


def lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> None:
    """Lock an open file or folder, where the file system has locks."""
    with suppress(OSError):
        fcntl.flock(descriptor, kind)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove the files and folders of this user that killed processes have left: those that nobody has locked.

    Links are left alone. On a file system without locks those go that have not been written to for a day.
    """
    for path in paths:
        with suppress(OSError):  # it is in use, or has just been removed
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                state = os.fstat(descriptor)
                if state.st_uid == os.getuid() and _is_left(descriptor, state):
                    if stat.S_ISDIR(state.st_mode):
                        shutil.rmtree(path)
                    elif stat.S_ISREG(state.st_mode):
                        path.unlink()
            finally:
                os.close(descriptor)


def _is_left(descriptor: int, state: os.stat_result) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - state.st_mtime > _DAY
    return True
