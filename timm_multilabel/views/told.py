"""What training is told of the views that it gets: columns behind the targets, one row a view."""
from dataclasses import dataclass

import torch

from timm_multilabel.views.recipe import NEUTRAL, Draws

PARAMETERS = 13
"""The numbers of `parameters`."""


@dataclass(frozen=True)
class Told:
    """Which columns there are; nothing is computed for those that there are not.

    Args:
        plain: Whether a view is plain (`is_plain`), as 1 or 0.
        parameters: What was drawn for it (`parameters`).
    """
    plain: bool = False
    parameters: bool = False

    def __bool__(self) -> bool:
        return self.plain or self.parameters

    @property
    def width(self) -> int:
        """K, the number of columns."""
        return int(self.plain) + PARAMETERS * int(self.parameters)

    def of(self, draws: Draws, height: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
        """The columns (N, K), float32, of N views.

        Args:
            draws: What was drawn for them.
            height: Heights of their whole images in pixels (N,).
            width: Widths (N,).
        """
        columns = [is_plain(draws).float()[:, None]] if self.plain else []
        return torch.cat(columns + ([parameters(draws, height, width)] if self.parameters else []), dim=1)

    def split(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Targets (N, W + K) -> targets (N, W), which views are plain (N,), what was drawn (N, PARAMETERS).

        What is not told is None.
        """
        if not self:
            return target, None, None
        target, columns = target[:, :-self.width], target[:, -self.width:]
        plain = columns[:, 0] > 0 if self.plain else None
        return target, plain, columns[:, int(self.plain):] if self.parameters else None


def is_plain(draws: Draws) -> torch.Tensor:
    """Which views have the colors of their image (N,): neither jitter nor grayscale changed them."""
    plain = ~draws.gray
    for factor, neutral in zip(draws.factors.unbind(1), NEUTRAL, strict=True):
        plain = plain & (factor == neutral)
    return plain


def parameters(draws: Draws, height: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """What was drawn for N views as numbers of about the same size (N, PARAMETERS), float32.

    - The crop: row and column of its center, its height and its width, as shares of the image's height and width.
    - Flips: 1 where there is one, horizontal and vertical. The angle of the rotation, in quarter turns.
    - Jitter: brightness, contrast and saturation less 1, and hue in quarter turns; 0 changes nothing.
    - Grayscale: 1 where it is. Blur: its standard deviation in pixels of the view, 0 without one.

    CASSLE (Przewięźlikowski et al. 2023, arXiv:2306.06082) tells the projector of crop, flip, jitter, grayscale and
    blur. The order of the jitter's operations and the interpolation are left out: they hardly change a view.

    Args:
        draws: What was drawn.
        height: Heights of the whole images in pixels (N,).
        width: Widths (N,).
    """
    top, left, rows, columns = draws.box.unbind(1)
    brightness, contrast, saturation, hue = draws.factors.unbind(1)
    return torch.stack([each.float() for each in (
        (top + rows / 2) / height, (left + columns / 2) / width, rows / height, columns / width,
        draws.hflip, draws.vflip, draws.angle / 90,
        brightness - 1, contrast - 1, saturation - 1, 4 * hue, draws.gray, draws.sigma)], dim=1)
