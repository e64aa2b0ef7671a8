r"""A denoiser of all mixtures of two laws: D(x_t, t, α) = E[x | x_t] where x is of the one with probability α.

α scales and shifts the channels of the network's inner layer (`features`), φ → (1 + a(α)) φ + b(α), by a perceptron of
cos π k α, k = 0, ..., 7; zero at first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vardistill.denoisers.features import through_inner
from vardistill.diffusion.denoiser import Denoiser, loss_weight
from vardistill.networks import mlp

FREQUENCIES = 8
"""Values of k."""


class OfMixtures(nn.Module):
    """D(x_t, t, α).

    Args:
        denoiser: with a network that has an inner layer.
        channels: of that layer.
        width: hidden units of the perceptron.
    """

    def __init__(self, denoiser: Denoiser, channels: int, width: int = 64) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.modulation = mlp(FREQUENCIES, 2 * channels, depth=1, width=width)
        for parameter in self.modulation[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, t: Tensor, share: Tensor | None = None, **condition: Tensor) -> Tensor:
        """E[x | x_t], shape of x_t, for α = `share` (B,) in [0, 1]; default 1."""
        share = torch.ones_like(t) if share is None else share
        waves = (math.pi * share[:, None] * torch.arange(FREQUENCIES, device=t.device, dtype=t.dtype)).cos()
        scale, shift = self.modulation(waves).chunk(2, 1)

        def modulated(seen: Tensor) -> Tensor:
            return seen * (1 + expand_channels(scale, seen)) + expand_channels(shift, seen)

        return through_inner(self.denoiser, modulated, x_t, t, **condition)

    def loss_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """That of the denoiser within."""
        return loss_weight(self.denoiser, alpha, sigma)


def expand_channels(v: Tensor, like: Tensor) -> Tensor:
    """(B, C) as (B, C, 1, ...) to broadcast against features (B, C, *places)."""
    return v.view(*v.shape, *[1] * (like.ndim - 2))
