"""What predict, embed and search share: a checkpoint's model, the images that the user names, files to write."""
import os
from pathlib import Path

from timm_multilabel.assembly.device import choose_precision, loader_workers, start_device
from timm_multilabel.config.commands import ReadingSettings
from timm_multilabel.data.arguments import rows_of_arguments
from timm_multilabel.data.table import Rows
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.distributed import world
from timm_multilabel.errors import UserError, escaped, is_utf8
from timm_multilabel.heads import load_registry
from timm_multilabel.inference.loaded import LoadedModel
from timm_multilabel.labels import LabelSpace
from timm_multilabel.log import say
from timm_multilabel.places import path_of
from timm_multilabel.training.checkpoint import Checkpoint


def load_checkpoint_model(
        settings: ReadingSettings,
        checkpoint: Checkpoint,
        weights: str,
        alone: str = 'this command runs in one process; start it without torchrun',
) -> LoadedModel:
    """The model on the device that the flags name.

    Args:
        settings: Device, precision, kinds of heads.
        checkpoint: The checkpoint.
        weights: Which of its weights.
        alone: Why several processes cannot share the work; empty where they can.

    Raises:
        UserError: It cannot be used, or several processes were started.
    """
    device = start_device(settings.device)
    if world()[1] > 1:
        if alone:
            raise UserError(alone)
        if '-' in settings.images:
            raise UserError('-: several processes cannot share standard input; write a table with a column of paths, '
                            'and name it')
    precision = choose_precision(device, settings.amp, None, False)
    return LoadedModel.of(checkpoint, weights, precision, load_registry(settings.head_module), settings.allow_hub)


def read_rows(settings: ReadingSettings, checkpoint: Checkpoint, space: LabelSpace) -> Rows:
    """The images that the user names."""
    # The root of the training images is not that of others.
    of_training = {**checkpoint.state, 'image_root': None}
    return rows_of_arguments(settings.images, space, TableFormat.of(settings, of_training), say=say)


def check_names(rows: Rows, form: str, way_out: str) -> None:
    """Find out before the work that a file of texts in UTF-8 cannot hold the name of an image.

    Args:
        rows: The images.
        form: What is to be written.
        way_out: What the user can do other than rename the image.

    Raises:
        UserError: A name is not UTF-8.
    """
    bad = [image for image in rows.images if not is_utf8(image)]
    if bad:
        more = f' and {len(bad) - 1:,} more' if len(bad) > 1 else ''
        raise UserError(f'{escaped(bad[0])}{more}: this name is not UTF-8, as {form} needs it; rename it, or {way_out}')


def in_one_process(out: str | None) -> str:
    """Why a file cannot be written by several processes, and what can."""
    way_out = 'pass --out FOLDER/' if out is None else f'pass --out {os.path.splitext(out)[0]}/'
    return f'several processes write a folder of Parquet parts, not one output; {way_out}, with the slash'


def workers_of(settings: ReadingSettings) -> int:
    """The loader processes to start."""
    return loader_workers(settings.workers)


def batches_of(settings: ReadingSettings, checkpoint: Checkpoint, rows: Rows) -> int:
    """How many batches the rows make, for the progress bar."""
    return -(-len(rows) // checkpoint.batch_size(settings.batch_size))


def new_file(name: str, flag: str, suffixes: tuple[str, ...], force: bool, instead: str = '') -> Path:
    """The path of a file to write, found out to be one before the work, not after it.

    Args:
        name: What the user says.
        flag: Where.
        suffixes: The endings that it may have.
        force: It may be there already.
        instead: What else may be named.

    Raises:
        UserError: It has another ending, is there already, or is a folder.
    """
    path = path_of(name)
    if path.suffix not in suffixes:
        raise UserError(f'{flag} {path}: name a file that ends in {" or ".join(suffixes)}{instead}')
    if path.is_dir():
        raise UserError(f'{flag} {path}: is a folder; name a file')
    if path.exists() and not force:
        raise UserError(f'{flag} {path}: is there already; name another, or overwrite it with --force')
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
