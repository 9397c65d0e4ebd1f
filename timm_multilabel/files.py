"""Files: written whole or not at all, read only where they are files, and without trusting what they hold."""
import errno
import json
import math
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from timm_multilabel.errors import DataError, OutputError, UserError, printable
from timm_multilabel.places import write_object
from timm_multilabel.stores import is_address, open_address
from timm_multilabel.temporary import lock, temporary_file, temporary_folder, temporary_path

# Writing


@contextmanager
def atomic_write(path: str | Path, read_only: bool = False) -> Iterator[BinaryIO]:
    """A file that is written beside its final place, and renamed when all of it is on disk.

    A reader, a crash or a loss of power never meets half of it. The folder must exist. A file that is replaced passes
    its permissions on; a new one has those that the umask allows. A link is replaced, not followed. What goes to an
    address is written to a temporary file and sent when it is whole.

    Args:
        path: Its final place.
        read_only: Nobody may write to it afterwards; it can only be replaced.

    Raises:
        OutputError: The disk is full, or the folder cannot be written to; what was there before is left as it is.
    """
    if is_address(path):
        with temporary_folder('timm-multilabel-write-', Path(tempfile.gettempdir())) as folder:
            with atomic_write(folder / 'file') as file:
                yield file
            try:
                write_object(folder / 'file', str(path))
            except OSError as error:
                raise OutputError(f'{path}: cannot be written ({error.strerror})') from error
        return
    path = Path(path)
    if path.exists() and not path.is_file():  # as root it would take the place of /dev/null
        raise OutputError(f'{path}: cannot be written: it is a folder, a device or a pipe; name a file')
    temporary = None
    try:
        descriptor, temporary = temporary_file(path.parent, path.name)
        with open(descriptor, 'wb') as file:
            yield file
            file.flush()
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            with suppress(OSError):
                before = path.lstat().st_mode
                mode = stat.S_IMODE(before) & 0o777 if stat.S_ISREG(before) else mode
            mode = mode & 0o444 if read_only else mode
            if mode != stat.S_IMODE(os.fstat(descriptor).st_mode):
                os.fchmod(descriptor, mode)
            os.fsync(descriptor)
            os.replace(temporary, path)  # while it is locked, so that nobody takes it for a leftover
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save puts its own error over it
        if not isinstance(cause, OSError):
            raise
        raise OutputError(
            f'{path}: cannot be written ({cause.strerror or cause}), and what was there before is left as it is; make '
            'room or check the permissions') from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file as `atomic_write` does; text as UTF-8, line ends as they are.

    What UTF-8 cannot write, as in the name of a file in another encoding, becomes `\\udcff`, as JSON and YAML read it.
    """
    with atomic_write(path) as file:
        file.write(content.encode('utf-8', 'backslashreplace') if isinstance(content, str) else content)


def link_whole(source: str | Path, path: str | Path) -> None:
    """Give a file another name, in place of the file that may have it; where there are no links, a copy.

    Raises:
        OutputError: See `atomic_write`.
    """
    path = Path(path)
    temporary = temporary_path(path.parent, path.name)
    try:
        with open(source, 'rb') as file:
            lock(file.fileno())  # the link is the same file, and must not be taken for a leftover
            os.link(source, temporary)
            os.replace(temporary, path)  # does nothing where both are one file already
    except OSError:
        with open(source, 'rb') as file, atomic_write(path) as copy:
            shutil.copyfileobj(file, copy)
        return
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def open_to_append(path: str | Path) -> BinaryIO:
    """Open a file to add to, made where there is none.

    Raises:
        OutputError: It is a link, which might lead anywhere, or no file, or cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = open(os.open(path, flags, 0o666), 'ab')
    except OSError as error:
        raise OutputError(f'{path}: cannot be opened to add to it ({error.strerror}); remove it') from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OutputError(f'{path}: is no file; remove it')
    return file


def _flush_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    with suppress(PermissionError):  # it may be written to, and not read
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Reading


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read, or what an address names, and never what only looks like a file: a pipe or a device, which
    may block for ever.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    if is_address(path):
        return open_address(str(path))

    def check(state: os.stat_result) -> None:
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, 'it is a folder, a pipe, a socket or a device, not a file', str(path))

    check(os.stat(path))  # before it is opened, since that alone may do something to a device
    # Without blocking, and looked at again, since another file may have come in its place.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    try:
        check(os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    # Out of the `try`: where a signal's handler raises in here, the file has closed the descriptor already, and closing
    # it again would hide that the process was told to stop behind "Bad file descriptor".
    return os.fdopen(descriptor, 'rb')


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file, which is at its beginning afterwards."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


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


@contextmanager
def reading(path: str | Path, what: str, way_out: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one line.

    Args:
        path: The file.
        what: What it should be, such as 'stored predictions'.
        way_out: What the user can do.

    Raises:
        DataError: Any Exception was raised within.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of libraries, on damaged files
            yield
    except UserError:
        raise
    except Exception as error:  # damaged files make libraries raise nearly anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = ' '.join(printable(reason).split())[:200] or type(error).__name__
        raise DataError(f'{path}: cannot be read as {what} ({reason}); {way_out}') from error


def read_json(
        path: Path,
        what: str,
        way_out: str,
        check: Callable[[Any], bool] = lambda value: True,
        most: int = 2 ** 29,
) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        what: See `reading`.
        way_out: See `reading`.
        check: Whether what it holds is what this program writes; it may raise.
        most: Bytes that it may have.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    with reading(path, what, way_out):
        value = json.loads(read_text(path, most))
        if not check(value):
            raise ValueError('it holds something else')
    return value


def without_nan(value: Any) -> Any:
    """NaN, which JSON has not, as null."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
