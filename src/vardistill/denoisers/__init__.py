"""Denoisers E[x | x_t]: exact ones, learned ones, and a user's own module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.denoisers.adapters import Adapted as Adapted
    from vardistill.denoisers.azula import from_azula as from_azula
    from vardistill.denoisers.diffusers import DiffusersDenoiser as DiffusersDenoiser, from_diffusers as from_diffusers
    from vardistill.denoisers.edm import from_edm as from_edm
    from vardistill.denoisers.guidance import Guided as Guided, unguided as unguided
    from vardistill.denoisers.mixed import Mixed as Mixed
    from vardistill.denoisers.mixture import Empirical as Empirical, GaussianMixture as GaussianMixture
    from vardistill.denoisers.module import (
        FromModule as FromModule,
        Rescheduled as Rescheduled,
        from_module as from_module,
        reschedule as reschedule,
    )
    from vardistill.denoisers.network import Preconditioned as Preconditioned, dsm_loss as dsm_loss

__getattr__, __all__ = attach(__name__)
