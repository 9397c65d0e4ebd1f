"""The unlabelled images: from a CSV, a folder, or rows of the training table that have no label."""
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from timm_multilabel.data.folders import images_of_folder
from timm_multilabel.data.table import Rows, Table, find_images, missing_targets
from timm_multilabel.errors import DataError
from timm_multilabel.labels import LabelSpace
from timm_multilabel.stores import is_address


def rows_of_table(table: Table, label_space: LabelSpace) -> Rows:
    """All images of a table, whatever labels it has.

    Raises:
        DataError: Images are missing.
    """
    images = np.array(find_images(table))
    return Rows(
        images=images,
        targets=missing_targets(label_space, len(images)),
        numbers=table.frame.index.to_numpy(),
        sources=(table.path,),
        which=np.zeros(len(images), dtype=np.int8),
    )


def rows_of_folder(
        folder: Path,
        label_space: LabelSpace,
        say: Callable[[str], None] = lambda line: None,
) -> Rows:
    """The images of a folder as rows without labels, see `images_of_folder`.

    Raises:
        DataError: There is none, or what has the name of an image is no file.
    """
    images = images_of_folder(folder, say)
    for image in images:
        if not is_address(image) and not os.path.isfile(image):
            raise DataError(f'{image}: is no file (a link that leads nowhere, perhaps); fix or remove it')
    return Rows(
        images=np.array(images),
        targets=missing_targets(label_space, len(images)),
        numbers=np.zeros(len(images), dtype=np.int64),
        sources=(folder,),
        which=np.zeros(len(images), dtype=np.int8),
    )


def split_labelled(rows: Rows, label_space: LabelSpace) -> tuple[Rows, Rows]:
    """The rows that have a label, and those that have none."""
    labelled = label_space.labelled(rows.targets).any(dim=1).numpy()
    return rows.select(labelled), rows.select(~labelled)


def keep_labels(rows: Rows, label_space: LabelSpace, count: int, seed: int) -> Rows:
    """The same rows, of which so many keep their labels, to measure what fewer labels would do.

    Fewer rows are a part of more ones, of the same seed.

    Args:
        rows: At least `count` of them have a label.
        label_space: The heads that the targets are of.
        count: Rows that keep their labels.
        seed: Decides which rows keep their labels.
    """
    labelled = label_space.labelled(rows.targets).any(dim=1).nonzero()[:, 0].numpy()
    kept = np.random.default_rng(seed).permutation(labelled)[:count]
    targets = missing_targets(label_space, len(rows)).clone()
    targets[kept] = rows.targets[kept]
    return replace(rows, targets=targets)


def join_rows(parts: list[Rows], label_space: LabelSpace) -> Rows:
    """The rows of several parts as unlabelled ones; an image that comes twice is taken once."""
    images = np.concatenate([part.images for part in parts])
    offsets = np.cumsum([0] + [len(part.sources) for part in parts])
    joined = Rows(
        images=images,
        targets=missing_targets(label_space, len(images)),
        numbers=np.concatenate([part.numbers for part in parts]),
        sources=sum((part.sources for part in parts), ()),
        which=np.concatenate([part.which + offset for part, offset in zip(parts, offsets)]),
    )
    first: dict[str, int] = {}
    kept = [first.setdefault(path, place) == place for place, path in enumerate(real_paths(joined.images))]
    return joined.select(np.array(kept, dtype=bool))


def without_images(rows: Rows, taken: set[str]) -> Rows:
    """The rows whose image is none of the real paths that are taken."""
    return rows.select(np.array([path not in taken for path in real_paths(rows.images)], dtype=bool))


def real_paths(images: Iterable[str]) -> list[str]:
    """The files of image paths, whatever links lead to them."""
    folders: dict[str, str] = {}
    found = []
    for path in images:
        if is_address(path):
            found.append(path)
            continue
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        file = os.path.join(folders[folder], name)
        found.append(os.path.realpath(file) if os.path.islink(file) else file)
    return found
