"""From a configuration to its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn

from vardistill.posteriors import few as posteriors
from vardistill.runs.config import (
    Config,
    DiffInstructConfig,
    LevelsConfig,
    NoiseConfig,
    TeachConfig,
    VarDiUConfig,
    VarDiUVarFlowConfig,
    VarFlowConfig,
)
from vardistill.training.data import Samples, teacher_samples
from vardistill.denoisers import Empirical, GaussianMixture, Preconditioned
from vardistill.diffusion.denoiser import Denoiser
from vardistill.errors import UsageError
from vardistill.students.perceptron import MLP
from vardistill.networks import LevelMLP
from vardistill.diffusion.noise import NoiseLevels, named_weight
from vardistill.objectives import DiffInstruct, Objective, Part, VarDiU, VarFlow, WeightedSum
from vardistill.students.axes import PrincipalAxes, principal_axes
from vardistill.domains.points.problems import PROBLEMS, Problem
from vardistill.diffusion.schedules import SCHEDULES, Schedule

POSTERIORS = {
    "diagonal": posteriors.DiagonalGaussian,
    "full": posteriors.FullGaussian,
    "mixture": posteriors.MixtureOfGaussians,
    "nsf": posteriors.NeuralSplineFlow,
}
"""The learned posteriors, by name."""


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Networks built inside draw their initial weights from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_schedule(name: str) -> Schedule:
    """The schedule of this name, with its defaults."""
    return SCHEDULES[name]()


def build_problem(name: str, schedule: str) -> Problem:
    """The problem of this name, its exact teacher under this schedule."""
    return PROBLEMS[name](build_schedule(schedule))


def build_exact(problem: Problem) -> Denoiser:
    """The problem's exact denoiser; raises UsageError where it has none."""
    if problem.denoiser is None:
        raise UsageError(f"{problem.name} has no exact teacher: choose an empirical or a learned one")
    return problem.denoiser


def build_empirical(config: Config, problem: Problem) -> Empirical:
    """The exact denoiser of a sample of the problem."""
    data = problem.data
    if data is None:
        rng = torch.Generator().manual_seed(config.training.seed)
        data = problem.sample(config.teacher.teacher_samples, rng)
    return Empirical(data, config.teacher.bandwidth, build_schedule(config.levels.schedule))


def build_network_denoiser(config: TeachConfig, problem: Problem, mixed: bool = False) -> Preconditioned:
    """An untrained network denoiser for the problem; `mixed`: its hidden layers in bfloat16."""
    (data,) = problem.data_shape
    with initial_weights(config.seed):
        network = LevelMLP(data, data, config.depth, config.width, mixed=mixed)
    return Preconditioned(network, problem.data_std, build_schedule(config.schedule))


def build_generator(config: Config, problem: Problem) -> MLP:
    """An untrained generator for the problem."""
    (data,) = problem.data_shape
    g = config.generator
    with initial_weights(config.training.seed):
        generator = MLP(
            g.latent, data, g.depth, g.width, g.activation, problem.data_std, fourier=g.fourier, linear=g.linear
        )
    return generator.start_from(build_axes(config, problem)) if g.linear else generator


def build_axes(config: Config, problem: Problem) -> PrincipalAxes:
    """The principal axes of a sample of the problem, as large as a teacher's, one for every latent."""
    (data,) = problem.data_shape
    if config.generator.latent > data:
        raise UsageError(
            f"a linear start takes at most {data} latents on {problem.name}: set latent {data} or smaller, or linear "
            "false (--no-linear) for a start from random weights"
        )
    rng = torch.Generator().manual_seed(config.training.seed)
    return principal_axes(problem.sample(config.teacher.teacher_samples, rng), config.generator.latent)


def takes_teacher(config: Config) -> bool:
    """Whether the objective has a teacher: VarFlow from the problem's data has none."""
    return not (isinstance(config.objective, VarFlowConfig) and config.objective.real == "data")


