"""`vardistill list`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from vardistill.bench.named import BENCHES
from vardistill.cli.arguments import parse
from vardistill.cli.teach import PICTURES, POINTS
from vardistill.diffusion.levels import EDM, LogNormal, PowerLaw, UniformTime
from vardistill.diffusion.schedules import SCHEDULES
from vardistill.domains.pictures.config import ImageObjectiveConfig, ImageVarDiUConfig, ImageVarFlowConfig
from vardistill.domains.pictures.presets import IMAGE_PRESETS
from vardistill.domains.points.presets import PRESETS
from vardistill.runs.config import Config, GeneratorConfig, LevelsConfig, ObjectiveConfig, TeacherConfig, VarDiUConfig
from vardistill.training.config_files import kind_of
from vardistill.training.warning_signs import RULES


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Presets, benches, objectives, problems, teachers, posteriors."""


def main(arguments: list[str]) -> int:
    """Print the names."""
    parse(Arguments, arguments, "list", "What there is to choose from.")
    described = {
        "presets": {name: preset.about for name, preset in {**PRESETS, **IMAGE_PRESETS}.items()},
        "teacher presets": {name: preset.about for name, preset in {**PICTURES, **POINTS}.items()},
        "benches": {name: bench.about for name, bench in BENCHES.items()},
    }
    for title, abouts in described.items():
        print(f"{title}:")
        for name, about in abouts.items():
            print(f"  {name:<30}{about}")
    choices: dict[str, Any] = {
        "problems": _options(Config, "problem"),
        "objectives": [kind_of(kind) for kind in typing.get_args(typing.get_args(ObjectiveConfig)[0])],
        "teachers": _options(TeacherConfig, "teacher"),
        "posteriors": _options(VarDiUConfig, "posterior"),
        "objectives of pictures": [kind_of(kind) for kind in typing.get_args(typing.get_args(ImageObjectiveConfig)[0])],
        "posteriors of pictures": _options(ImageVarDiUConfig, "posterior"),
        "spaces of VarFlow's distances between pictures": _options(ImageVarFlowConfig, "space"),
        "control variates": _options(VarDiUConfig, "control_variate"),
        "schedules": list(SCHEDULES),
        "level distributions (in a configuration file)": [
            kind.__name__ for kind in (LogNormal, PowerLaw, EDM, UniformTime)
        ],
        "weights": _options(LevelsConfig, "weight"),
        "activations": _options(GeneratorConfig, "activation"),
        "warning signs": list(dict.fromkeys(rule.name for rule in RULES)),
    }
    for title, names in choices.items():
        print(f"{title}: {', '.join(names)}")
    return 0


def _options(cls: type, field: str) -> list[str]:
    return list(typing.get_args(typing.get_type_hints(cls)[field]))
