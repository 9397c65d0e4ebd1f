"""`timm-multilabel convert`."""
import shlex

from timm_multilabel.api.convert import run_convert
from timm_multilabel.cli.output import say
from timm_multilabel.config.commands import ConvertSettings


def run(settings: ConvertSettings) -> None:
    """Convert, and say what to do next."""
    made = run_convert(settings)
    folder = shlex.quote(str(made.folder))
    described = ', '.join(f'{count:,} {split}' for split, count in made.rows.items())
    say(f'{made.form}: wrote {sum(made.rows.values()):,} rows ({described}) to {made.folder}')
    if made.missing:
        say(f'Left out {made.missing:,} rows whose image is not there')
    for line in made.skipped:
        say(f'Left out: {line}')
    tags = f' --head {" ".join(shlex.quote(f"{head}:loss=tags") for head in made.tags)}' if made.tags else ''
    if 'train' in made.rows:
        say(f'Next: timm-multilabel check {folder}{tags}')
    else:
        heads = ' '.join(map(shlex.quote, made.heads))
        table = f'{folder}/{next(iter(made.rows))}.jsonl'
        say(f"Next: timm-multilabel split {table} --image '{{image_path}}' --heads {heads}")
