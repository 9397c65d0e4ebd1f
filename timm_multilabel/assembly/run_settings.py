"""The settings of a run, read back from its folder."""
from pathlib import Path

from timm_multilabel.config.files import build
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.errors import CheckpointError


def read_run_settings(run: Path, head_module: str | None = None) -> TrainSettings:
    """The settings of training that a run folder's args.yaml holds, checked as a command line is.

    Args:
        run: The folder.
        head_module: The file with the user's own heads, as the caller names it; what args.yaml says does not count.

    Raises:
        CheckpointError: The folder is none of a run, its args.yaml cannot be read, or it names a file of heads and
            nobody else does.
    """
    path = run / 'args.yaml'
    if not path.is_file():
        what = 'holds no args.yaml' if run.is_dir() else 'no such folder'
        raise CheckpointError(
            f'{run}: not a run folder ({what}); name one that training made, such as output/train/NAME')
    # `allow_hub` allows nothing here, since no model is made of these settings; it is taken back below.
    given = {'config': str(path), 'allow_hub': True} | ({'head_module': head_module} if head_module else {})
    settings = build(TrainSettings, given).replace(allow_hub=False)
    return settings.replace(phases=tuple(
        type(phase)(phase.name, phase.given, phase.settings.replace(allow_hub=False)) for phase in settings.phases))


def last_phase(settings: TrainSettings) -> TrainSettings:
    """The settings of the phase that a run's best checkpoint is of; of a run without phases, its settings."""
    return settings.phases[-1].settings if settings.phases else settings
