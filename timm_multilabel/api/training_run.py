"""A run that has been trained."""
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from timm_multilabel.training.run_folder import read_summary


@dataclass(frozen=True)
class TrainingRun:
    """A run that has been trained.

    Args:
        folder: Its folder.
        metric: What ranks its checkpoints.
        best: The best value of it; None where nothing is scored.
        best_epoch: The epoch of that, from 0; None where nothing is scored.
        best_checkpoint: The best checkpoint; where nothing is scored the last one.
        last_checkpoint: The last checkpoint.
        has_heads: Whether it has heads, and so predictions that `report` shows.
        streamed: Whether its evaluation reads shards, of which no predictions are kept.
    """
    folder: Path
    metric: str
    best: float | None
    best_epoch: int | None
    best_checkpoint: Path
    last_checkpoint: Path
    has_heads: bool
    streamed: bool

    @property
    def summary(self) -> pd.DataFrame:
        """Its metrics, a row an epoch."""
        return read_summary(self.folder / 'summary.csv')

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of its best epoch, of its last one where nothing is scored."""
        summary = self.summary
        row = summary.iloc[-1]
        if self.best_epoch is not None:
            row = summary[summary['epoch'] == self.best_epoch].iloc[-1]
        return {str(name): float(value) for name, value in row.items()
                if isinstance(value, int | float) and not pd.isna(value)}
