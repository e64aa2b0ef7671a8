"""What networks predict: each prediction's definition, and the way to E[x | x_t] and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from vardistill.denoisers import GaussianMixture, from_module
from vardistill.diffusion import PREDICTIONS, from_x, score, to_x, unit_weight
from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified, Schedule
from vardistill.errors import UsageError

SCHEDULES = [VE(0.05, 20.0), VP(), Cosine(), Rectified()]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)

values = st.floats(-10, 10)
scales = st.floats(0.05, 1.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(predicts: str, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network would be trained to predict where x and ε are known."""
    targets = {
        "x": x,
        "epsilon": eps,
        "v": alpha * eps - sigma * x,
        "velocity": eps - x,
        "score": -eps / sigma,
    }
    return targets[predicts]


@every_prediction
@given(x=values, eps=values, alpha=scales, sigma=scales)
def test_definition(predicts: str, x: float, eps: float, alpha: float, sigma: float) -> None:
    """With x and ε known, x ↦ prediction is the definition, and prediction ↦ x gives x back."""
    x_, eps_, alpha_, sigma_ = torch.tensor([x, eps, alpha, sigma], dtype=torch.float64)
    x_t = alpha_ * x_ + sigma_ * eps_
    prediction = definition(predicts, x_, eps_, alpha_, sigma_)
    torch.testing.assert_close(from_x(predicts)(x_, x_t, alpha_, sigma_), prediction, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(to_x(predicts)(prediction, x_t, alpha_, sigma_), x_, rtol=1e-9, atol=1e-9)


@every_prediction
@given(prediction=values, x_t=values, alpha=scales, sigma=scales)
def test_round_trip(predicts: str, prediction: float, x_t: float, alpha: float, sigma: float) -> None:
    """The two maps are inverse to each other at any x_t, not only where it is αx + σε."""
    point = torch.tensor([x_t, alpha, sigma], dtype=torch.float64)
    start = torch.tensor(prediction, dtype=torch.float64)
    there_and_back = from_x(predicts)(to_x(predicts)(start, *point), *point)
    torch.testing.assert_close(there_and_back, start, rtol=1e-8, atol=1e-8)


@every_prediction
@given(x=values, other=values, x_t=values, alpha=scales, sigma=scales)
def test_unit_weight(predicts: str, x: float, other: float, x_t: float, alpha: float, sigma: float) -> None:
    """w |x − x′|² is the squared difference of the predictions that stand for x and x′; of σ s for a score."""
    point = torch.tensor([x_t, alpha, sigma], dtype=torch.float64)
    a, b = (from_x(predicts)(torch.tensor(v, dtype=torch.float64), *point) for v in (x, other))
    scale = sigma if predicts == "score" else 1.0
    weight = unit_weight(predicts)(*point[1:])
    torch.testing.assert_close(weight * (x - other) ** 2, (scale * (a - b)) ** 2, rtol=1e-8, atol=1e-8)


@every_schedule
@every_prediction
def test_the_exact_denoiser_through_any_prediction(predicts: str, schedule: Schedule) -> None:
    """A module that predicts what the exact denoiser implies gives the same denoiser back."""
    exact = GaussianMixture(2 * normal(4, 3), std=torch.linspace(0.3, 0.9, 4), schedule=schedule)

    def module(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (scale[:, None] for scale in schedule(t))
        return from_x(predicts)(exact(x_t, t), x_t, alpha, sigma)

    t = torch.linspace(0.02, 0.98, 30, dtype=torch.float64)
    x_t = normal(30, 3, seed=1) * 2
    teacher = from_module(module, schedule, predicts)
    torch.testing.assert_close(teacher(x_t, t), exact(x_t, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(score(teacher, x_t, t), score(exact, x_t, t), rtol=1e-9, atol=1e-9)


@every_schedule
def test_the_score_is_the_gradient_of_the_log_density(schedule: Schedule) -> None:
    """A module that returns autograd's ∇ log p_t is the exact denoiser."""
    exact = GaussianMixture(2 * normal(4, 3), std=0.5, schedule=schedule)

    def module(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            return torch.autograd.grad(exact.log_prob(x_t, t).sum(), x_t)[0]

    t, x_t = torch.linspace(0.02, 0.98, 30, dtype=torch.float64), normal(30, 3, seed=1)
    torch.testing.assert_close(from_module(module, schedule, "score")(x_t, t), exact(x_t, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [Cosine(), VP()], ids=lambda s: type(s).__name__)
def test_v_is_the_slope_of_x_t_in_the_angle(schedule: Schedule) -> None:
    """Where α² + σ² = 1, v = dx_t/dφ with α = cos φ, σ = sin φ (arXiv 2202.00512, appendix D)."""
    x, eps, t = normal(7, 2), normal(7, 2, seed=1), torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    alpha, sigma = (scale[:, None] for scale in schedule(t))
    phi = torch.atan2(sigma, alpha)
    _, slope = torch.autograd.functional.jvp(lambda phi: phi.cos() * x + phi.sin() * eps, phi, torch.ones_like(phi))
    v = from_x("v")(x, alpha * x + sigma * eps, alpha, sigma)
    torch.testing.assert_close(v, slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("convert", [to_x, from_x, unit_weight])
def test_unknown_prediction(convert: object) -> None:
    with pytest.raises(UsageError, match="unknown prediction 'epsilom': did you mean epsilon"):
        convert("epsilom")  # type: ignore[operator]
