"""Recipes for pictures. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vardistill.choices import WeightName
from vardistill.diffusion.config import LevelsConfig
from vardistill.diffusion.levels import LogNormal
from vardistill.domains.pictures.config import PicturesConfig
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

SHARED = 2
"""Levels that the rows of VarFlow share beside another objective."""

TRAINING = TrainingConfig(
    steps=1000,
    batch=64,
    lr=2e-4,
    auxiliary_lr=1e-3,
    clip=10.0,
    ema=0.995,
    log_every=50,
    eval_every=100,
    checkpoint_every=500,
    eval_samples=1000,
    precision="auto",
)

PICTURES_VARFLOW = VarFlowConfig(real="data", real_samples=2000, real_steps=18)

PICTURES_VARDIU = VarDiUConfig(posterior="diagonal", posterior_steps=4, control_variate="gaussian")

DIFF_INSTRUCT = Config(
    domain=PicturesConfig(data="digits"),
    objective=DiffInstructConfig(critic_start="teacher"),
    levels=LevelsConfig(
        distribution=LogNormal(base_start=0.6, base_end=0.3, spread=1.2), weight="sigma2", stratified=True
    ),
    training=replace(TRAINING, auxiliary_lr=4e-4),
)


def score_distillation(objective: Any, weight: WeightName = "one") -> Config:
    """Diff-Instruct's recipe with another objective of teacher and critic."""
    return replace(DIFF_INSTRUCT, objective=objective, levels=replace(DIFF_INSTRUCT.levels, weight=weight))


COPY: dict[str, Any] = {"critic_start": "teacher", "critic_steps": 1}

DATA: dict[str, Any] = {"real": "data", "real_samples": 2000, "real_steps": 18}

ADVERSARIAL = COPY | DATA

VARFLOW = replace(
    DIFF_INSTRUCT,
    objective=PICTURES_VARFLOW,
    levels=LevelsConfig(
        distribution=LogNormal(base_start=0.5, base_end=0.1, spread=1.0), weight="one", stratified=True, shared=2
    ),
    training=replace(TRAINING, batch=128),
)

VARDIU = replace(
    DIFF_INSTRUCT,
    objective=PICTURES_VARDIU,
    levels=LevelsConfig(
        distribution=LogNormal(base_start=2.0, base_end=0.3, spread=0.8), weight="sigma2", stratified=True
    ),
    training=replace(TRAINING, auxiliary_lr=2e-3, head_start=0.3),
)


def with_varflow(config: Config, weight: float, weight_end: float) -> Config:
    """The configuration with λ·VarFlow beside its objective, at the same levels in groups."""
    assert not isinstance(config.objective, SumConfig)
    own = PartConfig(PICTURES_VARFLOW, weight, weight_end, grouped(config.levels, SHARED))
    return replace(config, objective=SumConfig((PartConfig(config.objective), own)))


VARDIU_VARFLOW = with_varflow(
    replace(
        VARDIU,
        objective=replace(PICTURES_VARDIU, posterior_steps=3),
        training=replace(TRAINING, auxiliary_lr=2e-3),
    ),
    12.0,
    12.0,
)

PICTURES = {
    "vardiu": Recipe("VarDiU with a convolutional Gaussian posterior", VARDIU),
    "varflow": Recipe("VarFlow: the energy distance between noisy pictures", VARFLOW),
    "vardiu-varflow": Recipe("VarDiU + λ·VarFlow", VARDIU_VARFLOW),
    "diff-instruct": Recipe("Diff-Instruct with a critic from the teacher's weights", DIFF_INSTRUCT),
    "diff-instruct-varflow": Recipe("Diff-Instruct + λ·VarFlow", with_varflow(DIFF_INSTRUCT, 6.0, 1.0)),
    "dmd": Recipe(
        "DMD's normalised score difference; --pairs adds its regression", score_distillation(DMDConfig(**COPY))
    ),
    "dmd2": Recipe("DMD2: the same and a discriminator on the critic", score_distillation(DMD2Config(**ADVERSARIAL))),
    "f-distill": Recipe(
        "f-distill: DMD2 with samples weighted for the forward KL", score_distillation(FDistillConfig(**ADVERSARIAL))
    ),
    "smd": Recipe("SMD: divergences to mixtures of student and data", score_distillation(SMDConfig(**ADVERSARIAL))),
    "smt": Recipe("SMT: the same without the teacher's scores", score_distillation(SMTConfig(**ADVERSARIAL))),
    "sid": Recipe("SiD: the Fisher divergence, through the denoisers", score_distillation(SiDConfig(a=1.0, **COPY))),
    "sida": Recipe(
        "SiDA: the same and a discriminator without parameters", score_distillation(SiDAConfig(**ADVERSARIAL))
    ),
    "sim": Recipe("SiM: a pseudo-Huber distance of scores", score_distillation(SiMConfig(**COPY))),
    "moment-matching": Recipe(
        "moment matching: a critic between student and teacher", score_distillation(MomentMatchingConfig(**COPY))
    ),
    "emd": Recipe("EM distillation: a chain in latent and noise", score_distillation(EMDConfig(**COPY), "sigma2")),
    "ladd": Recipe("LADD: a discriminator on the teacher's features", score_distillation(LADDConfig(**DATA))),
    "add": Recipe("ADD: the same and the teacher's error", score_distillation(ADDConfig(**DATA))),
    "adm": Recipe(
        "ADM: a discriminator of the teacher's next step and the critic's", score_distillation(ADMConfig(**COPY))
    ),
    "sds": Recipe(
        "score distillation sampling: without a critic, and collapses", score_distillation(SDSConfig(), "sigma2")
    ),
}
"""Recipes for small pictures."""


def of_data(config: Config, data: str | None) -> Config:
    """The configuration for other pictures; None for those of a teacher yet to be named."""
    assert isinstance(config.domain, PicturesConfig)
    return replace(config, domain=replace(config.domain, data=data))
