"""From the name of a split to its file or its shards, the same for all commands."""
import shlex
from pathlib import Path

from timm_multilabel.data.class_folders import has_class_folders
from timm_multilabel.data.shards import Shards, find_shards
from timm_multilabel.data.table_files import ENDINGS, holds_paths
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import DataError
from timm_multilabel.places import Address, path_of, why_missing
from timm_multilabel.stores import WEB, is_address

_OTHER_SPLITS = ('val', 'test', 'unlabelled')


def split_path(folder: Path, name: str) -> Path:
    """The table of a split: the file NAME.csv (.tsv, ...) or NAME in the data directory, or else the path NAME.

    A folder of class folders with that name or path is a table too, in a data directory without tables or shards of
    splits. Where there is none of these, the file that the name asks for.
    """
    inside = _in(folder, name if name.endswith(ENDINGS) or is_address(name) else f'{name}.csv')
    found = next((path for path in places_of_split(folder, name) if path.is_file()), None)
    return found or _class_folders(folder, name) or inside


def table_of_classes(folder: Path, written: TableFormat | None = None) -> Path:
    """The table that names all classes, all.csv (.tsv, ...); where there is none, all.csv."""
    paths = [folder / f'all{ending}' for ending in ENDINGS]
    return next((path for path in paths if path.is_file() and (
        path.suffix != '.parquet' or holds_paths(path, (written or TableFormat()).image_column))), paths[0])


def find_split(
        folder: Path,
        name: str,
        written: TableFormat | None = None,
) -> Path | Shards | None:
    """The table of a split, or else its shards; None where there is neither.

    Args:
        folder: The data directory.
        name: See `split_path` and `find_shards`.
        written: How tables and shards are written.
    """
    written = written or TableFormat()
    path = split_path(folder, name)
    if path.is_file() and path.suffix != '.tar' and (
            path.suffix != '.parquet' or holds_paths(path, written.image_column)):
        return path
    shards = find_shards(folder, name, written.image_column, written.missing_value)
    return path if shards is None and path.is_dir() else shards


def check_folder(folder: Path) -> None:
    """Raise UserError, which says how to make one, unless a data directory is there."""
    if isinstance(folder, Address):
        if not str(folder).startswith(WEB) and not folder.is_dir():
            raise DataError(f'{folder}: {why_missing(folder, "folder")}; name the folder that holds train.csv, val.csv '
                            'and the images')
        return
    if folder.is_file():
        hint = {'.yaml': 'pass a recipe or the args.yaml of a run with -c', '.csv': _make_of(folder)}.get(
            folder.suffix.lower(), 'name the folder that holds train.csv, val.csv and the images')
        raise DataError(f'{folder}: a file, where a data directory is expected; {hint}')
    if not folder.is_dir():
        raise DataError(f'{folder}: no such data directory; it holds train.csv, val.csv and the images')


def no_split(folder: Path, name: str) -> DataError:
    """The error of a split that `find_split` does not find."""
    places = ', '.join(map(str, dict.fromkeys((_in(folder, f'{name}.csv'), _in(folder, name), path_of(name)))))
    others = ', '.join(ENDINGS[1:])
    tables = sorted(path for path in folder.glob('*.csv') if path.is_file() and path.stem not in _OTHER_SPLITS)
    hint = ''
    if name == 'train':
        hint = (f'; {_make_of(tables[0])}' if tables else
                '; write a CSV with the path of an image and its labels in each row, and split it with: '
                'timm-multilabel split; or split a folder that has a folder of images for each class')
    path = split_path(folder, name)
    return DataError(f'{path}: {why_missing(path)}; looked for {places} (or {others}), class folders and '
                     f'shards of this name{hint}')


def _make_of(table: Path) -> str:
    """How to make the splits of a data directory from a CSV."""
    return (f"make its train.csv, val.csv and test.csv with: timm-multilabel split {shlex.quote(str(table))} "
            "--image '{IMAGE_COLUMN}' --heads COLUMN ...")


def files_of_split(split: Path | Shards) -> set[Path]:
    """The real paths of a split's files."""
    return {path_of(file).resolve() for file in (split.files if isinstance(split, Shards) else [split])}


def places_of_split(folder: Path, name: str) -> list[Path]:
    """Where the table of a split may be, in order."""
    if is_address(name):
        return [*(path_of(f'{name}{ending}') for ending in ENDINGS), path_of(name)]
    return [*(folder / f'{name}{ending}' for ending in ENDINGS), folder / name, path_of(name)]


def _in(folder: Path, name: str) -> Path:
    """What a name stands for in a folder; an address stands alone."""
    return path_of(name) if is_address(name) else folder / name


def _class_folders(folder: Path, name: str) -> Path | None:
    """The folder of class folders that a name stands for.

    Not beside tables or shards, whose images may lie in folders that are called like the splits.
    """
    inside = folder / name
    splits = ('train', *_OTHER_SPLITS)
    if has_class_folders(inside) and not any(
            path.is_file() for split in splits for path in folder.glob(f'{split}.*') if path.name.endswith(ENDINGS)
    ) and all(find_shards(folder, split, '') is None for split in splits):
        return inside
    path = path_of(name)
    return path if path.name != name and has_class_folders(path) else None
