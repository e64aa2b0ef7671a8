"""Diffusion itself: forward processes, noise levels and their weights, what a step draws, predictions, samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.diffusion.denoiser import Denoiser as Denoiser
    from vardistill.diffusion.denoiser import DensityDenoiser as DensityDenoiser
    from vardistill.diffusion.denoiser import check_denoiser as check_denoiser
    from vardistill.diffusion.denoiser import dsm_weight as dsm_weight
    from vardistill.diffusion.denoiser import require_denoiser as require_denoiser
    from vardistill.diffusion.denoiser import score as score
    from vardistill.diffusion.levels import EDM as EDM
    from vardistill.diffusion.levels import LevelDistribution as LevelDistribution
    from vardistill.diffusion.levels import LogNormal as LogNormal
    from vardistill.diffusion.levels import PowerLaw as PowerLaw
    from vardistill.diffusion.levels import UniformTime as UniformTime
    from vardistill.diffusion.noise import Draw as Draw
    from vardistill.diffusion.noise import Noise as Noise
    from vardistill.diffusion.noise import NoiseLevels as NoiseLevels
    from vardistill.diffusion.parametrisations import PREDICTIONS as PREDICTIONS
    from vardistill.diffusion.parametrisations import from_x as from_x
    from vardistill.diffusion.parametrisations import to_x as to_x
    from vardistill.diffusion.parametrisations import unit_weight as unit_weight
    from vardistill.diffusion.samplers import karras_times as karras_times
    from vardistill.diffusion.samplers import sample as sample
    from vardistill.diffusion.schedules import SCHEDULES as SCHEDULES
    from vardistill.diffusion.schedules import VE as VE
    from vardistill.diffusion.schedules import VP as VP
    from vardistill.diffusion.schedules import Cosine as Cosine
    from vardistill.diffusion.schedules import Rectified as Rectified
    from vardistill.diffusion.schedules import Schedule as Schedule
    from vardistill.diffusion.schedules import Table as Table
    from vardistill.diffusion.schedules import expand as expand
    from vardistill.diffusion.schedules import same_schedule as same_schedule
    from vardistill.diffusion.weights import Weight as Weight
    from vardistill.diffusion.weights import named_weight as named_weight

__getattr__, __all__ = attach(
    __name__,
    {
        "levels": "EDM LevelDistribution LogNormal PowerLaw UniformTime",
        "noise": "Draw Noise NoiseLevels",
        "parametrisations": "PREDICTIONS from_x to_x unit_weight",
        "samplers": "karras_times sample",
        "denoiser": "Denoiser DensityDenoiser check_denoiser dsm_weight require_denoiser score",
        "weights": "Weight named_weight",
        "schedules": "SCHEDULES VE VP Cosine Rectified Schedule Table expand same_schedule",
    },
)
