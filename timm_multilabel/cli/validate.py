"""`timm-multilabel validate`."""
from timm_multilabel.api.validate import Validation, run_validation
from timm_multilabel.cli.output import say
from timm_multilabel.config.commands import ValidateSettings
from timm_multilabel.reports.results import results_lines


def run(settings: ValidateSettings) -> None:
    """Score a checkpoint, print its metrics as tables, and say what was written."""
    found = run_validation(settings, show)
    for line in found.files if found is not None else ():
        say(line)


def show(found: Validation) -> None:
    """Print the metrics."""
    print('\n'.join(results_lines(found.results, found.kinds)))
    for note in found.notes:
        say(note)
