"""Which predictions on the pool become labels: a threshold that goes by labelled images, and distribution alignment."""
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from timm_multilabel.distributed import sum_over_ranks, world
from timm_multilabel.heads import Head
from timm_multilabel.labels import MISSING, TagSet
from timm_multilabel.losses import alignment, binary_alignment
from timm_multilabel.losses.precision import float32

_MOMENTUM = 0.99  # of the running means, a step: about 100 steps, where ReMixMatch has the mean of 128

Weak = tuple[torch.Tensor, float | torch.Tensor]
"""What a head's pseudo-labels are made of: outputs on weak views of the pool (M, ...), and the least probability."""


class PseudoLabels(nn.Module):
    """The teacher's outputs on weak views -> what the heads take as labels, each head by itself.

    - Threshold: a share of the mean highest probability on the labelled images of the step, over all ranks (Roelofs et
      al. 2021, "AdaMatch", relative confidence threshold). A head has as many of them as have a label of it; where
      there is none in a step, or without a reference, the threshold is absolute, as FixMatch has it.
    - Alignment: outputs on the pool are moved so that their mean prediction becomes that on labelled images with a
      label of the head (see `losses.alignment`). Both means run over about the last 100 steps and over all ranks.
      Each tag is aligned and passes by itself, as a choice of two.

    The running means are state, the same on all ranks: `state_dict` is for checkpoints. A step whose predictions are
    not finite leaves them as they were. Nothing here waits for the device.

    A user's kind of head has a reference where it has probabilities, and is aligned where it `is_logits`.

    Args:
        heads: All heads by name; those without a distribution take no part.
        threshold: Least probability, as a share of the reference.
        relative: The reference is the confidence on labelled images, and not 1.
        aligned: Align the distribution.
        device: Where the outputs are.
    """
    sums: torch.Tensor
    counts: torch.Tensor
    binary: torch.Tensor

    def __init__(
            self,
            heads: Mapping[str, Head],
            threshold: float,
            relative: bool,
            aligned: bool,
            device: torch.device | None = None,
    ):
        super().__init__()
        self.threshold, self.relative, self.aligned = threshold, relative, aligned
        self.names = [name for name, head in heads.items() if head.distribution]
        self.measured = [name for name in self.names if heads[name].has_probabilities] if relative or aligned else []
        self.sizes = [heads[name].labels.outputs for name in self.measured]
        # Long sums of small numbers; MPS has no float64.
        dtype = torch.float32 if device is not None and device.type == 'mps' else torch.float64
        shape = 2, sum(self.sizes)  # on labelled images, and on the pool
        self.register_buffer('sums', torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer('counts', torch.zeros(shape, dtype=dtype, device=device))
        binary = [isinstance(heads[name].labels, TagSet) for name in self.measured for _ in range(
            heads[name].labels.outputs)]
        self.register_buffer('binary', torch.tensor(binary, dtype=torch.bool, device=device), persistent=False)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Bring back the running means; those of a run that had none, or had them where this has none, are left out."""
        if not self.measured or not state.get('sums', self.sums).numel():
            return None
        return super().load_state_dict(state, strict, assign)

    @property
    def needs_labelled(self) -> bool:
        """Whether outputs on labelled images are needed."""
        return bool(self.measured)

    @torch.no_grad()
    def forward(
            self,
            heads: Mapping[str, Head],
            labelled: Mapping[str, torch.Tensor],
            target: Mapping[str, torch.Tensor],
            pool: Mapping[str, torch.Tensor],
    ) -> dict[str, Weak]:
        """Take in a step, and say what the pseudo-labels of each head with a distribution are made of.

        Args:
            heads: The heads.
            labelled: Their outputs on the weak views of N labelled images; not looked at unless `needs_labelled`.
            target: The targets of these, as the heads take them.
            pool: Their outputs on the weak views of M images of the pool.
        """
        if not self.measured:
            return {name: (pool[name], self.threshold) for name in self.names}
        reference = self._take_in(heads, labelled, target, pool)
        thresholds = dict(zip(self.measured, self.threshold * reference, strict=True)) if self.relative else {}
        shifts = dict(zip(self.measured, self._shift().split(self.sizes), strict=True)) if self.aligned else {}
        found: dict[str, Weak] = {}
        for name in self.names:
            weak = pool[name]
            if name in shifts and heads[name].is_logits:
                weak = float32(weak)
                weak = weak + shifts[name].to(weak.dtype)
            found[name] = weak, thresholds.get(name, self.threshold)
        return found

    def _take_in(
            self,
            heads: Mapping[str, Head],
            labelled: Mapping[str, torch.Tensor],
            target: Mapping[str, torch.Tensor],
            pool: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Update the running means; the mean highest probability of each measured head on the labelled images (H,)."""
        dtype = self.sums.dtype
        parts, sure = [], []
        for name in self.measured:
            head, of_labelled = heads[name], _probabilities(heads[name], labelled[name]).to(dtype)
            if isinstance(head.labels, TagSet):
                known = (target[name] != MISSING).to(dtype)
                highest = torch.maximum(of_labelled, 1 - of_labelled)
            else:
                known = head.labels.known(target[name]).to(dtype)[:, None]
                highest = of_labelled.amax(dim=1, keepdim=True)
            sure.append(torch.stack([(highest * known).sum(), known.sum()]))
            of_pool = _probabilities(head, pool[name]).sum(dim=0, dtype=dtype)
            counted = known.sum(dim=0).expand_as(of_pool)
            parts.append(torch.stack([(of_labelled * known).sum(dim=0), counted, of_pool]))
        total = sum_over_ranks(torch.cat([torch.cat(parts, dim=1).flatten(), torch.stack(sure, dim=1).flatten()]))
        (of_labelled, counted, of_pool), (confidence, number) = (
            part.view(rows, -1) for part, rows in zip(total.split([3 * sum(self.sizes), 2 * len(sure)]), (3, 2)))
        images = torch.full_like(of_pool, len(pool[self.measured[0]]) * world()[1])
        sums, counts = torch.stack([of_labelled, of_pool]), torch.stack([counted, images])
        # A step without a label of a head leaves its mean as it is, and so does one that is not finite.
        news = (counts > 0) & total.isfinite().all()
        self.sums.copy_(torch.where(news, _MOMENTUM * self.sums + sums, self.sums))
        self.counts.copy_(torch.where(news, _MOMENTUM * self.counts + counts, self.counts))
        return torch.where(number > 0, confidence / number.clamp(min=1), 1.0)

    def _shift(self) -> torch.Tensor:
        """What to add to the outputs of all measured heads (S,); 0 where no label has been seen yet."""
        labelled, pool = self.sums / self.counts.clamp(min=torch.finfo(self.sums.dtype).tiny)
        shift = torch.where(self.binary, binary_alignment(labelled, pool), alignment(labelled, pool))
        return torch.where((self.counts > 0).all(dim=0), shift, 0.0)


def _probabilities(head: Head, output: torch.Tensor) -> torch.Tensor:
    """Probabilities (B, C) of classes or tags in float32 at least; `Head.probabilities` are in float32 at most."""
    answer = head.answer(output)
    return answer.sigmoid() if isinstance(head.labels, TagSet) else answer.exp()
