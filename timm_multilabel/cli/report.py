"""`timm-multilabel report`."""
import time

from timm_multilabel.api.report import run_report
from timm_multilabel.cli.output import say
from timm_multilabel.config.commands import ReportSettings


def run(settings: ReportSettings) -> None:
    """Write the page, and say where it is."""
    started = time.perf_counter()
    made = run_report(settings)
    for note in made.notes:
        say(note)
    say(f'{made.path}: {made.images} images, {made.size / 1e6:.1f} MB, {time.perf_counter() - started:.0f} s')
