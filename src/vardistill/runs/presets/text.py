"""Recipes for text to image. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vardistill.domains.text.config import SHAPES as DATA, TextConfig
from vardistill.objectives.registry import SumConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.runs.config import Config
from vardistill.runs.presets.pictures import PICTURES

NAMES = ("diff-instruct", "varflow", "diff-instruct-varflow", "dmd", "sid", "sim")
"""Recipes for pictures that need a teacher alone, or its own samples."""


PER_CONDITION = 4
"""Latents under a prompt, among which VarFlow takes distances: among all of a batch hardly two share one."""


def of_prompts(config: Config) -> Config:
    """The configuration for a guided text-to-image teacher, whose own latents are the real samples."""
    return replace(config, domain=TextConfig(guidance=3.0), objective=compared(config.objective, "teacher"))


def of_shapes(config: Config) -> Config:
    """The same for a teacher of `vardistill teach shapes`, which comes with captioned pictures."""
    return replace(config, domain=TextConfig(guidance=2.0, data=DATA), objective=compared(config.objective, "data"))


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
