"""Convert the data set of another program."""
from pathlib import Path
from typing import Any

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.config.commands import ConvertSettings
from timm_multilabel.converters.convert import convert_data
from timm_multilabel.converters.form import Converted
from timm_multilabel.converters.huggingface import convert_huggingface, is_huggingface
from timm_multilabel.places import local_path


@api_function(ConvertSettings)
def convert(source: str | Path, directory: str | Path, **settings: Any) -> Converted:
    """Write the tables of a data directory for a data set of CelebA, COCO, Label Studio or Hugging Face.

    Args:
        source: The folder or the file of the data set, or hf://USER/SET.
        directory: The data directory to write. Only images of Hugging Face, which lie in tables, are written.
        **settings: The settings, named as the flags.

    Raises:
        UserError: The source is of no form that is known, is damaged, or its images are not there.
    """
    return run_convert(make_settings(ConvertSettings, {**settings, 'source': source, 'directory': directory}))


def run_convert(settings: ConvertSettings) -> Converted:
    """Convert what the settings name.

    Raises:
        UserError: It cannot be converted.
    """
    root = None if settings.image_root is None else local_path(settings.image_root).expanduser()
    if is_huggingface(settings.source):
        return convert_huggingface(settings.source, local_path(settings.directory), settings.force)
    return convert_data(local_path(settings.source), local_path(settings.directory), root, settings.force)
