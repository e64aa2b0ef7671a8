"""What knows of several processes: gathering samples, means of gradients, and work for one of them alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from vardistill.devices import find_device
from vardistill.launch import launched as launched
from vardistill.progress import say

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long processes wait for one that works alone: evaluations and fits may take longer than any collective."""


LAUNCH = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip
"""By what Accelerate knows that processes were launched together."""

UNSET = ("", "0", "1", "no", "false", "none")
"""Values by which the launcher's variables ask for nothing."""


@contextmanager
def shielded() -> Iterator[None]:
    """Within, Accelerate finds in the environment neither settings, as a run has its own, nor a launch of one process.

    Settings that are there, `ACCELERATE_MIXED_PRECISION=bf16` for example, are told to have no effect.
    """
    settings = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    asked = [f"{name}={value}" for name, value in settings.items() if value.lower() not in UNSET]
    if asked:
        say(f"vardistill: without effect, as a run has settings of its own: {', '.join(asked)}")
    left = {name: os.environ[name] for name in LAUNCH if name in os.environ and launched() == 1}
    hidden = settings | left
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def join(device: str) -> None:
    """Meet the other processes, where there are any."""
    with shielded():
        PartialState(cpu=several_on_cpu(device))


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


def synchronise(tensors: Sequence[Tensor], how: Literal["mean", "first"]) -> None:
    """Give all processes the mean of their tensors, or the first process's, in place; one message for each type."""
    for dtype in dict.fromkeys(v.dtype for v in tensors):
        own = [v.detach() for v in tensors if v.dtype == dtype]
        flat = torch.cat([v.flatten() for v in own])
        if how == "mean":
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        else:
            dist.broadcast(flat, 0)
        for v, new in zip(own, flat.split([v.numel() for v in own]), strict=True):
            v.copy_(new.view_as(v))


@cache
def _waiting_room() -> Any:
    """A group of all processes that wait for each other however long it takes."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def on_main(work: Callable[[], T]) -> T | None:
    """Let the first process do this alone, while the others wait; returns its result there, None elsewhere.

    What it raises is raised there, and the others end with a `RuntimeError`, not in a wait for ever.
    """
    if not _together():
        return work()
    group, failed, result = _waiting_room(), torch.zeros(()), None
    error: BaseException | None = None
    if rank() == 0:
        try:
            with alone():
                result = work()
        except BaseException as caught:  # the others have to hear of it, whatever it is
            error, failed = caught, torch.ones(())
    dist.broadcast(failed, 0, group=group)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("the first process failed at what it did alone: see what it said")
    return result
