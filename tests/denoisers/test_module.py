"""A user's own module as a teacher; denoisers under another schedule; what a teacher must return."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vardistill.denoisers import FromModule, GaussianMixture, from_module, reschedule
from vardistill.diffusion import PREDICTIONS, Denoiser, DensityDenoiser, check_denoiser, score
from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified, Schedule
from vardistill.errors import UsageError

SCHEDULES = [VE(0.05, 20.0), VP(), Cosine(), Rectified()]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Network(nn.Module):
    """x_t ↦ tanh(W x_t + b + time), and it keeps what it was called with."""

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(d, d, dtype=torch.float64)
        self.calls: list[tuple[Tensor, dict[str, Tensor]]] = []

    def forward(self, x_t: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        self.calls.append((time, condition))
        out: Tensor = self.linear(x_t).tanh() + time.reshape(-1, *[1] * (x_t.ndim - 1))
        return out


def times(n: int) -> Tensor:
    return torch.linspace(0.05, 0.95, n, dtype=torch.float64)


def test_is_a_denoiser() -> None:
    teacher = from_module(Network(), VP())
    assert isinstance(teacher, FromModule)
    assert isinstance(teacher, Denoiser)
    assert not isinstance(teacher, DensityDenoiser)
    assert teacher.schedule == VP()


@every_prediction
def test_owns_the_module(predicts: str) -> None:
    """Parameters, devices and modes of the user's module follow the teacher's."""
    network = Network()
    teacher = from_module(network, VP(), predicts)
    assert list(teacher.parameters()) == list(network.parameters())
    teacher.eval()
    assert not network.training
    teacher.requires_grad_(False)
    assert not network.linear.weight.requires_grad


@every_prediction
@every_schedule
def test_gradients_reach_input_and_parameters(predicts: str, schedule: Schedule) -> None:
    network = Network()
    x_t = normal(5, 3).requires_grad_()
    from_module(network, schedule, predicts)(x_t, times(5)).square().sum().backward()
    for gradient in (x_t.grad, network.linear.weight.grad, network.linear.bias.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_any_callable_and_its_condition() -> None:
    def shift(x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return x_t + label[:, None]

    x = from_module(shift, Rectified())(normal(2, 3), times(2), label=torch.tensor([10.0, 20.0]))
    torch.testing.assert_close(x, normal(2, 3) + torch.tensor([[10.0], [20.0]]))


@every_schedule
def test_condition_passes_through_rescheduling(schedule: Schedule) -> None:
    network, label = Network(), torch.arange(4)
    teacher = reschedule(from_module(network, VP(), "epsilon"), schedule)
    score(teacher, normal(4, 3), times(4), label=label)
    assert network.calls[-1][1] == {"label": label}


def test_time_is_what_the_module_takes() -> None:
    network, schedule = Network(), VE()
    from_module(network, schedule)(normal(4, 3), times(4))
    from_module(network, schedule, time=lambda t: 999 * t)(normal(4, 3), times(4))
    from_module(network, schedule, time=lambda t: schedule(t)[1])(normal(4, 3), times(4))
    for (time, _), expected in zip(network.calls, [times(4), 999 * times(4), schedule(times(4))[1]], strict=True):
        torch.testing.assert_close(time, expected)


@every_prediction
@every_schedule
def test_images(predicts: str, schedule: Schedule) -> None:
    """α and σ broadcast over data of any shape as over the same data, flattened."""

    def module(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x_t.sin()

    x_t, t = normal(4, 3, 5, 5), times(4)
    teacher = from_module(module, schedule, predicts)
    x, flat = teacher(x_t, t), teacher(x_t.flatten(1), t)
    assert x.shape == x_t.shape
    torch.testing.assert_close(x.flatten(1), flat)
    torch.testing.assert_close(score(teacher, x_t, t).flatten(1), score(teacher, x_t.flatten(1), t))


def test_unknown_prediction() -> None:
    with pytest.raises(UsageError, match="unknown prediction 'scores': did you mean score"):
        from_module(Network(), VP(), "scores")


@every_prediction
@pytest.mark.parametrize("native", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("other", SCHEDULES, ids=lambda s: type(s).__name__)
def test_rescheduling_there_and_back(predicts: str, native: Schedule, other: Schedule) -> None:
    """Also by way of a third schedule."""
    teacher = from_module(Network(), native, predicts)
    x_t = normal(6, 3)
    alpha, sigma = native(times(6))
    t = other.time(sigma / alpha)
    other_alpha, _ = other(t)
    x = teacher(x_t, times(6))
    other_x_t = x_t * (other_alpha / alpha)[:, None]
    torch.testing.assert_close(reschedule(teacher, other)(other_x_t, t), x, rtol=1e-8, atol=1e-8)
    back = reschedule(reschedule(reschedule(teacher, other), VE()), native)
    torch.testing.assert_close(back(x_t, times(6)), x, rtol=1e-8, atol=1e-8)


@every_schedule
def test_rescheduled_score_is_of_the_rescheduled_density(schedule: Schedule) -> None:
    """Twice rescheduled, a mixture still knows its density, and its score is that density's gradient."""
    denoiser = reschedule(reschedule(GaussianMixture(normal(3, 2), std=0.5, schedule=VE()), VP()), schedule)
    assert isinstance(denoiser, DensityDenoiser)
    assert denoiser.schedule == schedule
    x_t = normal(6, 2, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser.log_prob(x_t, times(6)).sum(), x_t)
    torch.testing.assert_close(score(denoiser, x_t, times(6)), gradient, rtol=1e-8, atol=1e-8)


def test_check_accepts_a_teacher() -> None:
    check_denoiser(GaussianMixture(torch.zeros(1, 2), std=1.0), (2,), torch.zeros(()))
    check_denoiser(from_module(Network(), VP()), (3,), torch.zeros((), dtype=torch.float64))


class Double:
    """A denoiser that returns another precision than it was given."""

    schedule = VP()

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        return x_t.double()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (from_module(lambda x_t, t: x_t[:, :1], VP()), r"\(2, 3\).*returns \(2, 1\)"),
        (Double(), "torch.float32 the teacher returns .* of torch.float64"),
        (from_module(Network(), VP()), "does not take the generator's samples.*float32"),
        (from_module(Network(2).float(), VP()), r"does not take the generator's samples, \(2, 3\)"),
        (GaussianMixture(torch.zeros(1, 2), std=1.0, schedule=VP()), r"\(2, 3\)"),
        (GaussianMixture(torch.zeros(4, 5), std=1.0, schedule=VP()), r"\(2, 3\)"),
    ],
)
def test_check_refuses(teacher: Denoiser, message: str) -> None:
    """Output of another shape or dtype, input of another shape or dtype: one line that names both."""
    with pytest.raises(UsageError, match=message) as error:
        check_denoiser(teacher, (3,), torch.zeros(()))
    assert "\n" not in str(error.value)
