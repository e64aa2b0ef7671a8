"""Recipes for text to image. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vardistill.diffusion.config import LevelsConfig
from vardistill.diffusion.levels import UniformTime
from vardistill.domains.pictures.config import NetworkStudentConfig
from vardistill.domains.text.config import SHAPES as DATA, TextConfig
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.registry import PartConfig, SumConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.runs.config import Config
from vardistill.runs.presets.pictures import PICTURES, TRAINING
from vardistill.runs.presets.recipes import Recipe

NAMES = ("diff-instruct", "varflow", "diff-instruct-varflow", "dmd", "sid", "sim")
"""Recipes for pictures that need a teacher alone, or its own samples."""


PER_CONDITION = 4
"""Latents under a prompt, among which VarFlow takes distances: among all of a batch hardly two share one."""


def of_prompts(config: Config) -> Config:
    """The configuration for a guided text-to-image teacher, whose own latents are the real samples."""
    return replace(config, domain=TextConfig(guidance=3.0), objective=compared(config.objective, "teacher"))


def of_shapes(config: Config) -> Config:
    """The same for a teacher of `vardistill teach shapes`, which comes with captioned pictures."""
    domain, objective = TextConfig(guidance=2.0, data=DATA), compared(config.objective, "data")
    training = replace(config.training, steps=300, eval_every=100, eval_samples=300)  # some ten minutes of a processor
    return replace(config, domain=domain, objective=objective, training=training)


def compared(objective: Any, real: str) -> Any:
    """The objective with such real samples, compared under each prompt by itself."""
    if isinstance(objective, SumConfig):
        return SumConfig(tuple(replace(part, objective=compared(part.objective, real)) for part in objective.parts))
    if isinstance(objective, VarFlowConfig):
        objective = replace(objective, per_condition=PER_CONDITION)
    return replace(objective, real=real) if hasattr(objective, "real") else objective


TEXT = {name: replace(PICTURES[name], config=of_prompts(PICTURES[name].config)) for name in NAMES}
"""Untuned: levels and rates are those of small pictures."""

SHAPES = {name: replace(PICTURES[name], config=of_shapes(PICTURES[name].config)) for name in NAMES}
"""For teachers of `vardistill teach shapes`."""

MODELS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
}
"""Hub ids of the models that the paper on VarFlow distils, by the names of their presets."""

PAPER = VarFlowConfig(
    beta=1.0, cross="paired", real="teacher", real_samples=2000, real_steps=25, per_condition=PER_CONDITION
)
"""The paper's (its table 3): β = 1 and paired samples; beside it w = σ², t uniform and 16 latents at one level. Whether
they share a prompt the paper does not say; here four do, as with a prompt each the minimum would not be the data."""

RANK = 64
"""Of adapters; the paper states none."""


def at_size(teacher: str) -> Config:
    """VarFlow on a model of the paper's; rates, guidance and lengths are not the paper's, which states none."""
    student = NetworkStudentConfig(lora_rank=RANK, gradient_checkpointing=True, base_precision="bf16")
    return Config(
        domain=TextConfig(teacher=teacher, guidance=4.5, student=student),
        objective=PAPER,
        levels=LevelsConfig(distribution=UniformTime(), weight="sigma2", shared=1),
        training=replace(TRAINING, steps=10_000, batch=16, lr=1e-4, auxiliary_lr=1e-4, ema=0.999, eval_every=0),
    )


def beside_diff_instruct(config: Config) -> Config:
    """Diff-Instruct + λ·VarFlow, with a critic of adapters on the same base; λ is that of small pictures."""
    critic = DiffInstructConfig(critic_start="teacher", critic_rank=RANK)
    assert not isinstance(config.objective, SumConfig)
    parts = PartConfig(critic), PartConfig(config.objective, 6.0, 1.0, config.levels)
    return replace(config, objective=SumConfig(parts), levels=PICTURES["diff-instruct"].config.levels)


AT_SIZE = {
    f"{name}-{recipe}": Recipe(f"{about}, adapters on {source}", config)
    for name, source in MODELS.items()
    for recipe, about, config in (
        ("varflow", "VarFlow as in its paper", at_size(source)),
        ("diff-instruct-varflow", "Diff-Instruct + λ·VarFlow", beside_diff_instruct(at_size(source))),
    )
}
"""For models at their size, on an accelerator; rehearsed on tiny models of the same classes alone."""
