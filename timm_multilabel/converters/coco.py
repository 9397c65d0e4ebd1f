"""COCO annotations: the categories of the objects in an image become its tags.

https://cocodataset.org/#format-data: `images` with id and file_name, `categories` with id and name, `annotations` with
image_id and category_id.
"""
from collections.abc import Iterator, Mapping
from pathlib import Path

from timm_multilabel.converters.form import Form, Row, entry, json_of
from timm_multilabel.errors import DataError


def _find(source: Path) -> Mapping[str, Path]:
    if source.is_file():
        return {_split(source): source} if source.suffix == '.json' and _is_coco(source) else {}
    files = sorted((source / 'annotations').glob('instances_*.json'))
    return {_split(path): path for path in files}


def _split(path: Path) -> str:
    """The split that a file is named after: instances_train2017.json."""
    return next((name for name in ('train', 'val', 'test') if name in path.stem), 'table')


def _is_coco(path: Path) -> bool:
    found = json_of(path)
    return isinstance(found, dict) and {'images', 'annotations', 'categories'} <= found.keys()


def _read(path: Path, split: str, source: Path) -> Iterator[Row]:
    found = json_of(path)
    names = {entry(each, 'id', f'{path}: categories', int): entry(each, 'name', f'{path}: categories', str)
             for each in entry(found, 'categories', str(path), list)}
    tags: dict[int, dict[str, None]] = {}
    for each in entry(found, 'annotations', str(path), list):
        category = entry(each, 'category_id', f'{path}: annotations', int)
        if category not in names:
            raise DataError(f'{path}: annotations: there is no category {category}; export it again')
        tags.setdefault(entry(each, 'image_id', f'{path}: annotations', int), {})[names[category]] = None
    for each in entry(found, 'images', str(path), list):
        image = entry(each, 'file_name', f'{path}: images', str)
        yield {'': image, 'objects': list(tags.get(entry(each, 'id', f'{path}: images', int), ()))}


FORM = Form('COCO', 'annotations/instances_*.json, or one JSON file with images, annotations and categories', _find,
            _read, ('train2017', 'val2017', 'train2014', 'val2014', 'images', 'train', 'val'))
