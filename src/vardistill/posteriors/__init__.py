"""Variational posteriors q(z | x_t, t): of few latents, and of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.posteriors.few import Conditional as Conditional
    from vardistill.posteriors.few import DiagonalGaussian as DiagonalGaussian
    from vardistill.posteriors.few import FullGaussian as FullGaussian
    from vardistill.posteriors.few import MixtureOfGaussians as MixtureOfGaussians
    from vardistill.posteriors.few import NeuralSplineFlow as NeuralSplineFlow
    from vardistill.posteriors.few import Posterior as Posterior
    from vardistill.posteriors.few import Prior as Prior
    from vardistill.posteriors.few import Reparameterised as Reparameterised
    from vardistill.posteriors.few import check_posterior as check_posterior
    from vardistill.posteriors.few import standard_normal as standard_normal
    from vardistill.posteriors.pictures import ConvGaussian as ConvGaussian
    from vardistill.posteriors.pictures import CouplingFlow as CouplingFlow

__getattr__, __all__ = attach(
    __name__,
    {
        "few": "Conditional DiagonalGaussian FullGaussian MixtureOfGaussians NeuralSplineFlow Posterior Prior "
        "Reparameterised check_posterior standard_normal",
        "pictures": "ConvGaussian CouplingFlow",
    },
)
