"""vardistill: distil diffusion models into generators of one or a few steps.

`import vardistill as vd` costs no torch import; the parts load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill._version import __version__ as __version__
from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill import (
        denoisers as denoisers,
        diffusion as diffusion,
        export as export,
        metrics as metrics,
        networks as networks,
        objectives as objectives,
        posteriors as posteriors,
        students as students,
    )
    from vardistill.diffusion import levels as levels, samplers as samplers, schedules as schedules
    from vardistill.diffusion.noise import Draw as Draw, Noise as Noise, NoiseLevels as NoiseLevels
    from vardistill.domains.points import problems as problems
    from vardistill.errors import UsageError as UsageError
    from vardistill.runs.config import Config as Config
    from vardistill.runs.distill import distill as distill
    from vardistill.students.network import NetworkStudent as NetworkStudent
    from vardistill.training import data as data
    from vardistill.training.config import TrainingConfig as TrainingConfig
    from vardistill.training.loop import Diverged as Diverged, Interrupted as Interrupted, Run as Run

__getattr__, __all__ = attach(__name__)
