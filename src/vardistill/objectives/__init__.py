"""Objectives: losses that turn a teacher denoiser, or samples, into a one-step generator."""

from vardistill.objectives.base import Objective
from vardistill.objectives.diff_instruct import DiffInstruct
from vardistill.objectives.vardiu import VarDiU
from vardistill.objectives.varflow import VarFlow
from vardistill.objectives.weighted_sum import Part, WeightedSum

__all__ = ["DiffInstruct", "Objective", "Part", "VarDiU", "VarFlow", "WeightedSum"]
