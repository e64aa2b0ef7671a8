r"""MoG-40, the target of FAB (Midgley et al. 2023, arXiv 2208.01893; fab-torch's `GMM`).

Forty equal Gaussians N(μ_k, s² I) in the plane, μ_k uniform in [−40, 40]² under seed 0, s = softplus(1) =
1.31326.

The reference values: E log p_d and the standard deviation of log p_d (0.975253) are integrals over the plane by the
trapezoid rule, exact in all digits given; 10⁷ samples of `torch.Generator` seed 1 have the mean −6.85915 ± 0.00031.
The floor of the log-MMD is the mean and the standard deviation of 300 comparisons of 10,000 samples with 10,000, one
hundred from each of the seeds 0, 1 and 2, x before y; the standard error of that mean is 0.0055. (The closed form
agrees: ln E MMD² = ln[(2/n)(1 − E k)] = −8.531, and E ln MMD² is 0.005 less.)
The standard deviation of the energy distance is measured on 400 comparisons by `benchmarks/references.py`, seed 0, to
5 %, and those of the modes on 400 sets: mode TV with a standard error of 0.00015, the share off the modes with 7e-6.
That share is about half of a lone mode's as what is off one mode is often within another.
"""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from vardistill.diffusion.schedules import Schedule
from vardistill.domains.points.problems.base import MixtureProblem, ModeReference, Reference


class MoG40(MixtureProblem):
    """Forty equal Gaussians in the plane.

    Args:
        schedule: of the teacher; default VE.
    """

    name = "mog40"
    bandwidths = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the VarDiU reference
    reference = Reference(
        log_density=-6.859469, log_density_std=0.009753, log_mmd=-8.524, log_mmd_std=0.095, energy_distance_std=0.0049,
        modes=ModeReference(mode_tv=0.0251, mode_tv_std=0.0031, off_mode=0.000186, off_mode_std=0.000138),
    )  # fmt: skip

    def __init__(self, schedule: Schedule | None = None) -> None:
        rng = torch.Generator().manual_seed(0)
        means = (torch.rand(40, 2, generator=rng) - 0.5) * 80
        super().__init__(means, std=float(softplus(torch.tensor(1.0))), schedule=schedule)
