"""Objectives: losses that turn a teacher denoiser, or samples, into a generator of one or a few steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.objectives.base import Needs as Needs, Objective as Objective, Update as Update
    from vardistill.objectives.diff_instruct import (
        DiffInstruct as DiffInstruct,
        DiffInstructConfig as DiffInstructConfig,
    )
    from vardistill.objectives.registry import PartConfig as PartConfig, SumConfig as SumConfig
    from vardistill.objectives.vardiu import VarDiU as VarDiU, VarDiUConfig as VarDiUConfig
    from vardistill.objectives.varflow import VarFlow as VarFlow, VarFlowConfig as VarFlowConfig
    from vardistill.objectives.weighted_sum import Geometric as Geometric, Part as Part, WeightedSum as WeightedSum

__getattr__, __all__ = attach(__name__)
