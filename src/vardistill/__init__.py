"""vardistill: distil diffusion models into generators of one or a few steps.

`import vardistill as vd` costs no torch import; the parts load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill._version import __version__ as __version__
from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill import denoisers as denoisers
    from vardistill import diffusion as diffusion
    from vardistill import export as export
    from vardistill import metrics as metrics
    from vardistill import networks as networks
    from vardistill import objectives as objectives
    from vardistill import posteriors as posteriors
    from vardistill import students as students
    from vardistill.diffusion import levels as levels
    from vardistill.diffusion import samplers as samplers
    from vardistill.diffusion import schedules as schedules
    from vardistill.diffusion.noise import Draw as Draw
    from vardistill.diffusion.noise import Noise as Noise
    from vardistill.diffusion.noise import NoiseLevels as NoiseLevels
    from vardistill.domains.points import problems as problems
    from vardistill.errors import UsageError as UsageError
    from vardistill.runs.config import Config as Config
    from vardistill.students.network import NetworkStudent as NetworkStudent
    from vardistill.training import data as data
    from vardistill.training.config import TrainingConfig as TrainingConfig
    from vardistill.training.loop import Diverged as Diverged
    from vardistill.training.loop import Interrupted as Interrupted
    from vardistill.training.loop import Run as Run
    from vardistill.training.loop import distill as distill

__getattr__, __all__ = attach(
    __name__,
    {
        "denoisers": "",
        "diffusion": "levels samplers schedules",
        "diffusion.noise": "Draw Noise NoiseLevels",
        "domains.points": "problems",
        "errors": "UsageError",
        "export": "",
        "metrics": "",
        "networks": "",
        "objectives": "",
        "posteriors": "",
        "runs.config": "Config TrainingConfig",
        "students": "",
        "students.network": "NetworkStudent",
        "training": "data",
        "training.loop": "Diverged Interrupted Run distill",
    },
)
