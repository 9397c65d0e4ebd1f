"""`timm-multilabel sample`."""
from timm_multilabel.api.sample import run_sample
from timm_multilabel.cli.output import say
from timm_multilabel.config.commands import SampleSettings


def run(settings: SampleSettings) -> None:
    """Draw the data set, and say what to try next."""
    counts, folder = run_sample(settings), settings.directory
    described = ', '.join(f'{rows} {name}' for name, rows in counts.items())
    say(f'Wrote {sum(counts.values())} pictures ({described}) to {folder}, see preview.png there; '
        'the color NA is gray')
    say(f'Next: timm-multilabel train {folder} --model resnet10t --img-size {settings.size} -b 64 '
        '--opt adamw --lr 2e-3 --epochs 6 --cooldown-epochs 0')
