r"""Students: a map of z alone, or a map f(x_t, t) → x̂ along a list of times t_1 > ... > t_n.

    x_{t_1} = c_1 z,   z ~ N(0, I)
    x̂_k = f(x_{t_k}, t_k),   x_{t_{k+1}} = α_{t_{k+1}} x̂_k + σ_{t_{k+1}} n_k,   n_k ~ N(0, I);   x = x̂_n

Every step adds fresh noise, as consistency models (Song et al. 2023, arXiv 2303.01469, alg. 1) and DMD2 (Yin et al.
2024, arXiv 2405.14867) do: the samples are right for every n as soon as each x̂_k has the law of the data, which is what
objectives on samples ask for. A deterministic step (DDIM) would also need x̂ to be independent of the noise that it
leaves in x_t.

The latent of step k is u_k = x_{t_k}/c_k, of about unit variance; u_1 = z.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from numbers import Integral

import torch
from torch import Tensor, nn

from vardistill.diffusion.schedules import Schedule
from vardistill.errors import UsageError, require, require_type, require_whole

PRESERVED = 1e-6
"""How far α² + σ² may be from 1 where a schedule preserves the variance, for rounding."""


class Student(nn.Module):
    """x = g(z) in one step or in n, or g(z, c) under a condition c.

    A map of z alone overrides `forward`; a map with times overrides `predict`.

    Attributes:
        latent_shape: shape of one z; with times that of one x.
        data_shape: shape of one x.
        data_std: σ_d, standard deviation of the data, that default noise levels are in units of.
        classes: K, where it takes labels 0..K−1 as the condition `labels`; 0 for an unconditional one.
        times: t_1 > ... > t_n in (0, 1]; () for a map of z alone, which is one step.
        schedule: α_t and σ_t; only where there are times.
    """

    latent_shape: tuple[int, ...]
    data_shape: tuple[int, ...]
    data_std: float
    classes: int = 0
    times: tuple[float, ...] = ()
    schedule: Schedule

    @property
    def steps(self) -> int:
        """n, evaluations of the map for one sample."""
        return max(1, len(self.times))

    @property
    def condition_names(self) -> tuple[str, ...]:
        """Names of the conditions that it takes."""
        return ("labels",) if self.classes else ()

    @property
    def initial_ratio(self) -> float:
        """σ/α at t_1, above which it is right from the start as a teacher's own step; infinite without times."""
        alpha, sigma = self.levels[0] if self.times else (0.0, 1.0)
        return sigma / alpha if alpha else math.inf

    @cached_property
    def levels(self) -> tuple[tuple[float, float], ...]:
        """(α, σ) at each time, as numbers."""
        alpha, sigma = self.schedule(torch.tensor(self.times, dtype=torch.float64, device="cpu"))
        return tuple(zip(alpha.tolist(), sigma.tolist(), strict=True))

    def input_scale(self, step: int) -> float:
        """c_k, in x_{t_k} = c_k u_k.

        At k = 1 that of a pipeline's noise: 1 where the schedule preserves the variance, else σ. At k > 1
        √(α² σ_d² + σ²).
        """
        alpha, sigma = self.levels[step - 1]
        if step > 1:
            return math.hypot(alpha * self.data_std, sigma)
        return 1.0 if abs(alpha**2 + sigma**2 - 1) < PRESERVED else sigma

    def predict(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """f(x_t, t) for x_t (B, *data) and t (B,); shape of x_t.

        Raises:
            UsageError: for a map of z alone.
        """
        raise UsageError(f"a {type(self).__name__} maps z alone: it has no times")

    def forward(self, z: Tensor, renoise: Tensor | None = None, step: int = 1, **condition: Tensor) -> Tensor:
        """The path that begins at `step`, counted from 1, and goes on over as many steps as `renoise` has entries.

        Args:
            z: (B, *latent), u_k of that step k.
            renoise: (m, B, *data), the noise n_k, ..., n_{k+m−1}; None for m = 0.
            step: k.
            **condition: handed to the map.

        Returns:
            (B, *data), x̂_{k+m}: a sample where that is the last step.

        Raises:
            UsageError: for steps that there are not.
        """
        self.require_steps(step, renoise)
        x = self._step(self.input_scale(step) * z, step, condition)
        for k, noise in enumerate(() if renoise is None else renoise, step + 1):
            x = self._step(self._renoised(x, noise, k), k, condition)
        return x

    def require_steps(self, step: int, further: Tensor | None = None) -> None:
        """Raise UsageError where there is no such step, or fewer after it than there are entries of noise."""
        last = step + (0 if further is None else len(further))
        if not 1 <= step <= last <= self.steps:
            raise UsageError(f"the student has steps 1 to {self.steps}, but steps {step} to {last} were asked for")

    def _step(self, x_t: Tensor, step: int, condition: Mapping[str, Tensor]) -> Tensor:
        return self.predict(x_t, x_t.new_full(x_t.shape[:1], self.times[step - 1]), **condition)

    def _renoised(self, x: Tensor, noise: Tensor, step: int) -> Tensor:
        """x_t = α x̂ + σ n at the step's time."""
        alpha, sigma = self.levels[step - 1]
        return alpha * x + sigma * noise

    @torch.no_grad()
    def enter(self, z: Tensor, renoise: Tensor | None, step: int, **condition: Tensor) -> Tensor:
        """u_k, the latent of step k, by the first k − 1 steps; without gradient.

        forward(enter(z, renoise, k), step=k) is the path's x̂_k, with gradient in step k alone.

        Args:
            z: (B, *latent).
            renoise: (≥ k − 1, B, *data); None will do for k = 1.
            step: k.
            **condition: handed to the map.

        Returns:
            (B, *latent): z itself for k = 1.

        Raises:
            UsageError: for a step that there is not, or less noise than it needs.
        """
        self.require_steps(step)
        if step == 1:
            return z
        if renoise is None or len(renoise) < step - 1:
            raise UsageError(f"step {step} is entered with {step - 1} entries of noise, one for each step before it")
        x: Tensor = self(z, renoise[: step - 2], **condition)
        return self._renoised(x, renoise[step - 2], step) / self.input_scale(step)

    def latents(self, n: int, rng: torch.Generator) -> Tensor:
        """z ~ N(0, I), (n, *latent), in the generator's dtype, on the device of `rng`."""
        dtype = next(self.parameters()).dtype
        return torch.randn(n, *self.latent_shape, generator=rng, device=rng.device, dtype=dtype)

    def renoise(self, n: int, rng: torch.Generator) -> Tensor:
        """The noise between the steps, (steps − 1, n, *data), drawn step by step; nothing is drawn for one step."""
        dtype = next(self.parameters()).dtype
        noise = torch.empty(self.steps - 1, n, *self.data_shape, device=rng.device, dtype=dtype)
        for of_step in noise:
            of_step.normal_(generator=rng)
        return noise

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0, block: int = 65_536, labels: Tensor | None = None) -> Tensor:
        """(n, *data) samples of all steps; `block` at a time, the same for every block size.

        Args:
            n: their number, at least 1.
            seed: fixes the latents and the noise between the steps.
            block: latents that go through the network at once.
            labels: (n,) integers in [0, K), for a conditional generator.

        Raises:
            UsageError: unless n is at least 1, and there are n labels for a conditional generator and none for another.
        """
        require_whole("the number of samples", n)
        require_whole("block", block)
        require("seed", seed, isinstance(seed, Integral) and -(2**63) <= int(seed) < 2**64, "a whole number of 64 bits")
        parameter = next(self.parameters())
        rng = torch.Generator(parameter.device).manual_seed(seed)
        z = self.latents(n, rng).split(block)
        given: list[dict[str, Tensor]] = [{} for _ in z]
        if self.steps > 1:
            given = [{"renoise": noise} for noise in self.renoise(n, rng).split(block, dim=1)]
        if labels is not None or self.classes:
            of_parts = self._checked(labels, n).to(parameter.device).split(block)
            given = [part | {"labels": of_part} for part, of_part in zip(given, of_parts, strict=True)]
        return torch.cat([self(part, **options) for part, options in zip(z, given, strict=True)])

    def _checked(self, labels: Tensor | None, n: int) -> Tensor:
        if not self.classes:
            raise UsageError("the generator is unconditional: it takes no labels")
        if labels is not None:
            require_type("labels", labels, Tensor, f"a tensor of {n} integers below {self.classes}")
        if labels is None or labels.shape != (n,) or labels.is_floating_point():
            raise UsageError(f"the generator is conditional: give {n} integer labels below {self.classes}")
        if not (int(labels.min()) >= 0 and int(labels.max()) < self.classes):
            raise UsageError(f"labels must be in [0, {self.classes}), but are {labels.min()} to {labels.max()}")
        return labels
