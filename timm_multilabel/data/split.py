"""One table of labels, or class folders, turned into all.csv, train.csv, val.csv and test.csv."""
import itertools
import json
import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import pandas as pd

from timm_multilabel.cells import LIST, values_of_list
from timm_multilabel.config.commands import SplitSettings
from timm_multilabel.data.class_folders import read_class_folders
from timm_multilabel.data.table_files import read_cells
from timm_multilabel.errors import DataError, escaped, is_utf8
from timm_multilabel.escaping import csv_line
from timm_multilabel.files import write_atomic

SPLITS = ('train', 'val', 'test')
_IMAGE = 'image_path'  # the column of the images of class folders, before it gets its name


def split_csv(
        source: str | Path,
        directory: str | Path,
        *,
        image: str | None = None,
        heads: Sequence[tuple[str, str]] | None = None,
        class_head: str = SplitSettings.class_head,
        image_column: str = SplitSettings.image_column,
        separator: str | None = None,
        ratios: Sequence[float] = SplitSettings.ratios,
        seed: int = SplitSettings.seed,
        stratify: str | None = None,
        group: str | None = None,
        force: bool = False,
) -> dict[str, int]:
    """Shuffle the rows of a table whose image exists into three disjoint splits.

    Args:
        source: A table with a row for each image, or a folder with a folder of images for each class.
        directory: Folder for the four files, made if it is not there.
        image: Pattern of the image's path with columns in braces, such as './images/{id}.jpg'. It is looked up from
            the folder of the source, then from its parent, then from the working directory; the first of them that
            holds any image counts for all rows. Class folders have none, and no heads.
        heads: Name and source column of each head.
        class_head: The name of the head of class folders.
        image_column: Name of the column of paths in the files written.
        separator: Of the source, see `read_table`; the files written have commas.
        ratios: Shares of train, val and test, in any unit. A split with a ratio of 0 gets no file.
        seed: The same seed gives the same splits.
        stratify: The head each of whose labels (an empty one too) is to have these shares in each split.
        group: The column of the source whose rows of one value go into one split, such as a product's photos; rows
            without a value stand alone.
        force: Overwrite files of these names, and remove that of a split with a ratio of 0.

    Returns:
        The number of rows of 'all', 'train', 'val' and 'test', and of those left out for want of their image as
        'missing'.

    Raises:
        DataError: Something is wrong with the source or the arguments; nothing has been written then.
    """
    source, directory = Path(source), Path(directory)
    _check_ratios(ratios)
    outputs = _outputs(source, directory, 'csv', force)
    _outputs(source, directory, 'jsonl', force)  # which it will be where there are lists
    if source.is_dir():
        if image is not None or heads is not None:
            raise DataError(f'{source}: --image and --heads are of tables; leave them out, or name a table')
        frame = read_class_folders(source, _IMAGE, class_head)
        image, heads = f'{{{_IMAGE}}}', [(class_head, class_head)]
    else:
        if image is None or heads is None:
            raise DataError(f"{source}: name its images and heads: --image './images/{{id}}.jpg' --heads COLUMN ...")
        frame = read_cells(source, separator, join_surplus=True)
    names = [image_column, *(name for name, _ in heads)]
    if not heads or len(set(names)) < len(names):
        raise DataError(f'{", ".join(names)}: expected the image column and one or more heads, all named differently')

    _check_columns(source, frame, dict(heads), stratify, group)
    rows = _rows_with_image(source, frame, image, directory)
    labels, groups = (
        [row[column] for _, row in rows] if column is not None else [''] * len(rows)
        for column in (None if stratify is None else dict(heads).get(stratify), group))
    chosen = (_draw(len(rows), ratios, seed) if stratify is group is None
              else _draw_groups(labels, groups, ratios, seed))
    table = [[path, *(row[column] for _, column in heads)] for path, row in rows]
    lists = any(cell.startswith(LIST) for row in table for cell in row)  # of tags, which no CSV can hold
    if lists:
        outputs = {name: path.with_suffix('.jsonl') for name, path in outputs.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f'{directory}: cannot make this folder ({error.strerror}); choose another --out') from error
    for name, indices in {**chosen, 'all': range(len(table))}.items():
        for ending in ('csv', 'jsonl'):  # an earlier one of the other kind might count before the new one
            if directory / f'{name}.{ending}' != outputs[name] or name in SPLITS and not ratios[SPLITS.index(name)]:
                (directory / f'{name}.{ending}').unlink(missing_ok=True)
        if name in SPLITS and not ratios[SPLITS.index(name)]:
            continue
        chosen_rows = [table[index] for index in indices]
        lines = (_json_line(names, row) for row in chosen_rows) if lists else map(csv_line, [names, *chosen_rows])
        write_atomic(outputs[name], ''.join(f'{line}\n' for line in lines))
    return {
        'missing': len(frame) - len(table), **{name: len(indices) for name, indices in chosen.items()},
        'all': len(table)}


