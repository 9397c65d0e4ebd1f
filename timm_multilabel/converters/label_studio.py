"""Label Studio: the choices of an image, from an export as JSON or JSON-MIN.

https://labelstud.io/guide/export: in JSON, tasks with `data` and `annotations`, whose `result` has entries of type
`choices`; in JSON-MIN, an object a task, in which a choice is a text or {"choices": [...]}.
"""
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from timm_multilabel.converters.form import Form, Row, entry, json_of
from timm_multilabel.data.image_names import ENDINGS
from timm_multilabel.errors import DataError


def _find(source: Path) -> Mapping[str, Path]:
    if source.suffix != '.json' or not source.is_file():
        return {}
    tasks = json_of(source)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        return {}
    whole = all('data' in task and 'annotations' in task for task in tasks)
    return {'table': source} if tasks and (whole or all(_image(task) for task in tasks)) else {}


def _read(path: Path, split: str, source: Path) -> Iterator[Row]:
    rows: dict[str, Row] = {}  # JSON-MIN has an object for each annotation of a task
    for number, task in enumerate(json_of(path), 1):
        where = f'{path} task {number}'
        data = entry(task, 'data', where, dict) if 'annotations' in task else task
        image = _image(data)
        if image is None:
            raise DataError(f'{where}: its data name no image; leave it out of the export')
        rows[image] = {'': image, **(_of_annotations(task, where) if 'annotations' in task else _of_minimal(task))}
    yield from rows.values()


def _of_annotations(task: dict[str, Any], where: str) -> dict[str, Any]:
    """The choices of the last annotation that was not cancelled."""
    done = [each for each in entry(task, 'annotations', where, list)
            if isinstance(each, dict) and not each.get('was_cancelled')]
    labels: dict[str, Any] = {}
    for each in entry(done[-1], 'result', where, list) if done else []:
        if isinstance(each, dict) and each.get('type') == 'choices':
            value = entry(entry(each, 'value', where, dict), 'choices', where, list)
            labels[entry(each, 'from_name', where, str)] = _label(value)
    return labels


def _of_minimal(task: dict[str, Any]) -> dict[str, Any]:
    labels = {}
    for name, value in task.items():
        if isinstance(value, dict) and isinstance(value.get('choices'), list):
            labels[name] = _label(value['choices'])
        elif isinstance(value, str) and name not in _OF_TASK and not _is_image(value):
            labels[name] = value
    return labels


_OF_TASK = ('id', 'annotator', 'annotation_id', 'created_at', 'updated_at', 'lead_time')


def _label(choices: list[Any]) -> Any:
    return choices[0] if len(choices) == 1 else choices


def _image(data: dict[str, Any]) -> str | None:
    """The path of a task's image, without the address of the server that showed it."""
    for value in data.values():
        if isinstance(value, str) and _is_image(value):
            local = parse_qs(urlsplit(value).query).get('d')  # /data/local-files/?d=photos/1.jpg
            path = local[0] if local else unquote(urlsplit(value).path)
            return path.lstrip('/').removeprefix('data/upload/')
    return None


def _is_image(value: str) -> bool:
    try:
        parts = urlsplit(value)
    except ValueError:  # of a text such as //[x
        return False
    return any(os.path.splitext(text)[1].lower() in ENDINGS for text in (parts.path, parts.query))


FORM = Form('Label Studio', 'a JSON or JSON-MIN export of image choices', _find, _read,
            lambda path: ('', 'images', 'upload'))
