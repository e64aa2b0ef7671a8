r"""MoG-40, the target of FAB (Midgley et al. 2023, arXiv 2208.01893; fab-torch's `GMM`).

Forty equal Gaussians N(μ_k, s² I) in the plane, μ_k uniform in [−40, 40]² under seed 0, s = softplus(1) =
1.31326.
"""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from vardistill.problems.base import Problem, Reference
from vardistill.schedules import Schedule


class MoG40(Problem):
    """Forty equal Gaussians in the plane.

    Args:
        schedule: of the teacher; default VE.
    """

    name = "mog40"
    reference = Reference(
        log_density=-6.859469, log_density_std=0.009753, log_mmd=-8.58, log_mmd_std=0.11, samples=10_000
    )

    def __init__(self, schedule: Schedule | None = None) -> None:
        rng = torch.Generator().manual_seed(0)
        means = (torch.rand(40, 2, generator=rng) - 0.5) * 80
        super().__init__(means, std=float(softplus(torch.tensor(1.0))), schedule=schedule)
