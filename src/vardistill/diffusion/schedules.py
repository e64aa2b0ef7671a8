r"""Noise schedules.

A schedule maps a time t ∈ [0, 1] to the scales of the forward process

    x_t = α_t x + σ_t ε,   ε ~ N(0, I).

All that a denoiser can tell depends on t only through the *ratio* r_t = σ_t/α_t (EDM's "σ"): x_t/α_t = x + r_t ε.
`Schedule.time` inverts the ratio, so noise levels can be chosen in units of the data under every schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vardistill.errors import UsageError, first_line

if TYPE_CHECKING:  # configurations name schedules without importing torch
    import torch
    from torch import Tensor


@runtime_checkable
class Schedule(Protocol):
    """t ∈ [0, 1] → (α_t, σ_t), with σ_t/α_t increasing in t."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t, each with the shape and dtype of `t`."""
        ...

    def time(self, ratio: Tensor) -> Tensor:
        """The t at which σ_t/α_t equals `ratio` (> 0); shape and dtype of `ratio`."""
        ...


def expand(v: Tensor, like: Tensor) -> Tensor:
    """`v` of shape (B,) with trailing axes of length 1, to multiply `like` of shape (B, ...)."""
    return v.reshape(v.shape + (1,) * (like.ndim - v.ndim))


GRID = 1001
"""Times at which schedules are looked at."""


def grid(device: torch.device | str) -> Tensor:
    """(GRID,) times from 0 to 1, in double precision where the device has it."""
    import torch

    from vardistill.devices import WITHOUT_DOUBLES

    dtype = torch.float32 if torch.device(device).type in WITHOUT_DOUBLES else torch.float64
    return torch.linspace(0, 1, GRID, dtype=dtype, device=device)


def require_schedule(schedule: object) -> None:
    """Raise UsageError for what is no `Schedule`, its name or its class for example."""
    if isinstance(schedule, type) or not (callable(schedule) and callable(getattr(schedule, "time", None))):
        kind = schedule.__name__ if isinstance(schedule, type) else type(schedule).__name__
        raise UsageError(
            "the schedule must be an object with (t) -> (alpha, sigma) and time(sigma / alpha) -> t, such as "
            f"vardistill.schedules.VP(), but is {repr(schedule) if isinstance(schedule, str) else kind}"
        )


def check_schedule(schedule: Schedule, device: torch.device | str = "cpu") -> None:
    """Look at a schedule at times that cover [0, 1].

    A level that comes back within 0.01 in t or 5% in the ratio will do: `time` may be an approximation.

    Raises:
        UsageError: for one whose ratio σ/α does not grow with t, or whose `time` is not the ratio's inverse.
    """
    import torch

    require_schedule(schedule)
    t = grid(device)
    try:
        with torch.no_grad():
            alpha, sigma = schedule(t)
            ratio = sigma / alpha
            inside = (ratio > 0) & ratio.isfinite()
            back = schedule.time(ratio[inside])
            again_alpha, again_sigma = schedule(back.clamp(0, 1))
    except Exception as error:  # a user's own may raise anything
        raise UsageError(
            f"the schedule {type(schedule).__name__} fails at times from 0 to 1: {first_line(error)}"
        ) from error
    if alpha.shape != t.shape or sigma.shape != t.shape or back.shape != t[inside].shape:
        raise UsageError(f"the schedule {type(schedule).__name__} must return alpha, sigma and time of the shape of t")
    if not (ratio[1:] >= ratio[:-1]).all():
        raise UsageError(
            f"the ratio sigma/alpha of the schedule {type(schedule).__name__} must grow with t, from the data at 0 to "
            "the noise at 1"
        )
    apart = (back - t[inside]).abs()
    known = (apart <= 0.01) | ((again_sigma / again_alpha / ratio[inside]).log().abs() <= 0.05)
    if not known.all():
        worst = int(torch.where(known, -1.0, apart.nan_to_num(torch.inf)).argmax())
        raise UsageError(
            f"time(sigma / alpha) of the schedule {type(schedule).__name__} is not its inverse: at t = "
            f"{float(t[inside][worst]):.3g} the ratio is {float(ratio[inside][worst]):.3g}, whose time is "
            f"{float(back[worst]):.3g}"
        )


def same_schedule(a: Schedule, b: Schedule, device: torch.device | str = "cpu") -> bool:
    """Whether two schedules have the same α_t and σ_t, to a millionth, at times that cover [0, 1].

    A schedule needs no `__eq__`, and a copy's may be another object.

    Args:
        a: a schedule.
        b: another.
        device: where schedules that hold tensors have them.
    """
    if a is b:
        return True
    import torch

    t = grid(device)
    with torch.no_grad():
        pairs = zip(a(t), b(t), strict=True)
        return all(torch.allclose(v, w.to(v), rtol=1e-6, atol=1e-12, equal_nan=True) for v, w in pairs)


