"""What points provide to a run: problems whose truth is known, perceptrons, and everything that is exact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vardistill.denoisers import Empirical, GaussianMixture, reschedule
from vardistill.devices import computes_in_bf16, find_device
from vardistill.diffusion import SCHEDULES, Denoiser, DensityDenoiser, Schedule
from vardistill.domains.base import Finished, fit_once
from vardistill.domains.points.config import PointsConfig, PointsTeachConfig
from vardistill.domains.points.problems import PROBLEMS, Problem
from vardistill.domains.points.teach import build_network_denoiser, load_teacher, teach, teacher_errors
from vardistill.errors import UsageError, unknown
from vardistill.metrics import bound_gap, evaluate
from vardistill.metrics.bound import LARGEST_LATENT, diffusive_kl
from vardistill.metrics.critic import critic_bias
from vardistill.networks import initial_weights
from vardistill.objectives import Objective, VarDiU
from vardistill.objectives.critic import ScoreDistillation
from vardistill.posteriors import (
    DiagonalGaussian,
    FullGaussian,
    MixtureOfGaussians,
    NeuralSplineFlow,
    Posterior,
)
from vardistill.students import (
    MLP,
    DenoisingMLP,
    PrincipalAxes,
    Student,
    default_times,
    load_student,
    principal_axes,
)
from vardistill.training.config import TrainingConfig
from vardistill.training.data import Samples, teacher_samples
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Evaluate

POSTERIORS = {
    "diagonal": DiagonalGaussian,
    "full": FullGaussian,
    "mixture": MixtureOfGaussians,
    "nsf": NeuralSplineFlow,
}
"""The learned posteriors, by name."""

POSTERIOR_WIDTH = 256
"""Units of a posterior's hidden layers, by default."""

BOUND_RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Noise-to-signal ratios at which a finished run's bound is compared with the diffusive KL."""

GAP_RATIOS = (1.0, 4.0, 16.0)
"""Those over which the curves of a run's bound, KL and gap are averaged."""

DRAWS = 2048
"""Draws at each of these for the bound, the KL, the gap and the critic's bias, whose mean gradients are small beside
their noise; a run that evaluates fewer samples has as many of them."""


