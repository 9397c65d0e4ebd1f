"""What a form of another program's data is."""
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_multilabel.data.table_files import ENDINGS, read_text_of
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


@dataclass(frozen=True)
class Converted:
    """What became of a data set.

    Args:
        form: What it was, such as COCO.
        folder: The data directory.
        rows: The rows of each table, by the name of its split.
        missing: Images that are not on disk, whose rows were left out.
        skipped: Files of the data set of whose images none is there.
        tags: The heads whose labels are lists of tags.
        heads: All heads.
    """
    form: str
    folder: Path
    rows: Mapping[str, int]
    missing: int
    skipped: Sequence[str]
    tags: Sequence[str]
    heads: Sequence[str]


_TABLES = ('train', 'val', 'test', 'all', 'table', 'unlabelled')


def check_outputs(folder: Path, splits: Iterable[str], force: bool) -> dict[str, Path]:
    """The tables to write, by the names of their splits.

    Raises:
        DataError: One is there and may not be overwritten, or another table is there that would be read too.
    """
    outputs = {split: folder / f'{split}.jsonl' for split in splits}
    others = [path for name in _TABLES for ending in ENDINGS
              if (path := folder / f'{name}{ending}').exists() and path not in outputs.values()]
    if others:
        raise DataError(f'{", ".join(map(str, others))}: already there, and would be read too; choose another folder')
    taken = [str(path) for path in outputs.values() if path.exists()]
    if taken and not force:
        raise DataError(f'{", ".join(taken)}: already there; overwrite with --force or choose another folder')
    return outputs


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
