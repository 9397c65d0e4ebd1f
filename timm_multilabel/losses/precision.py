"""The precision that losses are computed in."""
import torch


def float32(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float32 at least, whatever the autocast gave."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
