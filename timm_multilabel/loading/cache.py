"""Decoded images as bytes, in memory or on disk, shared by the workers and the ranks of a machine."""
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
import simplejpeg
from tqdm.auto import tqdm

from timm_multilabel.arrays import check_array, read_arrays, write_arrays
from timm_multilabel.data.images import MAX_PIXELS, REDUCTIONS, DecodedPhoto, FilePhotos, Photo
from timm_multilabel.distributed import all_objects, ranks_here, world
from timm_multilabel.errors import UserError
from timm_multilabel.files import reading
from timm_multilabel.loading.shared import SharedBytes, format_size, free_memory
from timm_multilabel.places import absolute, entries
from timm_multilabel.progress import OFF_TERMINAL
from timm_multilabel.stores import is_address
from timm_multilabel.temporary import RANDOM_NAME, remove_leftovers

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
        last: Largest reduction that is kept, likewise (N,).
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

        if photos.are_remote:  # a folder is listed once
            made.stamps[:] = stamps_of([photos.paths[row] for row in rows])

        def look(places: Sequence[int]) -> None:
            for place in places:
                if not photos.are_remote:
                    made.stamps[place] = stamp_of(photos.paths[rows[place]])  # first, so that no change is missed
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

    def check(self, count: int) -> None:
        """Raise ValueError unless it can be that of so many images."""
        for name, kind, shape in (('sizes', np.int32, (2,)), ('first', np.uint8, ()), ('last', np.uint8, ()),
                                  ('bad', bool, ()), ('stamps', np.int64, (3,))):
            check_array(name, getattr(self, name), np.dtype(kind), count, *shape)
        if (self.sizes < 0).any() or (self.sizes.astype(np.int64).prod(axis=1) > MAX_PIXELS).any() or (
                self.last >= len(REDUCTIONS)).any():
            raise ValueError('sizes that no image has')

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
        contents: Which images and scales the cache holds.
        shared: The bytes of their pixels.
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

    All ranks call it together; those of one machine share a cache and the work of filling it. Where the system does
    not let it be made (no room, no permission, a limit), they go on without it, with a line.

    Args:
        kind: 'ram' or 'disk', where the pixels are to lie.
        files: The images, as they lie in their files.
        views: The views that it is for, which decide on the scales that are kept.
        folder: Where a cache on disk goes.
        workers: Threads that decode.
        skip_bad: Leave out images that cannot be decoded.
        say: Prints a line.
        flag: The kind that was asked for, where this one is a step to it.

    Raises:
        UserError: An image is bad, and such are not left out.
    """
    title = f'{files.rows.source}: --cache {flag or kind}'
    here = ranks_here()
    leader, place, visible = here[0], here.index(world()[0]), not world()[0]
    indices = _indices(files, views, folder) if kind == 'disk' else []
    offer, wrong, made, finished, ready = None, None, None, None, True
    if not place:
        offer, wrong = _attempt(_lead, files, views, indices, workers, skip_bad, title, say, visible)
    offers = all_objects(offer)
    if offers[leader] is not None:
        contents, shared, ready = offer or offers[leader]
        opened, wrong = _attempt(shared.open)
        made = CachedPhotos(files, contents, opened) if wrong is None else None
    try:
        todo = range(place, 0 if ready else len(files), len(here))
        bad = made.fill(todo, workers, skip_bad, title, visible) if todo and made is not None else []
        # From here on all ranks of all machines, since some may have a cache, and some no room for one.
        everyone = all_objects((bad, wrong))
        everyone = [everyone[rank] for rank in here]
        wrong = next((its for _, its in everyone if its), None)
        if not ready and made is not None:
            contents.bad[sum((its for its, _ in everyone), [])] = True
        if not place and not ready and indices and wrong is None:
            finished, wrong = _attempt(_finish, indices, shared, contents)
    finally:
        if not place and not ready and indices:
            Path(shared.path).unlink(missing_ok=True)  # it has another name by now, if all went well
    theirs, wrong = all_objects((finished, wrong))[leader]
    if wrong is None and theirs is not None and made is not None:
        made.shared, wrong = _attempt((finished or theirs).open)  # without it the batches are the same
    if wrong is not None:
        say(f'{title}: cannot be used ({wrong}); goes on without it')
    return files if made is None or wrong is not None else made


def _attempt(work: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """What some work gives, and None; or None, and why the system did not let it be done."""
    try:
        return work(*args), None
    except (OSError, ValueError) as error:
        return None, ' '.join(str(error).split())


def _lead(
        files: FilePhotos,
        views: Scales,
        indices: Sequence[Path],
        workers: int,
        skip_bad: bool,
        title: str,
        say: Callable[[str], None],
        visible: bool,
) -> tuple[Contents, SharedBytes, bool] | None:
    """Find out what a cache holds, and where, and whether it is there already; None if it would not fit.

    Raises:
        OSError: The system does not let it be made.
        UserError: An image is bad, and such are not left out.
    """
    for index in indices:
        index.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(index.parent.glob(f'.*-{"[0-9a-f]" * 16}-{RANDOM_NAME}'))  # of any cache
        found = _read_index(files, index, title, say)
        if found is not None:
            _remove_others(index, found[2])
            say(f'{title}: {format_size(found[1].length)} in {found[2]}, whole and up to date')
            return found[0], found[1], True
    folder = indices[0].parent if indices else None
    count = len(files)
    free = _SHARE * (free_memory() if folder is None else shutil.disk_usage(folder).free)
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
        + ('memory' if folder is None else str(folder)))
    length = max(1, length)
    shared = SharedBytes.in_memory(length) if folder is None else SharedBytes.in_file(folder, indices[0].stem, length)
    return contents, shared, False


def _indices(files: FilePhotos, views: Scales, folder: Path) -> list[Path]:
    """The indices that a cache on disk may have: others for other images, other scales, another decoder.

    The first is everybody's. The second is this user's own, where the first is another's and cannot be replaced.
    """
    key = hashlib.sha256(repr((FORMAT, simplejpeg.__version__, PIL.__version__, views.scales_key)).encode())
    for image in files.paths:
        key.update(os.fsencode(absolute(image)) + b'\0')
    stem = os.fsencode(Path(files.rows.source).stem)[:150].decode('utf-8', 'ignore')
    name = f'{stem}-{key.hexdigest()[:16]}'
    return [folder / f'{name}.npz', folder / f'{name}.{os.getuid()}.npz']


def stamp_of(image: str) -> tuple[int, int, int]:
    """What changes when a file does: its length, and when its content and its entry last changed; 0 without a file."""
    try:
        state = os.stat(image)
    except OSError:
        return 0, 0, 0
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def stamps_of(images: Sequence[str] | np.ndarray) -> np.ndarray:
    """`stamp_of` of files, and the like of what addresses name (N, 3)."""
    remote = [image for image in images if is_address(image)]
    found = dict(zip(remote, entries(remote))) if remote else {}
    known = ((*(found[image] or (0, 0)), 0) if image in found else stamp_of(image) for image in images)
    return np.array(list(known), np.int64).reshape(-1, 3)


def _read_index(
        files: FilePhotos,
        index: Path,
        title: str,
        say: Callable[[str], None],
) -> tuple[Contents, SharedBytes, Path] | None:
    """What a cache on disk holds, and its file; None where there is none that is whole, up to date and readable."""
    if not index.is_file():
        return None
    try:
        with reading(index, 'the index of a cache', 'it is made again'):
            found = read_arrays(index)
            name = str(found.pop('data'))
            contents = Contents(**found)
            contents.check(len(files))
            length, path = max(1, int(contents.lengths().sum())), index.with_name(name)
            if not _is_data(path, index) or path.stat().st_size != length:
                raise ValueError('other data')
            shared = SharedBytes.of_file(path, length)
    except UserError:
        return None
    changed = int((stamps_of(files.paths) != contents.stamps).any(axis=1).sum())
    if changed:
        say(f'{title}: {changed} of {len(files)} images have changed since it was made')
        return None
    return contents, shared, path


def _is_data(path: Path, index: Path) -> bool:
    """Whether a file is named as that of an index."""
    return path.name.startswith(f'{index.stem}-') and path.suffix == '.bin'


def _finish(indices: Sequence[Path], shared: SharedBytes, contents: Contents) -> SharedBytes:
    """Put a cache on disk into its place. The index names the file, so that both change at once, however many write.

    Both can only be read from then on: a file that becomes shorter ends the processes that have mapped it.

    Raises:
        OSError: The system does not let it be done.
    """
    assert shared.descriptor is not None  # it was made by `in_file`
    os.fchmod(shared.descriptor, os.fstat(shared.descriptor).st_mode & 0o444)
    os.fsync(shared.descriptor)
    path = Path(shared.path)
    try:
        for index in indices:
            path = path.replace(index.with_name(f'{index.stem}-{secrets.token_hex(8)}.bin'))
            try:
                write_arrays(index, {**vars(contents), 'data': np.array(path.name)}, read_only=True)
                break
            except UserError as error:
                if index == indices[-1]:
                    raise OSError(error.line) from error
        finished = SharedBytes.of_file(path, shared.length)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    _remove_others(index, path)
    return finished


def _remove_others(index: Path, data: Path) -> None:
    """Remove the data that an index does not name (any more); who has it open keeps it."""
    remove_leftovers(path for path in index.parent.glob(f'{glob.escape(index.stem)}-*.bin') if path != data)


def _bar(title: str, total: int, visible: bool) -> tqdm:
    return tqdm(total=total, desc=title, unit=' images', leave=False, disable=OFF_TERMINAL if visible else True)
