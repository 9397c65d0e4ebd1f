"""`timm-multilabel export`."""
from timm_multilabel.api.export import run_export
from timm_multilabel.config.commands import ExportSettings


def run(settings: ExportSettings) -> None:
    """Export; a line on each file is told as it is written."""
    run_export(settings)
