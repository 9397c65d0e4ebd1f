"""`timm-multilabel compare`."""
import sys

from timm_multilabel.api.compare import run_comparison
from timm_multilabel.cli.output import say
from timm_multilabel.config.commands import CompareSettings


def run(settings: CompareSettings) -> None:
    """Compare runs, and print the tables."""
    made = run_comparison(settings)
    print(made.markdown, end='')
    if made.files:
        say(f'Wrote {", ".join(map(str, made.files))}', sys.stderr)
