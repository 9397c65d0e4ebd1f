"""Arrays in npz files: written whole, and read without trusting what they hold."""
import math
import os
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from timm_multilabel.files import atomic_write

_FREE = 2 ** 28  # bytes that a compressed file may expand to, however small it is
_RATIO = 50  # and beyond that, bytes for each of its own
_HEADER = 1000  # characters of the header of an array


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], compress: bool = False, **kwargs: Any) -> None:
    """Write arrays as an npz file that `read_arrays` reads.

    Args:
        path: The file.
        arrays: They, by name.
        compress: Compress them, unless they shrink so far that `read_arrays` would refuse the file.
        kwargs: Of `atomic_write`.
    """
    named: dict[str, Any] = dict(arrays)  # numpy's types would take any name for an option
    written = BytesIO()
    if compress:
        np.savez_compressed(written, **named)
        compress = sum(array.nbytes for array in arrays.values()) < _limit(len(written.getbuffer()))
    if not compress:
        written = BytesIO()
        np.savez(written, **named)
    with atomic_write(path, **kwargs) as file:
        file.write(written.getbuffer())


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
        array: np.ndarray = np.ndarray(shape, kind, bytearray(file.read()), order='F' if by_columns else 'C')
        return array


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
