"""`timm-multilabel train`."""
import os
import shlex

from timm_multilabel.api.train import run_training
from timm_multilabel.api.training_run import TrainingRun
from timm_multilabel.cli.output import say
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.training.signals import LAUNCHER_ENDS, Stopped, StopSignals


def run(settings: TrainSettings) -> None:
    """Train; a first signal ends the step and saves."""
    with StopSignals(visible=not int(os.environ.get('RANK', 0))) as signals:
        if os.environ.get(LAUNCHER_ENDS):
            raise Stopped('stopped before it began')
        finished = run_training(settings, signals)
    if finished is None:
        return
    if finished.best is not None and finished.best_epoch is not None:
        say(f'Best {finished.metric}: {finished.best:.4g} in epoch {finished.best_epoch + 1}, '
            f'{finished.best_checkpoint}')
    say(f'Next: timm-multilabel {shlex.join(next_command(settings, finished))}')


def next_command(settings: TrainSettings, finished: TrainingRun) -> list[str]:
    """The command that comes after training: a report, a score, or training from what was learnt."""
    last = settings.phases[-1].settings if settings.phases else settings
    data, backbone = last.data, last.backbone
    own = [*(['--head-module', data.head_module] if data.head_module else []), *['--allow-hub'] * data.allow_hub]
    if finished.streamed:
        return ['validate', data.data_dir, '--split', data.val_split, '--checkpoint', str(finished.best_checkpoint),
                *own]
    if finished.has_heads:
        return ['report', str(finished.folder), *own]
    size = ['--img-size', str(backbone.img_size)] if backbone.img_size else []
    return ['train', data.data_dir, '--model', backbone.model, *size, '--initial-checkpoint',
            str(finished.last_checkpoint), *own]
