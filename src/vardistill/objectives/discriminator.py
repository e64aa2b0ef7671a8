r"""A discriminator: a head on the critic's features, whose logit C tells real noisy samples from the student's.

    head and critic:  E softplus(C(x_t^S, t)) + softplus(−C(x_t^T, t)),   x_t^T = α_t y + σ_t ε′ of real y
    generator:        E softplus(−C(x_t^S, t))

The best logit is C = log p_d^t/p_θ^t. With it the generator's gradient in x_t is (1 + p_d^t/p_θ^t)⁻¹ (s_θ − s_T): the
score difference of the diffusive KL under another weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vardistill.denoisers.features import features
from vardistill.networks import initial_weights, mlp

if TYPE_CHECKING:
    from vardistill.diffusion import Denoiser
    from vardistill.objectives.base import Parts


class Head(nn.Module):
    """Logits of features (R, channels, *places): a perceptron of each place's channels, meaned over the places, (R,).

    Args:
        channels: of the features.
        width: of the hidden layer.
    """

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.norm, self.layers = nn.LayerNorm(channels), mlp(channels, 1, depth=1, width=width)

    @classmethod
    def of_critic(cls, critic: Denoiser, parts: Parts) -> Head:
        """A fresh head on a critic of the student's samples."""
        student = parts.student
        x_t = torch.zeros(1, *student.data_shape)
        condition = {"labels": torch.zeros(1, dtype=torch.long)} if student.classes else {}
        with torch.no_grad(), initial_weights(parts.seed + 3):
            return cls(features(critic, x_t, torch.full((1,), 0.5), **condition).shape[1])

    def forward(self, features: Tensor) -> Tensor:
        """C, (R,)."""
        places = features.flatten(2).transpose(1, 2) if features.ndim > 2 else features[:, None]
        logits: Tensor = self.layers(self.norm(places))
        return logits.mean((1, 2))

    def logits(self, critic: Denoiser, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """C(x_t, t), (R,), differentiable in x_t."""
        out: Tensor = self(features(critic, x_t, t, **condition))
        return out
