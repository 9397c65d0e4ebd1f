"""The weights of heads that are computed together as one parameter, so that an optimizer visits it once."""
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from timm_multilabel.heads.head import Head
from timm_multilabel.heads.together import Group


class JoinedWeights(nn.Module):
    """Weight (sum of classes, F) and bias (sum of classes) of the heads of a group, in place of the heads' own.

    The heads' own parameters become views of these, so they change with them, and no longer ask for a gradient. State
    dicts, which hold the heads' own, have nothing of this module.

    Args:
        group: The group, which `can_join`.
        heads: All heads by name.
    """

    def __init__(self, group: Group, heads: Mapping[str, Head]):
        super().__init__()
        self.names, self.sizes = group.names, group.sizes
        self.layers = [_layer(heads[name]) for name in group.names]  # a list, for they are parts of their heads
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in self.layers]))
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in self.layers]))
        self._tie()

    @staticmethod
    def can_join(group: Group, heads: Mapping[str, Head]) -> bool:
        """Whether their plain layers, of one dtype and device, are all trained, without dropout."""
        layers = [layer for layer in (heads[name].fc for name in group.names) if type(layer) is nn.Linear]
        parameters = [p for layer in layers for p in layer.parameters()]
        return (len(set(parameters)) == 2 * len(group.names) and all(p.requires_grad for p in parameters)
                and len({(p.dtype, p.device) for p in parameters}) == 1
                and not any(getattr(heads[name].drop, 'p', 1) for name in group.names))

    def parts(self) -> dict[nn.Parameter, list[nn.Parameter]]:
        """Each of the two parameters, with those of the heads that are views of it, in their order."""
        return {whole: [part for layer in self.layers for name, part in layer.named_parameters() if name == which]
                for which, whole in self.named_parameters()}

    def one_by_one(self, heads: Mapping[str, Head], inputs: torch.Tensor) -> list[torch.Tensor]:
        """The logits (B, C) of each head of inputs (B, F), where each must run by itself; see `Group.logits`.

        A head whose layer was replaced by another has its own weights.
        """
        weights = zip(self.weight.split(self.sizes), self.bias.split(self.sizes), strict=True)
        return [
            functional_call(
                heads[name], {'fc.weight': weight, 'fc.bias': bias} if heads[name].fc is layer else {}, inputs)
            for name, layer, (weight, bias) in zip(self.names, self.layers, weights, strict=True)]

    def _tie(self) -> None:
        for whole, parts in self.parts().items():
            for part, view in zip(parts, whole.detach().split(self.sizes), strict=True):
                part.data = view
                part.requires_grad_(False)

    def _apply(self, *args: Any, **kwargs: Any) -> 'JoinedWeights':  # as `to`, `double` and others call it
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, whose layers are copied by now
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tie()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the heads have it all."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: what the heads load is here as well."""


def _layer(head: Head) -> nn.Linear:
    layer = head.fc
    assert isinstance(layer, nn.Linear)
    return layer
