"""Batches larger than the memory: a module's outputs and gradient, a piece of the batch at a time."""
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

Outputs = tuple[dict[str, torch.Tensor], torch.Tensor | None]


def run_in_pieces(module: nn.Module, images: torch.Tensor, views: int, size: int) -> Outputs:
    """Run a module on a batch in pieces, keeping nothing but what comes out: gradient caching.

    A loss on the outputs of all images has a gradient at those outputs. On its way back each piece is run again, from
    the same random state, and takes its part of that gradient through the module (Gao et al. 2021, "Scaling Deep
    Contrastive Learning Batch Size under Memory Limited Setup"). The gradient is added to the parameters' `grad`
    within `backward`; `torch.autograd.grad` does not find it.

    A piece has all views of its images, and as nearly as can be its share of the first images of the batch and of the
    last. Batch norm sees a piece, and its running statistics take each piece in once.

    Args:
        module: View-major images (V * B, 3, H, W) -> ({name: output (V * B, ...)}, projections (V * B, D) or None),
            perhaps within DistributedDataParallel, which then reduces once.
        images: Images of a batch (V * N, 3, H, W), the same number on every rank.
        views: V.
        size: The most images of a piece.

    Returns:
        What the module returns for the whole batch.
    """
    number = len(images) // views
    pieces = math.ceil(number / size)
    if pieces <= 1:
        return module(images)
    positions = torch.arange(len(images), device=images.device).view(views, number)
    parts = [positions[:, first::pieces].flatten() for first in range(pieces)]
    inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    states, found = [], []
    with _kept_buffers(inner):
        for part in parts:
            states.append(_RandomState(images))
            found.append(_without_graph(*inner(images[part])))
    back = torch.cat(parts).argsort()
    whole = {name: torch.cat([each[name] for each in found]).index_select(0, back) for name in found[0]}
    if torch.is_grad_enabled():
        replay = _Replay(module, images, parts, states)
        whole = dict(zip(whole, _Cached.apply(replay, torch.zeros((), requires_grad=True), *whole.values())))
    return {name: output for name, output in whole.items() if name is not None}, whole.get(None)


def _together(outputs: dict[str, torch.Tensor], projections: torch.Tensor | None) -> dict[str | None, torch.Tensor]:
    """The outputs, and under None the projections where there are any."""
    return outputs | ({} if projections is None else {None: projections})


def _without_graph(*outputs: Any) -> dict[str | None, torch.Tensor]:
    """The same by itself: whatever activations a module has kept for its gradient are gone.

    It does run with them, and not in no_grad, where a compiled module is another program with other random numbers.
    """
    return {name: output.detach() for name, output in _together(*outputs).items()}


class _Cached(torch.autograd.Function):
    """Outputs that are there already, and whose gradient is taken on by a replay."""

    @staticmethod
    def forward(ctx: Any, replay: '_Replay', requires_grad: torch.Tensor, *outputs: torch.Tensor):
        ctx.replay = replay
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        ctx.replay.run(gradients)
        return None, None, *(None for _ in gradients)


class _Replay:
    """Runs the pieces again, each with its part of the gradient at the outputs."""

    def __init__(self, module: nn.Module, images: torch.Tensor, parts: list[torch.Tensor],
                 states: list['_RandomState']):
        self.module, self.images, self.parts, self.states = module, images, parts, states
        device = images.device.type
        self.autocast = {'device_type': device, 'enabled': torch.is_autocast_enabled(device),
                         'dtype': torch.get_autocast_dtype(device)}

    def run(self, gradients: tuple[torch.Tensor, ...]) -> None:
        """Add the gradient of the parameters."""
        last = len(self.parts) - 1
        for index, (part, state) in enumerate(zip(self.parts, self.states, strict=True)):
            with ExitStack() as stack:
                if index < last and hasattr(self.module, 'no_sync'):
                    stack.enter_context(self.module.no_sync())
                stack.enter_context(torch.enable_grad())
                with state.again(), torch.autocast(**self.autocast):
                    outputs = _together(*self.module(self.images[part]))
                pairs = [(output, gradient.index_select(0, part))
                         for output, gradient in zip(outputs.values(), gradients, strict=True) if output.requires_grad]
                torch.autograd.backward(*zip(*pairs))
            del outputs, pairs


class _RandomState:
    """The state of the random numbers of the CPU and of some tensor's device."""

    def __init__(self, tensor: torch.Tensor):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(tensor)
        self.device_type = {'device_type': tensor.device.type} if self.devices else {}

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from this state on, and go back to the present one."""
        with torch.random.fork_rng(self.devices, **self.device_type):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, **self.device_type)
            yield


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Undo what happens to a module's buffers meanwhile: the second run of the pieces does it."""
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
