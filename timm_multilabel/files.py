"""Files of this program: written whole or not at all, and read without trusting what they hold."""
import fcntl
import json
import math
import os
import secrets
import shutil
import stat
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from timm_multilabel.errors import UserError, printable

_FREE = 2 ** 28  # bytes that a compressed file may expand to, however small it is
_RATIO = 50  # and beyond that, bytes for each of its own
_HEADER = 1000  # characters of the header of an array
_DAY = 86_400  # seconds

# Writing


@contextmanager
def whole_file(path: str | Path, read_only: bool = False) -> Iterator[BinaryIO]:
    """A file that is written beside its final place, and renamed when all of it is on disk.

    A reader, a crash or a loss of power never meets half of it. The folder must exist. A file that is replaced passes
    its permissions on; a new one has those that the umask allows. A link is replaced, not followed.

    Args:
        path: Its final place.
        read_only: Nobody may write to it afterwards; it can only be replaced.

    Raises:
        UserError: The disk is full, or the folder cannot be written to; what was there before is left as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # as root it would take the place of /dev/null
        raise UserError(f'{path}: cannot be written: it is a folder, a device or a pipe; name a file')
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
            os.fchmod(descriptor, mode & 0o444 if read_only else mode)
            os.fsync(descriptor)
            os.replace(temporary, path)  # while it is locked, so that nobody takes it for a leftover
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save puts its own error over it
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f'{path}: cannot be written ({cause.strerror or cause}), and what was there before is left as it is; make '
            'room or check the permissions') from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file as `whole_file` does; text as UTF-8, line ends as they are."""
    with whole_file(path) as file:
        file.write(content.encode('utf-8') if isinstance(content, str) else content)


def link_whole(source: str | Path, path: str | Path) -> None:
    """Give a file another name, in place of the file that may have it; where there are no links, a copy.

    Raises:
        UserError: See `whole_file`.
    """
    path = Path(path)
    temporary = _temporary_path(path.parent, path.name)
    try:
        with open(source, 'rb') as file:
            _lock(file.fileno())  # the link is the same file, and must not be taken for a leftover
            os.link(source, temporary)
            os.replace(temporary, path)  # does nothing where both are one file already
    except OSError:
        with open(source, 'rb') as file, whole_file(path) as copy:
            shutil.copyfileobj(file, copy)
        return
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def open_to_append(path: str | Path) -> BinaryIO:
    """Open a file to add to, made where there is none.

    Raises:
        UserError: It is a link, which might lead anywhere, or no file, or cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = open(os.open(path, flags, 0o666), 'ab')
    except OSError as error:
        raise UserError(f'{path}: cannot be opened to add to it ({error.strerror}); remove it') from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f'{path}: is no file; remove it')
    return file


def temporary_file(folder: Path, name: str) -> tuple[int, Path]:
    """A new file '.NAME-....tmp' that no one else has, with the permissions that the umask allows.

    It is locked until its descriptor is closed, by which `remove_leftovers` knows that it is in use.

    Returns:
        Its open descriptor, and its path.
    """
    while True:
        path = _temporary_path(folder, name)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        _lock(descriptor)
        if os.fstat(descriptor).st_nlink:  # else it was removed before it was locked
            return descriptor, path
        os.close(descriptor)


def _temporary_path(folder: Path, name: str) -> Path:
    """A name that nobody can foresee and that is short enough, whatever the name that it begins with."""
    short = os.fsencode(name)[:200].decode('utf-8', 'ignore')
    return folder / f'.{short}-{secrets.token_hex(8)}.tmp'


def _lock(descriptor: int) -> None:
    with suppress(OSError):  # of another process that looks at it, or a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def remove_leftovers(paths: Iterator[Path]) -> None:
    """Remove the files that killed processes have left: those that nobody has locked. Links are left alone.

    On a file system without locks, those that have not been written to for a day.
    """
    for path in paths:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                state = os.fstat(descriptor)
                if stat.S_ISREG(state.st_mode) and _is_left(descriptor, state):
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


def _flush_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    with suppress(PermissionError):  # it may be written to, and not read
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], compress: bool = False, **kwargs: Any) -> None:
    """Write arrays as an npz file that `read_arrays` reads.

    Args:
        path: The file.
        arrays: They, by name.
        compress: Compress them, unless they shrink so far that `read_arrays` would refuse the file.
        kwargs: Of `whole_file`.
    """
    written = BytesIO()
    if compress:
        np.savez_compressed(written, **arrays)
        compress = sum(array.nbytes for array in arrays.values()) < _limit(len(written.getbuffer()))
    if not compress:
        written = BytesIO()
        np.savez(written, **arrays)
    with whole_file(path, **kwargs) as file:
        file.write(written.getbuffer())


# Reading


@contextmanager
def reading(path: str | Path, what: str, way_out: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one line.

    Args:
        path: The file.
        what: What it should be, such as 'stored predictions'.
        way_out: What the user can do.

    Raises:
        UserError: Any Exception was raised within.
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
        raise UserError(f'{path}: cannot be read as {what} ({reason}); {way_out}') from error


def read_json(path: Path, what: str, way_out: str, check: Callable[[Any], bool] = lambda value: True) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        what: See `reading`.
        way_out: See `reading`.
        check: Whether what it holds is what this program writes; it may raise.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    with reading(path, what, way_out):
        value = json.loads(path.read_text(encoding='utf-8'))
        if not check(value):
            raise ValueError('it holds something else')
    return value


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file, without running anything that it contains or taking more memory than it is worth.

    Raises:
        Exception: Of any kind, where it is damaged; read it within `reading`.
    """
    with zipfile.ZipFile(path) as stored:
        members = stored.infolist()
        if len({member.filename for member in members}) != len(members):
            raise ValueError('an array twice')
        check_expansion(path, sum(member.file_size for member in members))
        return {member.filename.removesuffix('.npy'): _read_member(stored, member) for member in members}


def check_expansion(path: str | Path, size: int) -> None:
    """Raise ValueError if a file would expand to more bytes than any that this program writes."""
    if size > _limit(os.path.getsize(path)):
        raise ValueError(f'it would expand to {size} bytes')


def _limit(size: int) -> int:
    """The bytes that a file of a size may expand to."""
    return max(_FREE, _RATIO * size)


def _read_member(stored: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others may take any memory
        raise ValueError('a compression that this program does not use')
    with stored.open(member) as file:
        versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, kind = versions[np.lib.format.read_magic(file)](file, max_header_size=_HEADER)
        left = member.file_size - file.tell()
        if kind.hasobject or not kind.itemsize or math.prod(shape) * kind.itemsize != left:
            raise ValueError(f'{member.filename}: {left} bytes are no array of shape {shape} and type {kind}')
        return np.ndarray(shape, kind, bytearray(file.read()), order='F' if by_columns else 'C')


def check_array(name: str, array: np.ndarray, kind: Any, *shape: int | None) -> None:
    """Raise ValueError unless an array is of a type and a shape.

    Args:
        name: What errors call it.
        array: It.
        kind: Its type; `str` for texts, which must be such as paths can be.
        shape: Its sizes; None where any will do.
    """
    is_kind = array.dtype.kind == 'U' if kind is str else array.dtype == kind
    if not is_kind or array.ndim != len(shape) or any(
            wanted not in (None, size) for wanted, size in zip(shape, array.shape)):
        raise ValueError(f'{name}: an array of shape {array.shape} and type {array.dtype}')
    if kind is str and any('\0' in text for text in array.ravel().tolist()):  # it raises where they are no characters
        raise ValueError(f'{name}: a text with a zero byte')
