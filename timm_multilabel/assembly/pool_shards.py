"""Unlabelled images in shards: which shards, how many samples, and which of these are left out."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from tqdm.auto import tqdm

from timm_multilabel.assembly.splits import Splits, read_split_table
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.fingerprints import (
    Fingerprints,
    KeptOut,
    fingerprints_of_files,
    fingerprints_of_shards,
)
from timm_multilabel.data.optional import find_library
from timm_multilabel.data.pool import real_paths
from timm_multilabel.data.shards import Shards
from timm_multilabel.data.split_names import files_of_split, find_split, split_path
from timm_multilabel.data.streams import StreamedRows, check_count, unlabelled_stream
from timm_multilabel.data.table import Rows, find_images
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import DataError, UserError
from timm_multilabel.labels import LabelSpace
from timm_multilabel.loading.cache import stamps_of
from timm_multilabel.log import Say
from timm_multilabel.places import path_of
from timm_multilabel.progress import OFF_TERMINAL

T = TypeVar('T')


def stream_of(
        settings: TrainSettings,
        shards: Shards,
        label_space: LabelSpace,
        labelled: Iterable[str],
        splits: Splits,
        is_counted: bool,
        say: Say,
) -> StreamedRows:
    """The samples of shards as unlabelled images, but for those that are labelled or scored.

    Args:
        settings: Of the run, or of a phase.
        shards: What `--unlabelled` names.
        label_space: The heads.
        labelled: The files of labelled images.
        splits: Counts samples.
        is_counted: The number of samples is needed, even where that takes a pass over them.
        say: Tells a line.

    Raises:
        DataError: All of the shards are those of other splits, or they cannot be read.
    """
    find_library(shards.library)  # else it would be missed by the first loader process
    name = settings.pool.unlabelled
    left = _without_splits(settings, shards)
    if len(left.files) < len(shards.files):
        say(f'{len(shards.files) - len(left.files)} of {len(shards.files)} unlabelled shards are of the training, val '
            'or test split: left out')
        name = None  # what is left is no split
    files, others = scored_images(settings, left, say)
    counted: int | None = None
    if not left.tars:
        counted = left.most_samples()
    elif name is not None and name in splits.stored.rows:
        counted = splits.stored.rows[name]
        check_count(left, counted)
    elif is_counted:
        say(f'{left.source}: counting the samples' + (
            '; --epoch-by labelled and --epoch-steps need no count' if label_space.heads else ''))
        counted = splits.count(left, name)
    return unlabelled_stream(
        left, label_space, left.most_samples() if counted is None else counted, counted is not None,
        KeptOut(tuple(sorted({*files, *labelled})), tuple(others)))


def _without_splits(settings: TrainSettings, shards: Shards) -> Shards:
    """Shards without the files of splits; val and test may be asked for by name."""
    data, mine, taken = settings.data, files_of_split(shards), set()
    for name in (data.train_split, data.val_split, 'test'):
        split = find_split(path_of(data.data_dir), name, TableFormat.of(data))
        if isinstance(split, Shards) and (name == data.train_split or files_of_split(split) != mine):
            taken |= files_of_split(split)
    left = tuple(file for file in shards.files if path_of(file).resolve() not in taken)
    if not left:
        raise DataError(
            f'--unlabelled {settings.pool.unlabelled}: all of these shards are of the training, val or test split; '
            'name others')
    return replace(shards, files=left)


def scored_images(settings: TrainSettings, pool: Shards | None, say: Say) -> tuple[set[str], list[Shards]]:
    """The images that a model is scored on: those of the val and the test split, unless asked for by name.

    Args:
        settings: They name the splits.
        pool: The shards that `--unlabelled` names, if it names some.
        say: Tells a line.

    Returns:
        Files, and shards that hold others.
    """
    data, folder = settings.data, path_of(settings.data.data_dir)
    asked_for = [split_path(folder, name).resolve() for name in (data.train_split, settings.pool.unlabelled) if name]
    mine = files_of_split(pool) if pool is not None else None
    files: set[str] = set()
    shards = []
    for name in dict.fromkeys((data.val_split, 'test')):
        split = find_split(folder, name, TableFormat.of(data))
        if isinstance(split, Shards):
            if files_of_split(split) != mine:
                shards.append(split)
        elif split is not None and split.resolve() not in asked_for:
            try:
                files.update(real_paths(find_images(read_split_table(data, split), passing_over=True)))
            except UserError as error:
                say(f'{error.line}: cannot keep its images out of the unlabelled ones')
    return files, shards


def read_fingerprints(kept_out: KeptOut, workers: int, say: Say) -> Fingerprints:
    """Hash the images that are kept out of the unlabelled samples. All ranks call it together, and share the work.

    What cannot be read cannot be looked for, and a line says so.

    Args:
        kept_out: The images.
        workers: Threads that read files.
        say: Tells a line.
    """
    rank, ranks = world()
    of_shards = ''.join(f' and the images of {shards.source}' for shards in kept_out.shards)
    say(f'hashing {len(kept_out.files):,} labelled and scored images{of_shards}, which the unlabelled shards may hold '
        'too')
    mine = kept_out.files[rank::ranks]
    with _bar(len(mine)) as bar:
        of_files = [each for each in _counted(fingerprints_of_files(mine, workers), bar) if each is not None]
        found, wrong = _images_of(kept_out.shards, bar)
    told = all_objects((of_files, len(mine) - len(of_files), found, wrong))
    if unreadable := sum(its for _, its, *_ in told):
        say(f'{unreadable:,} labelled or scored images cannot be read, and not be kept out of the unlabelled shards')
    _say_wrong([line for *_, lines in told for line in lines], say)
    return Fingerprints(each for files, _, images, _ in told for each in [*files, *(one for one, _ in images)])


def without_images_of(rows: Rows, shards: Sequence[Shards], workers: int, say: Say) -> Rows:
    """Rows whose image is none of those in shards, by its bytes. All ranks call it together, and share the work.

    Args:
        rows: Rows of files, of which those are read that have as many bytes as one of the images.
        shards: Scored images.
        workers: Threads that read files.
        say: Tells a line.
    """
    if not shards:
        return rows
    rank, ranks = world()
    say(f'hashing the images of {" and of ".join(str(each.source) for each in shards)}, which may be among the '
        'unlabelled ones')
    with _bar(None) as bar:
        told = all_objects(_images_of(shards, bar))
    _say_wrong([line for _, lines in told for line in lines], say)
    known = Fingerprints(one for images, _ in told for one, _ in images)
    sizes = {size for images, _ in told for _, size in images}
    mine = range(rank, len(rows), ranks)
    stamps = stamps_of([str(rows.images[row]) for row in mine])
    alike = [row for row, size in zip(mine, stamps[:, 0].tolist()) if not size or size in sizes]  # 0: not known
    hashes = fingerprints_of_files([str(rows.images[row]) for row in alike], workers)
    taken = all_objects([row for row, each in zip(alike, hashes, strict=True) if each is not None and known.has(each)])
    left = np.ones(len(rows), dtype=bool)
    left[[row for its in taken for row in its]] = False
    return rows.select(left)


def _images_of(shards: Sequence[Shards], bar: tqdm) -> tuple[list[tuple[int, int]], list[str]]:
    """Hashes and sizes of the images in this rank's share of shards, and what is wrong with some."""
    found: list[tuple[int, int]] = []
    wrong: list[str] = []
    for each in shards:
        try:
            found.extend(_counted(fingerprints_of_shards(each, *world()), bar))
        except UserError as error:
            wrong.append(error.line)
    return found, wrong


def _bar(total: int | None) -> tqdm:
    return tqdm(desc='Hashing', total=total or None, unit=' images', disable=OFF_TERMINAL if world()[0] == 0 else True)


def _counted(items: Iterable[T], bar: tqdm) -> Iterator[T]:
    for item in items:
        bar.update()
        yield item


def _say_wrong(lines: Sequence[str], say: Say) -> None:
    for line in dict.fromkeys(lines):
        say(f'{line}: cannot keep its images out of the unlabelled ones')
