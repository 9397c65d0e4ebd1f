"""Data sets of Hugging Face: their images, as they are, become files, and their label columns tables.

What `datasets` has stored (`save_to_disk`), a folder of Parquet files with images, or hf://USER/SET[/CONFIG]. Unlike
the other forms, these hold the images, so images are written too. Data sets that need code of their own are not loaded.
"""
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from timm_multilabel.converters.form import Converted, check_outputs
from timm_multilabel.data.image_names import ENDINGS
from timm_multilabel.data.optional import find_library
from timm_multilabel.data.parquet import class_name
from timm_multilabel.errors import DataError, listed, printable, shortened
from timm_multilabel.files import write_atomic
from timm_multilabel.temporary import temporary_folder

NEEDS = 'a folder of save_to_disk or of Parquet files, or hf://USER/SET'

_HUB = 'hf://'
_SPLITS = {'train': 'train', 'training': 'train', 'validation': 'val', 'valid': 'val', 'val': 'val', 'dev': 'val',
           'test': 'test', 'testing': 'test', 'unsupervised': 'unlabelled', 'unlabelled': 'unlabelled',
           'unlabeled': 'unlabelled'}
_PLAIN = re.compile(r'bool|u?int\d+|float\d+|(large_)?string')


def is_huggingface(source: str) -> bool:
    """Whether a source is such a data set."""
    folder = Path(source)
    return source.startswith(_HUB) or (folder / 'dataset_dict.json').is_file() or (
        (folder / 'state.json').is_file() and (folder / 'dataset_info.json').is_file()) or any(_parquet(folder))


def _parquet(folder: Path) -> Iterator[Path]:
    for pattern in ('*.parquet', 'data/*.parquet'):
        yield from folder.glob(pattern)


def convert_huggingface(source: str, folder: Path, force: bool) -> Converted:
    """Write the tables and images of a data directory.

    Args:
        source: See the module.
        folder: The data directory to write, made if it is not there. Images go to its folder `images`.
        force: Overwrite tables.

    Raises:
        DataError: The data set cannot be loaded or has no images, or files are there already; nothing has been written.
    """
    parts = _load(source)
    names = {name: _SPLITS.get(name.lower(), name) for name in parts}
    if len(names) == 1 and 'test' not in names.values():
        names = dict.fromkeys(names, 'table')  # it has yet to be divided
    if len(set(names.values())) < len(names) or not all(re.fullmatch(r'[\w.-]+', name) for name in names.values()):
        raise DataError(f'{source}: its splits {listed(names)} cannot be told apart as ours; rename them')
    outputs = check_outputs(folder, names.values(), force)
    if (folder / 'images').exists():
        raise DataError(f'{folder / "images"}: already there; remove it, or choose another folder')
    image, heads, skipped = _columns(parts, source)
    folder.mkdir(parents=True, exist_ok=True)
    rows, missing = {}, 0
    with temporary_folder('.images-', folder) as aside:
        for part, name in names.items():
            lines, without = _write(parts[part], aside / 'images' / name, name, image, heads, f'{source} {part}')
            rows[name], missing = len(lines), missing + without
            (aside / f'{name}.jsonl').write_text(''.join(lines), encoding='utf-8')
            if not lines:
                raise DataError(f'{source} {part}: none of its {without} rows has an image')
        os.replace(aside / 'images', folder / 'images')
        for name, path in outputs.items():
            write_atomic(path, (aside / f'{name}.jsonl').read_bytes())
    return Converted('Hugging Face', folder, rows, missing, skipped,
                     [head for head, feature in heads.items() if _part_of(feature) is not None], list(heads))


