"""The projector before NT-Xent, and the one that is told what was drawn of each view."""
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from timm_multilabel.config.train import ObjectiveSettings
from timm_multilabel.views.told import PARAMETERS

_EMBEDDED = 64  # numbers that the draws of a view become before the projector takes them


class Projector(nn.Sequential):
    """The MLP before NT-Xent: features (B, F) -> projections (B, D).

    Two layers as in SimCLR (Chen et al. 2020, arXiv:2002.05709, section 4.2), or more, as in SimCLRv2 (Chen et al.
    2020, arXiv:2006.10029, section 2). Without biases and batch norm, so that a step is the same on many processes.

    Args:
        in_features: F.
        dim: D.
        layers: Linear layers, with ReLU between them.
        width: Of the hidden layers; F when None.
    """

    def __init__(
            self,
            in_features: int,
            dim: int,
            layers: int = ObjectiveSettings.projector_layers,
            width: int | None = ObjectiveSettings.projector_width,
    ):
        widths = [in_features, *[width or in_features] * (layers - 1), dim]
        made: list[nn.Module] = []
        for before, after in pairwise(widths):
            made += [nn.Linear(before, after, bias=False), nn.ReLU()]
        super().__init__(*made[:-1])


class ConditionedProjector(nn.Module):
    """A projector that is told what was drawn of each view: CASSLE (Przewięźlikowski et al. 2023, arXiv:2306.06082).

    It can make up for what an augmentation did only if the features still hold what the augmentation changed, so the
    backbone need not forget it. An MLP turns the draws into 64 numbers, and the projector gets them behind the features
    (the paper's concatenation).

    Args:
        in_features: F, the width of the features.
        dim: D, the width of the projections.
        layers: As of `Projector`.
        width: Likewise; F when None.
    """

    def __init__(
            self,
            in_features: int,
            dim: int,
            layers: int = ObjectiveSettings.projector_layers,
            width: int | None = ObjectiveSettings.projector_width,
    ):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(PARAMETERS, _EMBEDDED), nn.ReLU(), nn.Linear(_EMBEDDED, _EMBEDDED))
        self.project = Projector(in_features + _EMBEDDED, dim, layers, width or in_features)

    def forward(self, features: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Features (B, F) and what was drawn (B, PARAMETERS), see `told.parameters`, -> projections (B, D)."""
        embedded = self.embed(drawn.to(next(self.embed.parameters()).dtype))
        projections: torch.Tensor = self.project(torch.cat([features, embedded], dim=1))
        return projections


def projector_shape(state: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a checkpoint's projector, as arguments of `MultiLabelModel`; earlier versions had no choice."""
    return {'projection_dim': state.get('projection_dim', 64), 'projector_layers': state.get('projector_layers', 2),
            'projector_width': state.get('projector_width')}
