"""Draw a small data set with three label heads, without any download."""
from pathlib import Path
from typing import Any

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.config.commands import SampleSettings
from timm_multilabel.data.sample import write_sample

SPLITS = ('train', 'val', 'test', 'unlabelled')


@api_function(SampleSettings)
def sample(directory: str | Path, **settings: Any) -> Path:
    """Draw a small data set with three label heads, without any download.

    Args:
        directory: The folder to write to.
        **settings: The settings, named as the flags.

    Returns:
        The folder.

    Raises:
        UserError: It cannot be written, or is there.
    """
    made = make_settings(SampleSettings, {**settings, 'directory': directory})
    run_sample(made)
    return Path(made.directory)


def run_sample(settings: SampleSettings) -> dict[str, int]:
    """Draw the data set; the rows of each split."""
    counts = {name: settings.flat()[name] for name in SPLITS}
    write_sample(settings.directory, **counts, size=settings.size, seed=settings.seed, kind=settings.format,
                 force=settings.force)
    return counts
