"""Decoded images as bytes, in memory or on disk, shared by the workers and the ranks of a machine."""
import hashlib
import mmap
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
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
_CHUNK = 64  # images that a thread decodes at once
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
    def of(cls, photos: FilePhotos, views: Scales, rows: Sequence[int], skip_bad: bool, bar: tqdm) -> 'Contents':
        """Read the headers of images.

        Raises:
            UserError: One cannot be read, and bad ones are not left out.
        """
        made = cls(*(np.zeros((len(rows), *shape), kind) for shape, kind in (
            ((2,), np.int32), ((), np.uint8), ((), np.uint8), ((), bool), ((3,), np.int64))))
        for place, row in enumerate(rows):
            made.stamps[place] = _stamp(photos.rows.images[row])  # before it is read, so that no change is missed
            try:
                photo = photos[row]
            except UserError:
                if not skip_bad:
                    raise
                made.bad[place] = True
                continue
            finally:
                bar.update()
            useful = views.useful_reductions(photo)
            made.sizes[place] = photo.height, photo.width
            made.first[place], made.last[place] = REDUCTIONS.index(useful[0]), REDUCTIONS.index(useful[-1])
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
        """Memory that has no name in any folder, and goes when the last process that maps it ends."""
        if hasattr(os, 'memfd_create'):
            descriptor = os.memfd_create('timm-multilabel')
            path = f'/proc/{os.getpid()}/fd/{descriptor}'
        else:
            descriptor, path = tempfile.mkstemp(prefix='timm-multilabel-')
        os.ftruncate(descriptor, length)
        return cls(path, length, True, descriptor)

    @classmethod
    def in_file(cls, path: Path, length: int) -> 'SharedBytes':
        """A new file, its room on the disk taken."""
        with open(path, 'wb') as file:
            if hasattr(os, 'posix_fallocate'):
                os.posix_fallocate(file.fileno(), 0, length)
            else:
                file.truncate(length)
        return cls(str(path), length, True)

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
        chunks = [todo[start:start + _CHUNK] for start in range(0, len(todo), _CHUNK)]
        with ThreadPoolExecutor(max(1, workers)) as pool, _bar(title, len(todo), visible) as bar:
            try:
                return sum(pool.map(decode, chunks), [])
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

    Raises:
        UserError: An image is bad, and such are not left out.
    """
    title = f'{files.rows.source}: --cache {kind}'
    # As torchrun says them: this rank among those of its machine, and how many they are.
    place, ranks = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    leader, visible = world()[0] - place, not world()[0]
    path = _find_path(files, views, folder) if kind == 'disk' else None
    offer = None if place else _lead(files, views, path, skip_bad, title, say, visible)
    offer = all_objects(offer)[leader] if place else (offer, all_objects(offer))[0]
    if offer is None:
        return files
    contents, shared, ready = offer
    made = CachedPhotos(files, contents, shared)
    if ready:
        return made
    bad = made.fill(range(place, len(files), ranks), workers, skip_bad, title, visible)
    contents.bad[sum(all_objects(bad)[leader:leader + ranks], [])] = True
    if path is not None:
        if not place:
            _finish(shared, path, contents)
        all_objects(None)
        made.shared = SharedBytes(str(path), shared.length)
    return made


def _lead(
        files: FilePhotos,
        views: Scales,
        path: Path | None,
        skip_bad: bool,
        title: str,
        say: Callable[[str], None],
        visible: bool,
) -> tuple[Contents, SharedBytes, bool] | None:
    """Find out what a cache holds, and where, and whether it is there already; None if it would not fit."""
    contents = _read_index(files, path, title, say) if path is not None else None
    if contents is not None:
        length = int(contents.lengths().sum())
        say(f'{title}: {format_size(length)} in {path}, whole and up to date')
        return contents, SharedBytes(str(path), max(1, length)), True
    count = len(files)
    free = _SHARE * (free_memory() if path is None else shutil.disk_usage(path.parent).free)
    if count > 2 * _SAMPLED:  # the headers of all may take minutes; often some say that it is not worth it
        with _bar(f'{title}: sizes', _SAMPLED, visible) as bar:
            some = Contents.of(files, views, range(0, count, count // _SAMPLED), True, bar).lengths().mean() * count
        if some > 1.2 * free:
            say(f'{title}: some {format_size(some)} would not fit into the {format_size(free)} that may be used; goes '
                'on without it')
            return None
    with _bar(f'{title}: sizes', count, visible) as bar:
        contents = Contents.of(files, views, range(count), skip_bad, bar)
    length = int(contents.lengths().sum())
    if length > free:
        say(f'{title}: {format_size(length)} would not fit into the {format_size(free)} that may be used; goes on '
            'without it')
        return None
    say(f'{title}: decodes {count} images into {format_size(length)} of ' + ('memory' if path is None else str(path)))
    if path is None:
        return contents, SharedBytes.in_memory(max(1, length)), False
    _index_of(path).unlink(missing_ok=True)
    return contents, SharedBytes.in_file(path.with_name(f'.{path.name}.{os.getpid()}.tmp'), max(1, length)), False


def _find_path(files: FilePhotos, views: Scales, folder: Path) -> Path:
    """The file of a cache: another one for other images, other scales, another decoder."""
    key = hashlib.sha256(repr((FORMAT, simplejpeg.__version__, PIL.__version__, views.scales_key)).encode())
    for image in files.rows.images:
        key.update(os.path.abspath(image).encode() + b'\0')
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f'{Path(files.rows.source).stem}-{key.hexdigest()[:16]}.bin'


def _index_of(path: Path) -> Path:
    return path.with_suffix('.npz')


def _stamp(image: str) -> tuple[int, int, int]:
    try:
        state = os.stat(image)
    except OSError:
        return 0, 0, 0
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _read_index(files: FilePhotos, path: Path, title: str, say: Callable[[str], None]) -> Contents | None:
    """What a cache on disk holds; None where there is none, or not a whole one, or images have changed since."""
    try:
        with np.load(_index_of(path), allow_pickle=False) as index:
            contents = Contents(**index)
        if path.stat().st_size != max(1, contents.lengths().sum()):
            return None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    stamps = np.array([_stamp(image) for image in files.rows.images], np.int64)
    changed = int((stamps != contents.stamps).any(axis=1).sum())
    if changed:
        say(f'{title}: {changed} of {len(files)} images have changed since it was made')
        return None
    return contents


def _finish(shared: SharedBytes, path: Path, contents: Contents) -> None:
    """Put a cache on disk into its place, whole."""
    with open(shared.path, 'rb') as file:
        os.fsync(file.fileno())
    os.replace(shared.path, path)
    index = BytesIO()
    np.savez(index, **vars(contents))
    write_whole(_index_of(path), index.getvalue())


def free_memory() -> int:
    """Bytes of memory that this process may still take, its container's limit included."""
    free = psutil.virtual_memory().available
    folder = Path('/sys/fs/cgroup')
    for limit, used in (('memory.max', 'memory.current'),
                        ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes')):
        try:
            free = min(free, int((folder / limit).read_text()) - int((folder / used).read_text()))
        except (OSError, ValueError):  # no such version of cgroups, or 'max'
            pass
    return max(0, free)


def format_size(count: float) -> str:
    """Bytes for a person."""
    return f'{count / 1e9:.2f} GB' if count >= 1e8 else f'{count / 1e6:.1f} MB'


def _bar(title: str, total: int, visible: bool) -> tqdm:
    return tqdm(total=total, desc=title, unit=' images', leave=False, disable=None if visible else True)
