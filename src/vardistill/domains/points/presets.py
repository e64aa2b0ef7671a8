"""Named configurations, as the command line offers them. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from vardistill.diffusion.levels import LogNormal, PowerLaw
from vardistill.runs.config import (
    Config,
    DiffInstructConfig,
    GeneratorConfig,
    LevelsConfig,
    ProblemName,
    TeachConfig,
    TrainingConfig,
    VarDiUConfig,
    VarDiUVarFlowConfig,
    VarFlowConfig,
)

PosteriorName = Literal["diagonal", "full", "mixture", "nsf"]
"""The learned posteriors."""

C = TypeVar("C", covariant=True)


@dataclass(frozen=True)
class Preset(Generic[C]):
    """A configuration and what it is for."""

    about: str
    config: C


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

HIGH_BATCH = 256
"""Latents per step above two dimensions, where networks see more and steps cost more."""


def adapted(config: Config, problem: ProblemName) -> Config:
    """A configuration for MoG-40 with its noise levels in proportion to another problem's scales.

    Above two dimensions the student has a latent for every one, always starts as a linear map and has no Fourier
    features; batches are smaller, their groups as large as before.
    """
    scale, reference = SCALES[problem], SCALES["mog40"]
    large, small = scale.blurring / reference.blurring, scale.finest / reference.finest
    levels, generator, objective, training = config.levels, config.generator, config.objective, config.training
    if isinstance(levels.distribution, LogNormal):
        moved = replace(
            levels.distribution,
            base_start=levels.distribution.base_start * large,
            base_end=levels.distribution.base_end * small,
            sigma_min=levels.distribution.sigma_min * small,
            broad_min=levels.distribution.broad_min * small,
            broad_max=levels.distribution.broad_max * large,
        )
        levels = replace(levels, distribution=moved)
    if isinstance(levels.distribution, PowerLaw):
        smallest, largest = levels.distribution.sigma_min * small, levels.distribution.sigma_max * large
        levels = replace(levels, distribution=replace(levels.distribution, sigma_min=smallest, sigma_max=largest))
    if scale.dimension > 2:
        generator = replace(generator, latent=scale.dimension, linear=True, fourier=0)
        levels = replace(levels, shared=rescaled(levels.shared, training.batch))
        if isinstance(objective, VarDiUVarFlowConfig):
            objective = replace(objective, varflow_shared=rescaled(objective.varflow_shared, training.batch))
        training = replace(training, batch=HIGH_BATCH)
    return Config(problem, config.teacher, generator, objective, levels, training)


def rescaled(shared: int, batch: int) -> int:
    """Shared levels of a smaller batch whose groups are as large as before: at least one, 0 for none."""
    return max(1, shared * HIGH_BATCH // batch) if shared else 0


def teacher_fit(problem: ProblemName) -> TeachConfig:
    """A perceptron denoiser, its noise levels around the problem's finest structure."""
    base = 1.15 * SCALES[problem].finest
    return TeachConfig(problem=problem, distribution=LogNormal(base_start=base, base_end=base, spread=1.4))


def teacher_fit_of(config: Config) -> TeachConfig:
    """The fit of the learned teacher that a run asks for: with its data, schedule, seed and device."""
    return replace(
        teacher_fit(config.problem),
        samples=config.teacher.teacher_samples,
        schedule=config.levels.schedule,
        seed=config.training.seed,
        device=config.training.device,
    )


MOG40_LEVELS = LogNormal(base_start=15.0, base_end=0.5, broad=0.8, broad_min=0.4, broad_max=15.0)

MOG40 = Config(
    generator=GeneratorConfig(depth=4, width=192, activation="relu", fourier=32, linear=True),
    objective=VarDiUConfig(posterior="prior", candidates="batch", pool=2048),
    levels=LevelsConfig(distribution=MOG40_LEVELS, weight="sigma2_linear", stratified=True),
    training=TrainingConfig(
        steps=27_000,
        batch=1024,
        lr=2e-3,
        precision="bf16",
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


def learned_posterior(posterior: PosteriorName, candidates: int = 0) -> Config:
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

VARDIU_VARFLOW = replace(
    DEMO,
    objective=VarDiUVarFlowConfig(
        vardiu=VarDiUConfig(posterior="prior", candidates="batch"), varflow_weight=0.3, varflow_weight_end=0.03
    ),
)


def learned_posterior_varflow(posterior: PosteriorName) -> Config:
    """`learned_posterior` with VarFlow beside it, first above it: in many dimensions VarDiU alone loses modes."""
    base = learned_posterior(posterior)
    assert isinstance(base.objective, VarDiUConfig)
    objective = VarDiUVarFlowConfig(
        vardiu=base.objective, varflow_weight=30.0, varflow_weight_end=3.0, varflow_shared=8
    )
    return replace(base, objective=objective)


def diff_instruct(critic_steps: int) -> Config:
    """MoG-40 with a learned critic."""
    return replace(
        MOG40,
        objective=DiffInstructConfig(critic_steps=critic_steps, critic_width=192),
        training=replace(MOG40.training, steps=30_000, batch=512, lr=4e-3, auxiliary_lr=8e-3),
    )


PRESETS = {
    "mog40-vardiu": Preset("MoG-40, multi-sample VarDiU with candidates from the prior; the default", MOG40),
    "mog40-vardiu-demo": Preset("the same with fewer candidates and steps: a first result in minutes", DEMO),
    "mog40-vardiu-gaussian": Preset(
        "MoG-40, VarDiU with a learned full-covariance Gaussian posterior", learned_posterior("full")
    ),
    "mog40-vardiu-nsf": Preset("MoG-40, VarDiU with a neural spline flow posterior", learned_posterior("nsf")),
    "mog40-varflow": Preset("MoG-40, VarFlow: the energy distance between noisy marginals", VARFLOW),
    "mog40-vardiu-varflow": Preset("MoG-40, VarDiU + λ·VarFlow", VARDIU_VARFLOW),
    "mog40-vardiu-gaussian-varflow": Preset(
        "MoG-40, VarDiU with a full-covariance Gaussian posterior + λ·VarFlow; for data of many dimensions",
        learned_posterior_varflow("full"),
    ),
    "mog40-diff-instruct": Preset("MoG-40, Diff-Instruct with 5 critic steps", diff_instruct(5)),
    "mog40-vardiu-paper": Preset(
        "MoG-40, VarDiU with the reference's settings; initial weights and input scaling are ours (1,000,000 steps)",
        Config(
            generator=GeneratorConfig(depth=4, width=400),
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
                clip=10.0,
                ema=0.0,
                checkpoint_every=10_000,
            ),
        ),
    ),
}

TEACHERS: dict[str, Preset[TeachConfig]] = {
    name: Preset(f"{name}, a perceptron fitted to its data", teacher_fit(name)) for name in SCALES
}
