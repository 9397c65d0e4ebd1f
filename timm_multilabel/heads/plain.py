"""Heads that learn only from views with the colors of their image (`views=plain`)."""
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from timm_multilabel.distributed import sum_over_ranks, world
from timm_multilabel.labels import LabelSpace, missing_row


def heads_of_plain_views(options: Mapping[str, Mapping[str, object]]) -> tuple[str, ...]:
    """The heads whose options, as `resolve_options` gives them, have `views=plain`."""
    return tuple(name for name, its in options.items() if its.get('views') == 'plain')


class PlainViews(nn.Module):
    """What keeps some heads from learning from views whose colors were changed.

    To such a head each of those views is one without labels: it is in no sum of losses and in no number that a mean
    divides by. An image may so count twice in a step, once or not at all. It has tensors of constants, and no weights.

    Args:
        label_space: All heads.
        names: Those that learn from plain views only.
    """
    other_columns: torch.Tensor
    missing: torch.Tensor

    def __init__(self, label_space: LabelSpace, names: Sequence[str]):
        super().__init__()
        self.names = frozenset(names)
        others = [head.name not in self.names for head in label_space.heads for _ in range(head.width)]
        self.register_buffer('other_columns', torch.tensor(others), persistent=False)
        self.register_buffer('missing', missing_row(label_space), persistent=False)

    def mask(self, target: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """Targets (N, W) in which these heads have labels where a view is plain (N,) only."""
        return target.where(plain[:, None] | self.other_columns, self.missing)

    def mean(self, losses: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """The means (H,) of losses (H, N) over the plain views (N,) of all ranks, so that DDP's average is exact."""
        return losses.where(plain, 0).sum(dim=1) / self.count(plain)

    def count(self, plain: torch.Tensor) -> torch.Tensor:
        """How many views (N,) are plain, the mean over ranks; never 0, since where there is none all losses are 0."""
        return sum_over_ranks(plain.sum(dtype=torch.float32)).clamp(min=1e-6) / world()[1]

    def teach(self, weak: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """Outputs of weak views (N, ...) that are sure of nothing (NaN) where the strong view is not plain (N,)."""
        return weak.masked_fill(~plain.view(-1, *[1] * (weak.ndim - 1)), float('nan'))