def _load(source: str) -> Mapping[str, Any]:
    """The splits of a data set."""
    datasets = find_library('datasets')
    try:
        if source.startswith(_HUB):
            user, _, rest = source.removeprefix(_HUB).removeprefix('datasets/').partition('/')
            name, _, config = rest.strip('/').partition('/')
            if not user or not name:
                raise ValueError('expected hf://USER/SET or hf://USER/SET/CONFIG')
            loaded = datasets.load_dataset(f'{user}/{name}', config or None)
        elif any(_parquet(Path(source))):
            loaded = datasets.load_dataset(source)
        else:
            loaded = datasets.load_from_disk(source)
    except Exception as error:  # whatever the network or a damaged file makes of the library
        reason = shortened(' '.join(printable(str(error)).split()), 300) or type(error).__name__
        way_out = ('check the name, the network and, of a private set, the token (HF_TOKEN)'
                   if source.startswith(_HUB) else 'store it again')
        raise DataError(f'{source}: cannot be loaded as a data set of Hugging Face ({reason}); {way_out}') from error
    return loaded if isinstance(loaded, dict) else {str(loaded.split or 'train'): loaded}


def _columns(parts: Mapping[str, Any], source: str) -> tuple[str, dict[str, Any], list[str]]:
    """The column of the images, the heads with their features, and lines on what is left out."""
    datasets = find_library('datasets')
    features = next(iter(parts.values())).features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise DataError(f'{source}: no column of images (there are: {listed(features)}); if they lie in files, write a '
                        'table with their paths')
    image = next((name for name in ('image', 'img') if name in images), images[0])
    heads, skipped = {}, []
    for name, feature in features.items():
        part = _part_of(feature)
        plain = isinstance(feature if part is None else part, datasets.ClassLabel) or _PLAIN.fullmatch(
            str(getattr(feature if part is None else part, 'dtype', '')))
        if name == image:
            continue
        if not plain or name == 'image_path' or not name.strip() or not name.isprintable():
            skipped.append(f"column '{shortened(name)}': no column of classes, texts, numbers or lists of these")
        else:
            heads[name] = feature
    return image, heads, skipped


def _part_of(feature: Any) -> Any:
    """The feature of a list's parts; None of what is no list."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, 'feature', None)


def _write(
        part: Any,
        folder: Path,
        name: str,
        image: str,
        heads: Mapping[str, Any],
        where: str,
) -> tuple[list[str], int]:
    """Write the images of a split; the lines of its table, and the number of rows without an image."""
    folder.mkdir(parents=True)
    stored = part.select_columns([image, *heads]).cast_column(image, find_library('datasets').Image(decode=False))
    lines, missing = [], 0
    for number, row in enumerate(stored.with_format(None), 1):
        data = _bytes(row[image], f'{where} row {number}')
        if data is None:
            missing += 1
            continue
        ending = posixpath.splitext(row[image].get('path') or '')[1].lower()
        file = f'{number - 1:07d}{ending if ending in ENDINGS else _ending(data)}'
        (folder / file).write_bytes(data)
        labels = {head: class_name(row[head], feature, f'{where} row {number}', head)
                  for head, feature in heads.items()}
        lines.append(json.dumps({'image_path': f'images/{name}/{file}', **labels}, ensure_ascii=False) + '\n')
    return lines, missing


def _bytes(value: Any, where: str) -> bytes | None:
    """The bytes of an image; None where there is none.

    Raises:
        DataError: It names a file, which may be any of this machine.
    """
    if value is None or value.get('bytes') is None and not value.get('path'):
        return None
    if value.get('bytes') is None:
        path = shortened(str(value['path']))
        raise DataError(f'{where}: its image is a path ({path}), not the image; write the data set with its images, as '
                        'push_to_hub does')
    data: bytes = value['bytes']
    return data


def _ending(data: bytes) -> str:
    """How the name of an image file ends; that of a JPEG where it cannot be told, so that check finds it."""
    starts = {b'\x89PNG': '.png', b'GIF8': '.gif', b'RIFF': '.webp', b'BM': '.bmp', b'II*\0': '.tif', b'MM\0*': '.tif'}
    ending = next((ending for start, ending in starts.items() if data.startswith(start)), '.jpg')
    return ending if ending in ENDINGS else '.jpg'
