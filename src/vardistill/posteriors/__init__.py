"""Variational posteriors q(z | x_t, t): of few latents, and of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.posteriors.few import (
        Conditional as Conditional,
        DiagonalGaussian as DiagonalGaussian,
        FullGaussian as FullGaussian,
        MixtureOfGaussians as MixtureOfGaussians,
        NeuralSplineFlow as NeuralSplineFlow,
        Posterior as Posterior,
        Prior as Prior,
        Reparameterised as Reparameterised,
        check_posterior as check_posterior,
        standard_normal as standard_normal,
    )
    from vardistill.posteriors.pictures import ConvGaussian as ConvGaussian, CouplingFlow as CouplingFlow

__getattr__, __all__ = attach(__name__)
