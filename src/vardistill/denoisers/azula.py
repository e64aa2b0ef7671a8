r"""Teachers from the azula library (https://github.com/probabilists/azula), whose conventions are the same as here.

An azula denoiser has `schedule(t)` → (α_t, σ_t) for t ∈ [0, 1], with σ_t/α_t increasing, and `denoiser(x_t, t)` returns
a posterior whose `mean` is E[x | x_t]. Only the inverse of the ratio is missing, which bisection finds. azula itself is
not imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vardistill.diffusion.schedules import VE, Schedule
from vardistill.diffusion.weights import named_weight
from vardistill.errors import UsageError
from vardistill.networks import own_precision


@dataclass(frozen=True)
class Bisected:
    """A schedule from its scales alone; `time` bisects [0, 1] to the dtype's precision and stays within it.

    Args:
        scales: t → (α_t, σ_t), each of the shape of t, with σ_t/α_t increasing.
    """

    scales: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t."""
        return self.scales(t)

    @torch.no_grad()
    def time(self, ratio: Tensor) -> Tensor:
        """The t at which σ_t/α_t equals `ratio`, or the nearer end."""
        low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
        for _ in range(1 - round(math.log2(torch.finfo(ratio.dtype).eps))):
            middle = (low + high) / 2
            alpha, sigma = self.scales(middle)
            below = sigma < ratio * alpha
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class FromAzula(nn.Module):
    """An azula denoiser as a denoiser; see `from_azula`."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        if not callable(getattr(denoiser, "schedule", None)):
            raise UsageError(f"{type(denoiser).__name__} has no schedule: give an azula denoiser")
        self.denoiser = denoiser
        self.schedule: Schedule = known(denoiser.schedule)

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """E[x | x_t] for x_t (B, *data) and t (B,), shape and type of x_t."""
        with own_precision(self.denoiser, x_t.device):
            mean: Tensor = self.denoiser(x_t, t, **condition).mean
        return mean.to(x_t.dtype)

    def loss_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(α/σ)² + 1, (R,): azula's own, EDM's for data of unit variance."""
        return named_weight("edm", 1.0)(alpha, sigma)


def known(schedule: Any) -> Schedule:
    """This library's equal of an azula schedule, where it has one with an inverse in closed form."""
    if type(schedule).__name__ == "VESchedule":
        return VE(schedule.sigma_min, schedule.sigma_max)
    return Bisected(schedule)


def from_azula(denoiser: Any) -> FromAzula:
    """Make a teacher of an azula denoiser.

    Args:
        denoiser: has `schedule`, and is called as `denoiser(x_t, t, **condition)` with t of shape (B,); returns an
            object with `mean`.

    Raises:
        UsageError: for an object without a schedule.
    """
    return FromAzula(denoiser)
