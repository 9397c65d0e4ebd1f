"""Convert the data set of another program."""
from pathlib import Path
from typing import Any

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.config.commands import ConvertSettings
from timm_multilabel.converters.convert import Converted, convert_data
from timm_multilabel.places import local_path


@api_function(ConvertSettings)
def convert(source: str | Path, directory: str | Path, **settings: Any) -> Converted:
    """Write the tables of a data directory for a data set of CelebA, COCO or Label Studio.

    Args:
        source: The folder or the file of the data set.
        directory: The data directory to write. Images are not copied.
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
    root = None if settings.image_root is None else Path(settings.image_root).expanduser()
    return convert_data(Path(settings.source), local_path(settings.directory), root, settings.force)