def _check_columns(
        source: Path,
        frame: pd.DataFrame,
        heads: dict[str, str],
        stratify: str | None,
        group: str | None,
) -> None:
    """Raise UserError unless the columns that are asked for are there."""
    unknown = [column for column in heads.values() if column not in frame]
    if unknown:
        raise DataError(
            f'{source}: no column {", ".join(unknown)} (there are: {", ".join(frame)}); name them as '
            '--heads NAME=COLUMN'
        )
    if stratify is not None and stratify not in heads:
        raise DataError(f'--stratify {stratify}: no such head (there are: {", ".join(heads)})')
    if group is not None and group not in frame:
        raise DataError(f'--group {group}: {source} has no such column (there are: {", ".join(frame)})')


def _rows_with_image(
        source: Path,
        frame: pd.DataFrame,
        image: str,
        directory: Path,
) -> list[tuple[str, dict[str, str]]]:
    """The rows whose image exists, each with its path as the files in `directory` are to have it.

    Raises:
        DataError: The pattern cannot be filled, no image is there, or two rows have the same.
    """
    numbered = list(zip(frame.index.tolist(), frame.to_dict('records')))
    paths = _fill(image, source, list(frame), numbered)
    base = _find_base(source, paths)
    # A reader finds images from the folder of its CSV, from its parent or from the working directory. Paths stay as
    # they are where that leads to the same images.
    homes = (directory.resolve(), directory.resolve().parent, Path.cwd())
    moved = base.resolve() not in homes
    rows: list[tuple[str, dict[str, str]]] = []
    seen: dict[str, int] = {}
    for path, (number, row) in zip(paths, numbered):
        if not os.path.isfile(base / path):
            continue
        if path in seen:  # it could land in two splits
            raise DataError(
                f'{source} row {number}: its image {path} is that of row {seen[path]} already; remove one of the two '
                f'rows or correct --image {image}'
            )
        seen[path] = number
        written = os.path.relpath(base.resolve() / path, directory.resolve()) if moved else path
        if not is_utf8(written):
            raise DataError(f'{escaped(directory / written)}: this path to an image is not UTF-8, as a CSV needs it; '
                            'rename the folder, or leave out --out')
        rows.append((written, row))
    return rows


def _draw(length: int, ratios: Sequence[float], seed: int) -> dict[str, Sequence[int]]:
    """The rows of each split, in the order of the source."""
    order = list(range(length))
    random.Random(seed).shuffle(order)
    train_end, val_end = (round(length * sum(ratios[:count]) / sum(ratios)) for count in (1, 2))
    return {
        'train': sorted(order[:train_end]),
        'val': sorted(order[train_end:val_end]),
        'test': sorted(order[val_end:]),
    }


