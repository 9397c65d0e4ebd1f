"""Collectives that the objective needs; each does nothing in a single process."""
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from timm_multilabel.compat import assert_on_device


def world() -> tuple[int, int]:
    """(rank, number of ranks) of this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all ranks, concatenated in rank order: (N, ...) -> (ranks * N, ...).

    Differentiable: the gradient at a rank's tensor is the sum of what flows back into its copy on every rank. All
    ranks must give the same shape.
    """
    if world()[1] == 1:
        return tensor
    gathered: torch.Tensor = _Gather.apply(tensor)
    return gathered


class _Gather(torch.autograd.Function):
    """`gather`'s two directions."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(world()[1])]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        rank, ranks = world()
        return sum_over_ranks(gradient).chunk(ranks)[rank]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, as a new tensor without gradient."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)  # as NCCL wants it
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def all_objects(item: Any) -> list[Any]:
    """What each rank has, in rank order; it must be picklable."""
    items = [item] * world()[1]
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def ranks_here() -> list[int]:
    """The ranks on this machine, this one among them."""
    boot = Path('/proc/sys/kernel/random/boot_id')  # tells this start of this machine from others of its name (Linux)
    machines = all_objects((socket.gethostname(), boot.read_text() if boot.exists() else ''))
    return [rank for rank, machine in enumerate(machines) if machine == machines[world()[0]]]


def assert_same_on_all_ranks(number: int, device: torch.device, what: str) -> None:
    """Raise RuntimeError unless all ranks have the same number; on CUDA the device stops, and the host never waits."""
    numbers = gather(torch.full((1,), number, device=device))
    assert_on_device((numbers == number).all(), f'{what}; rank {world()[0]} has {number}')
