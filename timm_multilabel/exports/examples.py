"""The real images on which an export is compared with its checkpoint."""
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml

from timm_multilabel.data.folders import images_of_folder
from timm_multilabel.data.images import FilePhotos
from timm_multilabel.data.split_names import find_split
from timm_multilabel.data.table import Rows, find_images, missing_targets, read_table
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import UserError
from timm_multilabel.files import read_text, reading
from timm_multilabel.loading.batches import ImageDataset
from timm_multilabel.loading.loaders import create_eval_loader
from timm_multilabel.places import path_of
from timm_multilabel.training.checkpoint import Checkpoint
from timm_multilabel.views.pillow import scoring_views

COUNT = 16
"""Images at most."""


def images_of_run(checkpoint: Checkpoint) -> list[str]:
    """Images spread over the validation split, or else the training split, that a checkpoint's run had.

    Raises:
        UserError: The run's settings or its data are not where they were.
    """
    way_out = 'name images to compare with: --images DIR'
    folders = checkpoint.path.parent, checkpoint.path.absolute().parent.parent  # the latter of a phase's checkpoint
    settings = next((folder / 'args.yaml' for folder in folders if (folder / 'args.yaml').is_file()), None)
    if settings is None:
        raise UserError(f'{checkpoint.path}: no args.yaml beside it tells of its data; {way_out}')
    with reading(settings, 'the settings of a run', way_out):
        args = yaml.safe_load(read_text(settings, 2 ** 24))
        # Settings of the checkpoint come first: a phase may have splits of its own.
        folder, settings_of = path_of(args['data_dir']), {**args, **checkpoint.state}
        written = TableFormat.of(checkpoint.state)
        splits = [find_split(folder, settings_of.get(f'{usual}_split') or usual, written) for usual in ('val', 'train')]
        path = next((split for split in splits if isinstance(split, Path)), None)
    if path is None:
        raise UserError(f'{settings}: of its data directory {folder} no CSV is here; {way_out}')
    table = read_table(path, written)
    return find_images(replace(table, frame=table.frame.iloc[_spread(len(table.frame))]))


def images_of_paths(paths: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Images spread over files and folders.

    Args:
        paths: The files and folders.
        say: See `images_of_folder`.

    Raises:
        UserError: A path is not there, or a folder holds no image.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            found.extend(images_of_folder(path, say))
        elif path.is_file():
            found.append(str(path))
        else:
            raise UserError(f'--images {path}: no such file or folder')
    return [found[index] for index in _spread(len(found))]


def _spread(count: int) -> list[int]:
    """Up to `COUNT` different numbers from 0 to count - 1, evenly spread."""
    return sorted({int(index) for index in np.linspace(0, count - 1, min(COUNT, count)).round()})


def read_images(checkpoint: Checkpoint, paths: Sequence[str]) -> torch.Tensor:
    """Images as evaluation has them: (N, 3, H, W), float32; of a single one two copies, so that a batch is several.

    Raises:
        UserError: One cannot be read.
    """
    rows = Rows(
        images=np.array(paths),
        targets=missing_targets(checkpoint.label_space, len(paths)),
        numbers=np.zeros(len(paths), dtype=np.int64),
        sources=(Path(paths[0]).parent,),
        which=np.zeros(len(paths), dtype=np.int8),
    )
    config = checkpoint.data_config
    loader = create_eval_loader(
        ImageDataset(rows, FilePhotos(rows), scoring_views(config)), len(paths), mean=tuple(config['mean']),
        std=tuple(config['std']), device=torch.device('cpu'), workers=0)
    images: torch.Tensor = next(iter(loader))[0]
    return (images if len(images) > 1 else images.repeat(2, 1, 1, 1)).contiguous()
