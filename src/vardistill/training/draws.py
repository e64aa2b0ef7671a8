"""What an update draws: own rows only, from streams of random numbers.

A stream is named by (seed, step, update, place): a generator of random numbers that starts anew. Two places are common
to all rows (the student's step and noise levels: a few numbers, and strata must see all rows), and every chunk of the
batch has one for latents, noise, conditions and real samples. There are always `CHUNKS` chunks, and a process draws
those that hold its rows: so the drawn set does not depend on the number of processes, and no state of a random
generator has to be kept.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vardistill.diffusion.noise import Draw, Noise, NoiseLevels
from vardistill.objectives.base import Needs
from vardistill.students.student import Student
from vardistill.training.data import Conditions, Samples

CHUNKS = 8
"""Parts of a batch that are drawn apart."""

LEVELS, STUDENT_STEP, POOL, CONDITIONS = CHUNKS, CHUNKS + 1, CHUNKS + 2, 2 * CHUNKS + 2
"""Places after the chunks of the batch: noise levels, the student's step, the pool's first chunk, and conditions that
latents share."""

DIAGNOSTICS = 2**20
"""The update's number for a draw of diagnostics, which is none of training."""

CONDITION = "condition."
"""What the names of conditions begin with among the tensors of a chunk."""

Generate = Callable[..., Tensor]
"""A latent of a student's step, the step's number and conditions by name → x."""


def stream(seed: int, step: int, update: int, place: int, device: torch.device) -> torch.Generator:
    """A generator of random numbers that these four numbers fix."""
    name = struct.pack("<qqqq", seed, step, update, place)
    key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    return torch.Generator(device).manual_seed(key)


class Drawn(NamedTuple):
    """The random part of an update for N latents; see `Draw`. eta is (K, G, N, *latent), xi (K, G, N, *data).

    `step` is the student's step that is trained, from 1, and `renoise` (step − 1, N, *data) the fresh noise on the way.
    """

    z: Tensor
    renoise: Tensor
    noise: Noise
    eta: Tensor | None
    pool: tuple[Tensor, Tensor] | None
    real: Tensor | None
    progress: float
    other_noise: tuple[Noise, ...]
    condition: Mapping[str, Tensor]
    step: int = 1
    xi: Tensor | None = None

    def shard(self, part: int, parts: int) -> Drawn:
        """The `part`-th of `parts` equal, contiguous parts of the latents and of all that goes with them."""

        def share(v: Tensor | None, axis: int = 0) -> Tensor | None:
            return None if v is None else v.tensor_split(parts, axis)[part]

        return self._replace(
            z=self.z.tensor_split(parts)[part],
            renoise=self.renoise.tensor_split(parts, 1)[part],
            noise=self.noise.shard(part, parts),
            eta=share(self.eta, axis=2),
            xi=share(self.xi, axis=2),
            real=share(self.real),
            other_noise=tuple(noise.shard(part, parts) for noise in self.other_noise),
            condition={name: v.tensor_split(parts)[part] for name, v in self.condition.items()},
        )

    def latents(self, student: Student) -> Tensor:
        """The latents of the student's step, (N, *latent), without gradient."""
        return self.z if self.step == 1 else student.enter(self.z, self.renoise, self.step, **self.condition)

    def entered(self, student: Student) -> Drawn:
        """The same with the pool's latents brought to the student's step, without gradient."""
        if self.pool is None or self.step == 1:
            return self
        z, renoise = self.pool
        return self._replace(pool=(student.enter(z, renoise, self.step).to(z.dtype), renoise))

    def complete(self, student: Student, u: Tensor, x: Tensor, generate: Generate) -> Draw:
        """The draw of these latents and the student's samples of them, x = g(u, c), (N, *data)."""
        batch = {name: self.noise.rows(v) for name, v in self.condition.items()}

        def of_rows(z: Tensor) -> Tensor:
            times = len(z) // self.noise.t.numel()
            return generate(z, self.step, {name: v.repeat(times, *[1] * (v.ndim - 1)) for name, v in batch.items()})

        return Draw(
            self.noise.rows(u),
            self.noise.rows(x),
            self.noise,
            of_rows if batch else lambda z: generate(z, self.step, {}),
            None if self.eta is None else self.eta.flatten(1, 2),
            self.pool and self.pool[0],
            batch,
            real=None if self.real is None else self.noise.rows(self.real.to(u)),
            progress=self.progress,
            other_noise=self.other_noise,
            step=self.step,
            xi=None if self.xi is None else self.xi.flatten(1, 2),
        )


