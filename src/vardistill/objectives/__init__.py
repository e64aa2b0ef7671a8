"""Objectives: losses that turn a teacher denoiser, or samples, into a generator of one or a few steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.objectives.adm import ADM as ADM, ADMConfig as ADMConfig
    from vardistill.objectives.base import Needs as Needs, Objective as Objective, Update as Update
    from vardistill.objectives.diff_instruct import (
        DiffInstruct as DiffInstruct,
        DiffInstructConfig as DiffInstructConfig,
    )
    from vardistill.objectives.discriminator import Head as Head
    from vardistill.objectives.dmd import DMD as DMD, DMDConfig as DMDConfig
    from vardistill.objectives.dmd2 import DMD2 as DMD2, DMD2Config as DMD2Config
    from vardistill.objectives.em import EMD as EMD, EMDConfig as EMDConfig
    from vardistill.objectives.f_distill import FDistill as FDistill, FDistillConfig as FDistillConfig
    from vardistill.objectives.ladd import LADD as LADD, ADDConfig as ADDConfig, LADDConfig as LADDConfig
    from vardistill.objectives.moment_matching import (
        MomentMatching as MomentMatching,
        MomentMatchingConfig as MomentMatchingConfig,
    )
    from vardistill.objectives.registry import PartConfig as PartConfig, SumConfig as SumConfig
    from vardistill.objectives.sds import SDS as SDS, SDSConfig as SDSConfig
    from vardistill.objectives.sid import SiD as SiD, SiDConfig as SiDConfig
    from vardistill.objectives.sida import SiDA as SiDA, SiDAConfig as SiDAConfig
    from vardistill.objectives.sim import SiM as SiM, SiMConfig as SiMConfig
    from vardistill.objectives.smd import SMD as SMD, SMDConfig as SMDConfig
    from vardistill.objectives.smt import SMT as SMT, SMTConfig as SMTConfig
    from vardistill.objectives.vardiu import VarDiU as VarDiU, VarDiUConfig as VarDiUConfig
    from vardistill.objectives.varflow import VarFlow as VarFlow, VarFlowConfig as VarFlowConfig
    from vardistill.objectives.weighted_sum import Geometric as Geometric, Part as Part, WeightedSum as WeightedSum

__getattr__, __all__ = attach(__name__)
