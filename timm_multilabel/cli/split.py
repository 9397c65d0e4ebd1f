"""`timm-multilabel split`."""
from timm_multilabel.api.split import run_split
from timm_multilabel.cli.output import say
from timm_multilabel.config.commands import SplitSettings


def run(settings: SplitSettings) -> None:
    """Split the CSV, and say how many rows went where."""
    made = run_split(settings)
    described = ', '.join(f'{made.rows[name]} {name}' for name in ('train', 'val', 'test'))
    say(f'Wrote {made.rows["all"]} rows ({described}) to {made.folder}')
    if made.removed:
        say(f'Removed {", ".join(map(str, made.removed))}, whose ratio is 0')
    if made.rows['missing']:
        print(f'Left out {made.rows["missing"]} rows whose image is not there')
