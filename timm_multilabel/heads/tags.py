"""The head of tags."""
from typing import Any

import numpy as np
import torch

from timm_multilabel.heads.head import LinearHead
from timm_multilabel.labels import MISSING, Labels, TagSet
from timm_multilabel.losses import (
    binary_cross_entropy,
    binary_distillation_loss,
    binary_entropy,
    binary_marginal_entropy,
    binary_pseudo_label_loss,
)
from timm_multilabel.losses.precision import float32


class TagsHead(LinearHead):
    """Any number of tags: a linear layer, trained with binary cross-entropy; options as of `LinearHead`."""
    labels: TagSet
    kind = 'tags'
    reads = TagSet
    metric_names = ('map', 'f1', 'micro_f1', 'accuracy')
    metric_titles = {'map': 'mean average precision', 'f1': 'F1 (mean over tags)', 'micro_f1': 'F1 (over all labels)',
                     'accuracy': 'accuracy (mean over tags)'}
    metric_formats = dict.fromkeys(metric_names, '.2f %')
    compared = ('map',)
    distribution = True
    is_logits = True

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return binary_cross_entropy(output, target, self.smoothing, self.class_weights)

    def eval_loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return binary_cross_entropy(output, target)

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        return output.float().sigmoid()

    def metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
        """Percentages: 'map', the mean average precision of the tags, 'f1' and 'accuracy', the means of the tags' F1
        and accuracy at 0.5, and 'micro_f1', the F1 over all labels; 'tags', what `tag_metrics` gives of each tag.

        A tag without a 0 or without a 1 is in no mean, since there is nothing to tell apart; NaN where none is left.
        """
        from sklearn.metrics import f1_score  # here, since it takes a second to import

        tags = {tag: tag_metrics(target[:, place], measured[:, place]) for place, tag in enumerate(self.labels.classes)}
        scored = [its for its in tags.values() if not np.isnan(its['ap'])]
        if not scored:
            return {**dict.fromkeys(self.metric_names, np.nan), 'tags': tags}
        known = target != MISSING
        return {
            'map': np.mean([its['ap'] for its in scored]),
            'f1': np.mean([its['f1'] for its in scored]),
            'micro_f1': 100 * f1_score(target[known], measured[known] >= 0.5, zero_division=0),
            'accuracy': np.mean([its['accuracy'] for its in scored]),
            'tags': tags,
        }

    def row_metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, np.ndarray]:
        """None: each of its metrics is of all rows of a tag together."""
        return {}

    def entropy(self, output: torch.Tensor) -> torch.Tensor:
        return binary_entropy(output)

    def marginal_entropy(self, output: torch.Tensor) -> torch.Tensor:
        return binary_marginal_entropy(float32(output).sigmoid())

    def pseudo_label_loss(
            self,
            strong: torch.Tensor,
            weak: torch.Tensor,
            threshold: float | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return binary_pseudo_label_loss(strong, weak, threshold)

    def answer(self, output: torch.Tensor) -> torch.Tensor:
        return float32(output)

    def teacher_loss(self, output: torch.Tensor, answer: torch.Tensor, temperature: float) -> torch.Tensor:
        return binary_distillation_loss(output, answer, temperature)

    @staticmethod
    def balance(target: torch.Tensor, labels: Labels) -> list[float]:
        """Zeros for each one of a tag; 1 for a tag without either."""
        zeros, ones = (target == 0).sum(dim=0), (target == 1).sum(dim=0)
        balanced: list[float] = torch.where((zeros > 0) & (ones > 0), zeros / ones.clamp(min=1), 1.0).tolist()
        return balanced


def tag_metrics(target: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """The percentages 'ap' (average precision), and 'f1' and 'accuracy' at 0.5, of one tag; 'labels', and its 'ones'.

    The first three are NaN where the labels have no 0 or no 1.

    Args:
        target: 0, 1 or MISSING (N,).
        probability: Of the tag (N,).
    """
    from sklearn.metrics import average_precision_score, f1_score  # here, since it takes a second to import

    known = target != MISSING
    true, probability = target[known] == 1, probability[known]
    metrics = dict.fromkeys(('ap', 'f1', 'accuracy'), np.nan)
    if true.any() and not true.all():
        found = probability >= 0.5
        metrics = {
            'ap': 100 * float(average_precision_score(true, probability)),
            'f1': 100 * float(f1_score(true, found, zero_division=0)),
            'accuracy': 100 * float((found == true).mean()),
        }
    return metrics | {'labels': len(true), 'ones': int(true.sum())}
