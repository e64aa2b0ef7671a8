"""Where VarFlow takes distances between latents, if not between these themselves or in the teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vardistill.domains.pictures.classifier import Classifier
from vardistill.domains.pictures.spaces import ClassifierSpace
from vardistill.domains.text.families import decode


class DecodedSpace(ClassifierSpace):
    """φ(g(x_t)) of latents, with the decoder g of an autoencoder and a classifier of pictures.

    Args:
        classifier: φ is its penultimate layer.
        vae: an `AutoencoderKL`.
    """

    def __init__(self, classifier: Classifier, vae: Any) -> None:
        super().__init__(classifier)
        self.vae = vae

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(R, f) of x_t (R, C, h, w), in its type; t (R,) is left out."""
        return super().forward(decode(self.vae, x_t), t)
