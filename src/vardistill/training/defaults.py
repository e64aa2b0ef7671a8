"""What `distill` takes where it is told a teacher and a generator alone, from the tables in docs/results.md."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from vardistill.denoisers import unguided
from vardistill.diffusion.denoiser import Denoiser, DensityDenoiser, require_denoiser
from vardistill.diffusion.levels import LogNormal
from vardistill.diffusion.noise import NoiseLevels
from vardistill.diffusion.schedules import VE, Schedule, check_schedule
from vardistill.diffusion.weights import named_weight
from vardistill.errors import UsageError
from vardistill.objectives import DiffInstruct, Objective, VarDiU, WeightedSum
from vardistill.posteriors.few import Prior
from vardistill.students.student import Student

FEW_LATENTS = 4
"""Up to which a batch's latents are near enough to each other to be candidates."""

LEAST_LEVEL = 0.05
"""Standard deviations of the data at which noise levels end: modes of a student are not told apart below it."""

TRUSTED_LEVEL = 0.2
"""The same for an unbiased bound and a teacher that is trained: below it the bound leads the student where the
teacher's scores are wrong and its own sampler hardly goes (docs/own_model.md, learned teachers)."""


def default_objective(teacher: Denoiser, generator: Student) -> Objective:
    """For few latents multi-sample `VarDiU` with the batch's candidates; for more, `DiffInstruct` from the teacher.

    The first is the best of those that need no data on MoG-40, the second on pictures (docs/results.md). A teacher
    without parameters has no weights that a critic could start from, and no other objective holds up on every problem
    of more latents there: then there is no default. The critic of a teacher with guidance is a copy of the denoiser
    that is guided: the student's score has no guidance.

    Raises:
        UsageError: for more latents, or labels, and a teacher without parameters.
    """
    require_denoiser(teacher, "teacher")
    if math.prod(generator.latent_shape) <= FEW_LATENTS and not generator.classes:
        return VarDiU(teacher, Prior(), candidates="batch", control_variate="one")
    if not isinstance(teacher, nn.Module) or next(teacher.parameters(), None) is None:
        raise UsageError(
            f"above {FEW_LATENTS} latents, and with labels, the default needs a teacher with weights, for a critic to "
            "start from: if yours is a function around a network, give the torch module itself; else give objective=, "
            "e.g. VarFlow with data, or DiffInstruct with a critic"
        )
    critic = copy.deepcopy(unguided(teacher))
    assert isinstance(critic, nn.Module)
    if next(critic.parameters()).dtype in (torch.bfloat16, torch.float16):  # in which steps of training would be lost
        critic.float()
    return DiffInstruct(teacher, critic, sigma_data=generator.data_std)


def with_default_levels(objective: Objective, generator: Student, shared: int) -> tuple[Objective, NoiseLevels]:
    """An objective with `default_levels` for it, shared where it compares groups.

    In a sum, parts that compare groups and parts that do not want different weights: then the former get shared levels
    of their own.
    """
    dimension, start = math.prod(generator.data_shape), generator.initial_ratio
    parts = objective.parts if isinstance(objective, WeightedSum) else (objective,)
    bound = any(isinstance(part, VarDiU) and part.candidates == "batch" for part in parts)
    least = LEAST_LEVEL if not bound or isinstance(objective.teacher, DensityDenoiser) else TRUSTED_LEVEL

    def levels(shared: int) -> NoiseLevels:
        smallest = LEAST_LEVEL if shared else least
        return default_levels(objective.teacher, generator.data_std, dimension, shared, start, smallest)

    if not objective.needs.groups:
        return objective, levels(0)
    if isinstance(objective, WeightedSum) and not all(part.needs.groups for part in objective.parts):
        return objective.with_shared(levels(shared)), levels(0)
    return objective, levels(shared)


def default_levels(
    denoiser: Denoiser | None,
    data_std: float,
    dimension: int,
    shared: int = 0,
    start: float = math.inf,
    least: float = LEAST_LEVEL,
) -> NoiseLevels:
    """Half the levels anneal from √(2d) to `least` standard deviations σ_d of the data, half stay log-uniform between.

    √(2d) σ_d is what two points of the data are apart: noise of that size blurs all modes into one, in any dimension.
    A student that starts as a teacher's step from the ratio `start` is right above it, and the levels begin there.
    Shared levels are for energy distances, whose gradient is of one size at every level: their weight is 1. The
    schedule is the denoiser's, else `VE` over these levels.

    Raises:
        UsageError: for a denoiser whose schedule does not reach from 0.05 σ_d to σ_d.
    """
    largest, smallest = min(math.sqrt(2 * dimension) * data_std, start), least * data_std
    annealed = LogNormal(
        base_start=largest,
        base_end=smallest,
        sigma_min=0.02 * smallest,
        sigma_max=5 * largest,
        broad=0.5,
        broad_min=smallest,
        broad_max=largest,
    )
    schedule = VE(annealed.sigma_min, annealed.sigma_max) if denoiser is None else denoiser.schedule
    check_reach(schedule, data_std)
    weight = named_weight("one" if shared else "sigma2_linear", data_std)
    return NoiseLevels(schedule, annealed, weight, stratified=True, shared=shared)


def check_reach(schedule: Schedule, data_std: float) -> None:
    """Raise UsageError unless the schedule's ratios σ_t/α_t reach from 0.05 σ_d to σ_d."""
    check_schedule(schedule)
    alpha, sigma = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
    lowest, highest = (sigma / alpha).tolist()
    if not (lowest <= LEAST_LEVEL * data_std and data_std <= highest):
        raise UsageError(
            f"the teacher's noise-to-signal ratios go from {lowest:.3g} to {highest:.3g}, but data of standard "
            f"deviation {data_std:.3g} (the generator's data_std) need them from {LEAST_LEVEL * data_std:.3g} to "
            f"{data_std:.3g}: is data_std right? if so, give the teacher a schedule in the data's units, or levels="
        )
