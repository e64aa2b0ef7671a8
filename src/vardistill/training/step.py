"""What a step draws and computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vardistill.diffusion.noise import Draw, Noise
from vardistill.errors import UsageError
from vardistill.objectives import Objective
from vardistill.students.student import Student


class Drawn(NamedTuple):
    """The random part of a step; see `Draw`. Here z, real and condition have N entries; eta is (K, G, N, *latent)."""

    z: Tensor
    noise: Noise
    eta: Tensor | None
    pool: Tensor | None
    real: Tensor | None
    progress: float
    other_noise: tuple[Noise, ...]
    condition: Mapping[str, Tensor]

    def shard(self, part: int, parts: int) -> Drawn:
        """The `part`-th of `parts` equal, contiguous parts of the latents and of all that goes with them."""

        def share(v: Tensor | None, axis: int = 0) -> Tensor | None:
            return None if v is None else v.tensor_split(parts, axis)[part]

        return self._replace(
            z=self.z.tensor_split(parts)[part],
            noise=self.noise.shard(part, parts),
            eta=share(self.eta, axis=2),
            pool=share(self.pool),
            real=share(self.real),
            other_noise=tuple(noise.shard(part, parts) for noise in self.other_noise),
            condition={name: v.tensor_split(parts)[part] for name, v in self.condition.items()},
        )

    def complete(self, generator: Callable[..., Tensor]) -> Draw:
        """The draw with the latents' samples x = g(z, c), (N, *data)."""
        batch = {name: self.noise.rows(v) for name, v in self.condition.items()}

        def of_rows(z: Tensor) -> Tensor:
            times = len(z) // self.noise.t.numel()
            return generator(z, **{name: v.repeat(times, *[1] * (v.ndim - 1)) for name, v in batch.items()})

        return Draw(
            self.noise.rows(self.z),
            self.noise.rows(generator(self.z, **self.condition)),
            self.noise,
            of_rows,
            None if self.eta is None else self.eta.flatten(1, 2),
            self.pool,
            batch,
            real=None if self.real is None else self.noise.rows(self.real.to(self.z)),
            progress=self.progress,
            other_noise=self.other_noise,
        )


class Step(nn.Module):
    """The differentiable part of a step as one module, so that a wrapper sees each parameter's use."""

    def __init__(self, generator: Student, objective: Objective, precision: str) -> None:
        super().__init__()
        self.generator = generator
        self.objective = objective
        self.mixed = precision == "bf16"

    def forward(self, drawn: Drawn, critic: bool) -> Tensor:
        """The mean loss over this process's rows."""
        with torch.set_grad_enabled(not critic):
            draw = drawn.complete(self._generate)
        loss = self.objective.critic_loss(draw) if critic else self.objective.generator_loss(draw)
        if loss.shape != draw.noise.t.shape:
            raise UsageError(f"an objective returns one value per row, ({len(draw.z)},), but got {tuple(loss.shape)}")
        return loss.mean()

    def _generate(self, z: Tensor, **condition: Tensor) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.mixed):
            x: Tensor = self.generator(z, **condition)
        return x.to(z.dtype)
