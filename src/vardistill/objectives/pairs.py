r"""Stored pairs (z, y) of a teacher's own sampler: which noise it turns into which sample (DMD, eq. 9).

The regression ‖φ(g_θ(z)) − φ(y)‖² ties the student to the teacher's map, so that no mode goes missing. φ is the sample
itself in units of σ_d, or a feature space's; LPIPS (Zhang et al. 2018, arXiv 1801.03924) is a distance of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vardistill.diffusion.samplers import T_MIN, karras_times, sample
from vardistill.errors import UsageError, require
from vardistill.objectives.base import inner

if TYPE_CHECKING:
    from vardistill.diffusion import Denoiser, Draw
    from vardistill.students import Student

Distance = Callable[[Tensor, Tensor], Tensor]
"""Of two batches (R, *data), (R,)."""

BLOCK = 1024
"""Pairs that the sampler makes at once."""

LPIPS_SIZE = 224
"""Pixels along a side at which LPIPS compares pictures, as DMD does."""


class StoredPairs(nn.Module):
    """A set of pairs.

    Args:
        z: (n, *latent).
        y: (n, *data).
        labels: (n,) of a conditional teacher's; a draw's row then gets a pair of its own label.
    """

    z: Tensor
    y: Tensor
    order: Tensor
    counts: Tensor

    def __init__(self, z: Tensor, y: Tensor, labels: Tensor | None = None) -> None:
        super().__init__()
        labels = torch.zeros(len(z), dtype=torch.int64, device=z.device) if labels is None else labels
        for name, v in {"z": z, "y": y, "order": labels.argsort(stable=True), "counts": labels.bincount()}.items():
            self.register_buffer(name, v, persistent=False)

    def pick(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """A pair for each row, (R, *latent) and (R, *data): the one that the row's further latent, draw.eta, points to.

        Raises:
            UsageError: for a draw without further latents.
        """
        if draw.eta is None:
            raise UsageError("which pair a row gets is told by a further latent, draw.eta (1, R, *latent)")
        u = torch.special.ndtr(draw.eta[0].flatten(1)[:, 0].double())
        labels = draw.batch.get("labels", torch.zeros_like(u, dtype=torch.int64))
        counts, first = self.counts[labels], (self.counts.cumsum(0) - self.counts)[labels]
        place = self.order[first + (u * counts).long().clamp_max(counts - 1)]
        return self.z[place].to(draw.z), self.y[place].to(draw.x)


def check_pairs(student: Student) -> None:
    """Raise UsageError for a student whose latents are no noise of a teacher's."""
    if student.steps > 1:
        raise UsageError(
            f"pairs tie one step to the teacher's sampler, but the student has {student.steps}: set pairs 0"
        )
    if student.latent_shape != student.data_shape:
        raise UsageError(
            f"pairs of a teacher's noise and sample need latents of the data's shape, {student.data_shape}, but the "
            f"student's are {student.latent_shape}: set pairs 0"
        )


@torch.no_grad()
def teacher_pairs(
    teacher: Denoiser,
    student: Student,
    n: int,
    rng: torch.Generator,
    steps: int = 18,
    conditions: Callable[[int, torch.Generator], Mapping[str, Any]] | None = None,
) -> StoredPairs:
    """n pairs by Heun's method from where the student itself starts: x_{t_1} = c_1 z, or pure noise without times.

    Args:
        teacher: the denoiser.
        student: whose latents z are.
        n: pairs.
        rng: draws the noise, on the teacher's device.
        steps: of the sampler, two evaluations each but for the last.
        conditions: drawn for the teacher; its labels stay with the pairs.

    Raises:
        UsageError: for fewer than one pair, or one of each label.
    """
    require("pairs", n, n >= 1, "at least 1")
    times, scale = None, 1.0
    if student.times:
        times = karras_times(teacher.schedule, steps, t_max=student.times[0])
        scale = student.input_scale(1) / student.levels[0][1]
    starts, samples, labels = [], [], []
    for first in range(0, n, BLOCK):
        size = min(BLOCK, n - first)
        condition = {} if conditions is None else dict(conditions(size, rng))
        z = torch.randn(size, *student.data_shape, generator=rng, device=rng.device)
        samples.append(sample(teacher, scale * z, steps, times=times, **condition))
        starts.append(z)
        labels += [condition["labels"]] if "labels" in condition else []
    found = StoredPairs(torch.cat(starts), torch.cat(samples), torch.cat(labels) if labels else None)
    if student.classes and (len(found.counts) < student.classes or not bool((found.counts > 0).all())):
        raise UsageError(f"{n} pairs are too few for {student.classes} labels: raise pairs")
    return found


def mean_square(features: Callable[[Tensor, Tensor], Tensor] | None, sigma_data: float) -> Distance:
    """‖φ(x) − φ(y)‖² per value; without features of the samples themselves in units of σ_d."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        if features is None:
            error = (x - y) / sigma_data
        else:
            t = x.new_full((len(x),), T_MIN)
            error = features(x, t) - features(y, t)
        return inner(error, error)

    return distance


def lpips() -> Distance:
    """LPIPS of pictures in [−1, 1] by the package `lpips`, with VGG, at 224 pixels.

    Raises:
        UsageError: where it is not installed.
    """
    try:
        network: Any = importlib.import_module("lpips").LPIPS(net="vgg", verbose=False)
    except ImportError as error:
        raise UsageError("pair_space lpips needs the package of this name: pip install lpips") from error
    network.requires_grad_(False).eval()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        large = [
            nn.functional.interpolate(v, (LPIPS_SIZE, LPIPS_SIZE), mode="bilinear").expand(-1, 3, -1, -1)
            for v in (x, y)
        ]
        value: Tensor = network.to(x.device)(*large)
        return value.flatten()

    return distance
