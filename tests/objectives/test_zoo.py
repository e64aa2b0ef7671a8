"""Every objective of a teacher: a batch in parts is the whole one, and a wrong part is told in a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import small_runs
from vardistill.denoisers import GaussianMixture, Preconditioned
from vardistill.denoisers.of_mixtures import OfMixtures
from vardistill.diffusion.noise import Draw
from vardistill.diffusion.schedules import VE
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP
from vardistill.objectives import (
    ADM,
    DMD,
    DMD2,
    EMD,
    LADD,
    SDS,
    SMD,
    SMT,
    ADMConfig,
    EMDConfig,
    FDistill,
    Head,
    LADDConfig,
    MomentMatching,
    Objective,
    SiD,
    SiDA,
    SiDAConfig,
    SiM,
    SMDConfig,
    VarDiU,
    VarDiUConfig,
)
from vardistill.objectives.ladd import ADDConfig
from vardistill.posteriors import Prior
from vardistill.training.loop import Trainer

WIDTH = 8


def network(seed: int) -> Preconditioned:
    torch.manual_seed(seed)
    return Preconditioned(LevelMLP(2, 2, depth=2, width=WIDTH), 2.0, VE()).double()


def head() -> Head:
    return Head(WIDTH, width=4).double()


def of_mixtures() -> OfMixtures:
    return OfMixtures(network(2), WIDTH, width=4).double()


ZOO: dict[str, Callable[[], Objective]] = {
    "sds": lambda: SDS(network(1)),
    "dmd": lambda: DMD(network(1), network(2)),
    "dmd2": lambda: DMD2(network(1), network(2), head(), 2),
    "f-distill": lambda: FDistill(network(1), network(2), head(), 2),
    "smd": lambda: SMD(network(1), network(2), head(), 2),
    "smt": lambda: SMT(of_mixtures(), head(), 2),
    "sid": lambda: SiD(network(1), network(2)),
    "sida": lambda: SiDA(network(1), network(2)),
    "sim": lambda: SiM(network(1), network(2)),
    "moment-matching": lambda: MomentMatching(network(1), network(2)),
    "emd": lambda: EMD(network(1), network(2), chain_length=2, latent_step=0.0),
    "emd in latents": lambda: EMD(network(1), network(2), chain_length=2, latent_step=0.1),
    "ladd": lambda: LADD(network(1), head()),
    "add": lambda: LADD(network(1), head(), loss=ADDConfig.loss, r1=ADDConfig.r1, distillation=ADDConfig.distillation),
    "adm": lambda: ADM(network(1), network(2), head()),
}

every_objective = pytest.mark.parametrize("name", ZOO)


def trainer(objective: Objective, of_student: int, **options: Any) -> Trainer:
    """Of a student of so many steps."""
    student = small_runs.few_steps(of_student) if of_student > 1 else small_runs.generator()
    return Trainer(student, objective, small_runs.levels(), small_runs.config(**options), data=small_runs.data())


@every_objective
def test_a_batch_in_parts_is_the_whole_batch(name: str) -> None:
    whole, parted = (trainer(ZOO[name](), 1, accumulate=n, steps=3) for n in (1, 2))
    for job in (whole, parted):
        job.run()
    for p, q in zip(whole.student.parameters(), parted.student.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["smd", "emd"])
def test_a_draw_without_what_is_needed_is_refused(name: str) -> None:
    job = trainer(ZOO[name](), 1)
    drawn = job.draw(job.objective.updates()[-1], 0.0, 0)._replace(eta=None)
    u = drawn.z
    draw: Draw = drawn.complete(job.student, u, job.generate(u, 1, {}), job.generate)
    with pytest.raises(UsageError, match="needs? (a|as many) further latent"):
        job.objective.generator_loss(draw)


def test_latents_of_a_later_step_have_no_known_law() -> None:
    with pytest.raises(UsageError, match="set latent_step 0"):
        trainer(EMD(network(1), network(2), latent_step=0.1), 3)
    with pytest.raises(UsageError, match="and chains, need the latents' prior density"):
        trainer(VarDiU(small_runs.teacher(), Prior(), candidates="chain"), 3)


def test_a_discriminator_needs_a_network() -> None:
    exact = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), std=1.0, schedule=VE())
    with pytest.raises(UsageError, match="needs a learned denoiser"):
        trainer(LADD(exact, head()), 1)
    with pytest.raises(UsageError, match="needs a learned denoiser"):
        ADM(exact, network(2), head())
    with pytest.raises(UsageError, match="needs a learned denoiser"):
        SiDA(network(1), exact)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: EMDConfig(chain_length=0), "chain_length"),
        (lambda: EMDConfig(noise_step=1.0), "noise_step"),
        (lambda: EMDConfig(latent_step=-1.0), "latent_step"),
        (lambda: ADMConfig(shrink=1.0), "shrink"),
        (lambda: LADDConfig(r1=-1.0), "r1"),
        (lambda: LADDConfig(head_steps=0), "head_steps"),
        (lambda: SMDConfig(generator_gan=-1.0), "generator_gan"),
        (lambda: SiDAConfig(critic_gan=float("nan")), "critic_gan"),
        (lambda: VarDiUConfig(candidates="chain", chain_rate=0.0), "chain_rate"),
        (lambda: VarDiU(small_runs.teacher(), Prior(), candidates="chain", chain_length=0), "chain_length"),
        (lambda: VarDiU(small_runs.teacher(), Prior(), candidates="chain", chain_rate=0.0), "chain_rate"),
    ],
)
def test_numbers_out_of_range_are_told(make: Callable[[], object], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make()
