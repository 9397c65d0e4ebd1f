"""What a form of another program's data is."""
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_multilabel.data.table_files import read_text_of
from timm_multilabel.errors import DataError

Row = Mapping[str, Any]
"""Of an image: its path, under '', and its labels: a text, a list of tags, or None where there is none."""


@dataclass(frozen=True)
class Form:
    """A form of data.

    Args:
        name: What messages call it.
        needs: The files that it is told by, for a message.
        find: The files of a source that it can read, by the name of the split that each makes ('table' where it has yet
            to be divided); empty where the source is of another form.
        read: The rows of such a file, given the source; raises `DataError` where it is damaged.
        folders: Where the images of such a file usually lie, below the source or the folder of images.
    """
    name: str
    needs: str
    find: Callable[[Path], Mapping[str, Path]]
    read: Callable[[Path, str, Path], Iterator[Row]]
    folders: Callable[[Path], Sequence[str]]


def json_of(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return json.loads(read_text_of(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}: cannot be read as JSON ({error}); export it again') from error


def entry(holder: Any, name: str, where: str, kind: type | tuple[type, ...]) -> Any:
    """A value of a JSON object that must be there.

    Raises:
        DataError: It is not there, or of another type.
    """
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        raise DataError(f"{where}: no '{name}' as this form has it; export it again")
    return value
