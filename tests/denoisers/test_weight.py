"""The weight under which denoising score matching is the squared error of what a network itself predicts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tiny_models import tiny_unet
from vardistill.denoisers import (
    DiffusersDenoiser,
    GaussianMixture,
    Guided,
    Mixed,
    Preconditioned,
    dsm_loss,
    from_azula,
    from_edm,
    from_module,
    reschedule,
)
from vardistill.diffusion import PREDICTIONS, Denoiser, Noise, dsm_weight, from_x, named_weight
from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified, Schedule

SIGMA_DATA = 0.6
SCHEDULES = [VE(0.05, 20.0), VP(), Cosine(), Rectified()]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)


class Network(nn.Module):
    """x ↦ tanh(2x) + time, and it keeps its last prediction; any condition is left out."""

    label_dim, sigma_data = 0, SIGMA_DATA

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, *condition: Tensor, **more: Tensor) -> Tensor:
        self.prediction = (self.gain * x).tanh() + time.reshape(-1, *[1] * (x.ndim - 1))
        return self.prediction


def noise(schedule: Schedule, *shape: int) -> tuple[Tensor, Noise]:
    """Clean data and noise at levels from end to end, with no weight yet."""
    rng = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 9, *shape, generator=rng, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    return x, Noise(t, *schedule(t), torch.ones_like(t), eps, latents=len(t))


def weighted(denoiser: Denoiser, x: Tensor, noise: Noise, **condition: Tensor) -> Tensor:
    """w ‖D − x‖² under the denoiser's own weight, where σ_d = 3 is no one's."""
    return dsm_weight(denoiser, noise.alpha, noise.sigma, sigma_data=3.0) * dsm_loss(denoiser, x, noise, **condition)


def squared(error: Tensor) -> Tensor:
    return error.flatten(1).pow(2).mean(1)


@every_schedule
@every_prediction
def test_of_every_prediction(predicts: str, schedule: Schedule) -> None:
    """Also under the wrappers; of a score it is the error of σ s, that is of ε."""
    network = Network()
    denoiser = from_module(network, schedule, predicts)
    x, drawn = noise(schedule, 2, 3)
    alpha, sigma = (v[:, None, None] for v in (drawn.alpha, drawn.sigma))
    loss = weighted(denoiser, x, drawn)
    error = network.prediction - from_x(predicts)(x, drawn.x_t(x), alpha, sigma)
    exact = squared(sigma * error if predicts == "score" else error)
    torch.testing.assert_close(loss, exact)
    nulls = {"labels": torch.zeros(9)}
    for wrapper in (Mixed(denoiser), Guided(denoiser, 1.0, {"labels": 0}), Mixed(Mixed(denoiser))):
        torch.testing.assert_close(weighted(wrapper, x, drawn, **nulls), exact)


@every_schedule
@every_prediction
def test_under_another_schedule(predicts: str, schedule: Schedule) -> None:
    """The network is the same, and so is its error at the same x and ε."""
    network = Network()
    denoiser = from_module(network, VP(), predicts)
    x, drawn = noise(schedule, 3)
    t = VP().time(drawn.sigma / drawn.alpha)
    native = Noise(t, *VP()(t), drawn.weight, drawn.eps, drawn.latents)
    torch.testing.assert_close(weighted(reschedule(denoiser, schedule), x, drawn), weighted(denoiser, x, native))


@every_schedule
@pytest.mark.parametrize("sigma_data", [0.3, 1.7])
def test_of_edm_s_preconditioning(schedule: Schedule, sigma_data: float) -> None:
    """‖F − (x − c_skip x̂)/c_out‖², with the network's own σ_d."""
    network = Network()
    denoiser = Preconditioned(network, sigma_data, schedule)
    x, drawn = noise(schedule, 3)
    loss, ratio = weighted(denoiser, x, drawn), (drawn.sigma / drawn.alpha)[:, None]
    total = (ratio**2 + sigma_data**2).sqrt()
    target = (x - (sigma_data / total) ** 2 * drawn.x_t(x) / drawn.alpha[:, None]) / (ratio * sigma_data / total)
    torch.testing.assert_close(loss, squared(network.prediction - target))
    edm = named_weight("edm", SIGMA_DATA)
    own = from_edm(lambda *inputs: inputs[0]), from_edm(network)
    weights = [dsm_weight(some, drawn.alpha, drawn.sigma, 3.0) for some in own]
    torch.testing.assert_close(weights[0], named_weight("edm", 3.0)(drawn.alpha, drawn.sigma))
    torch.testing.assert_close(weights[1], edm(drawn.alpha, drawn.sigma))


@pytest.mark.parametrize(
    ("scheduler", "predicts"),
    [
        (diffusers.DDIMScheduler(), "epsilon"),
        (diffusers.DDIMScheduler(prediction_type="v_prediction"), "v"),
        (diffusers.DDIMScheduler(prediction_type="sample"), "x"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "velocity"),
    ],
)
def test_of_diffusers_networks(scheduler: Any, predicts: str) -> None:
    denoiser = DiffusersDenoiser(tiny_unet().double(), scheduler)
    x, drawn = noise(denoiser.schedule, 1, 8, 8)
    alpha, sigma = (v[:, None, None, None] for v in (drawn.alpha, drawn.sigma))
    x_t = drawn.x_t(x)
    with torch.no_grad():
        prediction = from_x(predicts)(denoiser(x_t, drawn.t), x_t, alpha, sigma)
        target = from_x(predicts)(x, x_t, alpha, sigma)
        torch.testing.assert_close(weighted(denoiser, x, drawn), squared(prediction - target))


def test_of_a_diffusers_network_of_edm_s() -> None:
    denoiser = DiffusersDenoiser(tiny_unet(), diffusers.EDMEulerScheduler(sigma_data=0.4))
    _, drawn = noise(denoiser.schedule, 1)
    weight = dsm_weight(Mixed(denoiser), drawn.alpha, drawn.sigma, 3.0)
    torch.testing.assert_close(weight, named_weight("edm", 0.4)(drawn.alpha, drawn.sigma))


@every_schedule
def test_of_what_does_not_tell(schedule: Schedule) -> None:
    """EDM's with the σ_d that was given; azula's, whose networks are for data of unit variance, with 1."""
    exact = GaussianMixture(torch.zeros(1, 3), std=1.0, schedule=schedule)
    guided: Callable[..., Denoiser] = lambda some: Guided(some, 2.0, {"labels": 0})  # noqa: E731
    azula = from_azula(SimpleNamespace(schedule=schedule))
    _, drawn = noise(schedule, 1)
    for denoiser in (exact, guided(exact), Mixed(exact), reschedule(exact, schedule)):
        weight = dsm_weight(denoiser, drawn.alpha, drawn.sigma, SIGMA_DATA)
        torch.testing.assert_close(weight, named_weight("edm", SIGMA_DATA)(drawn.alpha, drawn.sigma))
    weight = dsm_weight(azula, drawn.alpha, drawn.sigma, SIGMA_DATA)
    torch.testing.assert_close(weight, named_weight("edm", 1.0)(drawn.alpha, drawn.sigma))
