"""From the name of a split to its file or its shards, the same for all commands."""
import shlex
from pathlib import Path

from timm_multilabel.config.train import DataSettings
from timm_multilabel.data.shards import Shards, find_shards
from timm_multilabel.errors import DataError

_OTHER_SPLITS = ('val', 'test', 'unlabelled')


def split_path(folder: Path, name: str) -> Path:
    """The file of a split: NAME.csv or NAME in the data directory, or else the path NAME.

    Where there is none of these, the file that the name asks for.
    """
    inside = folder / name if name.endswith('.csv') else folder / f'{name}.csv'
    return next((path for path in _candidates(folder, name) if path.is_file()), inside)


def find_split(
        folder: Path,
        name: str,
        image_column: str = DataSettings.image_column,
        missing_value: str | None = None,
) -> Path | Shards | None:
    """The CSV of a split, or else its shards; None where there is neither.

    Args:
        folder: The data directory.
        name: See `split_path` and `find_shards`.
        image_column: The column of the images in Parquet, see `Shards`.
        missing_value: A further text that means a missing label.
    """
    path = split_path(folder, name)
    if path.is_file() and path.suffix not in ('.tar', '.parquet'):
        return path
    return find_shards(folder, name, image_column, missing_value)


def check_folder(folder: Path) -> None:
    """Raise UserError, which says how to make one, unless a data directory is there."""
    if folder.is_file():
        hint = {'.yaml': 'pass a recipe or the args.yaml of a run with -c', '.csv': _make_of(folder)}.get(
            folder.suffix.lower(), 'name the folder that holds train.csv, val.csv and the images')
        raise DataError(f'{folder}: a file, where a data directory is expected; {hint}')
    if not folder.is_dir():
        raise DataError(f'{folder}: no such data directory; it holds train.csv, val.csv and the images')


def no_split(folder: Path, name: str) -> DataError:
    """The error of a split that `find_split` does not find."""
    places = ', '.join(map(str, _candidates(folder, name)))
    tables = sorted(path for path in folder.glob('*.csv') if path.is_file() and path.stem not in _OTHER_SPLITS)
    hint = ''
    if name == 'train':
        hint = (f'; {_make_of(tables[0])}' if tables else
                '; write a CSV with the path of an image and its labels in each row, and split it with: '
                'timm-multilabel split')
    return DataError(f'{split_path(folder, name)}: no such file; looked for {places} and shards of this name{hint}')


def _make_of(table: Path) -> str:
    """How to make the splits of a data directory from a CSV."""
    return (f"make its train.csv, val.csv and test.csv with: timm-multilabel split {shlex.quote(str(table))} "
            "--image '{IMAGE_COLUMN}' --heads COLUMN ...")


def files_of_split(split: Path | Shards) -> set[Path]:
    """The real paths of a split's files."""
    return {Path(file).resolve() for file in (split.files if isinstance(split, Shards) else [split])}


def _candidates(folder: Path, name: str) -> list[Path]:
    return [folder / f'{name}.csv', folder / name, Path(name)]
