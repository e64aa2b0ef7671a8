"""What the scripts share: a network and a training loop that know nothing of vardistill, and the README's lines."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vardistill as vd

COMPARED = 10_000
"""Samples of student and teacher each, between which the distance is measured."""


@dataclass(frozen=True)
class Figures:
    """What a script prints."""

    distance: float
    """Energy distance of the student to its teacher's own sampler, in standard deviations of its samples."""
    seconds: float
    """Processor time of the README's lines."""


class Perceptron(nn.Module):
    """From points in the plane and a time in [0, 1]."""

    def __init__(self, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        sizes = [10, *[width] * depth]
        hidden = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        phase = time[:, None] * torch.tensor([1, 2, 4, 8]) * math.pi / 2
        return self.layers(torch.cat([x, phase.sin(), phase.cos()], dim=1))


def fit(network: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int, lr: float = 3e-3) -> nn.Module:
    """Adam with a cosine, and a moving average of the weights, which is returned."""
    average, optimizer = copy.deepcopy(network), torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(network).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for mean, p in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(p, max(0.005, 1 / (step + 1)))
    return average.eval()


def distil(
    teacher: vd.denoisers.Denoiser, steps: int, seed: int, levels: vd.diffusion.NoiseLevels | None = None
) -> Figures:
    """The README's lines, and their last number; `levels` are their default."""
    begun = time.process_time()
    torch.manual_seed(seed)
    points = vd.data.teacher_samples(teacher, (2,), 1000, torch.Generator().manual_seed(seed)).data
    generator = vd.students.MLP.from_data(points, width=128, depth=3)
    training = vd.TrainingConfig(steps=steps, batch=256, lr=4e-3, ema=0.99, seed=seed, eval_every=0, tracker="none")
    run = vd.distill(generator, teacher=teacher, training=training, levels=levels)
    seconds = time.process_time() - begun
    own = own_samples(teacher, COMPARED, seed)
    distance = vd.metrics.energy_distance(run.generator.sample(COMPARED, seed=seed), own)
    return Figures(distance / float(own.var(0).mean().sqrt()), seconds)


def own_samples(teacher: vd.denoisers.Denoiser, n: int, seed: int) -> Tensor:
    """(n, 2), by the teacher's own sampler."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(1000 + seed))
    return vd.samplers.sample(teacher, noise, steps=40)
