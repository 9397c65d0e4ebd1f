"""Batches larger than the memory: a module that takes its batch in pieces."""
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class InPieces(nn.Module):
    """Runs a module on the images of a batch in pieces, and keeps no activations but what comes out.

    A loss on the outputs of all images has the gradient at those outputs; on its way back each piece is run again, with
    the random numbers of the first time, and sends its part of that gradient through: gradient caching (Gao et al.
    2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"), by means of torch's activation
    checkpointing (Chen et al. 2016). Autograd, and DDP with it, sees one forward and one backward pass.

    A piece has all views of its images, and as nearly as can be the same share of a batch's first and last ones. Batch
    norm computes its statistics over a piece; running statistics take in each piece once.

    Args:
        module: View-major images (V * B, 3, H, W) -> ({name: output (V * B, ...)}, (V * B, D) or None).
        views: V.
        size: The most images of a piece.

    Raises:
        ValueError: A size of less than 1.
    """

    def __init__(self, module: nn.Module, views: int, size: int):
        super().__init__()
        if size < 1:
            raise ValueError(f'pieces have 1 image or more, not {size}')
        self.module = module  # by this name timm's unwrap_model finds it
        self.views, self.size = views, size

    def forward(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """As the module."""
        number = len(images) // self.views
        pieces = math.ceil(number / self.size)
        if pieces <= 1:
            return self.module(images)
        positions = torch.arange(len(images), device=images.device).view(self.views, number)
        parts = [positions[:, first::pieces].flatten() for first in range(pieces)]
        outputs, projections = zip(*(
            checkpoint(
                self._run,
                images,
                part,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), _keep_buffers(self.module)),
            ) for part in parts))
        back = torch.cat(parts).argsort()
        joined = {name: torch.cat([each[name] for each in outputs]).index_select(0, back) for name in outputs[0]}
        return joined, None if projections[0] is None else torch.cat(projections).index_select(0, back)

    def _run(
            self,
            images: torch.Tensor,
            part: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The module on some of the images."""
        return self.module(images[part])


@contextmanager
def _keep_buffers(module: nn.Module) -> Iterator[None]:
    """Undo what happens to a module's buffers meanwhile."""
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