def _draw_groups(
        labels: Sequence[str],
        groups: Sequence[str],
        ratios: Sequence[float],
        seed: int,
) -> dict[str, Sequence[int]]:
    """The rows of each split, in the order of the source, so that labels are spread evenly and groups stay whole.

    Groups go in a random order, large ones first, those of one label (the most frequent in them) after each other, each
    into the split that is then the furthest below its share: of this label, where groups differ in size and it has rows
    enough for each split, otherwise of all rows. scikit-learn's splitters refuse a label of one row, as most CSVs have.

    Args:
        labels: The label of each row.
        groups: The group of each row; '' where it is alone.
        ratios: See `split_csv`, as the next.
        seed: The same seed gives the same splits.
    """
    members: dict[str | int, list[int]] = {}
    for row, name in enumerate(groups):
        members.setdefault(name or row, []).append(row)
    order = list(members.values())
    random.Random(seed).shuffle(order)
    order.sort(key=len, reverse=True)
    shares = {name: ratio / sum(ratios) for name, ratio in zip(SPLITS, ratios) if ratio}
    chosen: dict[str, list[int]] = {name: [] for name in SPLITS}
    of_label = [(Counter(labels[row] for row in rows).most_common(1)[0][0], rows) for rows in order]
    before = 0
    for _, alike in itertools.groupby(sorted(of_label, key=itemgetter(0)), key=itemgetter(0)):
        sets = [rows for _, rows in alike]
        total = sum(map(len, sets))
        by_label = len(sets[0]) > 1 and total * min(shares.values()) >= 1
        here, done = dict.fromkeys(shares, 0), 0
        for rows in sets:
            done += len(rows)
            below = {name: (done * share - here[name] if by_label else 0.0,
                            (before + done) * share - len(chosen[name])) for name, share in shares.items()}
            name = max(below, key=below.__getitem__)
            chosen[name] += rows
            here[name] += len(rows)
        before += total
    return {name: sorted(rows) for name, rows in chosen.items()}


def _check_ratios(ratios: Sequence[float]) -> None:
    usable = all(math.isfinite(ratio) and ratio >= 0 for ratio in ratios)
    if len(ratios) != 3 or not usable or sum(ratios) <= 0:
        text = ' '.join(f'{ratio:g}' for ratio in ratios)
        raise DataError(f'ratios {text}: expected three numbers of 0 or more that are not all 0, such as 80 10 10')


def _json_line(names: Sequence[str], cells: Sequence[str]) -> str:
    """A row as JSON, lists as lists."""
    values = [cell if (values := values_of_list(cell)) is None else values for cell in cells]
    return json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False)


def _outputs(source: Path, directory: Path, ending: str, force: bool) -> dict[str, Path]:
    """The files to write, by the name of the split.

    Raises:
        DataError: One is the source, or is there and is not to be overwritten.
    """
    named = {name: directory / f'{name}.{ending}' for name in (*SPLITS, 'all')}
    outputs = named.values()
    if any(path.resolve() == source.resolve() for path in outputs):
        raise DataError(f'{source} would be overwritten by its own split; choose another folder with --out')
    taken = [str(path) for path in outputs if path.exists()]
    if taken and not force:
        raise DataError(f'{", ".join(taken)}: already there; overwrite with --force or choose another --out')
    return named


def _fill(image: str, source: Path, columns: list[str], numbered: list[tuple[int, dict[str, str]]]) -> list[str]:
    """The path of each row's image."""
    try:
        return [image.format_map(row) for _, row in numbered]
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise DataError(
            f'--image {image} cannot be filled from {source} ({error}); put its columns in braces, such as '
            f'{{{columns[0]}}} (there are: {", ".join(columns)})'
        ) from error


def _find_base(source: Path, paths: list[str]) -> Path:
    bases = (source.absolute().parent, source.absolute().parent.parent, Path.cwd())
    if source.is_dir():
        bases = (source.absolute(),) * 3
    for base in bases:
        if any(os.path.isfile(base / path) for path in paths):
            return base
    looked = ', '.join(dict.fromkeys(str(base) for base in bases))
    raise DataError(
        f'{source}: none of its {len(paths)} images is on disk: {paths[0]}, ...; looked in {looked}; put them there '
        'or correct --image, a path relative to one of these'
    )
