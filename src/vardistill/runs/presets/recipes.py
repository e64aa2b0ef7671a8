"""What a named configuration is. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from vardistill.diffusion.config import LevelsConfig

C = TypeVar("C", covariant=True)


@dataclass(frozen=True)
class Recipe(Generic[C]):
    """A configuration and what it is for."""

    about: str
    config: C


def grouped(levels: LevelsConfig, shared: int) -> LevelsConfig:
    """The levels as an objective that compares groups sees them beside another: shared, all alike in weight."""
    return replace(levels, weight="one", shared=shared, draws=1, antithetic=False)
