"""torch.export: a `.pt2` archive, which PyTorch runs without this library; the description as an extra file."""
import json
import warnings
from pathlib import Path

import torch

from timm_multilabel.exports.compare import Run
from timm_multilabel.exports.exportable import DESCRIPTION, Exportable, ReadableModel

NAME = 'pt2'
FILES = ('multilabel.pt2',)
OF_HEADS = True
LIBRARIES = ()


def note(exportable: Exportable, path: Path) -> str:
    """What to say of a file that was written."""
    return f'outputs {", ".join(exportable.names)}'


def write(exportable: Exportable, path: Path) -> None:
    """Write the model with a free batch size.

    Raises:
        Exception: Whatever PyTorch finds in a model that it cannot export.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of what models keep for the next image
        program = torch.export.export(
            ReadableModel(exportable.model, exportable.names),
            (exportable.images[:2],),
            dynamic_shapes=({0: torch.export.Dim('batch')},),
        )
    torch.export.save(program, path, extra_files={DESCRIPTION: exportable.text})


def load(exportable: Exportable, path: Path) -> Run:
    """The model of a file.

    Raises:
        ValueError: Its description is another.
    """
    extra = {DESCRIPTION: ''}
    module = torch.export.load(path, extra_files=extra).module()
    if json.loads(extra[DESCRIPTION]) != exportable.description:
        raise ValueError('its description comes back other than it was written')
    return lambda images: [module(images)[name] for name in exportable.names]
