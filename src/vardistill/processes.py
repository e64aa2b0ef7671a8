"""What is below the trainer and yet knows of several processes: their device, and gathering a batch's samples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vardistill.devices import find_device


def launched() -> int:
    """How many processes were launched together, as torchrun and `accelerate launch` tell."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several_on_cpu(device: str) -> bool:
    """Whether several processes share the CPU. One need not tell Accelerate of it, for which the choice is for good."""
    return launched() > 1 and find_device(device).type == "cpu"


_ALONE = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within, `gather` does not wait for the other processes: for what one of them does by itself."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def _together() -> bool:
    """Whether there are other processes to wait for."""
    return not _ALONE.get() and dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's place among those that `gather` waits for."""
    return int(dist.get_rank()) if _together() else 0


def gather(v: Tensor) -> Tensor:
    """All processes' `v` (N, ...) by rank, (P·N, ...), without gradient."""
    v = v.detach()
    if not _together():
        return v
    parts = [torch.empty_like(v) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, v.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """`gather`, whose backward pass sums what all processes' losses say of this process's share."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.rows = slice(rank() * len(v), (rank() + 1) * len(v))
        return gather(v)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.rows]


def gather_with_gradient(v: Tensor) -> Tensor:
    """All processes' `v` (N, ...) by rank, (P·N, ...), with the gradient of the sum of all processes' losses."""
    if not _together():
        return v
    out: Tensor = _Gather.apply(v)  # type: ignore[no-untyped-call]
    return out
