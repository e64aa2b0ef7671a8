r"""The linear-Gaussian start: a generator with the data's mean and covariance, and its exact posterior.

With the data's mean μ and covariance ≈ U diag(s²) Uᵀ (U has k orthonormal columns, the principal axes), the map
z → μ + U diag(s) z sends N(0, I_k) to the data's Gaussian, and for r = σ_t/α_t, h_i = [Uᵀ(x_t/α_t − μ)]_i/√(r² + s_i²),

    z_i | x_t ~ N( s_i/√(r² + s_i²) h_i, r²/(r² + s_i²) ),  independent over i.

In many dimensions a student that starts without spread shows a posterior nothing, and collapses; in few, random weights
fold the latents over the data, and some students lose modes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vardistill.errors import UsageError

SMALLEST_SCALE = 1e-3
"""Of the largest: directions in which the data do not vary keep a share of spread, so that scales can be divided by."""


@dataclass(frozen=True, eq=False)
class PrincipalAxes:
    """μ (d,), U (d, k) and s (k,), largest first."""

    mean: Tensor
    directions: Tensor
    scales: Tensor


def principal_axes(data: Tensor, axes: int) -> PrincipalAxes:
    """The first `axes` principal axes of data (n, d).

    Raises:
        UsageError: for points that are not vectors of floats, not finite, fewer than 2 or all the same, or more axes
            than dimensions.
    """
    if data.ndim != 2 or not data.is_floating_point():
        raise UsageError(f"principal axes need points (n, d) of floats, but got {tuple(data.shape)} of {data.dtype}")
    if not data.isfinite().all():
        raise UsageError("principal axes need finite points, but got NaN or infinity")
    n, d = data.shape
    if n < 2 or not 1 <= axes <= d:
        raise UsageError(f"principal axes need 2 points and 1 to {d} axes, but got {n} points and {axes} axes")
    mean = data.double().mean(0)
    variances, directions = torch.linalg.eigh((data.double() - mean).T.cov().reshape(d, d))
    scales = variances.clamp_min(0).sqrt().flip(0)[:axes]
    if not scales[0] > 0:
        raise UsageError("principal axes need data that vary, but all points are the same")
    scales = scales.clamp_min(SMALLEST_SCALE * float(scales[0]))
    return PrincipalAxes(mean.to(data), directions.flip(1)[:, :axes].to(data), scales.to(data))