@dataclass(frozen=True)
class Draws:
    """Draws updates of a run.

    Args:
        student: whose latents are drawn.
        levels: the run's noise levels.
        data: real samples; None where no update needs any.
        conditions: of a conditional student.
        batch: N, latents of a step, over all processes.
        seed: of all streams.
        device: where to draw.
        dtype: of latents and noise.
    """

    student: Student
    levels: NoiseLevels
    data: Samples | None
    conditions: Conditions | None
    batch: int
    seed: int
    device: torch.device
    dtype: torch.dtype

    def __call__(
        self,
        needs: Needs,
        progress: float,
        step: int,
        update: int,
        process: int = 0,
        processes: int = 1,
        student_step: int | None = None,
    ) -> Drawn:
        """The rows of one process.

        Args:
            needs: of the update.
            progress: of the run, in [0, 1].
            step: of training.
            update: its number within the step.
            process: which of
            processes: as many, that share the batch.
            student_step: k; default uniform on the student's steps.
        """
        of_step = stream(self.seed, step, update, STUDENT_STEP, torch.device("cpu"))
        k = student_step or int(torch.randint(self.student.steps, (), generator=of_step)) + 1
        levels = (self.levels if needs.levels is None else needs.levels, *needs.other_levels)
        shared = stream(self.seed, step, update, LEVELS, self.device)
        times = [some.times(self.batch, progress, shared, self.dtype) for some in levels]

        together = self._together(needs, levels, step, update)

        def chunk(latents: slice, rng: torch.Generator) -> dict[str, Tensor]:
            n = latents.stop - latents.start
            condition = {name: v[latents] for name, v in together.items()} or self._conditions(n, rng)
            return self._chunk(needs, levels, k, n, rng, condition)

        rows = self._rows(chunk, self.batch, step, update, 0, process, processes)
        start = self.batch * process // processes
        noises = [
            some.noise(
                t[:, start : start + len(rows["z"])],
                rows[f"eps{i}"].transpose(0, 1),
                _second_axis(rows, f"real_eps{i}"),
            )
            for i, (some, t) in enumerate(zip(levels, times, strict=True))
        ]
        pool = None
        if needs.pool:
            of_pool = self._rows(
                lambda rows, rng: self._latents(k, rows.stop - rows.start, rng),
                needs.pool,
                step,
                update,
                POOL,
                process,
                processes,
            )
            pool = of_pool["z"], of_pool["renoise"].transpose(0, 1)
        return Drawn(
            z=rows["z"],
            renoise=rows["renoise"].transpose(0, 1),
            noise=noises[0],
            eta=_third_axis(rows, "eta"),
            xi=_third_axis(rows, "xi"),
            pool=pool,
            real=rows.get("real"),
            progress=progress,
            other_noise=tuple(noises[1:]),
            condition={name.removeprefix(CONDITION): v for name, v in rows.items() if name.startswith(CONDITION)},
            step=k,
        )

    def _rows(
        self,
        chunk: Callable[[slice, torch.Generator], dict[str, Tensor]],
        total: int,
        step: int,
        update: int,
        place: int,
        process: int,
        processes: int,
    ) -> dict[str, Tensor]:
        """One process's rows of what is drawn by chunks, tensors by name with the rows first."""
        start, stop = total * process // processes, total * (process + 1) // processes
        ends = [total * c // CHUNKS for c in range(CHUNKS + 1)]
        own = [c for c in range(CHUNKS) if max(ends[c], start) < min(ends[c + 1], stop)]
        parts = [
            chunk(slice(ends[c], ends[c + 1]), stream(self.seed, step, update, place + c, self.device)) for c in own
        ]
        offset = start - ends[own[0]]
        return {name: torch.cat([part[name] for part in parts])[offset : offset + stop - start] for name in parts[0]}

    def _chunk(
        self,
        needs: Needs,
        levels: tuple[NoiseLevels, ...],
        k: int,
        n: int,
        rng: torch.Generator,
        condition: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """All that n latents are drawn with under their conditions."""
        rows = self._latents(k, n, rng) | {CONDITION + name: v for name, v in condition.items()}
        for i, some in enumerate(levels):
            rows[f"eps{i}"] = self._normal(rng, n, some.independent, *self.student.data_shape)
            if needs.real:
                rows[f"real_eps{i}"] = self._normal(rng, n, some.draws, *self.student.data_shape)
        if needs.real:
            assert self.data is not None
            rows["real"] = self.data(n, rng, **condition)
        if needs.eta:
            rows["eta"] = self._normal(rng, n, needs.eta, levels[0].draws, *self.student.latent_shape)
        if needs.xi:
            rows["xi"] = self._normal(rng, n, needs.xi, levels[0].draws, *self.student.data_shape)
        return rows

    def _conditions(self, n: int, rng: torch.Generator) -> Mapping[str, Tensor]:
        return {} if self.conditions is None else self.conditions(n, rng)

    def _together(self, needs: Needs, levels: tuple[NoiseLevels, ...], step: int, update: int) -> Mapping[str, Tensor]:
        """The conditions of all latents, where m of a group, one after the other, share one; else nothing.

        Groups of L levels hold every L-th latent.
        """
        if not needs.per_condition:
            return {}
        shared, latent = max(some.shared for some in levels), torch.arange(self.batch, device=self.device)
        of = latent // (needs.per_condition * shared) * shared + latent % shared
        rng = stream(self.seed, step, update, CONDITIONS, self.device)
        drawn = self._conditions(self.batch // needs.per_condition, rng)
        return {name: v[of] for name, v in drawn.items()}

    def _latents(self, k: int, n: int, rng: torch.Generator) -> dict[str, Tensor]:
        z = self._normal(rng, n, *self.student.latent_shape)
        return {"z": z, "renoise": self._normal(rng, n, k - 1, *self.student.data_shape)}

    def _normal(self, rng: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=rng.device, dtype=self.dtype)


def _second_axis(rows: Mapping[str, Tensor], name: str) -> Tensor | None:
    return None if name not in rows else rows[name].transpose(0, 1)


def _third_axis(rows: Mapping[str, Tensor], name: str) -> Tensor | None:
    return None if name not in rows else rows[name].movedim(0, 2)
