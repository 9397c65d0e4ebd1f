"""Heads of one class an image: softmax and ArcFace."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from timm_multilabel.heads.head import Head, LinearHead, check_fractions, class_weights_tensor
from timm_multilabel.labels import MISSING, Labels, LabelSet
from timm_multilabel.losses import (
    arcface_logits,
    categorical_entropy,
    dense_cross_entropy,
    distillation_loss,
    index_cross_entropy,
    marginal_entropy,
    pseudo_label_loss,
)
from timm_multilabel.losses.precision import float32


class ClassHead(Head):
    """What heads of one class an image share; outputs are logits (B, C) without a margin."""
    labels: LabelSet
    metric_names = ('top1', 'top5')
    metric_titles = {'top1': 'top-1 accuracy', 'top5': 'top-5 accuracy', 'balanced_accuracy': 'balanced accuracy',
                     'macro_f1': 'macro F1'}
    metric_formats = dict.fromkeys(metric_titles, '.2f %')
    compared = ('top1',)
    distribution = True
    is_logits = True

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        return output.argmax(dim=1)

    def probabilities(self, output: torch.Tensor) -> torch.Tensor:
        return float32(output).softmax(dim=1).float()

    def measure(self, output: torch.Tensor) -> torch.Tensor:
        """The five likeliest classes, the likeliest first."""
        return output.topk(min(5, output.shape[1]), dim=1).indices.float()

    def metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, float]:
        """'top1' and 'top5'; NaN of a single class, where every answer is right."""
        if len(self.labels.classes) == 1:
            return dict.fromkeys(self.metric_names, np.nan)
        hits = measured == target
        return {'top1': 100 * hits[:, 0].mean(), 'top5': 100 * hits.any(axis=1).mean()}

    def row_metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, np.ndarray]:
        hits = measured == target
        return {'top1': 100.0 * hits[:, 0], 'top5': 100.0 * hits.any(axis=1)}

    def eval_loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return index_cross_entropy(output, target)

    def entropy(self, output: torch.Tensor) -> torch.Tensor:
        return categorical_entropy(output)

    def marginal_entropy(self, output: torch.Tensor) -> torch.Tensor:
        return marginal_entropy(float32(output).softmax(dim=1))

    def pseudo_label_loss(
            self,
            strong: torch.Tensor,
            weak: torch.Tensor,
            threshold: float | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return pseudo_label_loss(strong, weak, threshold)

    def answer(self, output: torch.Tensor) -> torch.Tensor:
        return float32(output).log_softmax(dim=1)

    def teacher_loss(self, output: torch.Tensor, answer: torch.Tensor, temperature: float) -> torch.Tensor:
        return distillation_loss(output, answer, temperature)

    @staticmethod
    def balance(target: torch.Tensor, labels: Labels) -> list[float]:
        """N / (C * rows of the class), as scikit-learn has it; 1 for a class without rows."""
        counts = torch.bincount(target[target != MISSING], minlength=len(labels.classes))
        weights = counts.sum() / (len(labels.classes) * counts.clamp(min=1))
        balanced: list[float] = torch.where(counts > 0, weights, 1.0).tolist()
        return balanced


class SoftmaxHead(LinearHead, ClassHead):
    """One of several classes: a linear layer, trained with softmax cross-entropy; options as of `LinearHead`."""
    kind = 'softmax'

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy; `target` may also be mixed labels (B, C)."""
        loss = index_cross_entropy if target.ndim == 1 else dense_cross_entropy
        return loss(output, target, self.smoothing, self.class_weights)


class ArcFaceHead(ClassHead):
    """One of several classes by the angle between features and class: ArcFace (Deng et al. 2019).

    Outputs are `scale * cosine`, without the margin, which only the training loss puts in.

    Args:
        labels: The classes.
        in_features: Width of the input.
        drop: Dropout rate before the layer.
        smoothing: Label smoothing, off by default: it asks for angles that the margin forbids, and cancels it.
        class_weights: A weight for each class, in their order.
        scale: Factor on cosines.
        margin: Angle, in radians, that a row must be nearer to its class.
    """
    class_weights: torch.Tensor | None
    kind = 'arcface'
    inherits = ('drop',)

    def __init__(
            self,
            labels: LabelSet,
            in_features: int,
            *,
            drop: float = 0.0,
            smoothing: float = 0.0,
            class_weights: list[float] | None = None,
            scale: float = 30.0,
            margin: float = 0.5,
    ):
        super().__init__(labels)
        check_fractions(drop=drop, smoothing=smoothing)
        if not scale > 0:
            raise ValueError(f'scale is {scale:g}, expected more than 0')
        if not 0 <= margin <= np.pi:
            raise ValueError(f'margin is {margin:g}, expected an angle from 0 to pi')
        if smoothing:
            self.remark = "label smoothing works against ArcFace's margin"
        self.smoothing, self.scale, self.margin = smoothing, scale, margin
        self.drop = nn.Dropout(drop)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(len(labels.classes), in_features)))
        self.register_buffer('class_weights', class_weights_tensor(class_weights, labels), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`scale * cosine` (B, C) of features (B, F), in float32 at least."""
        with torch.autocast(features.device.type, enabled=False):
            features = self.drop(features)
            features = float32(features)
            weight = self.weight.to(features.dtype)
            return self.scale * (F.normalize(features, dim=1) @ F.normalize(weight, dim=1).T)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.scale * arcface_logits(output / self.scale, target, self.margin)
        return index_cross_entropy(logits, target, self.smoothing, self.class_weights)
