r"""Mean log-density of samples under the target.

    ℓ = 1/n Σ_i log p_d(x_i),   gap = ℓ − E_{x ~ p_d} log p_d(x)

The gap is signed: negative for mass where the target has little, positive for mass piled on the target's
peaks. A value near 0 is necessary for a good student, not sufficient: one that sits in a single mode may
have it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vardistill.metrics.pairwise import sample_matrix

ROWS = 2**16
"""Samples whose density is computed at once."""


class Target(Protocol):
    """A density."""

    def log_prob(self, x: Tensor, /) -> Tensor:
        """The log-density log p_d(x) in nats, (B,)."""
        ...


@torch.no_grad()
def log_density(samples: Tensor, target: Target) -> float:
    """1/n Σ_i log p_d(x_i) in nats.

    Args:
        samples: (n, *data).
        target: p_d.

    Raises:
        UsageError: for samples that are fewer than 2 or not finite.
    """
    sample_matrix(samples, "samples")
    log_prob = torch.cat([target.log_prob(rows) for rows in torch.split(samples, ROWS)])
    return float(log_prob.double().mean())
