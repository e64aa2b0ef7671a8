"""A spiral by a module in EDM's convention: called with x, σ and class labels, it preconditions itself."""

from __future__ import annotations

import torch
from somebody import Perceptron, fit
from torch import Tensor, nn

import vardistill as vd

SIGMA_DATA = 0.5


class EDM(nn.Module):
    """D(x, σ) = c_skip x + c_out F(c_in x, ln(σ)/4) (Karras et al. 2022, table 1)."""

    sigma_data = SIGMA_DATA

    def __init__(self) -> None:
        super().__init__()
        self.network = Perceptron()

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = sigma[:, None]
        total = sigma**2 + self.sigma_data**2
        f = self.network(x / total.sqrt(), sigma.log()[:, 0] / 4)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * f


def spiral(n: int) -> Tensor:
    turn = 3 * torch.rand(n).sqrt()
    return 0.3 * turn[:, None] * torch.stack([(3 * turn).cos(), (3 * turn).sin()], dim=1) + 0.05 * torch.randn(n, 2)


def build(steps: int) -> vd.denoisers.Denoiser:
    torch.manual_seed(0)
    data = spiral(20_000)

    def loss(network: nn.Module) -> Tensor:
        x, sigma = data[torch.randint(len(data), (512,))], (1.2 * torch.randn(512) - 1.2).exp()
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        error = network(x + sigma[:, None] * torch.randn(512, 2), sigma) - x
        return (weight[:, None] * error.pow(2)).mean()

    return vd.denoisers.from_edm(fit(EDM(), loss, steps))
