"""What a form of another program's data is."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_multilabel.errors import DataError
from timm_multilabel.files import read_json

_MOST = 2 ** 32  # bytes of a JSON file

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
        folders: Where images usually lie below the source.
    """
    name: str
    needs: str
    find: Callable[[Path], Mapping[str, Path]]
    read: Callable[[Path, str, Path], Iterator[Row]]
    folders: Sequence[str] = ()


def json_of(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: It cannot be read.
    """
    return read_json(path, 'JSON', 'export it again', most=_MOST)


def entry(holder: Any, name: str, where: str, kind: type | tuple[type, ...]) -> Any:
    """A value of a JSON object that must be there.

    Raises:
        DataError: It is not there, or of another type.
    """
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        raise DataError(f"{where}: no '{name}' as this form has it; export it again")
    return value
