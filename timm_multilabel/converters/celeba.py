"""CelebA: 40 attributes of -1 or 1, and a file that says of which split an image is.

As its authors publish it (list_attr_celeba.txt: the number of images, the attributes, then a row an image;
list_eval_partition.txt: an image and 0, 1 or 2), and as Kaggle does (the same as CSVs).
"""
from collections.abc import Iterator, Mapping
from pathlib import Path

from timm_multilabel.converters.form import Form, Row
from timm_multilabel.data.table_files import read_cells, read_text_of
from timm_multilabel.errors import DataError

_SPLITS = {'train': '0', 'val': '1', 'test': '2'}


def _file(source: Path, name: str) -> Path | None:
    """A file of CelebA in a folder or its Anno/ and Eval/."""
    places = [source / folder / f'{name}{ending}' for folder in ('', 'Anno', 'Eval') for ending in ('.txt', '.csv')]
    return next((path for path in places if path.is_file()), None)


def _find(source: Path) -> Mapping[str, Path]:
    attributes, splits = _file(source, 'list_attr_celeba'), _file(source, 'list_eval_partition')
    return dict.fromkeys(_SPLITS, attributes) if attributes is not None and splits is not None else {}


def _read(path: Path, split: str, source: Path) -> Iterator[Row]:
    partition = _file(source, 'list_eval_partition')
    assert partition is not None  # as `_find` saw
    chosen = {image for image, number in _rows(partition, 2)[1] if number == _SPLITS[split]}
    attributes, rows = _rows(path, None)
    for number, (image, *values) in enumerate(rows, 1):
        if image not in chosen:
            continue
        if not set(values) <= {'1', '-1', '0'}:
            raise DataError(f'{path}: image {number} ({image}): an attribute is not -1 or 1; download it again')
        yield {'': image, 'attributes': [name for name, value in zip(attributes, values) if value == '1']}


def _rows(path: Path, width: int | None) -> tuple[list[str], list[list[str]]]:
    """The names of the columns after the first one, and the rows."""
    if path.suffix == '.csv':
        frame = read_cells(path).iloc[:, :width]
        return list(frame.columns[1:]), frame.to_numpy().tolist()
    lines = [line.split() for line in read_text_of(path).splitlines() if line.strip()]
    if width is not None:  # no header
        rows, names = lines, ['']
    else:
        names, rows = (lines[1], lines[2:]) if len(lines) > 2 else ([], [])
    for number, row in enumerate(rows, len(lines) - len(rows) + 1):
        if len(row) != len(names) + 1:
            raise DataError(f'{path} line {number}: {len(row)} words, expected {len(names) + 1}; download it again')
    return names, rows


FORM = Form('CelebA', 'list_attr_celeba.txt and list_eval_partition.txt', _find, _read, lambda path: (
    'img_align_celeba', 'img_align_celeba/img_align_celeba', 'Img/img_align_celeba', 'images', ''))
