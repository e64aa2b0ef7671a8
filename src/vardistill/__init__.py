"""vardistill: distil diffusion models into one-step generators.

`import vardistill as vd` costs no torch import; the parts load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vardistill._version import __version__

if TYPE_CHECKING:
    from vardistill import data as data
    from vardistill import denoisers as denoisers
    from vardistill import export as export
    from vardistill import generators as generators
    from vardistill import image_posteriors as image_posteriors
    from vardistill import levels as levels
    from vardistill import metrics as metrics
    from vardistill import networks as networks
    from vardistill import noise_levels as noise_levels
    from vardistill import objectives as objectives
    from vardistill import posteriors as posteriors
    from vardistill import principal_axes as principal_axes
    from vardistill import problems as problems
    from vardistill import samplers as samplers
    from vardistill import schedules as schedules
    from vardistill.config import Config as Config
    from vardistill.config import TrainingConfig as TrainingConfig
    from vardistill.errors import UsageError as UsageError
    from vardistill.noise_levels import Draw as Draw
    from vardistill.noise_levels import Noise as Noise
    from vardistill.noise_levels import NoiseLevels as NoiseLevels
    from vardistill.one_step import OneStep as OneStep
    from vardistill.training import Diverged as Diverged
    from vardistill.training import Interrupted as Interrupted
    from vardistill.training import Run as Run
    from vardistill.training import distill as distill

_HOMES = {
    "Config": "config",
    "Diverged": "training",
    "Draw": "noise_levels",
    "Interrupted": "training",
    "Noise": "noise_levels",
    "NoiseLevels": "noise_levels",
    "OneStep": "one_step",
    "Run": "training",
    "TrainingConfig": "config",
    "UsageError": "errors",
    "distill": "training",
}
_MODULES = (
    "data",
    "denoisers",
    "export",
    "generators",
    "image_posteriors",
    "levels",
    "metrics",
    "networks",
    "noise_levels",
    "objectives",
    "posteriors",
    "principal_axes",
    "problems",
    "samplers",
    "schedules",
)

__all__ = ["__version__", *_MODULES, *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vardistill.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"vardistill.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vardistill' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
