"""The only place below the trainer that knows of several processes: gathering a batch's samples."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather(v: Tensor) -> tuple[Tensor, int]:
    """All processes' `v` (N, ...) by rank, (P·N, ...), without gradient, and the index where this one's begin."""
    v = v.detach()
    if not (dist.is_available() and dist.is_initialized()):
        return v, 0
    parts = [torch.empty_like(v) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, v.contiguous())
    return torch.cat(parts), dist.get_rank() * len(v)
