"""`timm-multilabel validate`."""
from timm_multilabel.api.validate import run_validation
from timm_multilabel.cli.output import say
from timm_multilabel.config.commands import ValidateSettings
from timm_multilabel.reports.results import results_lines


def run(settings: ValidateSettings) -> None:
    """Score a checkpoint, and print its metrics as tables."""
    found = run_validation(settings)
    if found is not None:
        print('\n'.join(results_lines(found.results, found.kinds)))
        for note in found.notes:
            say(note)
