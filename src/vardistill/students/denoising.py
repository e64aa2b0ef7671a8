r"""Students that start as a denoiser: f(x_t, t) = D(x_t, t) at a few times.

One step is the first of the denoiser's own sampler. Times are chosen by the ratio r = σ/α: r_1 far above the data's
standard deviation σ_d, the others from there towards r_min, equally spaced in r^(1/ρ) (Karras et al. 2022,
arXiv 2206.00364, eq. 5), r_min itself left out; both ends within the schedule's own range.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.schedules import Schedule, Table
from vardistill.errors import UsageError, require_positive, require_whole
from vardistill.students.student import Student

INITIAL_RATIO = 5.0
"""Default noise-to-signal ratio of t_1 in standard deviations of the data: SiD's σ = 2.5 for σ_d = ½."""

LAST_RATIO = 0.25
"""r_min, likewise. A step at less noise sees its input's errors and can hardly mend them: the lists of SiD-LSG (arXiv
2406.01561) and DMD2 (arXiv 2405.14867) end near σ_d, too."""

RHO = 7.0
"""ρ of the spacing, EDM's."""


class DenoisingStudent(Student):
    """f(x_t, t) = D(x_t, t) along a list of times.

    Args:
        denoiser: D, an nn.Module with the parameters to train.
        data_shape: shape of one x.
        data_std: σ_d, standard deviation of the data.
        times: t_1 > ... > t_n in (0, 1]; see `default_times`.
        classes: labels 0..classes − 1 that D takes; 0 for an unconditional one.

    Raises:
        UsageError: for times that are not so, or without noise.
    """

    denoiser: Denoiser

    def __init__(
        self,
        denoiser: Denoiser,
        data_shape: Sequence[int],
        data_std: float,
        times: Sequence[float],
        classes: int = 0,
    ) -> None:
        super().__init__()
        require_positive("data_std", data_std)
        self.times = checked_times(times)
        self.denoiser = denoiser
        self.latent_shape = self.data_shape = tuple(data_shape)
        self.data_std, self.classes = data_std, classes
        if not all(sigma > 0 for _, sigma in self.levels):
            raise UsageError(f"the schedule has no noise at one of the student's times, {shown(times)}")

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]  # read from the one place that has it
        """Of the denoiser."""
        return self.denoiser.schedule

    def predict(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """D(x_t, t), shape of x_t."""
        return self.denoiser(x_t, t, **condition)


def checked_times(times: Sequence[float]) -> tuple[float, ...]:
    """The times as a tuple; UsageError unless they decrease in (0, 1]."""
    if not times or not all(0 < t <= 1 for t in times):
        raise UsageError(f"a student's times must be in (0, 1], one for each step, but are {shown(times)}")
    if not all(t > s for t, s in zip(times, times[1:], strict=False)):
        raise UsageError(f"a student's times must decrease from noise to data, but are {shown(times)}")
    return tuple(map(float, times))


def shown(times: Sequence[float]) -> str:
    """Times for an error's text."""
    return ", ".join(f"{t:g}" for t in times) or "none"


def default_times(
    schedule: Schedule, steps: int = 1, data_std: float = 0.5, ratio: float | None = None
) -> tuple[float, ...]:
    """t_1 > ... > t_n at Karras's ratios; of a discrete schedule the nearest steps.

    Args:
        schedule: of the denoiser.
        steps: n.
        data_std: σ_d.
        ratio: r_1; default `INITIAL_RATIO` σ_d.

    Raises:
        UsageError: for n < 1, or so many times that the schedule does not tell them apart.
    """
    require_whole("a student's steps", steps)
    require_positive("data_std", data_std)
    if ratio is not None:
        require_positive("ratio", ratio)
    first = INITIAL_RATIO * data_std if ratio is None else ratio
    alpha, sigma = schedule(torch.tensor([1.0, 0.0], dtype=torch.float64))
    largest, least = (sigma / alpha).tolist()
    start, end = min(first, largest) ** (1 / RHO), max(LAST_RATIO * data_std, least) ** (1 / RHO)
    ratios = [first, *((start + k / steps * (end - start)) ** RHO for k in range(1, steps))]
    times: list[float] = schedule.time(torch.tensor(ratios, dtype=torch.float64)).clamp(0, 1).tolist()
    if isinstance(schedule, Table):
        last = len(schedule.alphas_cumprod) - 1
        times = [max(1, round(t * last)) / last for t in times]
    if not all(t > s > 0 for t, s in zip(times, times[1:], strict=False)):
        raise UsageError(f"{steps} steps are too many for the schedule: their times would be {shown(times)}")
    return tuple(times)
