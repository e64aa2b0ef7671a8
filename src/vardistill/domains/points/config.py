"""Configurations of runs on points. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from vardistill.choices import ActivationName, ScheduleName, check_choices
from vardistill.diffusion.config import Distribution
from vardistill.diffusion.levels import LogNormal
from vardistill.errors import require
from vardistill.files import located

if TYPE_CHECKING:
    from vardistill.training.config import TrainingConfig

ProblemName = Literal["mog40", "mog9", "mixture2", "mixture8", "mixture32", "mixture128", "moons", "digits"]


@dataclass(frozen=True)
class PerceptronConfig:
    """The student: a perceptron of latents or, of several steps, of noisy points and their levels.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    latent: int = 2
    """Dimension of z."""
    depth: int = 4
    """Hidden layers."""
    width: int = 256
    """Units of a hidden layer."""
    activation: ActivationName = "silu"
    """Activation function."""
    fourier: int = 0
    """Random Fourier features of z beside z itself; they make sharper maps."""
    steps_per_sample: int = 1
    """Steps of the student's path from noise to a sample. With more than one it is a denoiser, a perceptron of x_t and
    its level, at as many levels, and has no latents, Fourier features or linear start of its own."""
    kind: Literal["latents", "denoiser"] = "latents"
    """What a student of one step is: a map of latents, or a denoiser at one level, as one of several steps."""
    ratio: float | None = None
    """Noise-to-signal ratio σ/α of a denoiser's first level; default: five standard deviations of the data."""
    linear: bool = False
    """Start as a linear map with the mean and covariance of a sample of the problem (`teacher_samples`), a learned
    posterior as its exact one; for at most as many latents as dimensions."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("latent", "depth", "width"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("steps_per_sample", self.steps_per_sample, 1 <= self.steps_per_sample <= 64, "from 1 to 64")
        require("fourier", self.fourier, self.fourier >= 0, "0 or positive")
        require("ratio", self.ratio, self.ratio is None or self.ratio > 0, "positive")

    @property
    def denoises(self) -> bool:
        """Whether the student is a denoiser at its levels, not a map of latents."""
        return self.kind == "denoiser" or self.steps_per_sample > 1


@dataclass(frozen=True)
class TeacherConfig:
    """The denoiser to distil.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    teacher: Literal["true", "empirical", "learned"] = "true"
    """The problem's exact denoiser; the exact one of a sample of it; or a network fitted to that sample."""
    teacher_run: Path | None = None
    """Folder of a teacher made by `vardistill teach`, for a learned teacher; default: fit one first."""
    teacher_samples: int = 10_000
    """Size of the sample that an empirical or a learned teacher sees, and a linear start."""
    bandwidth: float = 0.0
    """Standard deviation of the Gaussian that an empirical teacher puts on every point."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("teacher_samples", self.teacher_samples, self.teacher_samples >= 1, "at least 1")
        require("bandwidth", self.bandwidth, self.bandwidth >= 0, "0 or positive")
        if self.teacher_run is not None:
            object.__setattr__(self, "teacher_run", Path(located(str(self.teacher_run))))
        unused = self.teacher_run is not None and self.teacher != "learned"
        require("teacher", self.teacher, not unused, "'learned' with a teacher_run")
        unused = self.bandwidth != 0 and self.teacher != "empirical"
        require("teacher", self.teacher, not unused, "'empirical' with a bandwidth")


@dataclass(frozen=True)
class PointsConfig:
    """Points: a problem, its teacher and a student.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "points"
    problem: ProblemName = "mog40"
    """The target."""
    schedule: ScheduleName = "ve"
    """Forward process."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: PerceptronConfig = field(default_factory=PerceptronConfig)

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def labels(self) -> tuple[str, str]:
        """Teacher and target in a word each."""
        return self.teacher.teacher, self.problem

    def learns_from(self, training: TrainingConfig) -> PointsTeachConfig | None:
        """The fit of a learned teacher that has no run yet, with data, seed and device of the run; else None."""
        if self.teacher.teacher != "learned" or self.teacher.teacher_run is not None:
            return None
        return replace(
            teacher_fit(self.problem),
            samples=self.teacher.teacher_samples,
            schedule=self.schedule,
            seed=training.seed,
            device=training.device,
        )

    def with_teacher(self, run: Path | None) -> PointsConfig:
        """The same with a learned teacher from this run, None for one that has yet to be fitted."""
        learned = self.teacher.teacher == "learned"
        return replace(self, teacher=replace(self.teacher, teacher_run=run)) if learned else self


@dataclass(frozen=True)
class PointsTeachConfig:
    """A network denoiser, fitted to a sample of a problem by denoising score matching.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    problem: ProblemName = "mog40"
    """The target."""
    samples: int = 10_000
    """Size of the data set."""
    steps: int = 10_000
    """Updates."""
    max_minutes: float | None = None
    """Wall-clock budget."""
    batch: int = 1024
    """Points per step."""
    lr: float = 1e-3
    """Peak learning rate, decayed along a half cosine."""
    ema: float = 0.999
    """Decay of the moving average of the weights."""
    depth: int = 4
    """Hidden layers."""
    width: int = 256
    """Units of a hidden layer."""
    schedule: ScheduleName = "ve"
    """Forward process."""
    distribution: Distribution = field(default_factory=lambda: LogNormal(base_start=1.5, base_end=1.5, spread=1.4))
    seed: int = 0
    """Fixes the data, the initial weights and all draws."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("samples", "steps", "batch", "lr", "depth", "width"):
            require(name, getattr(self, name), 0 < getattr(self, name) < float("inf"), "positive")
        require("ema", self.ema, 0 <= self.ema < 1, "in [0, 1)")
        if self.max_minutes is not None:
            require("max_minutes", self.max_minutes, self.max_minutes > 0, "positive")

    @property
    def label(self) -> str:
        """What tells a fit from others, in a word."""
        schedule = "" if self.schedule == "ve" else f"-{self.schedule}"
        return f"{self.problem}{schedule}-{self.samples}-seed{self.seed}"


@dataclass(frozen=True)
class Scale:
    """What a configuration has to know of a problem.

    Attributes:
        dimension: d of the data.
        blurring: noise that makes one mode of all. In two dimensions modes have near neighbours; above, all points are
            far apart, and it is half of two points' distance, √(d/2) times the data's standard deviation.
        finest: the standard deviation of the finest structure.
    """

    dimension: int
    blurring: float
    finest: float


SCALES: dict[ProblemName, Scale] = {
    "mog40": Scale(2, 15.0, 1.31),
    "mog9": Scale(2, 3.0, 0.5),
    "moons": Scale(2, 0.5, 0.1),
    "mixture2": Scale(2, 10.0, 1.0),
    "mixture8": Scale(8, 18.0, 1.0),
    "mixture32": Scale(32, 19.5, 1.0),
    "mixture128": Scale(128, 36.0, 1.0),
    "digits": Scale(64, 3.1, 0.15),
}
"""Every problem's, rounded."""


def teacher_fit(problem: ProblemName) -> PointsTeachConfig:
    """A perceptron denoiser, its noise levels around the problem's finest structure."""
    base = 1.15 * SCALES[problem].finest
    return PointsTeachConfig(problem=problem, distribution=LogNormal(base_start=base, base_end=base, spread=1.4))
