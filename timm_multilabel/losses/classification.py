"""Cross-entropy of one head, as a sum and the mass of labels that it is over."""
import torch
import torch.nn.functional as F

from timm_multilabel.labels import MISSING
from timm_multilabel.losses.precision import float32


def index_cross_entropy(
        logits: torch.Tensor,
        target: torch.Tensor,
        smoothing: float = 0.0,
        class_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy with label smoothing (Szegedy et al. 2016, "Rethinking the Inception Architecture").

    Args:
        logits: (B, C); the loss is computed in float32 at least.
        target: Class indices (B,), MISSING for no label.
        smoothing: Share of a label's mass that is spread evenly over all classes.
        class_weights: A weight for each class (C,), as in `torch.nn.CrossEntropyLoss`.

    Returns:
        The sum over labelled rows and their number (the sum of their classes' weights), both scalars.
    """
    logits = float32(logits)
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    total = F.cross_entropy(
        logits, target, weight=weights, ignore_index=MISSING, label_smoothing=smoothing, reduction='sum')
    labelled = (target != MISSING).to(logits.dtype)
    return total, (labelled if weights is None else labelled * weights[target.clamp(min=0)]).sum()


def dense_cross_entropy(
        logits: torch.Tensor,
        target: torch.Tensor,
        smoothing: float = 0.0,
        class_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy against mixed labels (Mixup, CutMix).

    Args:
        logits: (B, C); the loss is computed in float32 at least.
        target: (B, C), each row the shares of the mixed images' classes: it sums to 1, to less where one of the mixed
            images has no label, to 0 where none has.
        smoothing: Share of a label's mass that is spread evenly over all classes.
        class_weights: A weight for each class (C,).

    Returns:
        The sum over rows and the labels' (weighted) mass, both scalars.
    """
    log_probabilities = float32(logits).log_softmax(dim=1)
    mass = target.sum(dim=1, keepdim=True)
    smooth = target * (1 - smoothing) + mass * (smoothing / target.shape[1])
    if class_weights is not None:
        smooth, target = smooth * class_weights, target * class_weights
    return -(smooth * log_probabilities).sum(), target.sum().to(log_probabilities.dtype)


def binary_cross_entropy(
        logits: torch.Tensor,
        target: torch.Tensor,
        smoothing: float = 0.0,
        positive_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross-entropy of tags.

    Args:
        logits: (B, C); the loss is computed in float32 at least.
        target: (B, C) of 0, 1 or MISSING.
        smoothing: Half of this share of a label goes to its opposite.
        positive_weights: A weight for the ones of each tag (C,), as in `torch.nn.BCEWithLogitsLoss`.

    Returns:
        The sum over the labels that are there and their number, both scalars.
    """
    logits = float32(logits)
    known = (target != MISSING).to(logits.dtype)
    smooth = target.clamp(min=0).to(logits.dtype) * (1 - smoothing) + smoothing / 2
    weights = None if positive_weights is None else positive_weights.to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights, reduction='none')
    return (losses * known).sum(), known.sum()
