r"""How samples spread over the modes N(μ_k, s_k² I), of weights π_k, of a target.

A sample belongs to the mode that is nearest in units of its s_k, and is *off* the modes if that is farther
than r_d s_k, the radius outside which a mode of d dimensions has the share e⁻⁸ = 3.4e-4 of its mass:

    P(χ_d > r_d) = Γ(d/2, r_d²/2)/Γ(d/2) = e⁻⁸,   r_2 = 4

    modes_found = number of k that hold at least π_k/4 of the samples within r_d s_k
    mode_tv     = ½ Σ_k |share of the samples that belong to k − π_k|
    off_mode    = share of the samples off the modes

The shares of `mode_tv` are of all samples, so that they sum to one.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from vardistill.denoisers.mixture import squared_distances
from vardistill.errors import UsageError
from vardistill.metrics.pairwise import sample_matrix

OFF_SHARE = math.exp(-8)
"""Of a mode's own mass: what is outside 4 standard deviations in the plane."""

FOUND_SHARE = 0.25
"""Of a mode's weight."""

ROWS = 2**12
"""Samples whose distances to all modes are computed at once."""


class ModeStatistics(NamedTuple):
    """How samples spread over modes.

    Attributes:
        modes_found: number of modes, 0..K.
        mode_tv: total variation between the samples' and the target's mode masses, in [0, 1].
        off_mode: share of the samples, in [0, 1].
    """

    modes_found: int
    mode_tv: float
    off_mode: float


@cache
def mode_radius(dimension: int) -> float:
    """r_d, in standard deviations of a mode, by bisection to 12 decimals."""
    half = torch.tensor(dimension / 2, dtype=torch.float64)
    low, high = 0.0, 4.0 + 2 * math.sqrt(dimension)
    while high - low > 1e-13 * high:
        r = (low + high) / 2
        outside = float(torch.special.gammaincc(half, torch.tensor(r**2 / 2, dtype=torch.float64)))
        low, high = (r, high) if outside > OFF_SHARE else (low, r)
    return round(high, 12)


@torch.no_grad()
def mode_statistics(
    samples: Tensor, means: Tensor, std: float | Tensor, weights: Tensor | None = None
) -> ModeStatistics:
    """Modes found, total variation of the mode masses, and the share off the modes.

    Args:
        samples: (n, d).
        means: (K, d) μ_k.
        std: s_k, a number or (K,); > 0.
        weights: (K,) π_k, which sum to 1; default equal.

    Raises:
        UsageError: for samples that are fewer than 2, not finite or not of the modes' dimension, or a std
            that is not positive.
    """
    sample_matrix(samples, "samples")
    if samples.shape[1:] != means.shape[1:]:
        shape, dimension = tuple(samples.shape[1:]), means.shape[1]
        raise UsageError(f"the modes have dimension {dimension}, but the samples have shape {shape}")
    std = torch.as_tensor(std).to(means).expand(len(means))
    if not (std > 0).all():
        raise UsageError("the modes' std must be positive")
    weights = torch.full_like(std, 1 / len(means)) if weights is None else weights
    nearest, near = _assign(samples, means, std)
    mass = nearest.bincount(minlength=len(means)) / len(samples)
    mass_near = nearest[near].bincount(minlength=len(means)) / len(samples)
    return ModeStatistics(
        modes_found=int((mass_near >= FOUND_SHARE * weights).sum()),
        mode_tv=float(0.5 * (mass - weights).abs().sum()),
        off_mode=float((~near).double().mean()),
    )


def _assign(samples: Tensor, means: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest mode of every sample, and whether it is within the radius, both (n,)."""
    parts, radius = [], mode_radius(means.shape[1])
    for rows in torch.split(samples, ROWS):
        distance2, k = (squared_distances(rows, means, torch.ones_like(rows[:, 0])) / std**2).min(1)
        parts.append((k, distance2 <= radius**2))
    nearest, near = zip(*parts, strict=True)
    return torch.cat(nearest), torch.cat(near)
