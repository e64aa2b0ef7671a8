r"""Many-step sampling of a denoiser.

With D = D(x_t, t) and ε̂ = (x_t − α_t D)/σ_t, the probability-flow ODE (arXiv 2011.13456, eq. 13) is

    dx_t = D dα_t + ε̂ dσ_t.

One step from t to s < t is

    euler  x_s = x_t + (s − t)(α'_t D + σ'_t ε̂): order 1
    ddim   x_s = x_t + (α_s − α_t) D + (σ_s − σ_t) ε̂ = α_s D + σ_s ε̂: order 1 (arXiv 2010.02502, eq. 12)
    heun   x_s = x_t + ½ (α_s − α_t)(D + D_s) + ½ (σ_s − σ_t)(ε̂ + ε̂_s): order 2; D_s and ε̂_s at ddim's x_s
    ddpm   x_s = α_s D + σ_s (q ε̂ + √(1 − q²) n),  n ~ N(0, I),  q = (σ_s/α_s)/(σ_t/α_t):
           a draw from q(x_s | x_t, x_0 = D) (arXiv 2006.11239, eq. 6–7, in any schedule; DDIM with η = 1)

For VE `heun` is EDM's algorithm 1 (arXiv 2206.00364); for rectified flow it is Heun's rule on the velocity
ε̂ − D, and `euler` is the same as `ddim`. Only `euler` depends on how the schedule runs through time: under
VE's geometric σ it needs several times the steps of `ddim`.

A grid t_1 > ... > t_n takes n − 1 such steps; the n-th goes on to σ = 0 by `ddim`'s rule, which leaves
D(x_{t_n}, t_n), the clean sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor
from torch.autograd.functional import jvp

from vardistill.diffusion.denoiser import Denoiser, require_denoiser
from vardistill.diffusion.schedules import Schedule, check_schedule
from vardistill.errors import UsageError, require, require_type, unknown

T_MIN, T_MAX = 0.001, 0.999
"""Ends of the default grids: away from t = 0 and t = 1, where σ or α may vanish."""


def karras_times(
    schedule: Schedule, steps: int, rho: float = 7.0, t_min: float = T_MIN, t_max: float = T_MAX
) -> Tensor:
    """Times with ratios r = σ/α equally spaced in r^(1/ρ) (arXiv 2206.00364, eq. 5); (steps,) of float64.

    Args:
        schedule: gives the ratios of `t_max` and `t_min`, and the times of those between.
        steps: n.
        rho: ρ; larger values put more steps at small noise.
        t_min: last time.
        t_max: first time.
    """
    alpha, sigma = schedule(torch.tensor([t_max, t_min], dtype=torch.float64))
    first, last = (sigma / alpha) ** (1 / rho)
    times = schedule.time((first + torch.linspace(0, 1, steps, dtype=torch.float64) * (last - first)) ** rho)
    return times.clamp(t_min, t_max)


@dataclass(frozen=True)
class _Grid:
    """The denoiser on a grid of times t_i, (n,) each."""

    denoise: Callable[[Tensor, Tensor], Tensor]
    schedule: Schedule
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    rng: torch.Generator | None

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """D(x, t_i) and ε̂."""
        clean = self.denoise(x, self.t[i].expand(len(x)))
        return clean, (x - self.alpha[i] * clean) / self.sigma[i]


Step = Callable[[Tensor, int], Tensor]
"""(x at t_i, i) → x at t_{i+1}."""


def _euler(grid: _Grid) -> Step:
    slopes: tuple[Tensor, Tensor] = jvp(grid.schedule, grid.t, torch.ones_like(grid.t))[1]
    d_alpha, d_sigma = (slope[:-1] * grid.t.diff() for slope in slopes)

    def step(x: Tensor, i: int) -> Tensor:
        clean, eps = grid.predict(x, i)
        return x + d_alpha[i] * clean + d_sigma[i] * eps

    return step


def _ddim(grid: _Grid) -> Step:
    def step(x: Tensor, i: int) -> Tensor:
        clean, eps = grid.predict(x, i)
        return grid.alpha[i + 1] * clean + grid.sigma[i + 1] * eps

    return step


def _heun(grid: _Grid) -> Step:
    d_alpha, d_sigma = grid.alpha.diff(), grid.sigma.diff()

    def step(x: Tensor, i: int) -> Tensor:
        clean, eps = grid.predict(x, i)
        clean_s, eps_s = grid.predict(x + d_alpha[i] * clean + d_sigma[i] * eps, i + 1)
        return x + 0.5 * (d_alpha[i] * (clean + clean_s) + d_sigma[i] * (eps + eps_s))

    return step


def _ddpm(grid: _Grid) -> Step:
    if not isinstance(grid.rng, torch.Generator):
        raise UsageError("method 'ddpm' is random: give it a torch.Generator as rng")
    q = grid.sigma[1:] * grid.alpha[:-1] / (grid.alpha[1:] * grid.sigma[:-1])

    def step(x: Tensor, i: int) -> Tensor:
        clean, eps = grid.predict(x, i)
        n = torch.randn(x.shape, generator=grid.rng, device=x.device, dtype=x.dtype)
        return grid.alpha[i + 1] * clean + grid.sigma[i + 1] * (q[i] * eps + (1 - q[i] ** 2).sqrt() * n)

    return step


METHODS: dict[str, Callable[[_Grid], Step]] = {
    "heun": _heun,
    "euler": _euler,
    "ddim": _ddim,
    "ddpm": _ddpm,
}


def _checked(times: Tensor, steps: int) -> Tensor:
    require_type("times", times, Tensor, f"a tensor ({steps},)")
    if times.shape != (steps,):
        raise UsageError(f"times must have shape ({steps},), one a step, but have {tuple(times.shape)}")
    if not (times.diff() < 0).all():
        raise UsageError("times must decrease from noise to data, but they do not")
    return times


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    steps: int,
    method: str = "heun",
    times: Tensor | None = None,
    rng: torch.Generator | None = None,
    **condition: Tensor,
) -> Tensor:
    """Draw clean samples with a many-step sampler.

    The start is x = σ noise at the first time. The marginal there is that of α x + σ ε, so the start leaves
    out the data's share α x: choose a first time at which σ/α is large next to the data.

    Args:
        denoiser: D(x_t, t, **condition).
        noise: (B, *data), standard normal.
        steps: n ≥ 1; costs n evaluations of the denoiser, 2n − 1 with `heun`.
        method: `heun`, `euler`, `ddim` or `ddpm`.
        times: (steps,), decreasing, with σ > 0; default `karras_times`.
        rng: the source of randomness for `ddpm`, on the device of `noise`; the others are deterministic.
        **condition: handed to the denoiser.

    Returns:
        (B, *data), D at the last time.

    Raises:
        UsageError: for steps < 1, an unknown method, `ddpm` without rng, or times that are not `steps`
            decreasing values.
    """
    require_denoiser(denoiser, "denoiser")
    require_type("noise", noise, Tensor, "a tensor (B, *data) of floats")
    require("noise", noise.dtype, noise.is_floating_point(), "floats")
    require("steps", steps, isinstance(steps, Integral) and steps >= 1, "a whole number, at least 1")
    if method not in METHODS:
        raise unknown("sampling method", method, METHODS)
    if times is None:
        check_schedule(denoiser.schedule, noise.device)
        times = karras_times(denoiser.schedule, steps)
    times = _checked(times, steps).to(noise)
    alpha, sigma = denoiser.schedule(times)
    grid = _Grid(lambda x, t: denoiser(x, t, **condition), denoiser.schedule, times, alpha, sigma, rng)
    step = METHODS[method](grid)
    x = sigma[0] * noise
    for i in range(steps - 1):
        x = step(x, i)
    return grid.predict(x, steps - 1)[0]
