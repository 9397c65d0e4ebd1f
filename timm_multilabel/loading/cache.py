"""Decoded images as bytes, in memory or on disk, shared by the workers and the ranks of a machine."""
import fcntl
import hashlib
import mmap
import os
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
import psutil
import simplejpeg
from tqdm import tqdm

from timm_multilabel.data.images import REDUCTIONS, DecodedPhoto, FilePhotos, Photo
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import UserError
from timm_multilabel.files import write_whole

FORMAT = 1  # of the files; another one is another cache
_SHARE = 0.8  # of the memory or the disk that is free, what a cache may take at most
_CHUNK = 64  # images that a thread takes at once
_SAMPLED = 1000  # images that a first estimate goes by


class Scales(Protocol):
    """What a cache asks of the views that it is for."""

    def useful_reductions(self, photo: Photo) -> Sequence[int]:
        """The reductions of a photo that some view of it could ask for."""

    @property
    def scales_key(self) -> str:
        """What these depend on."""


@dataclass
class Contents:
    """What a cache holds of N images.

    Args:
        sizes: Height and width of the whole images (N, 2); 0 where the header cannot be read.
        first: Least reduction that is kept, as an index into `REDUCTIONS` (N,).
        last: Largest one (N,).
        bad: Whether the image cannot be decoded (N,).
        stamps: What changes when a file does (N, 3): its length, and when its content and its entry last changed.
    """
    sizes: np.ndarray
    first: np.ndarray
    last: np.ndarray
    bad: np.ndarray
    stamps: np.ndarray

    @classmethod
    def of(
            cls,
            photos: FilePhotos,
            views: Scales,
            rows: Sequence[int],
            workers: int,
            skip_bad: bool,
            bar: tqdm,
    ) -> 'Contents':
        """Read the headers of images.

        Raises:
            UserError: One cannot be read, and bad ones are not left out.
        """
        made = cls(*(np.zeros((len(rows), *shape), kind) for shape, kind in (
            ((2,), np.int32), ((), np.uint8), ((), np.uint8), ((), bool), ((3,), np.int64))))

        def look(places: Sequence[int]) -> None:
            for place in places:
                made.stamps[place] = _stamp(photos.rows.images[rows[place]])  # first, so that no change is missed
                try:
                    photo = photos[rows[place]]
                    useful = views.useful_reductions(photo)
                    made.sizes[place] = photo.height, photo.width
                    made.first[place], made.last[place] = REDUCTIONS.index(useful[0]), REDUCTIONS.index(useful[-1])
                except UserError:
                    if not skip_bad:
                        raise
                    made.bad[place] = True
            bar.update(len(places))

        _in_threads(look, range(len(rows)), workers)
        return made

    def lengths(self) -> np.ndarray:
        """Bytes of each image (N,)."""
        total = np.zeros(len(self.sizes), np.int64)
        for place, reduction in enumerate(REDUCTIONS):
            kept = (self.first <= place) & (place <= self.last)
            total += kept * 3 * (-(-self.sizes.astype(np.int64) // reduction)).prod(axis=1)
        return total

    def levels(self, row: int) -> list[tuple[int, tuple[int, int, int]]]:
        """What is kept of an image: reductions with the shapes of their pixels."""
        height, width = self.sizes[row].tolist()
        return [
            (each, (-(-height // each), -(-width // each), 3))
            for each in REDUCTIONS[self.first[row]:self.last[row] + 1]]


class SharedBytes:
    """A file that processes map into their memory; pickled, it is its path, and mapped anew where it is needed.

    Args:
        path: The file.
        length: Its bytes, at least one.
        writable: Map it for writing.
        descriptor: The open file, where only that keeps it alive.
    """

    def __init__(self, path: str, length: int, writable: bool = False, descriptor: int | None = None):
        self.path, self.length, self.writable, self.descriptor = path, length, writable, descriptor

    @classmethod
    def in_memory(cls, length: int) -> 'SharedBytes':
        """Memory without a name in any folder, where the system has such; it goes when the last process ends."""
        if hasattr(os, 'memfd_create'):
            descriptor = os.memfd_create('timm-multilabel')
            path = _path_of(descriptor)
        else:
            descriptor, path = tempfile.mkstemp(prefix='timm-multilabel-')
        os.ftruncate(descriptor, length)
        return cls(path, length, True, descriptor)

    @classmethod
    def of_file(cls, path: Path, length: int) -> 'SharedBytes':
        """A file that is there, and stays what it is for this and its processes even where another takes its place."""
        descriptor = os.open(path, os.O_RDONLY)
        opened = _path_of(descriptor)
        return cls(opened if os.path.exists(opened) else str(path), length, descriptor=descriptor).open()

    @classmethod
    def in_file(cls, folder: Path, name: str, length: int) -> 'SharedBytes':
        """A new file `.NAME-....tmp`, its room on the disk taken; it is locked while this process has it."""
        for path in folder.glob(f'.{name}-*.tmp'):
            _remove_unless_locked(path)  # what a run that was killed has left
        descriptor, path = tempfile.mkstemp('.tmp', f'.{name}-', folder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if hasattr(os, 'posix_fallocate'):
                os.posix_fallocate(descriptor, 0, length)
            else:
                os.ftruncate(descriptor, length)
        except OSError:
            os.unlink(path)
            raise
        return cls(path, length, True, descriptor)

    def open(self) -> 'SharedBytes':
        """This, mapped now, while the process that made it is there."""
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

    def __del__(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
            if os.path.basename(self.path).startswith('timm-multilabel-'):  # the file that stands for memory
                os.unlink(self.path)


def _path_of(descriptor: int) -> str:
    """A path by which other processes may open a file that this one has open (Linux)."""
    return f'/proc/{os.getpid()}/fd/{descriptor}'


def _remove_unless_locked(path: Path) -> None:
    try:
        with open(path, 'rb') as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > 60:  # else its process may be about to lock it
                path.unlink()
    except OSError:  # another run is filling it, or has just taken it away
        pass


class CachedPhotos:
    """The photos of rows from a cache.

    Args:
        files: The same from their files; an image that the cache has not is asked for there.
        contents: What the cache holds.
        shared: Where.
    """

    def __init__(self, files: FilePhotos, contents: Contents, shared: SharedBytes):
        self.files, self.contents, self.shared = files, contents, shared
        self.ends = np.cumsum(contents.lengths())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Photo:
        if self.contents.bad[index]:
            return self.files[index]
        return DecodedPhoto(self.pixels(index), *self.contents.sizes[index].tolist())

    def pixels(self, index: int) -> dict[int, np.ndarray]:
        """The pixels of an image by reduction, in the cache's own memory."""
        start, found = int(self.ends[index - 1]) if index else 0, {}
        for reduction, shape in self.contents.levels(index):
            length = shape[0] * shape[1] * 3
            found[reduction] = self.shared.array[start:start + length].reshape(shape)
            start += length
        return found

    def fill(self, rows: Sequence[int], workers: int, skip_bad: bool, title: str, visible: bool) -> list[int]:
        """Decode images into the cache; those that are bad.

        Raises:
            UserError: An image cannot be decoded, and bad ones are not left out.
        """
        def decode(chunk: Sequence[int]) -> list[int]:
            bad = []
            for row in chunk:
                try:
                    photo = self.files[row]
                    for reduction, pixels in self.pixels(row).items():
                        pixels[...] = photo.decode(reduction)
                except UserError:
                    if not skip_bad:
                        raise
                    bad.append(row)
            bar.update(len(chunk))
            return bad

        todo = [row for row in rows if not self.contents.bad[row]]
        with _bar(title, len(todo), visible) as bar:
            return sum(_in_threads(decode, todo, workers), [])


def _in_threads(work: Callable[[Sequence[int]], Any], items: Sequence[int], workers: int) -> list[Any]:
    """What work gives for chunks of items, several at a time; the first error ends it."""
    chunks = [items[start:start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            return list(pool.map(work, chunks))
        finally:
            pool.shutdown(cancel_futures=True)


def open_cache(
        kind: str,
        files: FilePhotos,
        views: Scales,
        *,
        folder: Path,
        workers: int,
        skip_bad: bool,
        say: Callable[[str], None],
        flag: str | None = None,
) -> CachedPhotos | FilePhotos:
    """Keep the images of rows decoded; where that would not fit, the files themselves.

    All ranks call it together; those of one machine share a cache and the work of filling it.

    Args:
        kind: 'ram' or 'disk'.
        files: The images.
        views: The views that it is for.
        folder: Where on disk.
        workers: Threads that decode.
        skip_bad: Leave out images that are bad.
        say: Prints a line.
        flag: The kind that was asked for, where this one is a step to it.

    Raises:
        UserError: An image is bad, and such are not left out.
    """
    title = f'{files.rows.source}: --cache {flag or kind}'
    machines = all_objects((socket.gethostname(), _boot()))
    here = [rank for rank, machine in enumerate(machines) if machine == machines[world()[0]]]
    leader, place, visible = here[0], here.index(world()[0]), not world()[0]
    index = _find_index(files, views, folder) if kind == 'disk' else None
    old = _data_of(index) if index is not None else None
    offer = _lead(files, views, index, workers, skip_bad, title, say, visible) if not place else None
    offers = all_objects(offer)
    made, bad, ready = None, [], True
    try:
        if offers[leader] is not None:
            contents, shared, ready = offer or offers[leader]
            made = CachedPhotos(files, contents, shared.open())
        if not ready:
            bad = made.fill(range(place, len(files), len(here)), workers, skip_bad, title, visible)
        # From here on all ranks of all machines, since some may have a cache, and some no room for one.
        everyone = all_objects(bad)
        if not ready:
            contents.bad[sum((everyone[rank] for rank in here), [])] = True
        path = _finish(index, shared, contents, old) if not ready and index is not None and not place else None
    except BaseException:
        if not ready and index is not None and not place:
            Path(shared.path).unlink(missing_ok=True)
        raise
    path = all_objects(path)[leader]
    if path is not None:
        made.shared = SharedBytes.of_file(path, shared.length)
    return files if made is None else made


def _boot() -> str:
    """What tells this start of this machine from others of its name (Linux)."""
    path = Path('/proc/sys/kernel/random/boot_id')
    return path.read_text() if path.exists() else ''


def _lead(
        files: FilePhotos,
        views: Scales,
        index: Path | None,
        workers: int,
        skip_bad: bool,
        title: str,
        say: Callable[[str], None],
        visible: bool,
) -> tuple[Contents, SharedBytes, bool] | None:
    """Find out what a cache holds, and where, and whether it is there already; None if it would not fit."""
    found = _read_index(files, index, title, say) if index is not None else None
    if found is not None:
        contents, path = found
        length = int(contents.lengths().sum())
        say(f'{title}: {format_size(length)} in {path}, whole and up to date')
        return contents, SharedBytes.of_file(path, max(1, length)), True
    count = len(files)
    free = _SHARE * (free_memory() if index is None else shutil.disk_usage(index.parent).free)
    if count > 2 * _SAMPLED:  # the headers of all may take minutes; often some say that it is not worth it
        some = range(0, count, count // _SAMPLED)
        with _bar(f'{title}: sizes', len(some), visible) as bar:
            length = Contents.of(files, views, some, workers, True, bar).lengths().mean() * count
        if length > 1.2 * free:
            say(f'{title}: some {format_size(length)} would not fit into the {format_size(free)} that may be used; '
                'goes on without it')
            return None
    with _bar(f'{title}: sizes', count, visible) as bar:
        contents = Contents.of(files, views, range(count), workers, skip_bad, bar)
    length = int(contents.lengths().sum())
    if length > free:
        say(f'{title}: {format_size(length)} would not fit into the {format_size(free)} that may be used; goes on '
            'without it')
        return None
    say(f'{title}: decodes {count} images into {format_size(length)} of '
        + ('memory' if index is None else str(index.parent)))
    length = max(1, length)
    shared = SharedBytes.in_memory(length) if index is None else SharedBytes.in_file(index.parent, index.stem, length)
    return contents, shared, False


def _find_index(files: FilePhotos, views: Scales, folder: Path) -> Path:
    """The index of a cache on disk: another one for other images, other scales, another decoder."""
    key = hashlib.sha256(repr((FORMAT, simplejpeg.__version__, PIL.__version__, views.scales_key)).encode())
    for image in files.rows.images:
        key.update(os.path.abspath(image).encode() + b'\0')
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f'{Path(files.rows.source).stem}-{key.hexdigest()[:16]}.npz'


def _stamp(image: str) -> tuple[int, int, int]:
    try:
        state = os.stat(image)
    except OSError:
        return 0, 0, 0
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _read_index(
        files: FilePhotos,
        index: Path,
        title: str,
        say: Callable[[str], None],
) -> tuple[Contents, Path] | None:
    """What a cache on disk holds, and its file; None where there is none that is whole and up to date."""
    try:
        with np.load(index, allow_pickle=False) as stored:
            found = dict(stored)
        path = index.with_name(str(found.pop('data')))
        contents = Contents(**found)
        if path.stat().st_size != max(1, contents.lengths().sum()):
            return None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    stamps = np.array([_stamp(image) for image in files.rows.images], np.int64)
    changed = int((stamps != contents.stamps).any(axis=1).sum())
    if changed:
        say(f'{title}: {changed} of {len(files)} images have changed since it was made')
        return None
    return contents, path


def _data_of(index: Path) -> Path | None:
    """The file that an index names."""
    try:
        with np.load(index, allow_pickle=False) as stored:
            return index.with_name(str(stored['data']))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _finish(index: Path, shared: SharedBytes, contents: Contents, old: Path | None) -> Path:
    """Put a cache on disk into its place. The index names the file, so that both change at once, however many write."""
    os.fsync(shared.descriptor)
    path = index.with_name(Path(shared.path).name.removeprefix('.').removesuffix('.tmp') + '.bin')
    os.replace(shared.path, path)
    written = BytesIO()
    np.savez(written, **vars(contents), data=np.array(path.name))
    write_whole(index, written.getvalue())
    if old is not None:
        old.unlink(missing_ok=True)  # who has it open keeps it
    return path


def free_memory() -> int:
    """Bytes of memory that this process may still take, its container's limit included."""
    return max(0, min([psutil.virtual_memory().available, *_container_memory()]))


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


def _bar(title: str, total: int, visible: bool) -> tqdm:
    return tqdm(total=total, desc=title, unit=' images', leave=False, disable=None if visible else True)
