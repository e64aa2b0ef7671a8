"""The configuration of a run: typed and complete; a run keeps it beside its results.

Importing this module does not import torch, so that the command line can answer `--help` at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Union

import tyro

from vardistill.choices import check_choices
from vardistill.diffusion.config import LevelsConfig
from vardistill.domains.pictures.config import PicturesConfig, PicturesTeachConfig
from vardistill.domains.points.config import SCALES, PointsConfig, PointsTeachConfig
from vardistill.domains.text.config import TextConfig
from vardistill.domains.text.shapes.config import ShapesTeachConfig
from vardistill.errors import UsageError
from vardistill.objectives.registry import ObjectiveConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.training.config import TrainingConfig

DomainConfig = Annotated[Union[PointsConfig, PicturesConfig, TextConfig], tyro.conf.AvoidSubcommands]  # noqa: UP007
"""What runs are made of."""

TeachConfig = Union[PointsTeachConfig, PicturesTeachConfig, ShapesTeachConfig]  # noqa: UP007
"""Fits of teachers."""


@dataclass(frozen=True)
class Config:
    """One run, completely.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    domain: DomainConfig = field(default_factory=PointsConfig)
    objective: ObjectiveConfig = field(default_factory=lambda: VarDiUConfig(candidates="batch"))
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @staticmethod
    def check_partial(data: Mapping[str, Any], where: str) -> None:
        """Raise UsageError for a file that leaves out the noise levels, by default MoG-40's, of other data."""
        domain = data.get("domain")
        of = domain.get("problem", domain.get("kind", "")) if isinstance(domain, Mapping) else ""
        levels = data.get("levels")
        known = of in SCALES or of in ("pictures", "text")  # what is not is refused by name
        if known and of != "mog40" and not (isinstance(levels, Mapping) and "distribution" in levels):
            raise UsageError(
                f"{where} needs levels with a distribution, as those of mog40 do not fit {of}: take a preset's"
            )

    def __post_init__(self) -> None:
        check_choices(self)
