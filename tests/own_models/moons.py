"""Two moons by a network that predicts ε under a variance preserving schedule, of 1000 steps."""

from __future__ import annotations

import math

import torch
from somebody import Perceptron, fit
from torch import Tensor, nn

import vardistill as vd


def moons(n: int) -> Tensor:
    angle = math.pi * torch.rand(n)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    arcs = torch.where(torch.rand(n, 1) < 0.5, upper, torch.tensor([1.0, 0.5]) - upper)
    return arcs + 0.1 * torch.randn(n, 2)


def build(steps: int) -> vd.denoisers.Denoiser:
    torch.manual_seed(0)
    data, schedule = moons(20_000), vd.schedules.VP()

    def loss(network: nn.Module) -> Tensor:
        x, t, eps = data[torch.randint(len(data), (512,))], 0.001 + 0.998 * torch.rand(512), torch.randn(512, 2)
        alpha, sigma = schedule(t)
        return (network(alpha[:, None] * x + sigma[:, None] * eps, t) - eps).pow(2).mean()

    network = fit(Perceptron(), loss, steps)
    return vd.denoisers.from_module(network, schedule, predicts="epsilon")
