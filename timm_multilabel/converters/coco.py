"""COCO annotations: the categories of the objects in an image become its tags.

https://cocodataset.org/#format-data: `images` with id and file_name, `categories` with id and name, `annotations` with
image_id and category_id.
"""
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_multilabel.converters.form import Form, Row, entry, json_of
from timm_multilabel.errors import DataError


def _find(source: Path) -> Mapping[str, Path]:
    if source.is_file():
        return {_split(source): source} if source.suffix == '.json' and _is_coco(source) else {}
    found: dict[str, Path] = {}
    for path in sorted((source / 'annotations').glob('instances_*.json')):
        if _split(path) in found:
            raise DataError(f'{found[_split(path)]} and {path.name}: both are of {_split(path)}; convert one of them '
                            'by its own path')
        found[_split(path)] = path
    return found


def _split(path: Path) -> str:
    """The split that a file is named after: instances_train2017.json."""
    return next((name for name in ('train', 'val', 'test') if name in path.stem), 'table')


def _is_coco(path: Path) -> bool:
    found = json_of(path)
    return isinstance(found, dict) and {'images', 'annotations', 'categories'} <= found.keys()


def _read(path: Path, split: str, source: Path) -> Iterator[Row]:
    found = json_of(path)
    names = {entry(each, 'id', where, int): entry(each, 'name', where, str)
             for where, each in _entries(found, 'categories', path)}
    tags: dict[int, dict[str, None]] = {}
    for where, each in _entries(found, 'annotations', path):
        category = entry(each, 'category_id', where, int)
        if category not in names:
            raise DataError(f'{where}: there is no category {category}; export it again')
        tags.setdefault(entry(each, 'image_id', where, int), {})[names[category]] = None
    for where, each in _entries(found, 'images', path):
        yield {'': entry(each, 'file_name', where, str), 'objects': list(tags.get(entry(each, 'id', where, int), ()))}


def _entries(found: Any, name: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a list, each with what messages call it."""
    for number, each in enumerate(entry(found, name, str(path), list)):
        yield f'{path}: {name}[{number}]', each


def _folders(path: Path) -> Sequence[str]:
    """The folder that is named as the file is, and those of its split."""
    name = path.stem.removeprefix('instances_')
    return [name, f'images/{name}', _split(path), f'images/{_split(path)}', 'images', '']


FORM = Form('COCO', 'annotations/instances_*.json, or one JSON file with images, annotations and categories', _find,
            _read, _folders)
