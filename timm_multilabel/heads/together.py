"""Softmax heads of about the same number of classes, computed together: many heads cost what one costs."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from timm_multilabel.compat import has_hooks, split_from
from timm_multilabel.heads.classes import SoftmaxHead
from timm_multilabel.heads.head import Head
from timm_multilabel.labels import MISSING
from timm_multilabel.losses import distillation_loss
from timm_multilabel.losses.precision import float32


@dataclass(frozen=True)
class Group:
    """Softmax heads whose logits are padded to one width.

    Args:
        names: The heads, in the order of the label space.
        sizes: Their numbers of classes.
    """
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def logits(
            self,
            heads: Mapping[str, Head],
            inputs: torch.Tensor,
            joined: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Sequence[torch.Tensor] | None:
        """The logits (B, C) of each head of inputs (B, F) by one matrix product; None where each must run by itself.

        That is so where dropout draws other numbers for each head, where a layer was replaced by another, and where a
        hook waits for a head to run.

        Args:
            heads: All heads by name.
            inputs: What the heads of the group read.
            joined: Weight and bias of all layers of the group, where they are one already (see `JoinedWeights`).
        """
        layers = []
        for name in self.names:
            head = heads[name]
            if type(head) is not SoftmaxHead:
                return None
            layer, drop = head.fc, head.drop
            if type(layer) is not nn.Linear or (head.training and drop.p):
                return None
            if has_hooks(head) or has_hooks(drop) or has_hooks(layer):
                return None
            layers.append(layer)
        weight, bias = joined if joined is not None else (
            torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))
        logits: tuple[torch.Tensor, ...] = F.linear(inputs, weight, bias).split(self.sizes, dim=1)
        return logits

    def losses(
            self,
            heads: Mapping[str, Head],
            outputs: Mapping[str, torch.Tensor],
            targets: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `SoftmaxHead.loss` gives of each head: sums and numbers of labels, both (H,)."""
        target = torch.stack([targets[name] for name in self.names], dim=1)
        logits = self._padded(outputs)
        # A log-softmax, whose own kernel is slow over so few classes.
        logits = logits - logits.detach().amax(dim=2, keepdim=True)
        normalizer = logits.exp().sum(dim=2, keepdim=True).log()
        known = target != MISSING
        picked = target.clamp(min=0)[..., None]
        weights, smoothing, classes = self._tables(heads, logits)
        loss = (normalizer - logits.gather(2, picked))[..., 0]
        mass = known.to(loss.dtype)
        if weights is not None:
            its = weights.expand(len(target), -1, -1).gather(2, picked)[..., 0]
            loss, mass = loss * its, mass * its
        if smoothing is not None:
            # The mean over classes of -(logit - normalizer). Padding is -inf, whose product with 0 would be NaN.
            spread = logits if len(set(self.sizes)) == 1 else logits.masked_fill(~classes, 0)
            if weights is None:
                even = normalizer[..., 0] - spread.sum(dim=2) / classes.sum(dim=1)
            else:
                even = normalizer[..., 0] * weights.sum(dim=1) - (spread * weights).sum(dim=2)
                even = even / classes.sum(dim=1)
            loss = (1 - smoothing) * loss + smoothing * even
        return loss.masked_fill(~known, 0).sum(dim=0), mass.sum(dim=0)

    def teacher_losses(
            self,
            outputs: Mapping[str, torch.Tensor],
            answers: Mapping[str, torch.Tensor],
            temperature: float,
    ) -> torch.Tensor:
        """`SoftmaxHead.teacher_loss` of each head (H, B)."""
        return distillation_loss(self._padded(outputs), self._padded(answers), temperature).T

    def hits(
            self,
            outputs: Mapping[str, torch.Tensor],
            targets: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of rows whose likeliest class is their label, and of labels, both (H,)."""
        target = torch.stack([targets[name] for name in self.names], dim=1)
        return (self._padded(outputs).max(dim=2).indices == target).sum(dim=0), (target != MISSING).sum(dim=0)

    def _padded(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits of all heads (B, H, C) in float32 at least, C being the most classes; -inf where a head has less."""
        its = [outputs[name] for name in self.names]
        whole = split_from(its)
        logits = float32(torch.cat(its, dim=1) if whole is None else whole)
        if len(set(self.sizes)) == 1:
            return logits.reshape(len(logits), len(self.sizes), self.sizes[0])
        index, classes = _padding(self.sizes, logits.device)
        padded = F.pad(logits, (0, 1), value=float('-inf'))
        return padded[:, index].reshape(len(logits), *classes.shape)

    def _tables(
            self,
            heads: Mapping[str, Head],
            like: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Class weights (H, C), smoothing (H,) and which classes there are (H, C); None where no head has any."""
        _, classes = _padding(self.sizes, like.device)
        its = [head for head in map(heads.__getitem__, self.names) if isinstance(head, SoftmaxHead)]
        smoothing = tuple(head.smoothing for head in its)
        given = [head.class_weights for head in its]
        most = classes.shape[1]
        weights = None
        if any(each is not None for each in given):
            weights = torch.stack([
                F.pad(like.new_ones(size) if each is None else each.to(like), (0, most - size))
                for each, size in zip(given, self.sizes, strict=True)])
        return weights, _constants(smoothing, like.dtype, like.device) if any(smoothing) else None, classes


@lru_cache(maxsize=64)  # a copy from the host at each step would have the host wait for the device
def _padding(sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which logit, or the one behind the last, stands where (H * C,), and where a head has a class (H, C)."""
    most, index, start = max(sizes), list[int](), 0
    for size in sizes:
        index += [*range(start, start + size), *[sum(sizes)] * (most - size)]
        start += size
    with torch.inference_mode(False):  # whoever asks first: a step may need them later
        found = torch.tensor(index, device=device)
        return found, (found < sum(sizes)).reshape(len(sizes), most)


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _places(order: tuple[str, ...], names: tuple[str, ...], device: torch.device) -> torch.Tensor | None:
    """Where in an order each name is (H,); None where the order is the same."""
    if order == names:
        return None
    where = {name: place for place, name in enumerate(order)}
    with torch.inference_mode(False):
        return torch.tensor([where[name] for name in names], device=device)


def group_heads(heads: Mapping[str, Head]) -> list[Group]:
    """The groups of two or more softmax heads whose numbers of classes are within a factor of two.

    A head of the user's own, though it inherits from one of ours, runs by itself.
    """
    groups: dict[int, dict[str, int]] = {}
    for name, head in heads.items():
        if type(head) is SoftmaxHead:
            size = len(head.labels.classes)
            groups.setdefault(size.bit_length(), {})[name] = size
    return [Group(tuple(group), tuple(group.values())) for group in groups.values() if len(group) > 1]


def losses_of_heads(
        groups: Sequence[Group],
        heads: Mapping[str, Head],
        outputs: Mapping[str, torch.Tensor],
        targets: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss of every head: sums and numbers of labels, both (H,) in the order of the heads."""
    together = [group for group in groups
                if all(targets[name].ndim == 1 for name in group.names)]  # mixed labels have two dimensions
    found = [group.losses(heads, outputs, targets) for group in together]
    names = dict.fromkeys(name for group in together for name in group.names)
    for name, head in heads.items():
        if name not in names:
            total, count = head.loss(outputs[name], targets[name])
            found.append((total[None], count[None]))
    order = (*names, *(name for name in heads if name not in names))
    sums, counts = (torch.cat(each) for each in zip(*found, strict=True))
    places = _places(order, tuple(heads), sums.device)
    return (sums, counts) if places is None else (sums[places], counts[places])


def teacher_losses_of_heads(
        groups: Sequence[Group],
        heads: Mapping[str, Head],
        outputs: Mapping[str, torch.Tensor],
        answers: Mapping[str, torch.Tensor],
        temperature: float,
) -> torch.Tensor:
    """`Head.teacher_loss` of each head that there are answers for (H, B), in their order."""
    found: dict[str, torch.Tensor] = {}
    for group in groups:
        found |= zip(group.names, group.teacher_losses(outputs, answers, temperature).unbind(), strict=True)
    return torch.stack([
        found[name] if name in found else heads[name].teacher_loss(outputs[name], answer, temperature)
        for name, answer in answers.items()])
