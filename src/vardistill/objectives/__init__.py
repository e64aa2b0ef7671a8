"""Objectives: losses that turn a teacher denoiser, or samples, into a generator of one or a few steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.objectives.base import Needs as Needs
    from vardistill.objectives.base import Objective as Objective
    from vardistill.objectives.base import Update as Update
    from vardistill.objectives.diff_instruct import DiffInstruct as DiffInstruct
    from vardistill.objectives.diff_instruct import DiffInstructConfig as DiffInstructConfig
    from vardistill.objectives.registry import PartConfig as PartConfig
    from vardistill.objectives.registry import SumConfig as SumConfig
    from vardistill.objectives.vardiu import VarDiU as VarDiU
    from vardistill.objectives.vardiu import VarDiUConfig as VarDiUConfig
    from vardistill.objectives.varflow import VarFlow as VarFlow
    from vardistill.objectives.varflow import VarFlowConfig as VarFlowConfig
    from vardistill.objectives.weighted_sum import Geometric as Geometric
    from vardistill.objectives.weighted_sum import Part as Part
    from vardistill.objectives.weighted_sum import WeightedSum as WeightedSum

__getattr__, __all__ = attach(
    __name__,
    {
        "base": "Needs Objective Update",
        "diff_instruct": "DiffInstruct DiffInstructConfig",
        "registry": "PartConfig SumConfig",
        "vardiu": "VarDiU VarDiUConfig",
        "varflow": "VarFlow VarFlowConfig",
        "weighted_sum": "Geometric Part WeightedSum",
    },
)
