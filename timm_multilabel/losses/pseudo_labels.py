"""Pseudo-labels: what a head predicts on a weak view, learnt on a strong one; and their alignment.

All take logits without a margin and compute in float32 at least.
"""
import torch
import torch.nn.functional as F

from timm_multilabel.losses.precision import float32

_FLOOR = 1e-6  # of a mean probability, as ReMixMatch's code has it: a class that is never predicted stays finite


def pseudo_label_loss(
        strong: torch.Tensor,
        weak: torch.Tensor,
        threshold: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Consistency with confident predictions (Sohn et al. 2020, "FixMatch", eq. 4).

    Args:
        strong: Logits (B, C) of the strongly augmented views, which learn.
        weak: Logits (B, C) of the weakly augmented views, which teach; no gradient flows into them.
        threshold: Least probability of a class to be taken as the label: a number, or a scalar tensor.

    Returns:
        The sum over rows that pass of the cross-entropy, and the number that pass, both scalars.
    """
    confidence, label = float32(weak.detach()).softmax(dim=1).max(dim=1)
    passed = (confidence >= threshold).to(confidence.dtype)
    losses = F.cross_entropy(float32(strong), label, reduction='none')
    return (losses * passed).sum(), passed.sum()


def binary_pseudo_label_loss(
        strong: torch.Tensor,
        weak: torch.Tensor,
        threshold: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pseudo_label_loss` for tags: each passes by itself, as there or as not there, and weighs 1 / C of a row."""
    probability = float32(weak.detach()).sigmoid()
    passed = (torch.maximum(probability, 1 - probability) >= threshold).to(probability.dtype)
    losses = F.binary_cross_entropy_with_logits(float32(strong), (probability > 0.5).to(probability.dtype),
                                                reduction='none')
    return (losses * passed).mean(dim=1).sum(), passed.mean(dim=1).sum()


def alignment(labelled: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """What to add to logits (..., C) of the pool so that its mean prediction moves towards that on labelled images.

    Distribution alignment (Berthelot et al. 2020, "ReMixMatch", section 3.1; Roelofs et al. 2021, "AdaMatch", eq. 1):
    probabilities p become p * labelled / pool, divided by their sum. The softmax of logits + log(labelled / pool) is
    that.

    Args:
        labelled: Mean probabilities (C,) on labelled images.
        pool: Mean probabilities (C,) on the pool.
    """
    return ((labelled + _FLOOR) / (pool + _FLOOR)).log()


def binary_alignment(labelled: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """`alignment` for tags (C,), each of which is a choice of two: there, or not there."""
    return alignment(labelled, pool) - alignment(1 - labelled, 1 - pool)
