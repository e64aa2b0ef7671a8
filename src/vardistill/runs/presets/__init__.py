"""Named configurations, TARGET-RECIPE, as the command line offers them. Importing this module does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vardistill.diffusion.config import LevelsConfig
from vardistill.domains.pictures.config import PicturesConfig, fit_of
from vardistill.domains.points.config import SCALES, PointsConfig, ProblemName, TeacherConfig, teacher_fit
from vardistill.domains.text.config import TextConfig
from vardistill.domains.text.shapes.config import ShapesTeachConfig
from vardistill.errors import UsageError, unknown
from vardistill.objectives.registry import OBJECTIVES, OwnConfig, PartConfig, SumConfig
from vardistill.runs.config import Config
from vardistill.runs.own import own
from vardistill.runs.presets import pictures, points
from vardistill.runs.presets.pictures import PICTURES as PICTURES, of_data
from vardistill.runs.presets.points import POINTS as POINTS, adapted as adapted
from vardistill.runs.presets.recipes import Recipe, grouped
from vardistill.runs.presets.text import AT_SIZE as AT_SIZE, SHAPES as SHAPES, TEXT as TEXT
from vardistill.specs import Spec, parse_sum
from vardistill.training import config_files

PICTURE_SETS: dict[str, str | None] = {"images": None, "digits": "digits", "mnist": "mnist"}
"""Targets of the recipes for pictures, and their data; `images` are those of a teacher that is given."""

POINT_TARGETS: dict[str, ProblemName] = {name: name for name in SCALES if name not in PICTURE_SETS} | {
    "digits-points": "digits"
}
"""Targets of the recipes for points, and the problem's name."""


def _presets() -> dict[str, Recipe[Config]]:
    found = {}
    for target, problem in POINT_TARGETS.items():
        for name, recipe in POINTS.items():
            config = recipe.config if problem == "mog40" else adapted(recipe.config, problem)
            found[f"{target}-{name}"] = Recipe(f"{target}, {recipe.about}", taught(config))
    for target, data in PICTURE_SETS.items():
        for name, recipe in PICTURES.items():
            about = "pictures of a teacher" if data is None else f"{target}, pictures"
            found[f"{target}-{name}"] = Recipe(f"{about}, {recipe.about}", of_data(recipe.config, data))
    for name, recipe in TEXT.items():
        found[f"text-{name}"] = Recipe(f"text to image, {recipe.about}", recipe.config)
    for name, recipe in SHAPES.items():
        found[f"shapes-{name}"] = Recipe(f"shapes, {recipe.about}", recipe.config)
    return found | AT_SIZE


def taught(config: Config) -> Config:
    """The configuration with a learned teacher where the problem, the digits as points, has no exact one."""
    domain = config.domain
    if not isinstance(domain, PointsConfig) or domain.problem != "digits":
        return config
    return replace(config, domain=replace(domain, teacher=TeacherConfig("learned")))


PRESETS = _presets()
"""Every recipe for every target."""

TEACHERS: dict[str, Recipe[Any]] = {
    "digits": Recipe("scikit-learn's 8×8 digits, a U-Net", fit_of("digits")),
    "mnist": Recipe("MNIST, a U-Net", fit_of("mnist")),
    "shapes": Recipe("captioned pictures from a formula, a whole text-to-image pipeline", ShapesTeachConfig()),
    **{
        target: Recipe(f"{problem}, a perceptron fitted to its data", teacher_fit(problem))
        for target, problem in POINT_TARGETS.items()
    },
}
"""Teachers that `vardistill teach` fits."""


def find_preset(name: str) -> Config:
    """The configuration of this name; raises UsageError for an unknown one."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name].config


RATES = (
    "lr", "auxiliary_lr", "networks", "beta1", "beta2", "weight_decay", "lr_schedule", "lr_final", "warmup",
    "head_start", "clip", "ema",
)  # fmt: skip
"""Settings of training that go with an objective wherever it is used; steps, batch and books with a whole recipe."""


def with_objective(config: Config, text: str, whole: bool = True) -> Config:
    """The configuration with another objective: NAME(key=value), or a sum of such with weights.

    Each is configured as in the domain's recipe of its name, with the options on top. Levels and training are those of
    the first one's recipe (not `whole`: of training its rates alone, as for a configuration that a user wrote); a part
    that compares groups has the same levels shared, with its options of levels on top.

    Raises:
        UsageError: for an unknown objective or option, or text that cannot be read.
    """
    domain = config.domain
    of_pictures = isinstance(domain, PicturesConfig)
    recipes: Mapping[str, Recipe[Config]] = PICTURES if of_pictures else POINTS
    if isinstance(domain, TextConfig):
        recipes = PICTURES | TEXT
    shared = pictures.SHARED if of_pictures else points.SHARED
    first, *others = specs = parse_sum(text)
    for spec in specs:
        if spec.name.endswith(".py"):
            raise UsageError(f"{spec.name} is a file: say which class of it is meant, as in {spec.name}:MineConfig")
        if ":" not in spec.name and spec.name not in OBJECTIVES:
            raise unknown("objective", spec.name, OBJECTIVES)
    base = recipes[first.name].config if first.name in recipes else config
    if isinstance(domain, PointsConfig) and domain.problem != "mog40":
        base = adapted(base, domain.problem)
    levels = config_files.from_dict(LevelsConfig, config_files.to_dict(base.levels) | _options(first, LevelsConfig))
    kept, itself = _objective(first, recipes)
    if getattr(itself, "compares_groups", False) and not levels.shared:
        levels = grouped(levels, shared)
    rates = {name: getattr(base.training, name) for name in RATES}
    training = replace(base.training, seed=config.training.seed) if whole else replace(config.training, **rates)
    if isinstance(kept, OwnConfig):  # whose networks are not those that the preset's settings are for
        training = replace(training, head_start=0.0, networks=())
    if not others and first.weight == 1 and first.weight_end is None:
        return replace(config, objective=kept, levels=levels, training=training)
    parts = [PartConfig(kept, first.weight, first.weight_end)]
    for spec in others:
        (kept, of_part), options = _objective(spec, recipes), _options(spec, LevelsConfig)
        of_levels = grouped(levels, shared) if getattr(of_part, "compares_groups", False) else levels
        changed = config_files.from_dict(LevelsConfig, config_files.to_dict(of_levels) | options)
        parts.append(PartConfig(kept, spec.weight, spec.weight_end, None if changed == levels else changed))
    return replace(config, objective=SumConfig(tuple(parts)), levels=levels, training=training)


def _objective(spec: Spec, recipes: Mapping[str, Recipe[Config]]) -> tuple[Any, Any]:
    """The objective of a term, as in its recipe with its options: what is kept of it, and itself."""
    if ":" in spec.name:
        return own(spec.name, spec.options, [f.name for f in dataclasses.fields(LevelsConfig)])
    kind = OBJECTIVES[spec.name]
    start = recipes[spec.name].config.objective if spec.name in recipes else kind()
    known = {f.name for f in dataclasses.fields(kind)} | {f.name for f in dataclasses.fields(LevelsConfig)}
    for key in spec.options:
        if key not in known:
            raise unknown(f"option of {spec.name}", key, known)
    found = config_files.from_dict(kind, config_files.to_dict(start) | _options(spec, kind), spec.name)
    return found, found


def _options(spec: Spec, kind: type) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(kind)}
    return {key: value for key, value in spec.options.items() if key in known}
