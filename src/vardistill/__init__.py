"""vardistill: distil diffusion models into one-step generators.

`import vardistill as vd` costs no torch import; the parts load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vardistill import denoisers, generators, levels, metrics, noise_levels, objectives, posteriors, problems, samplers, schedules
    from vardistill.config import Config, TrainingConfig
    from vardistill.errors import UsageError
    from vardistill.noise_levels import Draw, Noise, NoiseLevels
    from vardistill.training import Diverged, Interrupted, Run, distill

_MODULES = (
    "denoisers", "generators", "levels", "metrics", "noise_levels", "objectives", "posteriors", "problems", "samplers", "schedules",
)  # fmt: skip
_NAMES = {
    "Config": "config",
    "TrainingConfig": "config",
    "UsageError": "errors",
    "Draw": "noise_levels",
    "Noise": "noise_levels",
    "NoiseLevels": "noise_levels",
    "Diverged": "training",
    "Interrupted": "training",
    "Run": "training",
    "distill": "training",
}

__all__ = [*_MODULES, *_NAMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vardistill.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"vardistill.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'vardistill' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
