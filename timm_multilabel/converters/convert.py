"""A data set of another program -> train.jsonl, val.jsonl and so on; the images stay where they are."""
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_multilabel.converters import FORMS
from timm_multilabel.converters.form import Converted, Form, Row, check_outputs
from timm_multilabel.converters.huggingface import NEEDS
from timm_multilabel.errors import DataError, escaped, is_utf8, listed
from timm_multilabel.files import write_atomic

_EXAMPLES = 3  # images named in a message


def convert_data(source: Path, folder: Path, image_root: Path | None, force: bool) -> Converted:
    """Write the tables of a data directory.

    Args:
        source: The folder or the file of the data set.
        folder: The data directory to write, made if it is not there.
        image_root: The folder that the images are under; looked for from the source when None.
        force: Overwrite tables of these names.

    Raises:
        DataError: The source is of no form that is known, is damaged, or its images are not there; nothing has been
            written then.
    """
    if not source.exists():
        raise DataError(f'{source}: no such file or folder')
    form, files = _form_of(source)
    outputs = check_outputs(folder, files, force)
    texts, rows, missing = {}, {}, 0
    without: list[DataError] = []
    heads: dict[str, bool] = {}  # whether its labels are tags
    for split, path in files.items():
        found = list(form.read(path, split, source))
        try:
            there = _with_images(found, _bases(form, source, image_root, path), folder, path)
        except DataError as error:
            without.append(error)
            continue
        missing += len(found) - len(there)
        for row in there:
            for head, label in row.items():
                if head != 'image_path':
                    heads[head] = heads.get(head, False) or isinstance(label, list)
        rows[split], texts[split] = len(there), there
    if without and not texts:
        raise without[0]
    folder.mkdir(parents=True, exist_ok=True)
    for split, there in texts.items():
        write_atomic(outputs[split], ''.join(_line(row, heads) for row in there))
    return Converted(form.name, folder, rows, missing, [error.line for error in without],
                     [head for head, tags in heads.items() if tags], list(heads))


def _form_of(source: Path) -> tuple[Form, Mapping[str, Path]]:
    for form in FORMS:
        if files := form.find(source):
            return form, files
    known = '; '.join([*(f'{form.name} ({form.needs})' for form in FORMS), f'Hugging Face ({NEEDS})'])
    raise DataError(f'{source}: of no form that is known: {known}. A CSV and class folders need no converting: see '
                    'timm-multilabel split --help')


def _bases(form: Form, source: Path, image_root: Path | None, path: Path) -> list[Path]:
    """Where the images of a file are looked for."""
    starts = [source] if source.is_dir() else [source.parent, source.parent.parent]
    if image_root is not None:
        starts = [image_root]
    return [start / folder for start in starts for folder in form.folders(path)]


def _with_images(
        rows: Sequence[Row],
        bases: Sequence[Path],
        folder: Path,
        path: Path,
) -> list[dict[str, Any]]:
    """The rows whose image is there, under the base that has the most of them, with the path as `folder` has it."""
    by_base = {base: [row for row in rows if (base / row['']).is_file()] for base in bases}
    base, there = max(by_base.items(), key=lambda item: len(item[1]))
    if not there:
        examples = listed([row[''] for row in rows[:_EXAMPLES]])
        raise DataError(f'{path}: none of its {len(rows)} images is on disk: {examples}; looked in '
                        f'{", ".join(map(str, bases))}; name the folder that they are under with --image-root')
    written = []
    for row in there:
        image = os.path.relpath((base / row['']).resolve(), folder.resolve())
        if not is_utf8(image):
            raise DataError(f'{escaped(base / row[""])}: this path to an image is not UTF-8; rename it')
        written.append({'image_path': image, **{head: label for head, label in row.items() if head}})
    return written


def _line(row: Mapping[str, Any], heads: Mapping[str, bool]) -> str:
    """A row with all labels of a head as lists, where those of a row are."""
    labels = {head: [label] if heads.get(head) and isinstance(label, str) else label for head, label in row.items()}
    return json.dumps(labels, ensure_ascii=False) + '\n'
