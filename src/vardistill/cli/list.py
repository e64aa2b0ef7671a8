"""`vardistill list`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from typing import Any

from vardistill.bench.named import BENCHES
from vardistill.cli.arguments import parse
from vardistill.cli.main import entries
from vardistill.diffusion.config import LevelsConfig
from vardistill.diffusion.levels import EDM, LogNormal, PowerLaw, UniformTime
from vardistill.domains.points.config import PerceptronConfig, PointsConfig, TeacherConfig
from vardistill.objectives.adm import ADMConfig
from vardistill.objectives.base import RealConfig
from vardistill.objectives.critic import AdversarialConfig, CriticConfig
from vardistill.objectives.ladd import LADDConfig
from vardistill.objectives.registry import OBJECTIVES
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.progress import columns
from vardistill.runs.presets import AT_SIZE, PICTURE_SETS, PICTURES, POINT_TARGETS, POINTS, TEACHERS, TEXT
from vardistill.training.config_files import kind_of
from vardistill.training.warning_signs import RULES


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Presets, benches, objectives, problems, teachers, posteriors."""


def main(arguments: list[str]) -> int:
    """Print the names."""
    parse(Arguments, arguments, "list", "What there is to choose from.")
    described = {
        presets_of("points", POINT_TARGETS): {name: recipe.about for name, recipe in POINTS.items()},
        presets_of("pictures", PICTURE_SETS): {name: recipe.about for name, recipe in PICTURES.items()},
        presets_of("text to image", ["text", "shapes"]): {name: recipe.about for name, recipe in TEXT.items()},
        "presets of models at their size": {name: recipe.about for name, recipe in AT_SIZE.items()},
        "teacher presets": {name: preset.about for name, preset in TEACHERS.items()},
        "objectives, or FILE.py:CLASS of your own, and evaluations of networks in a step, for each latent, at the "
        "defaults": {name: needs_of(kind) for name, kind in OBJECTIVES.items()},
        "benches": {name: bench.about for name, bench in BENCHES.items()},
    }
    for title, abouts in described.items():
        print(textwrap.fill(f"{title}:", columns()))
        print("\n".join(entries(abouts)))
    choices: dict[str, Any] = {
        "problems": _options(PointsConfig, "problem"),
        "teachers of points": _options(TeacherConfig, "teacher"),
        "posteriors": _options(VarDiUConfig, "posterior"),
        "spaces of VarFlow's distances": _options(VarFlowConfig, "space"),
        "control variates": _options(VarDiUConfig, "control_variate"),
        "schedules": _options(PointsConfig, "schedule"),
        "level distributions (in a configuration file)": [
            kind_of(kind) for kind in (LogNormal, PowerLaw, EDM, UniformTime)
        ],
        "weights": _options(LevelsConfig, "weight"),
        "activations": _options(PerceptronConfig, "activation"),
        "warning signs": list(dict.fromkeys(rule.name for rule in RULES)),
    }
    for title, names in choices.items():
        told = f"{title}: {', '.join(names)}"
        print(textwrap.fill(told, columns(), subsequent_indent="  ", break_on_hyphens=False))
    return 0


def needs_of(kind: type[Any]) -> str:
    """What an objective has to be given, by what its configuration is, and what a step costs."""
    of_teacher = issubclass(kind, LADDConfig | ADMConfig)
    teacher = "a teacher or data" if hasattr(kind, "takes_teacher") else "a teacher"
    extras = {
        "real samples (the teacher's own or data)": issubclass(kind, RealConfig),
        "a critic": issubclass(kind, CriticConfig),
        "a discriminator on the critic": issubclass(kind, AdversarialConfig),
        "a discriminator on the teacher": of_teacher,
    }
    named = "a teacher that is a network" if of_teacher else teacher
    needed = ", ".join([named, *(name for name, needed in extras.items() if needed)])
    return f"needs {needed}; {kind.cost} evaluation{'s' if kind.cost > 1 else ''} a step"


def presets_of(domain: str, targets: typing.Iterable[str]) -> str:
    """The heading of a domain's recipes."""
    return f"presets of {domain}, TARGET-NAME with TARGET one of {', '.join(targets)}"


def _options(cls: type, field: str) -> list[str]:
    return list(typing.get_args(typing.get_type_hints(cls)[field]))
