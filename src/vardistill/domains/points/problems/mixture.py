r"""Ten equal Gaussians in d dimensions that are separated alike in every d.

    p(x) = 1/10 Σ_k N(x; μ_k, I),   μ_k = c_d m_k,   m_k ~ N(0, I) under seed 0,   min_{k≠l} ‖μ_k − μ_l‖ = 4 √(2d)

The nearest two modes are four times as far apart as two samples of one mode (in the root mean square): eight
standard deviations in the plane, 64 in 128 dimensions. The bandwidths of the MMD grow with √d alike.

With a gap of δ the modes overlap so little that E log p exceeds −ln 10 − (d/2) ln(2πe), the value of modes that do
not, by at most Σ_l exp(−‖μ_k − μ_l‖²/8) in the mean over k (from ln(1 + u) ≤ √u): below 10⁻¹³ for d ≥ 8, where the
standard deviation of log p is √(d/2). For d = 2 both are integrals over the plane by the trapezoid rule.
The floors are measured on 400 comparisons, and 400 sets, by `benchmarks/references.py`, seed 0: log-MMD with standard
errors of 0.007 to 0.010, mode TV with 0.00015, the share off the modes with 9e-6.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pdist

from vardistill.diffusion.schedules import Schedule
from vardistill.domains.points.problems.base import MixtureProblem, ModeReference, Reference
from vardistill.errors import UsageError

MODES = 10

SEPARATION = 4.0
"""Of the nearest two modes, in root mean square distances √(2d) of two samples of one mode."""

REFERENCES: dict[int, Reference] = {
    2: Reference(
        log_density=-5.140437, log_density_std=0.009998, log_mmd=-8.581, log_mmd_std=0.190, energy_distance_std=0.0034,
        modes=ModeReference(mode_tv=0.0121, mode_tv_std=0.0031, off_mode=0.000333, off_mode_std=0.000184),
    ),
    8: Reference(
        log_density=-13.654093, log_density_std=0.020000, log_mmd=-8.563, log_mmd_std=0.141, energy_distance_std=0.0033,
        modes=ModeReference(mode_tv=0.0121, mode_tv_std=0.0029, off_mode=0.000339, off_mode_std=0.000185),
    ),
    32: Reference(
        log_density=-47.708618, log_density_std=0.040000, log_mmd=-8.562, log_mmd_std=0.144, energy_distance_std=0.003,
        modes=ModeReference(mode_tv=0.0117, mode_tv_std=0.0029, off_mode=0.000326, off_mode_std=0.000179),
    ),
    128: Reference(
        log_density=-183.926717, log_density_std=0.080000, log_mmd=-8.573, log_mmd_std=0.133, energy_distance_std=0.005,
        modes=ModeReference(mode_tv=0.0117, mode_tv_std=0.0029, off_mode=0.000328, off_mode_std=0.000185),
    ),
}  # fmt: skip
"""By dimension."""


class Mixture(MixtureProblem):
    """Ten equal Gaussians in d dimensions.

    Args:
        dimension: d, one of `REFERENCES`.
        schedule: of the teacher; default VE.

    Raises:
        UsageError: for another d.
    """

    def __init__(self, dimension: int, schedule: Schedule | None = None) -> None:
        if dimension not in REFERENCES:
            raise UsageError(f"mixtures are there for d in {sorted(REFERENCES)}, but d is {dimension}")
        directions = torch.randn(MODES, dimension, generator=torch.Generator().manual_seed(0))
        means = directions * (SEPARATION * math.sqrt(2 * dimension) / pdist(directions).min())
        super().__init__(means, std=1.0, schedule=schedule)
        self.name = f"mixture{dimension}"
        self.reference = REFERENCES[dimension]
        self.bandwidths = tuple(2.0**i * math.sqrt(dimension / 2) for i in range(-2, 3))
