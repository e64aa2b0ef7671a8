"""Generators of one step: perceptrons, and the network of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.students.axes import PrincipalAxes as PrincipalAxes
    from vardistill.students.axes import principal_axes as principal_axes
    from vardistill.students.hub import SafeHubMixin as SafeHubMixin
    from vardistill.students.network import OneStep as OneStep
    from vardistill.students.perceptron import MLP as MLP
    from vardistill.students.perceptron import Generator as Generator

__getattr__, __all__ = attach(
    __name__,
    {
        "hub": "SafeHubMixin",
        "network": "OneStep",
        "perceptron": "MLP Generator",
        "axes": "PrincipalAxes principal_axes",
    },
)
