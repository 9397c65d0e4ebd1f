"""Cross-entropy of one head, as a sum and the number of labels that it is over.

Sums and counts, not means, so that a missing label weighs nothing, a batch without labels gives zero, and several
ranks divide by their common number of labels.
"""
import torch
import torch.nn.functional as F

from timm_multilabel.labels import MISSING


def index_cross_entropy(
        logits: torch.Tensor,
        target: torch.Tensor,
        smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy with label smoothing (Szegedy et al. 2016, "Rethinking the Inception Architecture").

    Args:
        logits: (B, C); the loss is computed in float32 at least.
        target: Class indices (B,), MISSING for no label.
        smoothing: Share of a label's mass that is spread evenly over all classes.

    Returns:
        The sum over labelled rows and their number, both scalars.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, target, ignore_index=MISSING, label_smoothing=smoothing, reduction='sum')
    return total, (target != MISSING).sum().to(logits.dtype)


def dense_cross_entropy(
        logits: torch.Tensor,
        target: torch.Tensor,
        smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy against mixed labels (Mixup, CutMix).

    Args:
        logits: (B, C); the loss is computed in float32 at least.
        target: (B, C), each row the shares of the mixed images' classes: it sums to 1, to less where one of the mixed
            images has no label, to 0 where none has.
        smoothing: Share of a label's mass that is spread evenly over all classes.

    Returns:
        The sum over rows and the labels' mass, both scalars.
    """
    log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
    mass = target.sum(dim=1, keepdim=True)
    smooth = target * (1 - smoothing) + mass * (smoothing / target.shape[1])
    return -(smooth * log_probabilities).sum(), mass.sum().to(log_probabilities.dtype)
