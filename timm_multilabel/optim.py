"""timm's optimizers over backbone, heads and projector, and gradient centralization as the fork had it."""
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import (
    AdamP,
    create_optimizer_v2,
    get_optimizer_class,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from timm_multilabel.backbones import JoinedBackbones
from timm_multilabel.compat import FUSED_OPTIMIZERS
from timm_multilabel.optimizer_layout import FormerLayout
from timm_multilabel.task import JointModule, JointTask


def create_optimizer(
        task: JointTask,
        opt: str,
        *,
        lr: float,
        weight_decay: float = 0.0,
        layer_decay: float | None = None,
        gradient_centralization: bool | None = None,
        join_heads: bool = False,
        **kwargs: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer of timm's for what a task trains; call it before `prepare_distributed`.

    Args:
        task: The task.
        opt: timm's name of the optimizer.
        lr: Learning rate.
        weight_decay: Weight decay of weights; biases, norms and what the backbone exempts have none.
        layer_decay: Factor on the learning rate from each layer of the backbone to the one below it; heads and
            projector have the whole rate.
        gradient_centralization: Centralize updates (see `centralize_`); by default for 'adamp' only, as the fork.
        join_heads: Have heads that are computed together trained as one (see `JointTask.join_heads`), where PyTorch's
            optimizer has one kernel for all weights. Checkpoints are the same.
        kwargs: Further arguments of `timm.optim.create_optimizer_v2`.

    Raises:
        ValueError: timm knows no such optimizer, or heads are joined for another one.
    """
    if gradient_centralization is None:
        gradient_centralization = opt.lower() == 'adamp'
    if len(task.joint_module.joined):
        raise ValueError('the heads of this task are joined for another optimizer')
    groups, joined = _parameter_groups(task.joint_module, weight_decay, layer_decay), {}
    if _fuses(opt, groups) and not kwargs.keys() & {'foreach', 'fused', 'capturable', 'differentiable'}:
        kwargs['fused'] = True
        joined = task.join_heads() if join_heads else {}
    layout = FormerLayout(groups, joined)
    optimizer = create_optimizer_v2(layout.groups, opt=opt, lr=lr, weight_decay=weight_decay, **kwargs)
    if joined:
        layout.attach(optimizer)
    if opt.lower() == 'adamp' and not kwargs.get('caution'):
        return CentralizedAdamP(optimizer.param_groups, gradient_centralization)
    if gradient_centralization:
        centralize_updates(optimizer)
    return optimizer


def _fuses(opt: str, groups: list[dict[str, Any]]) -> bool:
    """Whether PyTorch has one kernel for all weights, so that a step of many small heads costs what one large costs."""
    try:
        optimizer_class = get_optimizer_class(opt, bind_defaults=False)
    except ValueError:
        return False  # timm knows no such optimizer, and will say so
    return optimizer_class in FUSED_OPTIMIZERS and all(
        p.device.type in ('cpu', 'cuda') and p.is_floating_point() for group in groups for p in group['params'])


def _parameter_groups(module: JointModule, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
    """timm's groups for the backbone, and plain ones for heads and projector, which no layer of it contains."""
    backbone = module.model.backbone
    exempt: set[str] = getattr(backbone, 'no_weight_decay', set)()
    further = (module.projector, module.model.projector, module.to_features)
    others = nn.ModuleList([module.model.heads, *(each for each in further if each is not None)])
    groups: list[dict[str, Any]]
    if layer_decay is None:
        groups = param_groups_weight_decay(backbone, weight_decay, no_weight_decay_list=exempt)
    else:
        # Each of several joined backbones has layers of its own.
        parts = backbone.backbones if isinstance(backbone, JoinedBackbones) else [backbone]
        groups = [group for part in parts for group in param_groups_layer_decay(
            part, weight_decay, no_weight_decay_list=getattr(part, 'no_weight_decay', set)(), layer_decay=layer_decay)]
    groups += param_groups_weight_decay(others, weight_decay)
    return groups


def centralize_(update: torch.Tensor) -> torch.Tensor:
    """Subtract, in place, the mean over all dimensions but the first from a tensor of more than 3 dimensions.

    Gradient centralization (Yong et al. 2020, "Gradient Centralization: A New Optimization Technique for Deep Neural
    Networks"), which the fork applied to the update, not to the gradient.
    """
    if update.ndim > 3:
        update.sub_(update.mean(dim=tuple(range(1, update.ndim)), keepdim=True))
    return update


class CentralizedAdamP(AdamP):
    """timm's AdamP, without its two host syncs a tensor and step, and with the projected update centralized on request.

    AdamP: Heo et al. 2021, "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights". The
    state and the options of the groups are those of timm's class, so checkpoints of the two are the same.

    Args:
        param_groups: Groups that hold timm's options, as timm's AdamP has them.
        centralize: Centralize the projected update just before the step.
    """

    def __init__(self, param_groups: list[dict[str, Any]], centralize: bool):
        super().__init__(param_groups)  # type: ignore[no-untyped-call]  # timm's has no types
        self.centralize = centralize

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None:
                    self._step_one(p, p.grad, group)
        return loss

    def _step_one(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state['step'] += 1
        beta1, beta2 = group['betas']
        mean = state['exp_avg'].lerp_(grad, 1 - beta1)
        square = state['exp_avg_sq'].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

        denominator = (square / (1 - beta2 ** state['step'])).sqrt_().add_(group['eps'])
        update = (mean.lerp(grad, 1 - beta1) if group['nesterov'] else mean) / denominator
        decay = group['lr'] * group['weight_decay']
        if p.ndim > 1:
            update, projected = project(update, p, grad, group['delta'], group['eps'])
            decay = torch.where(projected, decay * group['wd_ratio'], decay)
        if group['weight_decay']:
            p.mul_(1 - decay)
        if self.centralize:
            centralize_(update)
        p.add_(update, alpha=-group['lr'] / (1 - beta1 ** state['step']))


def project(
        update: torch.Tensor,
        p: torch.Tensor,
        grad: torch.Tensor,
        delta: float,
        eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take out of an update what lies along a scale-invariant weight (Heo et al. 2021, algorithm 2).

    A weight counts as scale-invariant in each of its output channels, or else as a whole, when its gradient is nearly
    orthogonal to it there.

    Returns:
        The update, and whether it was projected (a scalar on the device, so that nothing waits for it).
    """
    weight, gradient, flat = (tensor.flatten(1) for tensor in (p, grad, update))
    # Of each channel; the whole tensor's dot products and squared norms are the sums of these.
    weight_square, gradient_square = weight.square().sum(1, keepdim=True), gradient.square().sum(1, keepdim=True)
    weight_gradient, weight_update = (weight * gradient).sum(1, keepdim=True), (weight * flat).sum(1, keepdim=True)

    along, projected = torch.zeros_like(weight_square), torch.zeros((), dtype=torch.bool, device=p.device)
    for whole in (True, False):  # the channels last, as they go before the whole
        parts = (weight_gradient, weight_square, gradient_square, weight_update)
        dot, square, its_square, length = (part.sum(0, keepdim=True) if whole else part for part in parts)
        norm, its_norm = square.sqrt(), its_square.sqrt()
        cosine = dot.abs() / (norm.clamp(min=eps) * its_norm.clamp(min=eps))
        invariant = cosine.max() < delta / (p.numel() if whole else weight.shape[1]) ** 0.5
        along = torch.where(invariant, length / (norm + eps).square(), along)
        projected = projected | invariant
    return (flat - weight * along).view_as(p), projected


def centralize_updates(optimizer: torch.optim.Optimizer) -> None:
    """Make every step of any optimizer change tensors of more than 3 dimensions by a centralized update.

    The update is all that the step changes, weight decay included. It costs a copy of those tensors a step.
    """
    before: dict[nn.Parameter, torch.Tensor] = {}

    @torch.no_grad()
    def remember(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            before.update((p, p.clone()) for p in group['params'] if p.grad is not None and p.ndim > 3)

    @torch.no_grad()
    def centralize(*_: Any) -> None:
        for p, old in before.items():
            p.copy_(old + centralize_(p - old))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(centralize)
