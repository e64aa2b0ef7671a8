"""Named configurations, as the command line offers them. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from vardistill.config import (
    Config,
    GeneratorConfig,
    LevelsConfig,
    ObjectiveConfig,
    TeachConfig,
    TrainingConfig,
)
from vardistill.levels import LogNormal, PowerLaw

C = TypeVar("C", Config, TeachConfig)


@dataclass(frozen=True)
class Preset(Generic[C]):
    """A configuration and what it is for."""

    about: str
    config: C


MOG40_LEVELS = LogNormal(base_start=15.0, base_end=0.5, broad=0.8, broad_min=0.4, broad_max=15.0)

MOG40 = Config(
    generator=GeneratorConfig(depth=4, width=192, activation="relu", fourier=32),
    objective=ObjectiveConfig(posterior="prior", candidates="batch", pool=2048),
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
    objective=replace(MOG40.objective, pool=0),
    training=replace(MOG40.training, steps=12_000, eval_every=1500, checkpoint_every=1500),
)


def learned_posterior(posterior: Literal["diagonal", "full", "mixture", "nsf"], candidates: int = 0) -> Config:
    """The default run with another posterior, which learns faster than the generator, and antithetic pairs."""
    return replace(
        MOG40,
        objective=ObjectiveConfig(posterior=posterior, candidates=candidates, posterior_steps=2),
        levels=replace(MOG40.levels, draws=2, antithetic=True),
        training=replace(MOG40.training, steps=20_000, batch=512, lr=1e-3, posterior_lr=2e-3, eval_every=1000),
    )


PRESETS = {
    "mog40-vardiu": Preset("MoG-40, multi-sample VarDiU with candidates from the prior; the default", MOG40),
    "mog40-vardiu-demo": Preset("the same with fewer candidates and steps: a first result in minutes", DEMO),
    "mog40-vardiu-gaussian": Preset(
        "MoG-40, VarDiU with a learned full-covariance Gaussian posterior", learned_posterior("full")
    ),
    "mog40-vardiu-nsf": Preset("MoG-40, VarDiU with a neural spline flow posterior", learned_posterior("nsf")),
    "mog40-vardiu-paper": Preset(
        "MoG-40, VarDiU with the reference's settings; initial weights and input scaling are ours (1,000,000 steps)",
        Config(
            generator=GeneratorConfig(depth=4, width=400),
            objective=ObjectiveConfig(posterior="diagonal", posterior_width=400),
            levels=LevelsConfig(distribution=PowerLaw(), weight="sigma2_max", draws=2, antithetic=True),
            training=TrainingConfig(
                steps=1_000_000,
                batch=512,
                lr=1e-4,
                posterior_lr=1e-4,
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

TEACHERS = {"mog40": Preset("MoG-40, a perceptron fitted to 10,000 points", TeachConfig())}
