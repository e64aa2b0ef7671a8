"""Two rings by a network that predicts v under a cosine schedule."""

from __future__ import annotations

import math

import torch
from somebody import Perceptron, fit
from torch import Tensor, nn

import vardistill as vd


def rings(n: int) -> Tensor:
    angle, radius = 2 * math.pi * torch.rand(n), torch.where(torch.rand(n) < 1 / 3, 1.0, 2.0)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.08 * torch.randn(n, 2)


def build(steps: int) -> vd.denoisers.Denoiser:
    torch.manual_seed(0)
    data, schedule = rings(20_000), vd.schedules.Cosine()

    def loss(network: nn.Module) -> Tensor:
        x, t, eps = data[torch.randint(len(data), (512,))], 0.001 + 0.998 * torch.rand(512), torch.randn(512, 2)
        alpha, sigma = (scale[:, None] for scale in schedule(t))
        return (network(alpha * x + sigma * eps, t) - (alpha * eps - sigma * x)).pow(2).mean()

    network = fit(Perceptron(), loss, steps)
    return vd.denoisers.from_module(network, schedule, predicts="v")
