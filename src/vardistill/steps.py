"""What a step draws and computes, and what has to fit for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vardistill.config import TrainingConfig
from vardistill.data import Samples, StoredSamples, check_samples
from vardistill.denoisers import Denoiser
from vardistill.errors import UsageError
from vardistill.generators import Generator
from vardistill.noise_levels import Draw, Noise, NoiseLevels
from vardistill.objectives import Objective


class Drawn(NamedTuple):
    """The random part of a step; see `Draw`. Here z and real have N entries, and eta is (K, G, N, *latent)."""

    z: Tensor
    noise: Noise
    eta: Tensor | None
    pool: Tensor | None
    real: Tensor | None
    progress: float
    other_noise: tuple[Noise, ...]

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
        )

    def complete(self, x: Tensor, generator: Callable[[Tensor], Tensor]) -> Draw:
        """The draw with the latents' samples x (N, *data)."""
        return Draw(
            self.noise.rows(self.z),
            self.noise.rows(x),
            self.noise,
            generator,
            None if self.eta is None else self.eta.flatten(1, 2),
            self.pool,
            real=None if self.real is None else self.noise.rows(self.real.to(x)),
            progress=self.progress,
            other_noise=self.other_noise,
        )


class Step(nn.Module):
    """The differentiable part of a step as one module, so that a wrapper sees each parameter's use."""

    def __init__(self, generator: Generator, objective: Objective, precision: str) -> None:
        super().__init__()
        self.generator = generator
        self.objective = objective
        self.mixed = precision == "bf16"

    def forward(self, drawn: Drawn, critic: bool) -> Tensor:
        """The mean loss over this process's rows."""
        with torch.set_grad_enabled(not critic):
            x = self._generate(drawn.z)
        draw = drawn.complete(x, self._generate)
        loss = self.objective.critic_loss(draw) if critic else self.objective.generator_loss(draw)
        if loss.shape != draw.noise.t.shape:
            raise UsageError(f"an objective returns one value per row, ({len(draw.z)},), but got {tuple(loss.shape)}")
        return loss.mean()

    def _generate(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.mixed):
            x: Tensor = self.generator(z)
        return x.to(z.dtype)


def check_schedules(teacher: Denoiser, levels: NoiseLevels) -> None:
    """Raise UsageError unless the noise levels follow the teacher's schedule."""
    if teacher.schedule != levels.schedule:
        raise UsageError(
            f"the teacher's schedule is {teacher.schedule}, but the noise levels' is {levels.schedule}: "
            "give both the same, or wrap the teacher in vardistill.denoisers.reschedule"
        )


def check_batch(batch: int, processes: int, objective: Objective, levels: NoiseLevels) -> None:
    """Raise UsageError unless the batch splits evenly and is large enough for the objective."""
    for name, latents in (("batch", batch), ("pool", objective.pool_latents)):
        if latents % processes:
            raise UsageError(f"{name} must be divisible by the {processes} processes, but is {latents}")
    if batch < objective.smallest_batch:
        name = type(objective).__name__
        raise UsageError(f"{name} needs a batch of at least {objective.smallest_batch}, but batch={batch}")
    if objective.compares_groups and not levels.shared:
        raise UsageError(f"{type(objective).__name__} compares groups of one level: share the levels, e.g. shared=8")
    for shared in {some.shared for some in (levels, *objective.other_levels)} - {0}:
        if batch % (shared * processes):
            raise UsageError(
                f"batch must be divisible by {shared * processes}, shared levels times processes, but is {batch}"
            )
        if batch // shared < 2:
            raise UsageError(f"groups need at least 2 latents each, but batch={batch} has {shared} shared levels")


def check_accumulation(training: TrainingConfig, processes: int, objective: Objective) -> None:
    """Raise UsageError unless the batch splits into the parts, and no row's loss depends on the others."""
    parts = training.accumulate * processes
    if training.accumulate > 1 and objective.smallest_batch > 1:
        raise UsageError(
            f"{type(objective).__name__} compares the rows of a batch, which accumulate={training.accumulate} would "
            "part: set accumulate=1"
        )
    if training.batch % parts:
        raise UsageError(f"batch must be divisible by {parts}, accumulate times processes, but is {training.batch}")


def real_samples(
    data: Samples | Tensor | None, objective: Objective, generator: Generator, like: Tensor
) -> Samples | None:
    """Where an objective that needs real samples has them from; None for the others."""
    if not objective.needs_real:
        return None
    if data is None:
        raise UsageError(
            f"{type(objective).__name__} compares with real samples: give data, a tensor of them or a function "
            "(vardistill.data.teacher_samples makes some of a teacher)"
        )
    if isinstance(data, StoredSamples):
        data = data.data
    if isinstance(data, Tensor):
        data = StoredSamples(data.to(like))
    check_samples(data, generator.data_shape, like.device)
    return data
