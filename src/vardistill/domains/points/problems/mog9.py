r"""MoG-9: nine equal Gaussians N(μ_k, I/4) on the grid μ_k ∈ {−5, 0, 5}².

E log p_d and the standard deviation of log p_d are integrals over the plane by the trapezoid rule, exact in all
digits given. The floors are measured on 400 comparisons, and 400 sets, by `benchmarks/references.py`, seed 0:
log-MMD with a standard error of 0.010, mode TV with 0.00015, the share off the modes with 9e-6.
"""

from __future__ import annotations

import torch

from vardistill.diffusion.schedules import Schedule
from vardistill.domains.points.problems.base import MixtureProblem, ModeReference, Reference


class MoG9(MixtureProblem):
    """Nine equal Gaussians on a grid in the plane, ten standard deviations apart.

    Args:
        schedule: of the teacher; default VE.
    """

    name = "mog9"
    bandwidths = (0.125, 0.25, 0.5, 1.0, 2.0)
    reference = Reference(
        log_density=-3.648805, log_density_std=0.010000, log_mmd=-8.592, log_mmd_std=0.192, energy_distance_std=0.00092,
        modes=ModeReference(mode_tv=0.0115, mode_tv_std=0.0030, off_mode=0.000337, off_mode_std=0.000184),
    )  # fmt: skip

    def __init__(self, schedule: Schedule | None = None) -> None:
        axis = torch.tensor([-5.0, 0.0, 5.0])
        super().__init__(torch.cartesian_prod(axis, axis), std=0.5, schedule=schedule)
