"""The images of a folder: one definition for all commands."""
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from timm_multilabel.data.image_names import ENDINGS
from timm_multilabel.errors import DataError, listed
from timm_multilabel.places import files_below
from timm_multilabel.stores import is_address

_HIDDEN, _LINKED = 'hidden files and folders', 'links to folders already taken'
_UNREADABLE, _BARE = 'folders that cannot be read', 'files without an ending'


def images_of_folder(folder: str | Path, say: Callable[[str], None], needed: bool = True) -> list[str]:
    """The images in a folder and those below it, in the order of their names.

    They are the files whose names end as those of a format that is read, in upper or lower case. Links to folders are
    followed, and what they lead to a second time is left out, as are hidden files and folders.

    Args:
        folder: Where to look, with all folders below it.
        say: Told how many files of which kind were passed over, if any were.
        needed: Whether there must be an image.

    Raises:
        DataError: There is no image and one is needed, or the folder cannot be read.
    """
    images, passed = _find(folder)
    if needed and not images:
        raise DataError(f'{folder}: no images in this folder (files that end in {", ".join(sorted(ENDINGS))}); '
                        f'passed over: {_counted(passed) or "nothing"}')
    if passed:
        say(f'{folder}: {len(images)} images; passed over: {_counted(passed)}')
    return images


def _find(folder: str | Path) -> tuple[list[str], Counter[str]]:
    """The images, and how many files and folders were passed over by their kind."""
    images: list[str] = []
    passed: Counter[str] = Counter()
    for parent, names in _remote(str(folder), passed) if is_address(folder) else walk(folder, passed):
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in ENDINGS:
                images.append(os.path.join(parent, name))
            else:
                passed[ending or _BARE] += 1
    return sorted(images), passed


def _remote(folder: str, passed: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """The objects below an address, each with its folder, as `walk` gives them; nothing hidden."""
    for path in files_below(folder):
        if '/.' in path.removeprefix(folder):
            passed[_HIDDEN] += 1
        else:
            parent, _, name = path.rpartition('/')
            yield parent, [name]


def walk(folder: str | Path, passed: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """A folder and each one below it once, with the names of the files in it; nothing hidden.

    A folder that links lead to as well goes by its own path.

    Args:
        folder: Where to start.
        passed: Counts what is passed over.

    Raises:
        DataError: The folder itself cannot be read.
    """
    def note(error: OSError) -> None:
        if error.filename == str(folder):
            raise DataError(f'{folder}: cannot be read ({error.strerror}); check its permissions') from error
        passed[_UNREADABLE] += 1

    seen, starts = set(), [str(folder)]
    for start in starts:  # more are added on the way
        for parent, folders, names in os.walk(start, onerror=note):
            state = os.stat(parent)
            if (state.st_dev, state.st_ino) in seen:
                passed[_LINKED] += 1
                folders.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            visible = [name for name in names if not name.startswith('.')]
            below = [name for name in folders if not name.startswith('.')]
            if hidden := len(names) - len(visible) + len(folders) - len(below):
                passed[_HIDDEN] += hidden
            folders[:] = below
            paths = [os.path.join(parent, name) for name in sorted(below)]
            starts += [path for path in paths if os.path.islink(path)]  # which `os.walk` does not follow
            yield parent, visible


def _counted(passed: Counter[str]) -> str:
    ordered = sorted(passed.items(), key=lambda item: (-item[1], item[0]))
    return listed([f'{kind} ({count:,})' for kind, count in ordered])
