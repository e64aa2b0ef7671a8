r"""Level distributions: which noise levels a run trains on, and how they move.

They draw the ratio r = σ_t/α_t (units of the data, the same under every schedule) from a uniform u, and may move
with the run's progress ∈ [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vardistill.diffusion.schedules import Schedule, check_range
from vardistill.errors import UsageError

if TYPE_CHECKING:  # configurations name level distributions without importing torch
    from torch import Tensor


class LevelDistribution(Protocol):
    """Draws the levels of a step as ratios σ_t/α_t."""

    def __call__(self, u: Tensor, progress: float, schedule: Schedule) -> Tensor:
        """Map u (n,), uniform in (0, 1), to ratios (n,) at this progress ∈ [0, 1] of the run."""
        ...


@dataclass(frozen=True)
class PowerLaw:
    """VarDiU's levels: r = σ_min + u^ρ (σ_max − σ_min), ρ climbing from `rho_start` to `rho_end` in equal stairs.

    The reference raises ρ by 0.01 every 1000 of 1,000,000 steps: the defaults.

    Args:
        sigma_min: smallest ratio.
        sigma_max: largest ratio.
        rho_start: ρ of the first stair.
        rho_end: ρ after the last one.
        rise: share of the run in which ρ climbs, in (0, 1].
        stairs: number of equal stairs.

    Raises:
        UsageError: unless 0 < sigma_min < sigma_max and 0 < rho_start.
    """

    sigma_min: float = 0.1
    sigma_max: float = 20.0
    rho_start: float = 0.1
    rho_end: float = 2.0
    rise: float = 0.19
    stairs: int = 190

    def __post_init__(self) -> None:
        check_range("sigma_min", self.sigma_min, "sigma_max", self.sigma_max)
        if self.rho_start <= 0 or self.rho_end <= 0:
            raise UsageError(f"rho must be positive, but goes from {self.rho_start:g} to {self.rho_end:g}")
        if not 0 < self.rise <= 1 or self.stairs < 1:
            raise UsageError(f"rise must be in (0, 1] and stairs at least 1, but are {self.rise:g} and {self.stairs}")

    def rho(self, progress: float) -> float:
        """The exponent at this progress."""
        rounding = 1e-9  # progress = step/steps may fall a rounding error short of its stair
        stair = min(math.floor(progress / self.rise * self.stairs + rounding), self.stairs)
        return self.rho_start + (self.rho_end - self.rho_start) * stair / self.stairs

    def __call__(self, u: Tensor, progress: float, schedule: Schedule) -> Tensor:
        """σ_min + u^ρ (σ_max − σ_min)."""
        return self.sigma_min + u ** self.rho(progress) * (self.sigma_max - self.sigma_min)


@dataclass(frozen=True)
class LogNormal:
    """r = base · exp(spread · n), n ~ N(0, 1), clipped to [σ_min, σ_max]; the base anneals geometrically.

    A share `broad` of the levels is log-uniform in [broad_min, broad_max] all along: the large ones among them keep
    correcting the modes' masses, which the small ones of a late base cannot see.

    Args:
        base_start: base at progress 0.
        base_end: base from progress `anneal` on.
        spread: standard deviation of log r.
        anneal: share of the run over which the base moves, in (0, 1].
        sigma_min: smallest ratio.
        sigma_max: largest ratio.
        broad: share of log-uniform levels, in [0, 1].
        broad_min: their smallest ratio.
        broad_max: their largest ratio.

    Raises:
        UsageError: unless 0 < sigma_min < sigma_max, 0 < broad_min < broad_max and the bases are positive.
    """

    base_start: float = 15.0
    base_end: float = 0.5
    spread: float = 0.5
    anneal: float = 0.8
    sigma_min: float = 0.01
    sigma_max: float = 100.0
    broad: float = 0.0
    broad_min: float = 0.5
    broad_max: float = 10.0

    def __post_init__(self) -> None:
        check_range("sigma_min", self.sigma_min, "sigma_max", self.sigma_max)
        check_range("broad_min", self.broad_min, "broad_max", self.broad_max)
        if not 0 <= self.broad <= 1:
            raise UsageError(f"broad must be a share in [0, 1], but is {self.broad:g}")
        if self.base_start <= 0 or self.base_end <= 0:
            raise UsageError(f"base must be positive, but goes from {self.base_start:g} to {self.base_end:g}")
        if not 0 < self.anneal <= 1 or self.spread < 0:
            raise UsageError(f"anneal must be in (0, 1], spread not negative, but are {self.anneal:g}, {self.spread:g}")

    def base(self, progress: float) -> float:
        """base_start^(1−a) · base_end^a with a = min(progress/anneal, 1)."""
        a = min(progress / self.anneal, 1.0)
        return float(self.base_start ** (1 - a) * self.base_end**a)

    def __call__(self, u: Tensor, progress: float, schedule: Schedule) -> Tensor:
        """Log-uniform where u < broad, else base · exp(spread · Φ⁻¹(u')), u' the place of u in (broad, 1)."""
        v = ((u - self.broad) / max(1 - self.broad, 1e-9)).clamp(1e-7, 1 - 1e-7)
        annealed = (self.base(progress) * (self.spread * normal_quantile(v)).exp()).clamp(
            self.sigma_min, self.sigma_max
        )
        broad = self.broad_min * (self.broad_max / self.broad_min) ** (u / max(self.broad, 1e-9))
        return annealed.where(u >= self.broad, broad)


@dataclass(frozen=True)
class EDM:
    """EDM's training levels: ln r ~ N(mean, std²) (Karras et al. 2022, arXiv 2206.00364, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if self.std < 0:
            raise UsageError(f"std must not be negative, but is {self.std:g}")

    def __call__(self, u: Tensor, progress: float, schedule: Schedule) -> Tensor:
        """exp(mean + std · Φ⁻¹(u))."""
        return (self.mean + self.std * normal_quantile(u)).exp()


@dataclass(frozen=True)
class UniformTime:
    """t uniform in [t_min, t_max] ⊂ [0, 1]."""

    t_min: float = 0.001
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise UsageError(
                f"t_min and t_max must obey 0 <= t_min < t_max <= 1, but are {self.t_min:g}, {self.t_max:g}"
            )

    def __call__(self, u: Tensor, progress: float, schedule: Schedule) -> Tensor:
        """The ratio at t_min + u (t_max − t_min)."""
        alpha, sigma = schedule(self.t_min + u * (self.t_max - self.t_min))
        return sigma / alpha


def normal_quantile(u: Tensor) -> Tensor:
    """Φ⁻¹(u) for u in (0, 1)."""
    return math.sqrt(2) * (2 * u - 1).erfinv()
