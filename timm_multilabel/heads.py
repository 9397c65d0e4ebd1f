"""What a head is: its layer and its loss."""
import torch
from torch import nn

from timm_multilabel.losses import dense_cross_entropy, index_cross_entropy


class CategoricalHead(nn.Module):
    """One label of several classes: dropout and a linear layer, trained with softmax cross-entropy.

    Args:
        in_features: Width of the backbone's features.
        num_classes: Classes of the head.
        drop: Dropout rate before the layer.
    """

    def __init__(self, in_features: int, num_classes: int, drop: float = 0.0):
        super().__init__()
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(in_features, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of features (B, F)."""
        return self.fc(self.drop(features))

    @staticmethod
    def loss(logits: torch.Tensor, target: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over the batch and the number of labels; `target` is (B,) indices or (B, C) mixed labels."""
        loss = index_cross_entropy if target.ndim == 1 else dense_cross_entropy
        return loss(logits, target, smoothing)
