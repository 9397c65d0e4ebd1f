"""CSV -> rows: image paths that exist and class indices, or one clear line about what is wrong."""
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from timm_multilabel.errors import UserError
from timm_multilabel.labels import MISSING, UNKNOWN, LabelSpace

_EXAMPLES = 3  # rows, files or labels named in a message


@dataclass(frozen=True)
class Table:
    """A CSV read as text.

    `frame` has the file's columns, and the row numbers of the file (the header is row 1) as its index; blank lines are
    left out.
    """
    path: Path
    frame: pd.DataFrame
    image_column: str

    @property
    def label_columns(self) -> list[str]:
        return [column for column in self.frame.columns if column != self.image_column]


@dataclass(frozen=True)
class Rows:
    """The rows of one split, ready to load.

    `images` are paths (N,), `targets` class indices (N, H) with MISSING for no label, `numbers` the rows' numbers in
    the file `source` (N,).
    """
    source: Path
    images: np.ndarray
    targets: torch.Tensor
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def where(self, index: int) -> str:
        """Name a row as messages do."""
        return f'{self.source} row {self.numbers[index]}'


def read_table(path: str | Path, image_column: str = 'image_path') -> Table:
    """Read a CSV as text, so that `NA` stays a label; only an empty (or blank) cell is a missing one.

    Raises:
        UserError: The file is missing, unreadable, empty, has no image column, an unnamed or a repeated column, or a
            row without an image.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path}: no such file')
    try:
        # The header is read as a row: pandas would rename repeated columns and take surplus cells for an index.
        cells = pd.read_csv(
            path, header=None, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding='utf-8-sig')
    except (ValueError, OSError) as error:  # pandas' parser errors and wrong encodings are ValueErrors
        reason = ' '.join(str(error).split())
        raise UserError(f'{path}: cannot be read as a CSV in UTF-8 ({reason})') from error
    cells = cells.fillna('').map(str.strip)
    cells.index = np.arange(1, len(cells) + 1)
    header, frame = cells.iloc[0].tolist(), cells.iloc[1:]
    frame = frame[(frame != '').any(axis=1)]

    for position, name in enumerate(header, 1):
        if not name:
            raise UserError(f'{path} row 1: column {position} has no name; name it or remove it')
        if header.index(name) != position - 1:
            raise UserError(f"{path} row 1: two columns are called '{name}'; rename or remove one")
    frame.columns = header
    if image_column not in header:
        raise UserError(
            f"{path}: no column '{image_column}' (there are: {', '.join(header)}); "
            'name the one that holds the image paths with --image-column')
    if frame.empty:
        raise UserError(f'{path}: the table has no rows')
    without = frame.index[frame[image_column] == '']
    if len(without):
        raise UserError(f"{path} row {without[0]}: no image in column '{image_column}'; name one or remove the row")
    return Table(path, frame, image_column)


def find_images(table: Table) -> list[str]:
    """Find the images of a table on disk.

    A path is taken as written relative to the CSV's folder, to the parent of that folder, or to the working directory,
    or by its name under `images/` beside the CSV: the first of these under which any of the images exists serves for
    all.

    Raises:
        UserError: Images are missing, with how many and the first few.
    """
    folder = table.path.parent
    rules = {
        f'in {folder}': lambda text: folder / text,
        f'in {folder / ".."}': lambda text: folder / '..' / text,
        'in the working directory': lambda text: Path(text),
        f'by name in {folder / "images"}': lambda text: folder / 'images' / Path(text).name,
    }
    texts = table.frame[table.image_column]
    for rule in rules.values():
        paths = [rule(text) for text in texts]
        exists = [os.path.isfile(path) for path in paths]
        if any(exists):
            break
    if all(exists):
        return [str(path) for path in paths]
    missing = [f'{text} (row {row})' for (row, text), found in zip(texts.items(), exists) if not found]
    examples = ', '.join(missing[:_EXAMPLES]) + (', ...' if len(missing) > _EXAMPLES else '')
    if len(missing) == len(texts):
        raise UserError(
            f'{table.path}: none of its {len(texts)} images is on disk: {examples}; looked {", ".join(rules)}')
    raise UserError(
        f'{table.path}: {len(missing)} of {len(texts)} images are missing on disk: {examples}; '
        'add them or remove their rows')


def find_label_space(tables: list[Table], heads: list[str] | None) -> LabelSpace:
    """The label space of a data directory: its heads from the last table, their classes from the first.

    Args:
        tables: all.csv, where there is one, and train.csv.
        heads: The columns to learn; every column but the image's when None.

    Raises:
        UserError: A head that is no column, or a column without labels.
    """
    source, train = tables[0], tables[-1]
    names = train.label_columns if heads is None else heads
    for name in names:
        if name == 'ema' or name.startswith('ema_'):  # summary.csv names the figures of EMA weights so
            raise UserError(f"{train.path}: a label column may not be called '{name}'; rename it")
    for table in tables:
        for name in names:
            if name not in table.label_columns:
                raise UserError(
                    f"{table.path}: no label column '{name}' (there are: {', '.join(table.label_columns) or 'none'}); "
                    'choose columns with --heads')
    try:
        return LabelSpace.from_columns({name: source.frame[name] for name in names})
    except ValueError as error:
        raise UserError(f'{source.path}: {error}; leave it out with --heads') from error


def unknown_labels(table: Table, label_space: LabelSpace) -> dict[str, dict[str, list[int]]]:
    """The labels of a table that are no classes: {head: {label: rows}}, without the heads that have none."""
    found = {}
    for head in label_space.heads:
        if head.name in table.frame:
            column = table.frame[head.name]
            strange = column[head.encode(column) == UNKNOWN]
            if len(strange):
                found[head.name] = {label: list(rows) for label, rows in strange.groupby(strange).groups.items()}
    return found


def describe_unknown(unknown: dict[str, dict[str, list[int]]]) -> str:
    """One line on what `unknown_labels` found."""
    parts = []
    for head, labels in unknown.items():
        for label, rows in labels.items():
            shown = ', '.join(str(row) for row in rows[:_EXAMPLES]) + (', ...' if len(rows) > _EXAMPLES else '')
            parts.append(f"{head} '{label}' in {len(rows)} row{'s' if len(rows) > 1 else ''} ({shown})")
    more = len(parts) - 2 * _EXAMPLES
    return '; '.join(parts[:2 * _EXAMPLES]) + (f'; and {more} more labels' if more > 0 else '')


def encode_rows(
        table: Table,
        label_space: LabelSpace,
        ignore_unknown: bool = False,
        way_out: str = 'mend them, or take them as missing with --unknown-labels ignore',
) -> Rows:
    """Find a table's images and turn its labels into class indices.

    A head that the table has no column for is missing in every row.

    Args:
        table: The table.
        label_space: Heads and classes.
        ignore_unknown: Take a label that is no class as missing.
        way_out: What to advise where such a label is an error.

    Raises:
        UserError: Images are missing, or a label is unknown.
    """
    unknown = unknown_labels(table, label_space)
    if unknown and not ignore_unknown:
        raise UserError(
            f'{table.path}: labels that training does not know: {describe_unknown(unknown)}; {way_out}')
    columns = [
        head.encode(table.frame[head.name]) if head.name in table.frame else np.full(len(table.frame), MISSING)
        for head in label_space.heads
    ]
    targets = np.stack(columns, axis=1) if columns else np.empty((len(table.frame), 0), dtype=np.int64)
    return Rows(
        source=table.path,
        images=np.array(find_images(table)),
        targets=torch.from_numpy(np.where(targets == UNKNOWN, MISSING, targets)),
        numbers=table.frame.index.to_numpy(),
    )
