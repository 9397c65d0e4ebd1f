"""Copies of remote images on this machine's disk, for --cache disk: fetched once, and again when the image changes."""
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from timm_multilabel.data.images import FilePhotos, read_image
from timm_multilabel.distributed import all_objects, ranks_here, world
from timm_multilabel.errors import DataError, UserError
from timm_multilabel.files import write_atomic
from timm_multilabel.loading.shared import format_size
from timm_multilabel.places import AT_ONCE, Entry, entries
from timm_multilabel.progress import OFF_TERMINAL
from timm_multilabel.stores import is_address

_SHARE = 0.8  # of the disk that is free, what copies may take at most


def with_copies(files: FilePhotos, folder: Path, skip_bad: bool, say: Callable[[str], None]) -> FilePhotos:
    """The photos of rows, read from copies where rows name addresses.

    All ranks call it together; those of one machine share the copies and the work of fetching them.

    Args:
        files: The images as rows name them.
        folder: Where the copies go.
        skip_bad: Leave images that cannot be fetched at their address, where they turn out to be bad.
        say: Prints a line.

    Raises:
        DataError: An image cannot be fetched, and bad ones are not left out.
    """
    remote = [row for row, image in enumerate(files.rows.images) if is_address(image)]
    if not remote:
        return files
    here, title = ranks_here(), f'{files.rows.source}: --cache disk'
    todo, wrong = None, None
    paths = {row: folder / _name(str(files.rows.images[row])) for row in remote}
    if world()[0] == here[0]:
        try:
            todo = _todo(files, paths, folder, title, say)
        except (OSError, UserError) as error:
            wrong = error.line if isinstance(error, UserError) else f'{folder}: {error.strerror}'
    offers = all_objects((todo, wrong))
    todo, wrong = offers[here[0]]
    bad: list[int] = []
    if wrong is None and todo:
        try:
            bad = _fetch(files, paths, todo[here.index(world()[0])::len(here)], skip_bad, title)
        except UserError as error:
            wrong = error.line
    everyone = all_objects((bad, wrong))
    for _, theirs in everyone:  # of all machines, so that all end together
        if theirs is not None:
            raise DataError(theirs)
    if todo is None:  # no room
        return files
    left = set().union(*(everyone[rank][0] for rank in here))
    images = files.rows.images.astype(object)
    for row, path in paths.items():
        if row not in left:
            images[row] = str(path)
    return FilePhotos(files.rows, images)


def _name(address: str) -> str:
    """The name of an address's copy, in one of 256 folders."""
    digest = hashlib.sha256(address.encode('utf-8', 'surrogateescape')).hexdigest()
    return f'{digest[:2]}/{digest[2:42]}{os.path.splitext(address)[1][:8]}'


def _todo(
        files: FilePhotos,
        paths: dict[int, Path],
        folder: Path,
        title: str,
        say: Callable[[str], None],
) -> list[tuple[int, int]] | None:
    """The rows to fetch, each with the stamp of its image; None where the copies would not fit.

    A copy has its image's stamp as its time of change, so that the cache of decoded images, which goes by that, sees
    what has changed too.
    """
    found = entries([str(files.rows.images[row]) for row in paths])
    todo, size = [], 0
    for (row, path), entry in zip(paths.items(), found, strict=True):
        entry = entry or Entry(0, 0)  # one that is not there is named when it is fetched
        if not _is_copy(path, entry):
            todo.append((row, entry.stamp))
            size += entry.size
    folder.mkdir(parents=True, exist_ok=True)
    free = int(_SHARE * shutil.disk_usage(folder).free)
    if size > free:
        say(f'{title}: {format_size(size)} of remote images would not fit into the {format_size(free)} that may be '
            'used; they are read from where they are')
        return None
    if todo:
        say(f'{title}: copies {len(todo):,} of {len(paths):,} remote images{f" ({format_size(size)})" if size else ""} '
            f'to {folder}')
    return todo


def _is_copy(path: Path, entry: Entry) -> bool:
    try:
        state = path.stat()
    except OSError:
        return False
    return not entry.stamp or (state.st_size, state.st_mtime_ns) == (entry.size, _time(entry.stamp))


def _time(stamp: int) -> int:
    """A stamp as nanoseconds since 1970 that file systems can keep, of whatever precision in part of a second."""
    return stamp % 2 ** 30 * 10 ** 9


def _fetch(
        files: FilePhotos,
        paths: dict[int, Path],
        todo: Sequence[tuple[int, int]],
        skip_bad: bool,
        title: str,
) -> list[int]:
    """Fetch images; those that cannot be."""
    def fetch(item: tuple[int, int]) -> int | None:
        row, stamp = item
        image, path = str(files.rows.images[row]), paths[row]
        try:
            data = read_image(image)
        except OSError as error:
            if skip_bad:
                return row
            raise DataError(f'{image} ({files.rows.where(row)}): cannot be read ({error.strerror}); fix that or leave '
                            'it out') from error
        finally:
            bar.update()
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, data)
        if stamp:
            os.utime(path, ns=(_time(stamp), _time(stamp)))
        return None

    visible = not world()[0]
    with tqdm(total=len(todo), desc=f'{title}: copies', unit=' images', leave=False,
              disable=OFF_TERMINAL if visible else True) as bar, ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return [row for row in pool.map(fetch, todo) if row is not None]
        finally:
            pool.shutdown(cancel_futures=True)