def build_objective(config: Config, problem: Problem, teacher: Denoiser | None) -> Objective:
    """The objective, with untrained auxiliary networks; the teacher is None where it takes none."""
    o = config.objective
    if isinstance(o, VarFlowConfig):
        return build_varflow(o, teacher)
    assert teacher is not None
    if isinstance(o, DiffInstructConfig):
        return build_diff_instruct(o, config, problem, teacher)
    if isinstance(o, VarDiUVarFlowConfig):
        levels = replace(
            config.levels, weight=o.varflow_level_weight, shared=o.varflow_shared, draws=1, antithetic=False
        )
        own = build_levels(levels, problem)
        weight = Geometric(o.varflow_weight, o.varflow_weight_end)
        vardiu, varflow = build_vardiu(o.vardiu, config, problem, teacher), build_varflow(o.varflow, teacher)
        return WeightedSum([Part(vardiu), Part(varflow, weight, own)])
    return build_vardiu(o, config, problem, teacher)


def build_vardiu(o: VarDiUConfig, config: Config, problem: Problem, teacher: Denoiser) -> VarDiU:
    """VarDiU, with an untrained posterior."""
    posterior: posteriors.Posterior = posteriors.Prior()
    if o.posterior != "prior":
        (data,) = problem.data_shape
        with initial_weights(config.training.seed + 1):
            posterior = POSTERIORS[o.posterior](
                data,
                config.generator.latent,
                problem.data_std,
                o.posterior_depth,
                o.posterior_width,
                axes=build_axes(config, problem) if config.generator.linear else None,
                activation=o.posterior_activation,
                mixed=config.training.precision == "bf16",
            )
    return VarDiU(
        teacher,
        posterior,
        candidates=o.candidates,
        control_variate=o.control_variate,
        sigma_data=problem.data_std,
        posterior_steps=o.posterior_steps,
        pool=o.pool,
    )


def build_varflow(o: VarFlowConfig, teacher: Denoiser | None) -> VarFlow:
    """VarFlow; it knows the teacher only as whose samples it may compare with."""
    return VarFlow(o.beta, o.cross, teacher=teacher)


def build_diff_instruct(o: DiffInstructConfig, config: Config, problem: Problem, teacher: Denoiser) -> DiffInstruct:
    """Diff-Instruct, with a fresh critic or a copy of the teacher."""
    if o.critic_start == "teacher":
        if not isinstance(teacher, nn.Module) or next(teacher.parameters(), None) is None:
            raise UsageError("an exact teacher has no weights that a critic could start from: use critic_start fresh")
        critic: Denoiser = deepcopy(teacher)
    else:
        fit = TeachConfig(depth=o.critic_depth, width=o.critic_width, schedule=config.levels.schedule,
                          seed=config.training.seed + 1)  # fmt: skip
        critic = build_network_denoiser(fit, problem, mixed=config.training.precision == "bf16")
    return DiffInstruct(teacher, critic, o.critic_steps, sigma_data=problem.data_std)


@dataclass(frozen=True)
class Geometric:
    """start^(1−p) · end^p at progress p."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        return float(self.start ** (1 - progress) * self.end**progress)


def build_real_samples(config: Config, problem: Problem, teacher: Denoiser | None) -> Samples | None:
    """Where the objective's real samples come from, or None for one that needs none.

    A teacher that is a distribution (a mixture, a data set) is drawn from; a network's own sampler fills a stored set.
    """
    o = config.objective.varflow if isinstance(config.objective, VarDiUVarFlowConfig) else config.objective
    if not isinstance(o, VarFlowConfig):
        return None
    if o.real == "data":
        return problem.sample
    assert teacher is not None
    if isinstance(teacher, GaussianMixture):
        return teacher.sample
    rng = torch.Generator().manual_seed(config.training.seed + 2)
    return teacher_samples(teacher, problem.data_shape, o.real_samples, rng, o.real_steps)


def build_levels(config: LevelsConfig, problem: Problem) -> NoiseLevels:
    """How steps draw their noise."""
    return build_noise(config, build_schedule(config.schedule), problem.data_std)


def build_noise(config: NoiseConfig, schedule: Schedule, data_std: float) -> NoiseLevels:
    """How steps draw their noise, under this schedule."""
    sigma_max = getattr(config.distribution, "sigma_max", 1.0)
    weight = named_weight(config.weight, data_std, sigma_max)
    return NoiseLevels(
        schedule,
        config.distribution,
        weight,
        config.draws,
        config.antithetic,
        config.stratified,
        config.shared,
    )
