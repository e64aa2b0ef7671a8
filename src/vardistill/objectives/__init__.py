"""Objectives: losses that turn a teacher denoiser into a one-step generator."""

from vardistill.objectives.base import Objective
from vardistill.objectives.vardiu import VarDiU

__all__ = ["Objective", "VarDiU"]
