"""The head of tags."""
import numpy as np
import torch
from sklearn.metrics import average_precision_score, f1_score

from timm_multilabel.heads.head import LinearHead
from timm_multilabel.labels import MISSING, TagSet
from timm_multilabel.losses import (
    binary_cross_entropy,
    binary_entropy,
    binary_marginal_entropy,
    binary_pseudo_label_loss,
)
from timm_multilabel.losses.precision import float32


class TagsHead(LinearHead):
    """Any number of tags: a linear layer, trained with binary cross-entropy; options as of `LinearHead`."""
    kind = 'tags'
    reads = TagSet
    figures = ('map', 'f1', 'micro_f1')
    distribution = True

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return binary_cross_entropy(output, target, self.smoothing, self.class_weights)

    def eval_loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return binary_cross_entropy(output, target)

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        return output.float().sigmoid()

    def metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, float]:
        """'map', the mean average precision of the tags, and F1 at 0.5: their mean, and over all labels.

        A tag without a 0 or without a 1 is in no mean, since there is nothing to tell apart; NaN where none is left.
        """
        precisions, f1s = [], []
        for tag in range(target.shape[1]):
            known = target[:, tag] != MISSING
            true, probability = target[known, tag], measured[known, tag]
            if true.any() and not true.all():
                precisions.append(average_precision_score(true, probability))
                f1s.append(f1_score(true, probability >= 0.5, zero_division=0))
        if not precisions:
            return dict.fromkeys(self.figures, np.nan)
        known = target != MISSING
        micro = f1_score(target[known], measured[known] >= 0.5, zero_division=0)
        return {'map': 100 * np.mean(precisions), 'f1': 100 * np.mean(f1s), 'micro_f1': 100 * micro}

    def entropy(self, output: torch.Tensor) -> torch.Tensor:
        return binary_entropy(output)

    def marginal_entropy(self, output: torch.Tensor) -> torch.Tensor:
        return binary_marginal_entropy(float32(output).sigmoid())

    def pseudo_label_loss(self, strong, weak, threshold):
        return binary_pseudo_label_loss(strong, weak, threshold)

    @staticmethod
    def balance(target: torch.Tensor, labels: TagSet) -> list[float]:
        """Zeros for each one of a tag; 1 for a tag without either."""
        zeros, ones = (target == 0).sum(dim=0), (target == 1).sum(dim=0)
        return torch.where((zeros > 0) & (ones > 0), zeros / ones.clamp(min=1), 1.0).tolist()
