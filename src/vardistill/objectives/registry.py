"""The objectives that configurations know, by name, and their sums. Importing this module does not import torch.

Every configuration has a name, in files and on the command line, and a `build` that makes the objective of what a
domain provides.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Union

import tyro

from vardistill.diffusion.config import LevelsConfig
from vardistill.errors import UsageError, require
from vardistill.objectives.adm import ADMConfig
from vardistill.objectives.base import Objective, Parts
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.dmd import DMDConfig
from vardistill.objectives.dmd2 import DMD2Config
from vardistill.objectives.em import EMDConfig
from vardistill.objectives.f_distill import FDistillConfig
from vardistill.objectives.ladd import ADDConfig, LADDConfig
from vardistill.objectives.moment_matching import MomentMatchingConfig
from vardistill.objectives.sds import SDSConfig
from vardistill.objectives.sid import SiDConfig
from vardistill.objectives.sida import SiDAConfig
from vardistill.objectives.sim import SiMConfig
from vardistill.objectives.smd import SMDConfig
from vardistill.objectives.smt import SMTConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig

if TYPE_CHECKING:
    from vardistill.objectives.weighted_sum import WeightedSum

NamedConfig = Union[  # noqa: UP007
    VarDiUConfig,
    VarFlowConfig,
    DiffInstructConfig,
    SDSConfig,
    DMDConfig,
    DMD2Config,
    FDistillConfig,
    SMDConfig,
    SMTConfig,
    SiDConfig,
    SiDAConfig,
    SiMConfig,
    MomentMatchingConfig,
    EMDConfig,
    LADDConfig,
    ADDConfig,
    ADMConfig,
]
"""An objective's configuration: a new one has its place here.

Its `cost` is how many evaluations of a network a step takes for each latent, at the defaults.
"""

OBJECTIVES: dict[str, type[Any]] = {cls.name: cls for cls in typing.get_args(NamedConfig)}
"""All of them by name."""


@dataclass(frozen=True)
class OwnConfig:
    """What a run keeps of an objective from a user's file; `runs.own` makes it and opens it.

    Raises:
        UsageError: for a source of another form.
    """

    name: ClassVar[str] = "own"
    source: str
    """FILE.py:CLASS, with the whole path."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the class."""
    takes_teacher: bool = True
    """As the class says."""
    digest: str | None = None
    """SHA-256 of the file, which a run that goes on must find again; None for any."""

    def __post_init__(self) -> None:
        require("an objective's source", self.source, bool(str(self.file) and self.title), "FILE.py:CLASS")

    def build(self, parts: Parts) -> Objective:
        """Nothing: the file runs where `runs.own.opened` puts the class itself in this one's place."""
        raise UsageError(f"{self.source} is built by `vardistill train` alone")

    @property
    def file(self) -> Path:
        """The file."""
        return Path(self.source.rpartition(":")[0])

    @property
    def title(self) -> str:
        """The class."""
        return self.source.rpartition(":")[2]


SingleConfig = Union[NamedConfig, Annotated[OwnConfig, tyro.conf.Fixed]]  # noqa: UP007
"""A term of a sum, or the only one."""


def title_of(config: Any) -> str:
    """What an objective is called in sums: its configuration's name or its class, less `Config`."""
    title = config.title if isinstance(config, OwnConfig) else getattr(config, "name", type(config).__name__)
    return str(title).removesuffix("Config")


@dataclass(frozen=True)
class PartConfig:
    """A term of a sum.

    Raises:
        UsageError: for a weight that is not positive and finite.
    """

    objective: SingleConfig = field(default_factory=VarDiUConfig)
    weight: float = 1.0
    """λ at the start."""
    weight_end: float | None = None
    """λ at the end, to which it moves geometrically; default: it stays."""
    levels: LevelsConfig | None = None
    """Noise levels of its own; default: the run's."""

    def __post_init__(self) -> None:
        for name in ("weight", "weight_end"):
            value = getattr(self, name)
            require(name, value, value is None or 0 < value < math.inf, "positive and finite")

    def __str__(self) -> str:
        end = "" if self.weight_end is None else f"..{self.weight_end:g}"
        return (
            title_of(self.objective)
            if not end and self.weight == 1
            else f"{self.weight:g}{end}*{title_of(self.objective)}"
        )


def _refuse(words: list[str]) -> tuple[PartConfig, ...]:
    """The terms of a sum have options, levels and rates to start from: `runs.presets.with_objective` knows these."""
    raise UsageError(f"the terms of a sum are said by --objective, as in --objective '{words[0]}'")


Terms = Annotated[
    tuple[PartConfig, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="SUM",
        instance_from_str=_refuse,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda parts: [" + ".join(map(str, parts))],
    ),
]
"""For the command line a sum is one word."""


@dataclass(frozen=True)
class SumConfig:
    """A weighted sum of objectives.

    Raises:
        UsageError: for no parts, or two of a kind.
    """

    name: ClassVar[str] = "sum"
    parts: Terms = ()
    """The terms; --objective says others."""

    def __post_init__(self) -> None:
        names = [title_of(part.objective) for part in self.parts]
        require(
            "a sum's parts", names, bool(names) and len(set(names)) == len(names), "at least one, of different kinds"
        )

    def build(self, parts: Parts) -> WeightedSum:
        """The sum, its parts built one by one."""
        from vardistill.objectives.weighted_sum import Geometric, Part, WeightedSum

        terms = []
        for part in self.parts:
            levels = None if part.levels is None else part.levels.build(parts.schedule, parts.data_std)
            end = part.weight if part.weight_end is None else part.weight_end
            weight = part.weight if end == part.weight else Geometric(part.weight, end)
            terms.append(Part(part.objective.build(parts), weight, levels, title_of(part.objective)))
        return WeightedSum(terms)


ObjectiveConfig = Annotated[Union[SingleConfig, SumConfig], tyro.conf.AvoidSubcommands]  # noqa: UP007
"""What a run may be configured with."""


def singles(config: Any) -> tuple[Any, ...]:
    """The configurations that an objective's is the sum of: itself, unless it is a sum."""
    return tuple(part.objective for part in config.parts) if isinstance(config, SumConfig) else (config,)


def find(config: Any, kind: type[Any]) -> Any:
    """The configuration of this kind in an objective's; None where there is none."""
    return next((single for single in singles(config) if isinstance(single, kind)), None)


def takes_teacher(config: Any) -> bool:
    """Whether any part has a teacher."""
    return any(getattr(single, "takes_teacher", True) for single in singles(config))