@dataclass(frozen=True)
class VE:
    """Variance exploding: α_t = 1, σ_t = σ_min (σ_max/σ_min)^t (Song et al. 2021, arXiv 2011.13456, eq. 30).

    Args:
        sigma_min: σ at t = 0, in units of the data; > 0.
        sigma_max: σ at t = 1; > sigma_min.

    Raises:
        UsageError: unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        check_range("sigma_min", self.sigma_min, "sigma_max", self.sigma_max)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t = 1 and σ_t."""
        log_sigma = math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min)
        return t.new_ones(t.shape), log_sigma.exp()

    def time(self, ratio: Tensor) -> Tensor:
        """t = log(r/σ_min) / log(σ_max/σ_min)."""
        return (ratio / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class VP:
    """Variance preserving: α_t = exp(−½ ∫β), β linear from β_min to β_max; σ_t² = 1 − α_t² (arXiv 2011.13456, eq. 32).

    Args:
        beta_min: β at t = 0; > 0.
        beta_max: β at t = 1; > beta_min.

    Raises:
        UsageError: unless 0 < beta_min < beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_range("beta_min", self.beta_min, "beta_max", self.beta_max)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t."""
        integral = self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2
        return (-0.5 * integral).exp(), (-(-integral).expm1()).sqrt()

    def time(self, ratio: Tensor) -> Tensor:
        """The root t ≥ 0 of β_min t + ½(β_max − β_min) t² = log(1 + r²)."""
        integral = (ratio**2).log1p()
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())


@dataclass(frozen=True)
class Cosine:
    """α_t = cos(πt/2), σ_t = sin(πt/2), without offset (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t."""
        return (0.5 * math.pi * t).cos().clamp_min(0), (0.5 * math.pi * t).sin()

    def time(self, ratio: Tensor) -> Tensor:
        """t = (2/π) arctan r."""
        return ratio.atan() * (2 / math.pi)


@dataclass(frozen=True)
class Rectified:
    """Rectified flow: α_t = 1 − t, σ_t = t (Liu et al. 2022, arXiv 2209.03003)."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t."""
        return 1 - t, t.clone()

    def time(self, ratio: Tensor) -> Tensor:
        """t = r/(1 + r)."""
        return ratio / (1 + ratio)


@dataclass(frozen=True)
class Table:
    """A discrete diffusion's ᾱ_0 > ᾱ_1 > ... > ᾱ_{T−1} (Ho et al. 2020, arXiv 2006.11239), in continuous time.

    α_t = cos φ and σ_t = sin φ. The angle φ_i = atan2(√(1 − ᾱ_i), √ᾱ_i) is interpolated linearly between the indices
    i = (T − 1) t, so α_t² = ᾱ_i and σ_t² = 1 − ᾱ_i at every i. A last ᾱ of 0 (zero terminal SNR, arXiv 2305.08891) is
    the angle π/2. Times and ratios outside the table are moved to its ends.

    Args:
        alphas_cumprod: (T,) ᾱ_i, strictly decreasing, in [0, 1).

    Raises:
        UsageError: for fewer than two entries, or entries that do not decrease or lie outside [0, 1).
    """

    alphas_cumprod: tuple[float, ...]
    _angles: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = self.alphas_cumprod
        decreasing = all(a > b for a, b in zip(values, values[1:], strict=False))
        if len(values) < 2 or not (decreasing and values[0] < 1 and values[-1] >= 0):
            raise UsageError("alphas_cumprod must be at least two numbers in [0, 1), each below the one before it")

    def __repr__(self) -> str:
        return f"Table({len(self.alphas_cumprod)} from {self.alphas_cumprod[0]:g} to {self.alphas_cumprod[-1]:g})"

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t."""
        angles = self.angles(t.device)
        index = (t.to(angles.dtype) * (len(angles) - 1)).clamp(0, len(angles) - 1)
        low = index.long().clamp_max(len(angles) - 2)
        angle = angles[low].lerp(angles[low + 1], index - low)
        return angle.cos().clamp_min(0).to(t.dtype), angle.sin().to(t.dtype)

    def time(self, ratio: Tensor) -> Tensor:
        """t at the angle φ = arctan r."""
        import torch

        angles = self.angles(ratio.device)
        angle = ratio.to(angles.dtype).atan().clamp(angles[0], angles[-1])
        low = (torch.searchsorted(angles, angle) - 1).clamp(0, len(angles) - 2)
        index = low + (angle - angles[low]) / (angles[low + 1] - angles[low])
        return (index / (len(angles) - 1)).to(ratio.dtype)

    def angles(self, device: torch.device) -> Tensor:
        """(T,) φ_i on `device`, in double precision where it has one."""
        import torch

        from vardistill.devices import WITHOUT_DOUBLES

        if device not in self._angles:
            with torch.inference_mode(False):
                alpha2 = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
                angles = torch.atan2((1 - alpha2).sqrt(), alpha2.sqrt())
                dtype = torch.float32 if device.type in WITHOUT_DOUBLES else torch.float64
                self._angles[device] = angles.to(device, dtype)
        return self._angles[device]


SCHEDULES: dict[str, type[VE] | type[VP] | type[Cosine] | type[Rectified]] = {
    "ve": VE,
    "vp": VP,
    "cosine": Cosine,
    "rectified": Rectified,
}


def check_range(low_name: str, low: float, high_name: str, high: float) -> None:
    """Raise UsageError unless 0 < low < high < ∞."""
    if not 0 < low < high < math.inf:
        raise UsageError(
            f"{low_name} must be positive and below {high_name}, but {low_name}={low:g}, {high_name}={high:g}"
        )
