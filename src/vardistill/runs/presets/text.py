"""Recipes for text to image. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vardistill.domains.text.config import TextConfig
from vardistill.objectives.registry import SumConfig
from vardistill.runs.config import Config
from vardistill.runs.presets.pictures import PICTURES

NAMES = ("diff-instruct", "varflow", "diff-instruct-varflow", "dmd", "sid", "sim")
"""Recipes for pictures that need a teacher alone, or its own samples."""


def of_prompts(config: Config) -> Config:
    """The configuration for a guided text-to-image teacher, whose own latents are the real samples."""
    return replace(config, domain=TextConfig(guidance=3.0), objective=from_teacher(config.objective))


def from_teacher(objective: Any) -> Any:
    """The objective with the teacher's own samples."""
    if isinstance(objective, SumConfig):
        return SumConfig(tuple(replace(part, objective=from_teacher(part.objective)) for part in objective.parts))
    return replace(objective, real="teacher") if hasattr(objective, "real") else objective


TEXT = {name: replace(PICTURES[name], config=of_prompts(PICTURES[name].config)) for name in NAMES}
"""Untuned: levels and rates are those of small pictures."""
