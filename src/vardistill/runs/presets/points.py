"""Recipes for points: what is tuned on MoG-40, and moved to other problems. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from vardistill.choices import WeightName
from vardistill.diffusion.config import LevelsConfig
from vardistill.diffusion.levels import LogNormal, PowerLaw
from vardistill.domains.points.config import SCALES, PerceptronConfig, PointsConfig, ProblemName, TeacherConfig
from vardistill.objectives.adm import ADMConfig
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.dmd import DMDConfig
from vardistill.objectives.dmd2 import DMD2Config
from vardistill.objectives.em import EMDConfig
from vardistill.objectives.f_distill import FDistillConfig
from vardistill.objectives.ladd import ADDConfig, LADDConfig
from vardistill.objectives.moment_matching import MomentMatchingConfig
from vardistill.objectives.registry import PartConfig, SumConfig
from vardistill.objectives.sds import SDSConfig
from vardistill.objectives.sid import SiDConfig
from vardistill.objectives.sida import SiDAConfig
from vardistill.objectives.sim import SiMConfig
from vardistill.objectives.smd import SMDConfig
from vardistill.objectives.smt import SMTConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.runs.config import Config
from vardistill.runs.presets.recipes import Recipe, grouped
from vardistill.training.config import TrainingConfig

LearnedPosterior = Literal["diagonal", "full", "mixture", "nsf"]
"""The learned posteriors."""

HIGH_BATCH = 256
"""Latents per step above two dimensions, where networks see more and steps cost more."""

SHARED = 8
"""Levels that the rows of VarFlow share beside another objective."""

MOG40_LEVELS = LogNormal(base_start=15.0, base_end=0.5, broad=0.8, broad_min=0.4, broad_max=15.0)

MOG40 = Config(
    domain=PointsConfig(
        student=PerceptronConfig(depth=4, width=192, activation="relu", fourier=32, linear=True),
    ),
    objective=VarDiUConfig(posterior="prior", candidates="batch", pool=2048),
    levels=LevelsConfig(distribution=MOG40_LEVELS, weight="sigma2_linear", stratified=True),
    training=TrainingConfig(
        steps=27_000,
        batch=1024,
        lr=2e-3,
        precision="auto",
        log_every=200,
        eval_every=3000,
        checkpoint_every=3000,
    ),
)

DEMO = replace(
    MOG40,
    objective=VarDiUConfig(posterior="prior", candidates="batch"),
    training=replace(MOG40.training, steps=12_000, eval_every=1500, checkpoint_every=1500),
)


def learned_posterior(posterior: LearnedPosterior, candidates: int = 0) -> Config:
    """MoG-40 with a learned posterior: antithetic pairs, and rates at which the posterior keeps up."""
    return replace(
        MOG40,
        objective=VarDiUConfig(
            posterior=posterior, candidates=candidates, posterior_width=128, posterior_activation="relu"
        ),
        levels=replace(MOG40.levels, draws=2, antithetic=True),
        training=replace(MOG40.training, steps=40_000, batch=512, lr=4e-3, auxiliary_lr=4e-3),
    )


VARFLOW_LEVELS = LogNormal(base_start=2.0, base_end=0.1, anneal=0.3)

VARFLOW = replace(
    MOG40,
    objective=VarFlowConfig(beta=0.5),
    levels=replace(MOG40.levels, distribution=VARFLOW_LEVELS, weight="one", shared=16),
    training=replace(MOG40.training, steps=20_000, lr=4e-3),
)


def with_varflow(config: Config, weight: float, weight_end: float) -> Config:
    """The configuration with λ·VarFlow beside its objective, at the same levels in groups."""
    assert not isinstance(config.objective, SumConfig)
    own = PartConfig(VarFlowConfig(), weight, weight_end, grouped(config.levels, SHARED))
    return replace(config, objective=SumConfig((PartConfig(config.objective), own)))


VARDIU_VARFLOW = with_varflow(DEMO, 0.21, 0.021)


def learned_posterior_varflow(posterior: LearnedPosterior) -> Config:
    """`learned_posterior` with VarFlow beside it, first above it: in many dimensions VarDiU alone loses modes."""
    return with_varflow(learned_posterior(posterior), 21.0, 2.1)


def diff_instruct(critic_steps: int) -> Config:
    """MoG-40 with a learned critic."""
    return replace(
        MOG40,
        objective=DiffInstructConfig(critic_steps=critic_steps, critic_width=192),
        training=replace(MOG40.training, steps=30_000, batch=512, lr=4e-3, auxiliary_lr=8e-3),
    )


def score_distillation(objective: Any, weight: WeightName = "one", lr: float = 4e-3) -> Config:
    """MoG-40 with another objective of teacher and critic, at Diff-Instruct's other rates."""
    base = diff_instruct(5)
    levels, training = replace(base.levels, weight=weight), replace(base.training, lr=lr)
    return replace(base, objective=objective, levels=levels, training=training)


def of_learned(config: Config) -> Config:
    """The configuration with a learned teacher, whose features a discriminator sees."""
    assert isinstance(config.domain, PointsConfig)
    return replace(config, domain=replace(config.domain, teacher=TeacherConfig("learned")))


CRITIC: dict[str, Any] = {"critic_steps": 5, "critic_width": 192}

PAPER = Config(
    domain=PointsConfig(student=PerceptronConfig(depth=4, width=400)),
    objective=VarDiUConfig(posterior="diagonal", posterior_width=400),
    levels=LevelsConfig(distribution=PowerLaw(), weight="sigma2_max", draws=2, antithetic=True),
    training=TrainingConfig(
        steps=1_000_000,
        batch=512,
        lr=1e-4,
        auxiliary_lr=1e-4,
        beta2=0.999,
        lr_schedule="constant",
        warmup=0.0,
        clip=5.0,  # the reference's 10 for losses that sum over two dimensions
        ema=0.0,
        checkpoint_every=10_000,
    ),
)