class Points:
    """The parts of a run on points; see `domains.base.Domain`.

    Args:
        config: of the domain.
        training: of the run, for seed, precision and numbers of samples.
        takes_teacher: whether the objective has one.
    """

    conditions = None
    teacher: Denoiser | None
    student: Student

    def __init__(self, config: PointsConfig, training: TrainingConfig, takes_teacher: bool = True) -> None:
        self.config, self.training, self.takes_teacher = config, training, takes_teacher
        self.seed = training.seed
        self.schedule: Schedule = SCHEDULES[config.schedule]()
        self.problem: Problem = PROBLEMS[config.problem](self.schedule)  # stays on the CPU; the teacher moves
        self.data_std = self.problem.data_std
        (self.dimension,) = self.problem.data_shape

    @cached_property
    def mixed(self) -> bool:
        """Whether perceptrons compute in bfloat16."""
        return computes_in_bf16(self.training.precision, find_device(self.training.device))

    def load(self, folder: RunFolder | None) -> None:
        """Build teacher and student."""
        self.teacher = self._ready_teacher()
        if self.teacher is None and self.takes_teacher:
            fitted = None if folder is None else load_teacher(folder.teacher)
            self.teacher = fitted or build_network_denoiser(
                PointsTeachConfig(schedule=self.config.schedule), self.problem
            )
        self.student = self._build_student()

    def check(self) -> None:
        """Raise UsageError for a teacher of which nothing is taken."""
        kind = self.config.teacher.teacher
        if not self.takes_teacher and kind != "true":
            raise UsageError(
                f"an objective of data alone takes no teacher, but teacher is {kind!r}: leave it out (--teacher true)"
            )

    def prepare(self, folder: RunFolder) -> None:
        """Fit the teacher, where one is asked for that has no run of its own; a fit that was stopped goes on."""
        fit = self.config.learns_from(self.training)
        if fit is None or not self.takes_teacher:
            return
        fit_once(folder.teacher, lambda begun: teach(fit, folder.teacher, resume=begun))

    def _ready_teacher(self) -> Denoiser | None:
        """The teacher, None for one that has yet to be fitted and an objective that takes none."""
        t = self.config.teacher
        if not self.takes_teacher:
            return None
        if t.teacher == "true":
            if self.problem.denoiser is None:
                raise UsageError(f"{self.problem.name} has no exact teacher: choose an empirical or a learned one")
            return deepcopy(self.problem.denoiser)
        if t.teacher == "empirical":
            data = self.problem.data
            if data is None:
                data = self.problem.sample(t.teacher_samples, torch.Generator().manual_seed(self.seed))
            return Empirical(data, t.bandwidth, self.schedule)
        if t.teacher_run is not None:
            return reschedule(load_teacher(t.teacher_run), self.schedule)
        return None

    def _build_student(self) -> Student:
        s = self.config.student
        if s.denoises:
            times = default_times(self.schedule, s.steps_per_sample, self.data_std, s.ratio)
            with initial_weights(self.seed):
                return DenoisingMLP(
                    times, self.dimension, s.depth, s.width, s.activation, self.data_std, self.config.schedule
                )
        with initial_weights(self.seed):
            student = MLP(
                s.latent,
                self.dimension,
                s.depth,
                s.width,
                s.activation,
                self.data_std,
                fourier=s.fourier,
                linear=s.linear,
            )
        return student.start_from(self._axes()) if s.linear else student

    def _axes(self) -> PrincipalAxes:
        """The principal axes of a sample of the problem, as large as a teacher's, one for every latent."""
        latent = self.config.student.latent
        if latent > self.dimension:
            raise UsageError(
                f"a linear start takes at most {self.dimension} latents on {self.problem.name}: set latent "
                f"{self.dimension} or smaller, or linear false (--no-linear) for a start from random weights"
            )
        rng = torch.Generator().manual_seed(self.seed)
        return principal_axes(self.problem.sample(self.config.teacher.teacher_samples, rng), latent)

    def posterior(self, family: str, **sizes: Any) -> list[Posterior]:
        """A fresh posterior of each step's latent."""
        if family not in POSTERIORS:
            raise unknown("posterior of points", family, ("prior", *POSTERIORS))
        s = self.config.student
        found = []
        for step in range(self.student.steps):
            with initial_weights(self.seed + 1 + step):
                found.append(
                    POSTERIORS[family](
                        self.dimension,
                        math.prod(self.student.latent_shape),
                        self.data_std,
                        sizes["depth"],
                        sizes["width"] or POSTERIOR_WIDTH,
                        axes=self._axes() if s.linear and not s.denoises else None,
                        activation=sizes["activation"],
                        mixed=self.mixed,
                    )
                )
        return list(found)

    def critic(self, start: str, **sizes: Any) -> Denoiser:
        """A perceptron denoiser, or a copy of a learned teacher."""
        if start == "fresh":
            fit = PointsTeachConfig(
                depth=sizes["depth"], width=sizes["width"], schedule=self.config.schedule, seed=self.seed + 1
            )
            return build_network_denoiser(fit, self.problem, mixed=self.mixed)
        teacher = self.teacher
        if not isinstance(teacher, nn.Module) or next(teacher.parameters(), None) is None:
            raise UsageError("an exact teacher has no weights that a critic could start from: use critic_start fresh")
        if sizes["rank"]:
            raise UsageError("critics of points have no adapters: leave out critic_rank")
        return cast(Denoiser, deepcopy(teacher))

    def space(self, name: str) -> Callable[[Tensor, Tensor], Tensor] | None:
        """None: distances are taken between the points themselves."""
        if name != "data":
            raise UsageError(f"points have no features, so VarFlow's space must be data, but is {name}")
        return None

    def real(self, source: Literal["teacher", "data"], n: int, steps: int) -> Samples:
        """A teacher that is a distribution (a mixture, a data set) is drawn from; a network's sampler fills a set."""
        if source == "data":
            return self.problem.sample
        assert self.teacher is not None
        if isinstance(self.teacher, GaussianMixture):
            return self.teacher.sample
        rng = torch.Generator().manual_seed(self.seed + 2)
        return teacher_samples(self.teacher, self.problem.data_shape, n, rng, steps)

    def metrics(self, objective: Objective) -> Evaluate:
        """Samples against the problem, and the student's divergence from the teacher.

        The samples are the averaged student's; divergence, bound and critic are those of the student in training,
        whose auxiliary networks they are.
        """
        teacher_error: dict[str, float] = {}
        student, seed = self.student, self.seed
        exact = deepcopy(self.problem.denoiser)  # moves to where the student is

        def measure(average: Student) -> dict[str, float]:
            samples = average.sample(self.training.eval_samples, seed=seed + 1).cpu()
            rng = torch.Generator().manual_seed(seed + 2)
            table: dict[str, float] = dict(evaluate(samples, self.problem, rng, p_value=False))
            device = next(student.parameters()).device
            if not teacher_error and self.config.teacher.teacher != "true" and exact is not None:
                assert objective.teacher is not None
                errors = teacher_errors(objective.teacher, self.problem, device)["relative_score_error"]
                teacher_error["teacher_error"] = sum(errors) / len(errors)
            rng = torch.Generator(device).manual_seed(seed + 3)
            return table | teacher_error | student_divergence(objective, student, exact, rng, self.training)

        return measure

    def finish(self, student: Student, objective: Objective) -> Finished:
        """Samples, final metrics and, where densities are exact, the bound's gap."""
        n, seed = self.training.eval_samples, self.seed
        samples = student.sample(n, seed=seed + 1).cpu()
        gap = final_gap(objective, self.student, self.training)
        extras = {} if gap is None else {"bound.json": gap}
        return Finished({"samples": samples}, self._table(samples, seed + 3), extras)

    def evaluate(self, student: Student, n: int, seed: int) -> dict[str, Any]:
        """Metrics of n samples against the problem."""
        return self._table(student.sample(n, seed=seed).cpu(), seed + 1)

    def _table(self, samples: Tensor, seed: int) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(seed)
        return {**evaluate(samples, self.problem, rng), "samples": len(samples)}

    def beside(self) -> dict[str, dict[str, float]]:
        """Nothing: what a perfect student scores is known, see `reports.verdict`."""
        return {}

    def load_student(self, path: Path) -> Student:
        """A saved student of points."""
        return load_student(path, DenoisingMLP if self.config.student.denoises else MLP)


