r"""Two moons: a band along two interleaved half circles, as a mixture so fine that it is smooth.

    upper arc (cos θ, sin θ),   lower arc (1 − cos θ, ½ − sin θ),   θ_i = π (i + ½)/128,   i = 0..127

Every arc has 128 equal Gaussians of standard deviation s = 0.1 at equal steps Δ = π/128 ≈ s/4. Along a row of
Gaussians at steps Δ the density ripples by ±2 exp(−2π²s²/Δ²) of itself (the first term of Poisson's sum): here by
less than 10⁻¹⁰⁰, so that the density is that of a continuous band, and still exact at every noise level. Its
components are no modes.

E log p_d and the standard deviation of log p_d are integrals over the plane by the trapezoid rule, exact in all
digits given. The floors are measured on 400 comparisons by `benchmarks/references.py`, seed 0: log-MMD with a
standard error of 0.009.
"""

from __future__ import annotations

import math

import torch

from vardistill.diffusion.schedules import Schedule
from vardistill.domains.points.problems.base import MixtureProblem, Reference

COMPONENTS = 128
"""Of one moon."""


class Moons(MixtureProblem):
    """Two interleaved half circles in the plane, 0.1 wide.

    Args:
        schedule: of the teacher; default VE.
    """

    name = "moons"
    bandwidths = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    reference = Reference(
        log_density=-1.007455, log_density_std=0.007476, log_mmd=-8.605, log_mmd_std=0.183, energy_distance_std=0.00017
    )

    def __init__(self, schedule: Schedule | None = None) -> None:
        theta = math.pi * (torch.arange(COMPONENTS) + 0.5) / COMPONENTS
        upper = torch.stack([theta.cos(), theta.sin()], 1)
        lower = torch.tensor([1.0, 0.5]) - upper
        super().__init__(torch.cat([upper, lower]), std=0.1, schedule=schedule)
        self.modes = None
