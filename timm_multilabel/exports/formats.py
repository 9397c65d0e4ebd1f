"""The formats, and how a file of one is written: aside, loaded again, compared, and only then put in place."""
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from timm_multilabel.errors import OutputError, escaped, is_utf8
from timm_multilabel.exports import backbone, onnx, pt2, weights
from timm_multilabel.exports.compare import TOLERANCE, largest_difference
from timm_multilabel.exports.exportable import Exportable
from timm_multilabel.files import link_whole
from timm_multilabel.temporary import temporary_folder

FORMATS = {form.NAME: form for form in (onnx, pt2, weights, backbone)}
"""The formats by name. Each is a module with NAME, FILES (the first holds the weights), OF_HEADS (it has heads, not the
backbone alone), LIBRARIES that it needs, note, write and load."""


def missing_libraries(form: ModuleType) -> list[str]:
    """The libraries that a format needs and that are not installed."""
    return [name for name in form.LIBRARIES if importlib.util.find_spec(name) is None]


def check_free(folder: Path, files: Sequence[str], force: bool) -> None:
    """Raise UserError where files could not be written into a folder, or exist and are not to be replaced."""
    if not is_utf8(str(folder.absolute())):  # the libraries take the path, and not an open file
        raise OutputError(f'{escaped(folder)}: this path is not UTF-8, and the libraries that write exports take no '
                          'other; name another folder')
    if folder.exists() and not folder.is_dir():
        raise OutputError(f'{folder}: is a file; name a folder')
    there = [name for name in files if (folder / name).exists()]
    if there and not force:
        raise OutputError(f'{folder / there[0]}: exists; replace it with --force, or choose another folder')
    for name in there:
        if not (folder / name).is_file():
            raise OutputError(f'{folder / name}: is no file; choose another folder')


@contextmanager
def put_in_place(folder: Path, files: Sequence[str]) -> Iterator[Path]:
    """A folder aside to write files into; they are moved into `folder` if all went well, and else removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder('.timm-multilabel-export-', folder) as aside:
        yield aside
        for name in files:
            with open(aside / name, 'rb') as file:
                os.fsync(file.fileno())
        for name in files:
            link_whole(aside / name, folder / name)


def export(exportable: Exportable, form: ModuleType, folder: Path) -> float:
    """Write a model in a format, into a folder.

    Returns:
        The largest difference to the checkpoint, see `largest_difference`.

    Raises:
        OutputError: See `write_compared`; nothing is left in the folder then.
    """
    with put_in_place(folder, form.FILES) as aside:
        return write_compared(exportable, form, aside)


def write_compared(exportable: Exportable, form: ModuleType, folder: Path) -> float:
    """Write a model's files, load them again, and compare; the largest difference.

    Raises:
        OutputError: The model cannot be written or loaded so, or says something else than the checkpoint.
    """
    path = folder / form.FILES[0]
    try:
        form.write(exportable, path)
        difference = largest_difference(form.load(exportable, path), exportable, form.OF_HEADS)
    except Exception as error:  # exporters, runtimes and timm raise their own kind
        reason = ' '.join(str(error).replace(f'{folder}{os.sep}', '').split())[:300] or type(error).__name__
        raise OutputError(f'{path.name}: {exportable.checkpoint.arch} cannot be exported so ({reason})') from error
    if not difference <= TOLERANCE:
        raise OutputError(
            f'{path.name}: differs from the checkpoint by {difference:.1e}, more than {TOLERANCE:.0e}; not kept')
    return difference
