r"""A discriminator: a head on a denoiser's features, whose logit C tells real noisy samples from the student's.

With x_t^S the student's and x_t^T = α_t y + σ_t ε′ of real y,

| loss | head | student |
|---|---|---|
| logistic | E softplus(C(x_t^S, t)) + softplus(−C(x_t^T, t)) | E softplus(−C(x_t^S, t)) |
| hinge | E max(0, 1 + C(x_t^S, t)) + max(0, 1 − C(x_t^T, t)) | −E C(x_t^S, t) |

The best logistic logit is C = log p_d^t/p_θ^t. With it the student's gradient in x_t is
(1 + p_d^t/p_θ^t)⁻¹ (s_θ − s_T), the score difference of the diffusive KL under another weight.

`approximate_r1` is what bounds a logit's slope at real samples without a second derivative: with n ~ N(0, I),
E [(C(x_t + δ s n) − C(x_t))/δ]² → s² ‖∇C‖² as δ → 0, here with s² = α_t² σ_d² + σ_t², the samples' own scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from vardistill.denoisers.features import features
from vardistill.diffusion.schedules import expand
from vardistill.networks import initial_weights, mlp

if TYPE_CHECKING:
    from vardistill.diffusion import Denoiser, Noise
    from vardistill.objectives.base import Parts

AdversarialLoss = Literal["logistic", "hinge"]

STEP = 0.1
"""δ of the approximate R1."""


class Head(nn.Module):
    """Logits of features (R, channels, *places): a perceptron of each place's channels, meaned over the places, (R,).

    Args:
        channels: of the features.
        width: of the hidden layer.
    """

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.channels = channels
        self.norm, self.layers = nn.LayerNorm(channels), mlp(channels, 1, depth=1, width=width)

    @classmethod
    def on(cls, trunk: Denoiser, parts: Parts) -> Head:
        """A fresh head on a denoiser that takes the student's samples."""
        student = parts.student
        parameters = trunk.parameters() if isinstance(trunk, nn.Module) else iter(())
        x_t = torch.zeros(1, *student.data_shape, device=next(parameters, torch.zeros(())).device)
        condition = {"labels": x_t.new_zeros(1, dtype=torch.long)} if student.classes else {}
        with torch.no_grad(), initial_weights(parts.seed + 3):
            return cls(features(trunk, x_t, x_t.new_full((1,), 0.5), **condition).shape[1])

    def forward(self, features: Tensor) -> Tensor:
        """C, (R,)."""
        places = features.flatten(2).transpose(1, 2) if features.ndim > 2 else features[:, None]
        logits: Tensor = self.layers(self.norm(places))
        return logits.mean((1, 2))

    def logits(self, trunk: Denoiser, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """C(x_t, t), (R,), differentiable in x_t."""
        out: Tensor = self(features(trunk, x_t, t, **condition))
        return out


def of_head(real: Tensor, generated: Tensor, loss: AdversarialLoss = "logistic") -> Tensor:
    """What a head lowers, of the logits of real and of generated samples; the shape of both."""
    if loss == "hinge":
        return (1 + generated).relu() + (1 - real).relu()
    return nn.functional.softplus(generated) + nn.functional.softplus(-real)


def of_student(generated: Tensor, loss: AdversarialLoss = "logistic") -> Tensor:
    """What a student lowers, of the logits of its samples; their shape."""
    return -generated if loss == "hinge" else nn.functional.softplus(-generated)


def approximate_r1(
    logits: Callable[[Tensor], Tensor], at: Tensor, x_t: Tensor, noise: Noise, sigma_data: float
) -> Tensor:
    """[(C(x_t + δ s ε) − C(x_t))/δ]², (R,).

    Args:
        logits: C, of noisy samples (R, *data).
        at: C(x_t), (R,), as it is known already.
        x_t: noisy real samples, whose noise is not `noise.eps`.
        noise: of the rows, its ε taken for n.
        sigma_data: σ_d.
    """
    scale = (noise.alpha**2 * sigma_data**2 + noise.sigma**2).sqrt()
    return ((logits(x_t + STEP * expand(scale, x_t) * noise.eps) - at) / STEP) ** 2
