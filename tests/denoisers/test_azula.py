"""azula denoisers as teachers.

azula 0.11 asks for torchvision, which this library does without: `Azula` and the schedules here are stand-ins that have
azula's interface and its formulas (azula.noise, azula.denoise.GaussianDenoiser), nothing of azula itself.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from vardistill.denoisers import GaussianMixture, from_azula, reschedule
from vardistill.denoisers.azula import Bisected
from vardistill.diffusion import Denoiser, same_schedule, score
from vardistill.diffusion.schedules import VE, VP, Schedule
from vardistill.errors import UsageError

STD = 0.7


class VESchedule:
    sigma_min, sigma_max = 0.01, 30.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.exp((1 - t) * math.log(self.sigma_min) + t * math.log(self.sigma_max))


class VPSchedule:
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = torch.exp(math.log(1e-3) * t**2)
        return alpha, torch.sqrt(1 - alpha**2 + 1e-6)


class RectifiedSchedule:
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t * 1e-3 + (1 - t), t + (1 - t) * 1e-3


class Azula(nn.Module):
    """The exact denoiser of N(shift, s² I)."""

    def __init__(self, schedule: object) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, shift: Tensor | None = None) -> SimpleNamespace:
        alpha, sigma = (scale[:, None] for scale in self.schedule(t))
        mean = self.mean if shift is None else self.mean + shift
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return SimpleNamespace(mean=mean + gain * (x_t - alpha * mean))


every_schedule = pytest.mark.parametrize("azula", [VESchedule(), VPSchedule(), RectifiedSchedule()])


@every_schedule
def test_is_the_exact_denoiser(azula: object, rng: torch.Generator) -> None:
    """As a denoiser, as a score, and under another schedule."""
    teacher = from_azula(Azula(azula))
    assert isinstance(teacher, Denoiser)
    x_t, t = torch.randn(7, 2, generator=rng, dtype=torch.float64), torch.linspace(0.05, 0.9, 7, dtype=torch.float64)
    mean = teacher.denoiser.mean.detach()[None]
    exact = GaussianMixture(mean, std=STD, schedule=teacher.schedule)
    torch.testing.assert_close(teacher(x_t, t), exact(x_t, t))
    torch.testing.assert_close(score(teacher, x_t, t), score(exact, x_t, t))
    elsewhere = GaussianMixture(mean, std=STD, schedule=VP())
    torch.testing.assert_close(reschedule(teacher, VP())(x_t, t), elsewhere(x_t, t))


@every_schedule
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_bisection_inverts_the_ratio(azula: Schedule, dtype: torch.dtype, tolerance: float) -> None:
    schedule, t = Bisected(azula), torch.linspace(0.02, 0.98, 49, dtype=dtype)
    alpha, sigma = schedule(t)
    time = schedule.time(sigma / alpha)
    assert time.dtype == dtype
    torch.testing.assert_close(time, t, rtol=0, atol=tolerance)


def test_ratios_outside_go_to_the_ends() -> None:
    time = Bisected(VPSchedule()).time(torch.tensor([1e-9, 1e9], dtype=torch.float64))
    torch.testing.assert_close(time, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-15)


@every_schedule
def test_a_copy_has_the_same_schedule(azula: object) -> None:
    """As a critic that starts as a copy of its teacher has."""
    teacher = from_azula(Azula(azula))
    assert same_schedule(copy.deepcopy(teacher).schedule, teacher.schedule)
    assert not same_schedule(teacher.schedule, VP())


def test_known_schedules_are_this_library_s() -> None:
    assert from_azula(Azula(VESchedule())).schedule == VE(0.01, 30.0)


def test_condition_and_parameters_pass_through(rng: torch.Generator) -> None:
    teacher = from_azula(Azula(VPSchedule()))
    x_t, t = torch.randn(4, 2, generator=rng, dtype=torch.float64), torch.full((4,), 0.9, dtype=torch.float64)
    assert not torch.allclose(teacher(x_t, t, shift=torch.ones(4, 2)), teacher(x_t, t))
    teacher(x_t, t).sum().backward()
    assert [parameter.grad is not None for parameter in teacher.parameters()] == [True]


def test_refuses_what_has_no_schedule() -> None:
    with pytest.raises(UsageError, match="Linear has no schedule: give an azula denoiser"):
        from_azula(nn.Linear(2, 2))