def has_quadrature(student: Student) -> bool:
    """Whether the student's noisy density can be integrated over its latents: few of them, and one step."""
    return student.steps == 1 and math.prod(student.latent_shape) <= LARGEST_LATENT


def student_divergence(
    objective: Objective,
    student: Student,
    truth: GaussianMixture | None,
    rng: torch.Generator,
    training: TrainingConfig,
) -> dict[str, float]:
    """The diffusive KL over `GAP_RATIOS`, from the objective's bound where it has one, and what a critic adds to it.

    For a teacher that is no density, its critic is still measured; without a teacher the truth stands in for it.
    """
    if not has_quadrature(student):
        return {}
    teacher: Denoiser | None = objective.teacher
    if teacher is None and truth is not None:
        teacher = truth.to(next(student.parameters()).device)
    table: dict[str, float] = {}
    for part in objective.parts:
        if isinstance(part, VarDiU) and part.has_bound:
            gap = bound_gap(part, student, GAP_RATIOS, rng, nodes=128, **bound_batches(part, training))
            table |= {name: float(getattr(gap, name).mean()) for name in ("diu", "dikl", "gap")}
        elif isinstance(part, ScoreDistillation) and part.tells_score:
            bias = critic_bias(part, student, GAP_RATIOS, rng, draws(training), nodes=128)
            table |= {"critic_error": float(bias.critic_error.mean()), "gradient_bias": float(bias.gradient_bias)}
    if "dikl" not in table and isinstance(teacher, DensityDenoiser):
        table["dikl"] = float(diffusive_kl(teacher, student, GAP_RATIOS, rng, draws(training), nodes=128).mean())
    return table


def draws(training: TrainingConfig) -> int:
    """At each noise level."""
    return min(DRAWS, training.eval_samples)


def bound_batches(objective: VarDiU, training: TrainingConfig) -> dict[str, int]:
    """Size and number of the batches of so many draws, at least: the run's own batches where they are candidates."""
    n = max(2, training.batch)
    if objective.candidates == "batch":
        return {"n": n, "batches": math.ceil(draws(training) / n)}
    return {"n": max(n, draws(training))}


def final_gap(objective: Objective, student: Student, training: TrainingConfig) -> dict[str, list[float]] | None:
    """DiU, DiKL and their gap at `BOUND_RATIOS`, where densities are exact."""
    for part in objective.parts:
        if has_quadrature(student) and isinstance(part, VarDiU) and part.has_bound:
            rng = torch.Generator(next(student.parameters()).device).manual_seed(0)
            gap = bound_gap(part, student, BOUND_RATIOS, rng, **bound_batches(part, training))
            return {f.name: getattr(gap, f.name).tolist() for f in dataclasses.fields(gap)}
    return None
