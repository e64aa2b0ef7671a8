"""Denoisers E[x | x_t]: exact ones, learned ones, and a user's own module."""

from vardistill.denoisers.base import (
    Denoiser,
    DensityDenoiser,
    FromModule,
    Rescheduled,
    check_denoiser,
    from_module,
    require_denoiser,
    reschedule,
    score,
)
from vardistill.denoisers.from_azula import from_azula
from vardistill.denoisers.from_diffusers import DiffusersDenoiser, from_diffusers
from vardistill.denoisers.from_edm import from_edm
from vardistill.denoisers.guidance import Guided
from vardistill.denoisers.mixed import Mixed
from vardistill.denoisers.mixture import Empirical, GaussianMixture
from vardistill.denoisers.network import Preconditioned, dsm_loss
from vardistill.denoisers.parametrisations import PREDICTIONS, from_x, to_x

__all__ = [
    "PREDICTIONS",
    "Denoiser",
    "DensityDenoiser",
    "DiffusersDenoiser",
    "Empirical",
    "FromModule",
    "GaussianMixture",
    "Guided",
    "Mixed",
    "Preconditioned",
    "Rescheduled",
    "check_denoiser",
    "dsm_loss",
    "from_azula",
    "from_diffusers",
    "from_edm",
    "from_module",
    "from_x",
    "require_denoiser",
    "reschedule",
    "score",
    "to_x",
]
