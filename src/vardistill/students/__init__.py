"""Students: maps of latents, and denoisers along a few times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.students.axes import PrincipalAxes as PrincipalAxes, principal_axes as principal_axes
    from vardistill.students.denoising import DenoisingStudent as DenoisingStudent, default_times as default_times
    from vardistill.students.hub import SafeHubMixin as SafeHubMixin
    from vardistill.students.network import NetworkStudent as NetworkStudent
    from vardistill.students.perceptron import MLP as MLP
    from vardistill.students.preconditioned import DenoisingMLP as DenoisingMLP
    from vardistill.students.saved import load_student as load_student
    from vardistill.students.student import Student as Student
    from vardistill.students.teacher import from_teacher as from_teacher

__getattr__, __all__ = attach(__name__)
