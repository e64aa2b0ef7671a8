"""From a configuration to its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vardistill import posteriors
from vardistill.config import Config, LevelsConfig, TeachConfig
from vardistill.denoisers import Denoiser, Empirical, Preconditioned
from vardistill.generators import MLP
from vardistill.networks import LevelMLP
from vardistill.noise_levels import NoiseLevels, named_weight
from vardistill.objectives import VarDiU
from vardistill.problems import PROBLEMS, Problem
from vardistill.schedules import SCHEDULES, Schedule

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


def build_empirical(config: Config, problem: Problem) -> Empirical:
    """The exact denoiser of a sample of the problem."""
    rng = torch.Generator().manual_seed(config.training.seed)
    data = problem.sample(config.teacher.teacher_samples, rng)
    return Empirical(data, config.teacher.bandwidth, build_schedule(config.levels.schedule))


def build_network_denoiser(config: TeachConfig, problem: Problem) -> Preconditioned:
    """An untrained network denoiser for the problem."""
    (data,) = problem.data_shape
    with initial_weights(config.seed):
        network = LevelMLP(data, data, config.depth, config.width)
    return Preconditioned(network, problem.data_std, build_schedule(config.schedule))


def build_generator(config: Config, problem: Problem) -> MLP:
    """An untrained generator for the problem."""
    (data,) = problem.data_shape
    g = config.generator
    with initial_weights(config.training.seed):
        return MLP(g.latent, data, g.depth, g.width, g.activation, problem.data_std, fourier=g.fourier)


def build_objective(config: Config, problem: Problem, teacher: Denoiser) -> VarDiU:
    """The objective, with untrained auxiliary networks."""
    o = config.objective
    posterior: posteriors.Posterior = posteriors.Prior()
    if o.posterior != "prior":
        (data,) = problem.data_shape
        with initial_weights(config.training.seed + 1):
            posterior = POSTERIORS[o.posterior](
                data, config.generator.latent, problem.data_std, o.posterior_depth, o.posterior_width
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


def build_levels(config: LevelsConfig, problem: Problem) -> NoiseLevels:
    """How steps draw their noise."""
    sigma_max = getattr(config.distribution, "sigma_max", 1.0)
    weight = named_weight(config.weight, problem.data_std, sigma_max)
    schedule = build_schedule(config.schedule)
    return NoiseLevels(schedule, config.distribution, weight, config.draws, config.antithetic, config.stratified)
