"""The configuration of noise levels. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Union

import tyro

from vardistill.choices import WeightName, check_choices
from vardistill.diffusion.levels import EDM, LogNormal, PowerLaw, UniformTime
from vardistill.errors import require

if TYPE_CHECKING:
    from vardistill.diffusion.noise import NoiseLevels
    from vardistill.diffusion.schedules import Schedule

Distribution = Annotated[Union[LogNormal, PowerLaw, EDM, UniformTime], tyro.conf.AvoidSubcommands]  # noqa: UP007


@dataclass(frozen=True)
class LevelsConfig:
    """Noise levels and their weights, under the teacher's forward process.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    distribution: Distribution = field(default_factory=LogNormal)
    weight: WeightName = "sigma2_linear"
    """w(t)."""
    draws: int = 1
    """Noise draws per latent."""
    antithetic: bool = False
    """Draw ε in pairs of opposite sign."""
    stratified: bool = False
    """Draw a step's levels from equal strata."""
    shared: int = 0
    """Levels that the latents of a draw share, for VarFlow; 0 gives every row its own."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("draws", self.draws, self.draws >= 1, "at least 1")
        require("shared", self.shared, self.shared >= 0, "0 or positive")

    def build(self, schedule: Schedule, data_std: float) -> NoiseLevels:
        """How steps draw their noise, under this schedule, for data of this standard deviation."""
        from vardistill.diffusion.noise import NoiseLevels
        from vardistill.diffusion.weights import named_weight

        sigma_max = getattr(self.distribution, "sigma_max", 1.0)
        weight = named_weight(self.weight, data_std, sigma_max)
        return NoiseLevels(
            schedule, self.distribution, weight, self.draws, self.antithetic, self.stratified, self.shared
        )