POINTS = {
    "vardiu": Recipe("multi-sample VarDiU with candidates from the prior", MOG40),
    "vardiu-demo": Recipe("the same with fewer candidates and steps: a first result in minutes", DEMO),
    "vardiu-gaussian": Recipe("VarDiU with a learned full-covariance Gaussian posterior", learned_posterior("full")),
    "vardiu-nsf": Recipe("VarDiU with a neural spline flow posterior", learned_posterior("nsf")),
    "varflow": Recipe("VarFlow: the energy distance between noisy marginals", VARFLOW),
    "vardiu-varflow": Recipe("VarDiU + λ·VarFlow", VARDIU_VARFLOW),
    "vardiu-gaussian-varflow": Recipe(
        "VarDiU with a full-covariance Gaussian posterior + λ·VarFlow; for data of many dimensions",
        learned_posterior_varflow("full"),
    ),
    "diff-instruct": Recipe("Diff-Instruct with 5 critic steps", diff_instruct(5)),
    "dmd": Recipe(
        "DMD's normalised score difference; --pairs adds its regression", score_distillation(DMDConfig(**CRITIC))
    ),
    "dmd2": Recipe("DMD2: the same and a discriminator on the critic", score_distillation(DMD2Config(**CRITIC))),
    "f-distill": Recipe(
        "f-distill: DMD2 with samples weighted for the forward KL", score_distillation(FDistillConfig(**CRITIC))
    ),
    "smd": Recipe("SMD: divergences to mixtures of student and data", score_distillation(SMDConfig(**CRITIC))),
    "smt": Recipe("SMT: the same without a teacher's scores", score_distillation(SMTConfig(**CRITIC))),
    "sid": Recipe(
        "SiD: the Fisher divergence, through the denoisers", score_distillation(SiDConfig(a=1.0, **CRITIC), lr=1e-3)
    ),
    "sida": Recipe(
        "SiDA: the same and a discriminator without parameters", score_distillation(SiDAConfig(**CRITIC), lr=1e-3)
    ),
    "sim": Recipe("SiM: a pseudo-Huber distance of scores", score_distillation(SiMConfig(**CRITIC), lr=1e-3)),
    "moment-matching": Recipe(
        "moment matching: a critic between student and teacher", score_distillation(MomentMatchingConfig(**CRITIC))
    ),
    "emd": Recipe(
        "EM distillation: a chain in latent and noise", score_distillation(EMDConfig(**CRITIC), "sigma2_linear")
    ),
    "ladd": Recipe(
        "LADD: a discriminator on a learned teacher's features", of_learned(score_distillation(LADDConfig()))
    ),
    "add": Recipe("ADD: the same and the teacher's error", of_learned(score_distillation(ADDConfig()))),
    "adm": Recipe(
        "ADM: a discriminator of the teacher's next step and the critic's",
        of_learned(score_distillation(ADMConfig(**CRITIC))),
    ),
    "sds": Recipe(
        "score distillation sampling: without a critic, and collapses",
        score_distillation(SDSConfig(), "sigma2_linear"),
    ),
    "vardiu-paper": Recipe(
        "VarDiU with the reference's settings; initial weights and input scaling are ours (1,000,000 steps)", PAPER
    ),
}
"""Recipes for MoG-40, which `adapted` moves to other problems."""


def adapted(config: Config, problem: ProblemName) -> Config:
    """A configuration for MoG-40 with its noise levels in proportion to another problem's scales.

    Above two dimensions the student has a latent for every one, always starts as a linear map and has no Fourier
    features; batches are smaller, their groups as large as before.
    """
    assert isinstance(config.domain, PointsConfig)
    scale, reference = SCALES[problem], SCALES["mog40"]
    large, small = scale.blurring / reference.blurring, scale.finest / reference.finest
    domain, objective, training = config.domain, config.objective, config.training
    batch = training.batch if scale.dimension > 2 else 0
    if scale.dimension > 2:
        student = replace(domain.student, latent=scale.dimension, linear=True, fourier=0)
        domain, training = replace(domain, student=student), replace(training, batch=HIGH_BATCH)
    if isinstance(objective, SumConfig):
        parts = [
            part if part.levels is None else replace(part, levels=moved(part.levels, large, small, batch))
            for part in objective.parts
        ]
        objective = SumConfig(tuple(parts))
    levels = moved(config.levels, large, small, batch)
    return Config(replace(domain, problem=problem), objective, levels, training)


def moved(levels: LevelsConfig, large: float, small: float, batch: int) -> LevelsConfig:
    """Levels with their ends so many times as large; of a batch that becomes `HIGH_BATCH`, regrouped."""
    distribution = levels.distribution
    if isinstance(distribution, LogNormal):
        distribution = replace(
            distribution,
            base_start=distribution.base_start * large,
            base_end=distribution.base_end * small,
            sigma_min=distribution.sigma_min * small,
            broad_min=distribution.broad_min * small,
            broad_max=distribution.broad_max * large,
        )
    if isinstance(distribution, PowerLaw):
        smallest, largest = distribution.sigma_min * small, distribution.sigma_max * large
        distribution = replace(distribution, sigma_min=smallest, sigma_max=largest)
    shared = max(1, levels.shared * HIGH_BATCH // batch) if batch and levels.shared else levels.shared
    return replace(levels, distribution=distribution, shared=shared)
