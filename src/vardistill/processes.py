"""The only place below the trainer that knows of several processes: gathering a batch's samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

_ALONE = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within, `gather` does not wait for the other processes: for what one of them does by itself."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def gather(v: Tensor) -> Tensor:
    """All processes' `v` (N, ...) by rank, (P·N, ...), without gradient."""
    v = v.detach()
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return v
    parts = [torch.empty_like(v) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, v.contiguous())
    return torch.cat(parts)
