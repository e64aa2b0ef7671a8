"""Where VarFlow takes distances, if not between pixels: maps (x_t, t) → (R, f), differentiable in x_t."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from vardistill.denoisers.diffusers import DiffusersDenoiser
from vardistill.denoisers.features import features, inner_layer
from vardistill.domains.pictures.classifier import Classifier


class ClassifierSpace(nn.Module):
    """φ(x_t), the penultimate layer of a classifier of clean pictures, at every level."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(R, 64) of x_t (R, C, H, W), in its type; t (R,) is left out."""
        return self.classifier.features(x_t).to(x_t.dtype)


class EncoderSpace(nn.Module):
    """φ(x_t, t), what the middle block of the teacher's U-Net returns, flat; the blocks after it are not run.

    Args:
        denoiser: with a network that has a `mid_block`.
        label: what a conditional network is told, the label for no class if it has one; None for an unconditional one.
        mixed: whether it runs in bfloat16, as it also does within autocast.

    Raises:
        UsageError: for a network without a middle block.
    """

    def __init__(self, denoiser: DiffusersDenoiser, label: int | None = None, mixed: bool = False) -> None:
        super().__init__()
        inner_layer(denoiser)
        self.denoiser, self.label, self.mixed = denoiser, label, mixed

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(R, f) of x_t (R, C, H, W) at t (R,), in the type of x_t."""
        condition = {} if self.label is None else {"labels": x_t.new_full((len(x_t),), self.label).long()}
        with torch.autocast(x_t.device.type, torch.bfloat16) if self.mixed else nullcontext():
            return features(self.denoiser, x_t, t, **condition).flatten(1)
