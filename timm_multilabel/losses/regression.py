"""The loss of a number, as a sum and the number of labels that it is over."""
import torch
import torch.nn.functional as F

from timm_multilabel.losses.precision import float32


def smooth_l1(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth L1, d^2 / 2 for a difference d of less than 1 and |d| - 1/2 beyond (Girshick 2015, "Fast R-CNN", eq. 3).

    Args:
        output: Standardised predictions (B,); the loss is computed in float32 at least.
        target: Standardised numbers (B,), NaN for no label.

    Returns:
        The sum over labelled rows and their number, both scalars.
    """
    output = float32(output)
    known = ~target.isnan()
    losses = F.smooth_l1_loss(output, target.nan_to_num().to(output.dtype), reduction='none')
    return (losses * known).sum(), known.sum().to(output.dtype)
