r"""What a training step draws: times, noise, weights.

A level distribution (`levels`) draws the ratios σ_t/α_t, a weight (`weights`) turns them into w(t), `NoiseLevels.draw`
gathers one step's draws in a `Noise`, and a `Draw` adds the latents and the student's samples: the one object that
objectives receive.

The R = G·N rows of a draw hold G noise draws for each of N latents; row r belongs to latent r mod N. An antithetic pair
is two rows with the same latent and time, and noise +ε and −ε: it cancels the part of a gradient that is linear in ε.

Every row has a level of its own, or rows share L levels in each of the G draws: row r then has the level r mod L of its
draw, and the rows of one level are a *group*, a sample of one noisy marginal (what the energy distance compares).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.levels import LevelDistribution
from vardistill.diffusion.schedules import Schedule, expand, require_schedule
from vardistill.diffusion.weights import Weight
from vardistill.errors import UsageError, require


@dataclass(frozen=True, eq=False)
class Noise:
    """One step's noise.

    Attributes:
        t: (R,) times in [0, 1].
        alpha: (R,) α_t.
        sigma: (R,) σ_t.
        weight: (R,) w(t).
        eps: (R, *data) standard normal.
        latents: N, the number of different latents; rows r, r + N, r + 2N, ... share one.
        shared: L, the levels that the rows of a draw share; 0 where every row has its own.
        real_eps: (R, *data) standard normal for real samples beside the student's; None where none are needed.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    weight: Tensor
    eps: Tensor
    latents: int
    shared: int = 0
    real_eps: Tensor | None = None

    def x_t(self, x: Tensor) -> Tensor:
        """α_t x + σ_t ε for x of shape (R, *data)."""
        return expand(self.alpha, x) * x + expand(self.sigma, x) * self.eps

    def real_t(self, real: Tensor) -> Tensor:
        """α_t y + σ_t ε′ for real samples y of shape (R, *data)."""
        if self.real_eps is None:
            raise UsageError("no noise was drawn for real samples: draw the levels with real=True")
        return expand(self.alpha, real) * real + expand(self.sigma, real) * self.real_eps

    def groups(self, v: Tensor) -> Tensor:
        """`v` (R, ...) with the rows of one level together, (G·L, N/L, ...).

        Raises:
            UsageError: where every row has a level of its own.
        """
        if not self.shared:
            raise UsageError("every row has a noise level of its own: share levels among rows, for example shared=8")
        return v.reshape(-1, self.latents // self.shared, self.shared, *v.shape[1:]).transpose(1, 2).flatten(0, 1)

    def ungroup(self, v: Tensor) -> Tensor:
        """The inverse of `groups`, (R, ...)."""
        return v.reshape(-1, self.shared, *v.shape[1:]).transpose(1, 2).flatten(0, 2)

    def rows(self, v: Tensor) -> Tensor:
        """`v` of shape (N, ...), one entry a latent, repeated to the R rows."""
        return v.repeat(len(self.t) // self.latents, *[1] * (v.ndim - 1))

    def shard(self, process: int, processes: int) -> Noise:
        """The rows of the `process`-th of `processes` equal, contiguous parts of the latents."""
        n = self.latents // processes

        def part(v: Tensor) -> Tensor:
            of_latents = v.reshape(-1, self.latents, *v.shape[1:])[:, process * n : (process + 1) * n]
            return of_latents.flatten(0, 1)

        scales = part(self.t), part(self.alpha), part(self.sigma), part(self.weight)
        real_eps = None if self.real_eps is None else part(self.real_eps)
        return Noise(*scales, part(self.eps), n, self.shared, real_eps)


@dataclass(frozen=True, eq=False)
class Draw:
    """What an update draws, as an objective receives it: a loss is a deterministic function of this.

    Attributes:
        z: (R, *latent) latents of the student's step that made x.
        x: (R, *data) = generator(z), with its gradient.
        noise: times, scales, weights and ε of the R rows.
        generator: that step of the student, for objectives that evaluate it at other latents.
        eta: (K, R, *latent) standard normal, for objectives that draw K further latents a row; None for the others.
        xi: (K, R, *data) standard normal, for objectives that need further noise; None for the others.
        pool: (M, *latent) further latents of the step, for objectives that share them among the rows; or None.
        batch: further tensors of R rows, handed to the teacher as keywords (labels, for example).
        real: (R, *data) real samples, for objectives that need them; None for the others.
        progress: of the run, in [0, 1].
        other_noise: further noise for the same latents, one for each of the update's `Needs.other_levels`.
        step: k, which of the student's steps made x, from 1.
        memo: what was computed of this draw already.
    """

    z: Tensor
    x: Tensor
    noise: Noise
    generator: Callable[[Tensor], Tensor]
    eta: Tensor | None = None
    pool: Tensor | None = None
    batch: Mapping[str, Tensor] = field(default_factory=dict)
    real: Tensor | None = None
    progress: float = 0.0
    other_noise: tuple[Noise, ...] = ()
    step: int = 1
    xi: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def x_t(self) -> Tensor:
        """The noisy samples α_t x + σ_t ε, (R, *data)."""
        return self.noise.x_t(self.x)

    @property
    def real_t(self) -> Tensor:
        """The noisy real samples α_t y + σ_t ε′, (R, *data).

        Raises:
            UsageError: where the draw holds no real samples.
        """
        if self.real is None:
            raise UsageError("this objective compares with real samples, but none were drawn: give the trainer data")
        return self.noise.real_t(self.real)

    def denoised(self, denoiser: Denoiser) -> Tensor:
        """D(x_t, t), shape of x, without gradient; evaluated once, however many losses and diagnostics ask."""
        x = self.x.detach()
        seen = denoiser, self.noise, self.batch  # they stay with the result, lest others come to lie at their place
        key = *map(id, seen), x.data_ptr()
        if key not in self.memo:
            with torch.no_grad():
                self.memo[key] = denoiser(self.noise.x_t(x), self.noise.t, **self.batch), x, seen
        denoised: Tensor = self.memo[key][0]
        return denoised

    def score(self, denoiser: Denoiser) -> Tensor:
        """∇ log p_t(x_t) = (α_t D(x_t, t) − x_t)/σ_t² (Tweedie), shape of x, without gradient."""
        x = self.x.detach()
        alpha, sigma = expand(self.noise.alpha, x), expand(self.noise.sigma, x)
        return (alpha * self.denoised(denoiser) - self.noise.x_t(x)) / sigma**2

    def under(self, noise: Noise) -> Draw:
        """The same latents, real samples and conditions under another noise; eta and xi stay behind."""
        key = id(noise), id(self.x)
        if key not in self.memo:
            n = noise.latents
            real = None if self.real is None else noise.rows(self.real[:n])
            with torch.enable_grad():  # whoever asks first
                z, x = noise.rows(self.z[:n]), noise.rows(self.x[:n])
            batch = {name: noise.rows(v[:n]) for name, v in self.batch.items()}
            own = replace(
                self, z=z, x=x, real=real, noise=noise, eta=None, xi=None, batch=batch, other_noise=(), memo={}
            )
            self.memo[key] = own, self.x
        under: Draw = self.memo[key][0]
        return under


@dataclass(frozen=True)
class NoiseLevels:
    """How a step draws its noise.

    Args:
        schedule: t → (α_t, σ_t).
        distribution: of the ratios σ_t/α_t.
        weight: w(α, σ); default 1.
        draws: G, noise draws per latent; even if antithetic.
        antithetic: the second half of the rows repeats the first half's times with −ε.
        stratified: draw the levels' u one from each of as many equal strata, in random order, not independently:
            same marginal law, less variance.
        shared: L, the levels that the latents of a draw share; 0 gives every row its own.

    Raises:
        UsageError: for draws < 1, odd draws with antithetic pairs, or shared < 0.
    """

    schedule: Schedule
    distribution: LevelDistribution
    weight: Weight = lambda alpha, sigma: torch.ones_like(sigma)
    draws: int = 1
    antithetic: bool = False
    stratified: bool = False
    shared: int = 0

    def __post_init__(self) -> None:
        require_schedule(self.schedule)
        for name in ("distribution", "weight"):
            require(name, getattr(self, name), callable(getattr(self, name)), "a function, see vardistill.levels")
        if self.draws < 1:
            raise UsageError(f"draws must be at least 1, but is {self.draws}")
        if self.antithetic and self.draws % 2:
            raise UsageError(f"antithetic pairs need an even number of noise draws per latent, but draws={self.draws}")
        if self.shared < 0:
            raise UsageError(f"shared must be 0 or the number of levels that a draw shares, but is {self.shared}")

    def draw(
        self,
        shape: torch.Size | tuple[int, ...],
        latents: int,
        progress: float,
        rng: torch.Generator,
        dtype: torch.dtype = torch.float32,
        real: bool = False,
    ) -> Noise:
        """Draw a step's noise for `latents` latents and data of `shape`, on the device of `rng`.

        Args:
            shape: of one data point.
            latents: N; the draw has R = draws · N rows.
            progress: of the run, in [0, 1].
            rng: the source of randomness.
            dtype: of the result.
            real: whether to draw noise for real samples, too.

        Raises:
            UsageError: where the latents do not split evenly over the shared levels.
        """
        t = self.times(latents, progress, rng, dtype)
        eps = torch.randn(*t.shape, *shape, generator=rng, device=rng.device, dtype=dtype)
        real_eps = None
        if real:
            real_eps = torch.randn(self.draws, *eps.shape[1:], generator=rng, device=rng.device, dtype=dtype)
        return self.noise(t, eps, real_eps)

    @property
    def independent(self) -> int:
        """The noise draws of a latent that are no mirror images of others."""
        return self.draws // 2 if self.antithetic else self.draws

    def times(self, latents: int, progress: float, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """The levels of a step as times, (independent, latents), on the device of `rng`.

        Levels outside the schedule's range are moved to its ends, t = 0 and t = 1.

        Raises:
            UsageError: where the latents do not split evenly over the shared levels.
        """
        if self.shared and latents % self.shared:
            raise UsageError(f"the batch must be divisible by the {self.shared} shared levels, but is {latents}")
        u = self._uniform(self.independent * (self.shared or latents), rng, dtype).clamp(1e-7, 1 - 1e-7)
        t = self.schedule.time(self.distribution(u, progress, self.schedule)).clamp(0, 1)
        if self.shared:
            t = t.view(self.independent, 1, self.shared).expand(-1, latents // self.shared, -1)
        return t.reshape(self.independent, latents)

    def noise(self, t: Tensor, eps: Tensor, real_eps: Tensor | None = None) -> Noise:
        """The noise of N latents at the times t (independent, N), from ε (independent, N, *data) drawn for them.

        `real_eps` (draws, N, *data) is the noise of real samples, if any.
        """
        latents = t.shape[1]
        t, eps = t.flatten(), eps.flatten(0, 1)
        if self.antithetic:
            t, eps = torch.cat([t, t]), torch.cat([eps, -eps])
        alpha, sigma = self.schedule(t)
        real = None if real_eps is None else real_eps.flatten(0, 1)
        return Noise(t, alpha, sigma, self.weight(alpha, sigma), eps, latents, self.shared, real)

    def _uniform(self, n: int, rng: torch.Generator, dtype: torch.dtype) -> Tensor:
        u = torch.rand(n, generator=rng, device=rng.device, dtype=dtype)
        if not self.stratified:
            return u
        return (torch.randperm(n, generator=rng, device=rng.device) + u) / n
