"""The private names of PyTorch and timm that the program needs, each with the reason and with what could replace it.

No other module uses such a name, but for the methods of timm's saver that `WholeSaver` overrides.
"""
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from timm.utils import NativeScaler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNorm = _BatchNorm
"""The base of all batch norms. Needed since PyTorch, up to 2.14 at least, has no public name for it."""

FUSED_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""PyTorch's optimizers that have one kernel for all weights, which can leave out a step."""


def all_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whether all numbers of some tensors are finite, a boolean scalar on their device.

    Needed for one kernel over all gradients. It can go when PyTorch 2.6 is the oldest that is supported, which has
    `torch.nn.utils.get_total_norm`.
    """
    return torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all()


def grad_scaler(scaler: NativeScaler) -> torch.amp.GradScaler:
    """PyTorch's loss scaler within timm's.

    Needed since timm's one call scales, unscales, clips and steps, and an update here is looked at in between. It can
    go when timm, of which 1.0.31 has no public name for it, gives one.
    """
    found: torch.amp.GradScaler = scaler._scaler
    return found


def step_unless(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> bool:
    """Have an optimizer step, or leave weights and moments as they are where a boolean scalar on the device is true.

    Needed since only PyTorch's loss scaler can tell a fused optimizer to skip, which float32 and bfloat16 do not need.
    False for an optimizer that cannot: nothing happened.
    """
    if type(optimizer) not in FUSED_OPTIMIZERS or not optimizer.defaults['fused']:
        return False
    if isinstance(optimizer, torch.optim.SGD):
        if any(group['momentum'] and group['dampening'] for group in optimizer.param_groups):
            return False
        # A first step that is skipped leaves the momentum that it makes unset. One of 0 gives the same first step.
        for group in optimizer.param_groups:
            for p in group['params'] if group['momentum'] else ():
                if p.grad is not None and optimizer.state[p].get('momentum_buffer') is None:
                    optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    return True


def shared_bytes(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of bytes in new shared memory.

    Needed since `Tensor.share_memory_` copies what a tensor holds, and PyTorch, up to 2.14 at least, has no public way
    to allocate shared memory.
    """
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def resize_antialiased(images: torch.Tensor, bicubic: bool, out: torch.Tensor) -> None:
    """Resize images (N, C, H, W) of bytes into `out`, as `torch.nn.functional.interpolate` with `antialias=True` does.

    Needed since that function, up to PyTorch 2.14 at least, has no `out` and takes a detour through another layout of
    the result.
    """
    resize = torch.ops.aten._upsample_bicubic2d_aa if bicubic else torch.ops.aten._upsample_bilinear2d_aa
    resize.out(images, out.shape[2:], False, out=out)


def after_backward(callback: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that is running.

    Needed since PyTorch, up to 2.14 at least, has hooks for single tensors and modules only; its own data parallel
    modules do the same.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Raise RuntimeError unless a boolean scalar is true; on CUDA the device stops, and the host never waits.

    Needed since a public assertion, in PyTorch up to 2.14 at least, reads the scalar on the host.
    """
    torch._assert_async(condition, message)


def split_from(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor (B, C) that some tensors (B, C_1), (B, C_2) ... were split from, in this order, or None.

    Needed since PyTorch, up to 2.14 at least, has no public name for the tensor that another is a view of. Where
    another function came in between, whose backward pass would be left out, there is none.
    """
    whole, split = parts[0]._base, parts[0].grad_fn
    if whole is None or (split.next_functions[0][0] if split is not None else None) is not whole.grad_fn:
        return None
    place, strides, width = whole.storage_offset(), whole.stride(), 0
    for part in parts:
        if part._base is not whole or part.grad_fn is not split or (
                part.storage_offset() != place + width * strides[1] or part.stride() != strides):
            return None
        width += part.shape[1]
    return whole if whole.shape == (len(parts[0]), width) else None


def own_buffers(module: nn.Module) -> Iterable[torch.Tensor | None]:
    """The buffers of a module without those of its parts, None where one is not set.

    Needed since `nn.Module.buffers` takes longer for some hundred heads than what is done with them.
    """
    return module._buffers.values()


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to be called when a module runs: `nn.Module` has no public way to ask."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)
