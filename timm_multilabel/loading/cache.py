"""Decoded images as bytes, in memory or on disk, shared by the workers and the ranks of a machine."""
import glob
import hashlib
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
import simplejpeg
from tqdm import tqdm

from timm_multilabel.data.images import REDUCTIONS, DecodedPhoto, FilePhotos, Photo
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import UserError
from timm_multilabel.files import remove_left_over, write_whole
from timm_multilabel.loading.shared import SharedBytes, format_size, free_memory

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
    if index is not None and not place:
        _remove_left_over(index)
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
        path = _finish(index, shared, contents) if not ready and index is not None and not place else None
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


def _remove_left_over(index: Path) -> None:
    """Remove what processes that were killed left of any cache in the folder, and of this one the files of before."""
    remove_left_over(index.parent.glob(f'.*-{"[0-9a-f]" * 16}-*.tmp'))
    # A file that was put into its place a moment ago is locked until its index is there.
    remove_left_over(path for path in index.parent.glob(f'{glob.escape(index.stem)}-*.bin') if path != _data_of(index))


def _finish(index: Path, shared: SharedBytes, contents: Contents) -> Path:
    """Put a cache on disk into its place. The index names the file, so that both change at once, however many write."""
    os.fsync(shared.descriptor)
    path = index.with_name(Path(shared.path).name.removeprefix('.').removesuffix('.tmp') + '.bin')
    os.replace(shared.path, path)
    written = BytesIO()
    np.savez(written, **vars(contents), data=np.array(path.name))
    write_whole(index, written.getvalue())
    _remove_left_over(index)  # who has one of them open keeps it
    return path


def _bar(title: str, total: int, visible: bool) -> tqdm:
    return tqdm(total=total, desc=title, unit=' images', leave=False, disable=None if visible else True)
