"""From the name of a split to its file or its shards, the same for all commands."""
from pathlib import Path

from timm_multilabel.data.shards import Shards, find_shards
from timm_multilabel.errors import UserError


def split_path(folder: Path, name: str) -> Path:
    """The file of a split: NAME.csv or NAME in the data directory, or else the path NAME.

    Where there is none of these, the file that the name asks for.
    """
    inside = folder / name if name.endswith('.csv') else folder / f'{name}.csv'
    return next((path for path in _candidates(folder, name) if path.is_file()), inside)


def find_split(
        folder: Path,
        name: str,
        image_column: str = 'image_path',
        missing_value: str | None = None,
) -> Path | Shards | None:
    """The CSV of a split, or else its shards; None where there is neither.

    Args:
        folder: The data directory.
        name: See `split_path` and `find_shards`.
        image_column: See `Shards`, as the next one.
        missing_value: A label that is missing.
    """
    path = split_path(folder, name)
    if path.is_file() and path.suffix not in ('.tar', '.parquet'):
        return path
    return find_shards(folder, name, image_column, missing_value)


def no_split(folder: Path, name: str) -> UserError:
    """The error of a split that `find_split` does not find."""
    places = ', '.join(map(str, _candidates(folder, name)))
    return UserError(f'{split_path(folder, name)}: no such file; looked for {places} and shards of this name')


def files_of_split(split: Path | Shards) -> set[Path]:
    """The real paths of a split's files."""
    return {Path(file).resolve() for file in (split.files if isinstance(split, Shards) else [split])}


def _candidates(folder: Path, name: str) -> list[Path]:
    return [folder / f'{name}.csv', folder / name, Path(name)]
