"""Diffusion itself: forward processes, noise levels and their weights, what a step draws, predictions, samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.diffusion.denoiser import (
        Denoiser as Denoiser,
        DensityDenoiser as DensityDenoiser,
        check_denoiser as check_denoiser,
        dsm_weight as dsm_weight,
        require_denoiser as require_denoiser,
        score as score,
    )
    from vardistill.diffusion.levels import (
        EDM as EDM,
        LevelDistribution as LevelDistribution,
        LogNormal as LogNormal,
        PowerLaw as PowerLaw,
        UniformTime as UniformTime,
    )
    from vardistill.diffusion.noise import Draw as Draw, Noise as Noise, NoiseLevels as NoiseLevels
    from vardistill.diffusion.parametrisations import (
        PREDICTIONS as PREDICTIONS,
        from_x as from_x,
        to_x as to_x,
        unit_weight as unit_weight,
    )
    from vardistill.diffusion.samplers import karras_times as karras_times, sample as sample
    from vardistill.diffusion.schedules import (
        SCHEDULES as SCHEDULES,
        VE as VE,
        VP as VP,
        Cosine as Cosine,
        Rectified as Rectified,
        Schedule as Schedule,
        Table as Table,
        expand as expand,
        same_schedule as same_schedule,
    )
    from vardistill.diffusion.weights import Weight as Weight, named_weight as named_weight

__getattr__, __all__ = attach(__name__)
