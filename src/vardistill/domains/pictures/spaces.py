"""Where VarFlow takes distances, if not between pixels: maps (x_t, t) → (R, f), differentiable in x_t.

Of several blocks it is one map to views (R, places, f), which are compared place by place.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vardistill.denoisers.diffusers import DiffusersDenoiser
from vardistill.denoisers.features import block_features, blocks, features, inner_layer
from vardistill.domains.pictures.classifier import Classifier

PLACES = 4
"""Along a side, to which blocks' features are averaged."""


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
        with self._precision(x_t):
            return features(self.denoiser, x_t, t, **self._told(x_t)).flatten(1)

    def _told(self, x_t: Tensor) -> dict[str, Tensor]:
        return {} if self.label is None else {"labels": x_t.new_full((len(x_t),), self.label).long()}

    def _precision(self, x_t: Tensor) -> AbstractContextManager[object]:
        return torch.autocast(x_t.device.type, torch.bfloat16) if self.mixed else nullcontext()


class BlocksSpace(EncoderSpace):
    """φ_b(x_t, t), what each block b of the teacher's U-Net returns, averaged over patches to at most 4×4 places.

    So distances see coarse and fine structure, each where it is (Teacher-feature drifting, arXiv 2605.07327). Small
    noise tells most: take small levels.

    Args:
        denoiser: with a U-Net of diffusers; see `EncoderSpace`.
        label: likewise.
        mixed: likewise.

    Raises:
        UsageError: for another network.
    """

    def __init__(self, denoiser: DiffusersDenoiser, label: int | None = None, mixed: bool = False) -> None:
        super().__init__(denoiser, label, mixed)
        blocks(denoiser)

    def forward(self, x_t: Tensor, t: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Views (R, places, channels) of x_t (R, C, H, W) at t (R,), in the type of x_t."""
        with self._precision(x_t):
            found = block_features(self.denoiser, x_t, t, **self._told(x_t))
        pooled = [adaptive_avg_pool2d(v, (min(PLACES, v.shape[2]), min(PLACES, v.shape[3]))) for v in found]
        return [v.flatten(2).transpose(1, 2) for v in pooled]
