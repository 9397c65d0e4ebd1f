"""Gradients -> weights, and never weights that are no numbers."""
import math
from dataclasses import dataclass, field

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import nn

from timm_multilabel.compat import all_finite, grad_scaler, own_buffers, step_unless
from timm_multilabel.task import JointTask
from timm_multilabel.training.update_decisions import UpdateDecisions


@dataclass
class OptimizerStep:
    """Gradients -> weights: accumulation, loss scaling, clipping, the optimizer, the EMA, a schedule of updates.

    An update whose loss or gradient is not finite on any rank is skipped on all of them, on the device: weights and
    the statistics of batch norm stay as they were. So do the moments of PyTorch's fused Adam, AdamW and SGD; those of
    other optimizers see a gradient of zero, and the step takes a copy of the weights.

    Args:
        task: What is trained.
        optimizer: Changes its weights; `create_optimizer` makes it.
        scheduler: Learning rate schedule, or None.
        scaler: Loss scaler for float16, or None.
        accumulate: Batches whose gradients make one update.
        clip_grad: The value to clip gradients at; no clipping when None.
        clip_mode: How timm clips: by 'norm', by 'value', or 'agc'.
    """
    task: JointTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None = None
    scaler: NativeScaler | None = None
    accumulate: int = 1
    clip_grad: float | None = None
    clip_mode: str = 'norm'
    modules: list[nn.Module] = field(default_factory=list, init=False)  # those with buffers
    finite: torch.Tensor | None = field(default=None, init=False)
    buffers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, init=False)

    def updates_per_epoch(self, steps: int) -> int:
        return math.ceil(steps / self.accumulate)

    def is_update(self, step: int, steps: int) -> bool:
        """Whether the weights change after a step (from 0); the last group of an epoch may be a smaller one."""
        return (step + 1) % self.accumulate == 0 or step + 1 == steps

    def batches_in_update(self, step: int, steps: int) -> int:
        """The number of batches that the update which a step (from 0) belongs to is over."""
        return min(self.accumulate, steps - step // self.accumulate * self.accumulate)

    @torch.no_grad()
    def begin(self) -> None:
        """Before the forward pass of a step: keep what a skipped update must leave as it was."""
        if self.finite is None:
            if not self.modules:
                self.modules = [module for module in self.task.joint_module.modules() if own_buffers(module)]
            self.buffers = [(buffer, buffer.clone()) for module in self.modules for buffer in own_buffers(module)
                            if buffer is not None]

    def backward(self, loss: torch.Tensor, update: bool, decisions: UpdateDecisions, step: int, stop: bool) -> None:
        """Add the gradient of a loss, and change the weights if it is the update's last.

        Args:
            loss: A step's loss, divided by the batches of its update.
            update: Whether the step is the last of its update.
            decisions: Has the ranks agree on whether the update is to be skipped.
            step: The number of the step in its epoch, from 0.
            stop: Whether this rank was told to stop.
        """
        here = loss.detach().isfinite()
        here = self.finite = here if self.finite is None else self.finite & here
        if self.scaler is not None:
            grad_scaler(self.scaler).scale(loss).backward()
        else:
            loss.backward()
        if not update:
            return
        gradients = [p.grad for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        finite = decisions.reach(step, here & all_finite(gradients), here, stop)
        self._update(gradients, finite)
        self.finite = None

    @torch.no_grad()
    def _update(self, gradients: list[torch.Tensor], finite: torch.Tensor) -> None:
        parameters = self.task.get_clip_parameters(exclude_head=self.clip_mode == 'agc') if self.clip_grad else None
        kept = list(self.buffers)
        if self.scaler is not None:
            kept += self._weights_before()
            # It looks at the gradient too, lowers the scale and leaves the optimizer out.
            scaler = grad_scaler(self.scaler)
            if self.clip_grad is not None:
                scaler.unscale_(self.optimizer)
                dispatch_clip_grad(parameters, self.clip_grad, self.clip_mode)
            scaler.step(self.optimizer)
            scaler.update()
        else:
            if self.clip_grad is not None:
                dispatch_clip_grad(parameters, self.clip_grad, self.clip_mode)
            if not step_unless(self.optimizer, ~finite):
                for gradient in gradients:
                    gradient.masked_fill_(~finite, 0)
                kept += self._weights_before()
                self.optimizer.step()
        for tensor, old in kept:
            torch.where(finite, tensor, old, out=tensor)
        self.optimizer.zero_grad()

    def _weights_before(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each weight that is about to change, with a copy of it."""
        weights = (p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None)
        return [(p, p.detach().clone()) for p in weights]
