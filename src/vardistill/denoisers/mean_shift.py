r"""Mean shift towards the modes of data that a denoiser knows (Thamizharasan et al. 2025, mean-shift distillation).

    m(x) = E[y N(x; y, λ² I)]/E[N(x; y, λ² I)] − x = D(x; r = λ) − x = λ² ∇log p_λ(x),

y of the data, p_λ their density under noise of standard deviation λ: the denoiser at the *clean* x. Steps along m find
the modes of p_λ. It is a tool for single samples: as an objective it would draw all of a student's to the modes. Of a
set of samples it is the same of their `Empirical` denoiser; the paper draws y by a sampler of the product of both laws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.schedules import expand
from vardistill.errors import require


def mean_shift(denoiser: Denoiser, x: Tensor, scale: float, **condition: Tensor) -> Tensor:
    """m(x), shape of x (B, *data), differentiable in x.

    Args:
        denoiser: E[y | x_t] of the data.
        x: points, in the data's units.
        scale: λ, in the same; positive.
        **condition: handed to the denoiser.

    Raises:
        UsageError: for a scale that is not positive and finite.
    """
    require("scale", scale, 0 < scale < math.inf, "positive and finite")
    t = denoiser.schedule.time(torch.full(x.shape[:1], scale, dtype=x.dtype, device=x.device)).clamp(0, 1)
    alpha, _ = denoiser.schedule(t)
    return denoiser(expand(alpha, x) * x, t, **condition) - x
