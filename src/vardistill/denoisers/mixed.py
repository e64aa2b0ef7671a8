"""Mixed precision of a network denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vardistill.diffusion.denoiser import Denoiser, loss_weight


class Mixed(nn.Module):
    """A denoiser whose products and convolutions run in bfloat16; its weights, x_t and E[x | x_t] keep their type.

    A preconditioning around the network, D = c_skip x_t + c_out F, stays in x_t's precision, so what bfloat16's 8 bits
    blur is F alone. For networks: an exact denoiser's matrices are better left as they are.

    Args:
        denoiser: with a network.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """E[x | x_t], shape and type of x_t."""
        with torch.autocast(x_t.device.type, torch.bfloat16):
            x = self.denoiser(x_t, t, **condition)
        return x.to(x_t.dtype)

    def loss_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """That of the denoiser within."""
        return loss_weight(self.denoiser, alpha, sigma)
