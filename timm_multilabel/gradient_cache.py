"""Batches larger than the memory: a module's outputs and gradient, a piece of the batch at a time."""
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_multilabel.compat import after_backward
from timm_multilabel.heads import REGISTRY

Outputs = tuple[dict[str, torch.Tensor], torch.Tensor | None]
_HEADS = frozenset(REGISTRY.values())


def run_with_gradient_cache(
        module: nn.Module,
        images: torch.Tensor,
        views: int,
        size: int | None,
        *further: torch.Tensor,
) -> Outputs:
    """Run a module on a batch in pieces, keeping nothing but what comes out: gradient caching.

    A loss on the outputs of all images has a gradient at those outputs. On its way back each piece is run again, from
    the same random state, and takes its part of that gradient through the module (Gao et al. 2021, "Scaling Deep
    Contrastive Learning Batch Size under Memory Limited Setup"). The gradient is added to the parameters' `grad`
    within `backward`; `torch.autograd.grad` does not find it.

    A piece has all views of its images, and as nearly as can be its share of the first images of the batch and of the
    last. Batch norm sees a piece, and its running statistics take each piece in once.

    Args:
        module: View-major images (V * B, 3, H, W), with `further`, -> ({name: output (V * B, ...)}, projections
            (V * B, D) or None), perhaps within DistributedDataParallel, which then reduces once.
        images: Images of a batch (V * N, 3, H, W), the same number on every rank.
        views: V.
        size: The most images of a piece; None for the whole batch at once.
        further: What else the module takes, without a gradient of its own, a row for each of the images (V * N, ...).

    Returns:
        What the module returns for the whole batch.

    Raises:
        RuntimeError: A backward pass that is to be differentiated itself.
    """
    number = len(images) // views
    pieces = math.ceil(number / size) if size is not None else 1
    if pieces <= 1:
        return _with_buffers_kept(module, module(images, *further))
    positions = torch.arange(len(images), device=images.device).view(views, number)
    parts = [positions[:, first::pieces].flatten() for first in range(pieces)]
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    with_gradient = torch.is_grad_enabled()
    states, found = [], []
    with _kept_buffers(inner) if with_gradient else nullcontext():  # the second run of the pieces changes them
        for part in parts:
            states.append(_RandomState(images.device))
            found.append(_detached(inner(*(rows[part] for rows in (images, *further)))))
    back = torch.cat(parts).argsort()
    names = list(found[0][0])
    whole = [torch.cat(tensors).index_select(0, back) for tensors in zip(*map(_flat, found), strict=True)]
    if with_gradient:
        replay = _Replay(module, (images, *further), parts, states)
        whole = _Cached.apply(replay, torch.zeros((), requires_grad=True), *whole)
    return dict(zip(names, whole)), whole[-1] if len(whole) > len(names) else None


def _flat(result: Outputs) -> list[torch.Tensor]:
    """The outputs, and last the projections where there are any."""
    outputs, projections = result
    return [*outputs.values(), *([] if projections is None else [projections])]


def _detached(result: Outputs) -> Outputs:
    """The same without what its gradient would need: activations go as soon as nothing else holds them.

    The module does not run in no_grad, since there a compiled one is another program with other random numbers.
    """
    outputs, projections = result
    return ({name: output.detach() for name, output in outputs.items()},
            None if projections is None else projections.detach())


def _with_buffers_kept(module: nn.Module, result: Outputs) -> Outputs:
    """What a module returned; where it recomputes activations, its backward pass leaves the buffers as they are then.

    Gradient checkpointing runs layers again in the backward pass, and batch norm would update its running statistics a
    second time. It is done here, outside of what torch.compile compiles, and with any loop that calls `backward`.
    """
    outputs, projections = result
    if not torch.is_grad_enabled() or not _recomputes(module):
        return result
    if not any(each.requires_grad for each in _flat(result)):
        return result
    flat = _BuffersKept.apply(list(module.buffers()), *_flat(result))
    return dict(zip(outputs, flat)), None if projections is None else flat[-1]


def _recomputes(module: nn.Module) -> bool:
    """Whether gradient checkpointing is on in some part; heads of our own kinds, which may be hundreds, have none."""
    if type(module) in _HEADS:
        return False
    return bool(getattr(module, 'grad_checkpointing', False)) or any(map(_recomputes, module.children()))


class _BuffersKept(torch.autograd.Function):
    """Outputs whose backward pass, from here to its end, leaves buffers as they were when it came here."""

    @staticmethod
    def forward(ctx: Any, buffers: list[torch.Tensor], *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.buffers = buffers
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        before = [buffer.clone() for buffer in ctx.buffers]
        after_backward(lambda: _restore(ctx.buffers, before))
        return None, *gradients


class _Cached(torch.autograd.Function):
    """Outputs that are there already, and whose gradient is taken on by a replay."""

    @staticmethod
    def forward(
            ctx: Any,
            replay: '_Replay',
            requires_grad: torch.Tensor,
            *outputs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.replay = replay
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError('a batch in pieces has no second derivative: call backward without create_graph=True')
        ctx.replay.run(gradients)
        return None, None, *(None for _ in gradients)


class _Replay:
    """Runs the pieces again, each with its part of the gradient at the outputs."""

    def __init__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], parts: list[torch.Tensor],
                 states: list['_RandomState']):
        self.module, self.inputs, self.parts, self.states = module, inputs, parts, states
        device = inputs[0].device.type
        self.autocast = partial(
            torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def run(self, gradients: tuple[torch.Tensor, ...]) -> None:
        """Add the gradient of the parameters."""
        last = len(self.parts) - 1
        no_sync = self.module.no_sync if isinstance(self.module, DistributedDataParallel) else nullcontext
        for index, (part, state) in enumerate(zip(self.parts, self.states, strict=True)):
            with ExitStack() as stack:
                if index < last:
                    stack.enter_context(no_sync())
                stack.enter_context(torch.enable_grad())
                with state.again(), self.autocast():
                    outputs = _flat(_with_buffers_kept(self.module, self.module(*(rows[part] for rows in self.inputs))))
                pairs = [(output, gradient.index_select(0, part))
                         for output, gradient in zip(outputs, gradients, strict=True) if output.requires_grad]
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
            del outputs, pairs


class _RandomState:
    """The state of the random numbers of the CPU and of a device."""

    def __init__(self, device: torch.device):
        self.devices = [torch.device('cpu')] + ([device] if device.type != 'cpu' else [])
        self.states = self._read()

    def _read(self) -> list[torch.Tensor]:
        return [module.get_rng_state(*where) for module, where in map(_random_numbers, self.devices)]

    def _write(self, states: list[torch.Tensor]) -> None:
        for (module, where), state in zip(map(_random_numbers, self.devices), states, strict=True):
            module.set_rng_state(state, *where)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from this state on, and go back to the present one."""
        present = self._read()
        self._write(self.states)
        try:
            yield
        finally:
            self._write(present)


def _random_numbers(device: torch.device) -> tuple[Any, tuple[torch.device, ...]]:
    """What knows the state of a device's random numbers, and how to name the device to it."""
    if device.type == 'cpu':
        return torch, ()
    return torch.get_device_module(device), () if device.type == 'mps' else (device,)


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Undo what happens to a module's buffers meanwhile."""
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        _restore(buffers, before)


@torch.no_grad()
def _restore(buffers: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
