"""The head of a number."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from timm_multilabel.heads.head import Head, check_fractions
from timm_multilabel.labels import Quantity
from timm_multilabel.losses import smooth_l1
from timm_multilabel.losses.precision import float32


class NumericHead(Head):
    """A number: a linear layer on standardised values, trained with smooth L1.

    Args:
        labels: Mean and standard deviation.
        in_features: Width of the input.
        drop: Dropout rate before the layer.
    """
    labels: Quantity
    kind = 'numeric'
    reads = Quantity
    metric_names = ('r2', 'mae')
    lower_is_better = ('mae',)
    metric_titles = {'r2': 'explained variance (R²)', 'mae': 'mean absolute error'}
    metric_formats = {'r2': '.2f %', 'mae': '.4g'}
    compared = ('mae',)

    def __init__(self, labels: Quantity, in_features: int, *, drop: float = 0.0):
        super().__init__(labels)
        check_fractions(drop=drop)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(in_features, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Standardised predictions (B,) of features (B, F)."""
        numbers: torch.Tensor = self.fc(self.drop(features))[:, 0]
        return numbers

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return smooth_l1(output, target)

    def teacher_loss(self, output: torch.Tensor, answer: torch.Tensor, temperature: float) -> torch.Tensor:
        """Smooth L1 to the teacher's number; a number has no temperature."""
        output = float32(output)
        return F.smooth_l1_loss(output, answer[:, 0].to(output.dtype), reduction='none')

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, float]:
        """'mae', the mean absolute error in the column's unit, and 'r2', the explained variance in percent."""
        error = (measured[:, 0] - target[:, 0]).astype(np.float64)
        variance = target[:, 0].astype(np.float64).var()
        r2 = 100 * (1 - np.square(error).mean() / variance) if variance else np.nan
        return {'mae': self.labels.std * np.abs(error).mean(), 'r2': r2}

    def row_metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, np.ndarray]:
        return {'mae': self.labels.std * np.abs(measured[:, 0] - target[:, 0])}
