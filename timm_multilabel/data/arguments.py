"""IMAGES of a command line -> rows: files, folders, globs, tables, and paths on standard input."""
import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from timm_multilabel.data.folders import images_of_folder, walk
from timm_multilabel.data.image_names import ENDINGS
from timm_multilabel.data.table import Rows, find_images, look_for_images, missing_targets, read_table
from timm_multilabel.data.table_files import ENDINGS as ENDINGS_OF_TABLES
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import DataError
from timm_multilabel.labels import LabelSpace
from timm_multilabel.places import path_of
from timm_multilabel.stores import WEB, is_address

Found = tuple[Sequence[str], np.ndarray]
"""Image paths, and the number of each in what names it, or 0: in an array, since there may be millions."""


def rows_of_arguments(
        arguments: Sequence[str],
        label_space: LabelSpace,
        written: TableFormat | None = None,
        stdin: BinaryIO | None = None,
        say: Callable[[str], None] = lambda line: None,
) -> Rows:
    """The images that words of a command line name, in their order, as rows without labels.

    A file need not be there or be an image: that is found out when it is read, and is the row's own matter.

    Args:
        arguments: Files, folders, globs, tables, or - for standard input.
        label_space: The heads, which say how wide the empty targets are.
        written: How tables are written.
        stdin: What '-' stands for: paths, one a line, or with a zero byte between them as `find -print0` writes them;
            standard input when None.
        say: Told what was passed over in folders, see `images_of_folder`.

    Raises:
        DataError: A word names no image: an empty folder or standard input, a glob that nothing matches, a table that
            cannot be read or of whose images none is there.
    """
    images, numbers, which = [], [], []
    sources: dict[Path, int] = {}
    for argument in arguments:
        source, (paths, its_numbers) = _expand(argument, written or TableFormat(), stdin, say)
        place = sources.setdefault(source, len(sources))
        images.append(np.array(paths, dtype=object))  # not of fixed width, so that one long path does not widen all
        numbers.append(its_numbers)
        which.append(np.full(len(paths), place))
    joined = np.concatenate(images)
    return Rows(
        images=joined,
        targets=missing_targets(label_space, len(joined)),
        numbers=np.concatenate(numbers).astype(np.int64),
        sources=tuple(sources),
        which=np.concatenate(which).astype(np.int64),
    )


def _expand(
        argument: str,
        written: TableFormat,
        stdin: BinaryIO | None,
        say: Callable[[str], None],
) -> tuple[Path, Found]:
    """What one word names, and what messages call it."""
    if argument == '-':
        return Path('standard input'), _of_lines(sys.stdin.buffer if stdin is None else stdin)
    if is_address(argument):
        return _expand_address(argument, written, say)
    if os.path.isdir(argument):
        return Path(argument), _without_numbers(images_of_folder(argument, say))
    if argument.lower().endswith(ENDINGS_OF_TABLES):
        return Path(argument), _of_table(argument, written)
    if not os.path.lexists(argument) and glob.has_magic(argument):
        return Path(argument), _without_numbers(_of_glob(argument, say))
    if not os.path.lexists(argument) and Path(argument).suffix.lower() not in ENDINGS:
        raise DataError(f'{argument}: no such file or folder')
    return Path('the command line'), _without_numbers([argument])


def _without_numbers(images: Sequence[str]) -> Found:
    return images, np.zeros(len(images), np.int64)


def _expand_address(argument: str, written: TableFormat, say: Callable[[str], None]) -> tuple[Path, Found]:
    """What an address names; only the last part of a pattern has wildcards."""
    path = path_of(argument)
    if argument.lower().endswith(ENDINGS_OF_TABLES):
        return path, _of_table(argument, written)
    if glob.has_magic(path.name) and not argument.startswith(WEB):
        images = sorted(map(str, path.parent.glob(path.name)))
        if not images:
            raise DataError(f'{argument}: no file matches; correct the pattern')
        return path, _without_numbers(images)
    if path.suffix.lower() in ENDINGS or not path.is_dir():
        return Path('the command line'), _without_numbers([argument])
    return path, _without_numbers(images_of_folder(str(path), say))


def _of_lines(stream: BinaryIO) -> Found:
    text = os.fsdecode(stream.read())
    lines = text.split('\0') if '\0' in text else [line.rstrip('\r') for line in text.split('\n')]
    numbers = np.array([number for number, line in enumerate(lines, 1) if line], np.int64)
    if not len(numbers):
        raise DataError('-: standard input names no image; write a path on each line')
    return [line for line in lines if line], numbers


def _of_table(path: str, written: TableFormat) -> Found:
    table = read_table(path, written)
    images, exist = look_for_images(table)
    if not any(exist):
        find_images(table)  # which says where it looked
    return images, np.asarray(table.frame.index, np.int64)


def _of_glob(pattern: str, say: Callable[[str], None]) -> list[str]:
    images = []
    for match in sorted(_matches(pattern)):
        if not os.path.isdir(match):
            images.append(match)
        elif '**' not in pattern:  # which matches what is in the folder as well
            images.extend(images_of_folder(match, say, needed=False))
    if not images:
        raise DataError(f'{pattern}: no file matches; correct the pattern')
    return images


def _matches(pattern: str) -> set[str]:
    """What a pattern matches; unlike in `glob.glob`, `**` takes no way round a circle of links, of which many exist."""
    parts = re.fullmatch(r'(.*?/)??\*\*(?:/+(.*))?', pattern, re.DOTALL)
    if parts is None:
        return set(glob.glob(pattern))
    before, after = parts.groups()
    starts = glob.glob(before) if before else [os.curdir]
    folders = [folder for start in starts for folder, _ in walk(start, Counter())]
    found = {match for folder in folders for match in _matches(os.path.join(glob.escape(folder), after or '*'))}
    if '**' in (after or ''):  # so that one folder was walked from several
        places = {(os.path.realpath(os.path.dirname(path)), os.path.basename(path)): path
                  for path in sorted(found, key=lambda path: (len(path), path), reverse=True)}
        found = set(places.values())
    return found if before else {path.removeprefix(f'{os.curdir}/') for path in found}
