"""Bytes that processes share, in memory or on disk, and how much there is room for."""
import mmap
import os
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from timm_multilabel.temporary import temporary_file


class SharedBytes:
    """A file that processes map into their memory; pickled, it is its path, and mapped anew where it is needed.

    Args:
        path: The file, by a path under which other processes can open it too.
        length: How many bytes it has, at least one.
        writable: Map it for writing.
        descriptor: The open file, where only that keeps it alive.
    """

    def __init__(self, path: str, length: int, writable: bool = False, descriptor: int | None = None):
        self.path, self.length, self.writable, self.descriptor = path, length, writable, descriptor

    @classmethod
    def in_memory(cls, length: int) -> 'SharedBytes':
        """Memory without a name in any folder, where the system has such; it goes when the last process ends.

        Raises:
            OSError: There is not so much, or a limit forbids it.
        """
        if hasattr(os, 'memfd_create'):
            descriptor = os.memfd_create('timm-multilabel')
            path = _path_of(descriptor)
        else:
            descriptor, path = tempfile.mkstemp(prefix='timm-multilabel-')
        made = cls(path, length, True, descriptor)  # which gives it back where the next step fails
        os.ftruncate(descriptor, length)
        return made

    @classmethod
    def of_file(cls, path: Path, length: int) -> 'SharedBytes':
        """A file that is there, and stays what it is for this and its processes even where another takes its place.

        Raises:
            OSError, ValueError: It cannot be opened, is a link or no file, or is too short.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        opened = _path_of(descriptor)
        return cls(opened if os.path.exists(opened) else str(path), length, descriptor=descriptor).open()

    @classmethod
    def in_file(cls, folder: Path, name: str, length: int) -> 'SharedBytes':
        """A new file `.NAME-....tmp`, its room on the disk taken; it is locked while this process has it.

        Raises:
            OSError: There is no room, a limit forbids it, or the folder cannot be written to.
        """
        descriptor, path = temporary_file(folder, name)
        made = cls(str(path), length, True, descriptor)
        try:
            if hasattr(os, 'posix_fallocate'):
                os.posix_fallocate(descriptor, 0, length)
            else:
                os.ftruncate(descriptor, length)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return made

    def open(self) -> 'SharedBytes':
        """This, mapped now, while the process that made it is there.

        Raises:
            OSError, ValueError: It cannot be opened, or is too short.
        """
        assert len(self.array) == self.length
        return self

    @cached_property
    def array(self) -> np.ndarray:
        """The bytes."""
        access = mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ
        with open(self.path, 'r+b' if self.writable else 'rb') as file:
            return np.frombuffer(mmap.mmap(file.fileno(), self.length, access=access), np.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedBytes, (self.path, self.length, self.writable)

    def __del__(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            if os.path.basename(self.path).startswith('timm-multilabel-'):  # the file that stands for memory
                os.unlink(self.path)


def _path_of(descriptor: int) -> str:
    """A path by which other processes may open a file that this one has open (Linux)."""
    return f'/proc/{os.getpid()}/fd/{descriptor}'


def free_memory() -> int:
    """Bytes of memory that this process may still take, its container's limit included."""
    of_machine: int = psutil.virtual_memory().available
    return max(0, min([of_machine, *_container_memory()]))


def _container_memory() -> Iterator[int]:
    """Bytes that the control groups of this process (cgroups, version 2) still allow; caches of files may go."""
    root = Path('/sys/fs/cgroup')
    try:
        own = root / Path('/proc/self/cgroup').read_text().strip().rpartition('::/')[2]
    except OSError:
        return
    for folder in (own, *own.parents):
        try:
            limit, used = (int((folder / f'memory.{name}').read_text()) for name in ('max', 'current'))
            statistics = dict(line.split() for line in (folder / 'memory.stat').read_text().splitlines())
            yield limit - used + int(statistics['inactive_file'])
        except (OSError, ValueError, KeyError):  # no limit ('max'), or no such group
            continue


def format_size(count: float) -> str:
    """Bytes for a person."""
    return f'{count / 1e9:.2f} GB' if count >= 1e8 else f'{count / 1e6:.1f} MB'
