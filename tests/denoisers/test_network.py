"""Learned denoisers: EDM's preconditioning, and what denoising score matching converges to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from vardistill.denoisers import GaussianMixture, Preconditioned, dsm_loss, reschedule
from vardistill.diffusion import Denoiser, score
from vardistill.diffusion.levels import LogNormal
from vardistill.diffusion.noise import Noise, NoiseLevels
from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified, Schedule
from vardistill.diffusion.weights import named_weight
from vardistill.errors import UsageError

SCHEDULES = [VE(0.05, 20.0), VP(), Cosine(), Rectified()]
LEVELS = LogNormal(base_start=1.0, base_end=1.0, spread=1.0, sigma_min=0.05, sigma_max=20.0)

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def times(n: int) -> Tensor:
    return torch.linspace(0.05, 0.95, n, dtype=torch.float64)


class Network(nn.Module):
    """F(x, c), a small MLP, started from a seed."""

    def __init__(self, d: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, d)).to(
            dtype
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]), generator=generator())

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.cat([x, c[:, None]], 1))
        return out


@every_schedule
@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_preconditioning(schedule: Schedule, shape: tuple[int, ...]) -> None:
    """EDM's table 1 in the ratio r: c_skip, c_out, c_in, c_noise."""
    x_t, t, sigma_data = normal(5, *shape), times(5), 0.7
    alpha, sigma = (scale.reshape(5, *[1] * len(shape)) for scale in schedule(t))
    r, x = sigma / alpha, x_t / alpha
    teacher = Preconditioned(lambda x, c: x.sin() + c.reshape(r.shape), sigma_data, schedule)
    prediction = (x / (r**2 + sigma_data**2).sqrt()).sin() + r.log() / 4
    skip = sigma_data**2 / (r**2 + sigma_data**2) * x
    out = r * sigma_data / (r**2 + sigma_data**2).sqrt() * prediction
    torch.testing.assert_close(teacher(x_t, t), skip + out, rtol=1e-10, atol=1e-10)


@every_schedule
def test_silent_network_is_exact_for_a_centred_gaussian(schedule: Schedule) -> None:
    """With F = 0 the skip connection is E[x | x_t] of N(0, σ_d² I)."""
    teacher = Preconditioned(lambda x, c: torch.zeros_like(x), 0.7, schedule)
    exact = GaussianMixture(torch.zeros(1, 3, dtype=torch.float64), std=0.7, schedule=schedule)
    x_t, t = normal(5, 3), times(5)
    torch.testing.assert_close(teacher(x_t, t), exact(x_t, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(score(teacher, x_t, t), score(exact, x_t, t), rtol=1e-9, atol=1e-9)


@every_schedule
def test_the_schedule_does_not_matter(schedule: Schedule) -> None:
    """The same network under another schedule is the rescheduled denoiser."""
    network = Network(3, torch.float64)
    x_t, t = normal(5, 3), times(5)
    rescheduled = reschedule(Preconditioned(network, 0.7, VE()), schedule)
    torch.testing.assert_close(Preconditioned(network, 0.7, schedule)(x_t, t), rescheduled(x_t, t))


@every_schedule
def test_every_parameter_and_the_input_get_a_gradient(schedule: Schedule) -> None:
    teacher = Preconditioned(Network(3, torch.float64), 0.7, schedule)
    x_t = normal(5, 3).requires_grad_()
    teacher(x_t, times(5)).square().sum().backward()
    for gradient in (x_t.grad, *(parameter.grad for parameter in teacher.parameters())):
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_dsm_loss() -> None:
    """w ‖D(x_t) − x‖², meaned over all but the batch axis; the condition reaches the denoiser."""

    class Shift:
        schedule = VP()

        def __call__(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
            return 0.5 * x_t + condition["label"].reshape(-1, 1, 1)

    noise = NoiseLevels(VP(), LEVELS, named_weight("snr")).draw((2, 3), 6, 0.0, generator(), torch.float64)
    x, label = normal(6, 2, 3), normal(6)
    loss = dsm_loss(Shift(), x, noise, label=label)
    x_t = noise.alpha[:, None, None] * x + noise.sigma[:, None, None] * noise.eps
    for r in range(6):
        expected = noise.weight[r] * ((0.5 * x_t[r] + label[r] - x[r]) ** 2).mean()
        torch.testing.assert_close(loss[r], expected)


@every_schedule
def test_dsm_loss_exceeds_its_minimum_by_the_denoisers_distance(schedule: Schedule) -> None:
    """E loss(D) − E loss(D*) = E w ‖D − D*‖² for the exact D* (Vincent 2011).

    Seed 0, n = 50,000 paired draws: 5 standard errors are exceeded with probability 6e-7.
    """
    n = 50_000
    exact = GaussianMixture(2 * normal(4, 2), std=0.5, schedule=schedule)
    other = Preconditioned(Network(2, torch.float64), 1.5, schedule)
    noise = NoiseLevels(schedule, LEVELS, named_weight("edm", 1.5)).draw((2,), n, 0.0, generator(), torch.float64)
    x = exact.sample(n, generator(1))
    with torch.no_grad():
        x_t = noise.x_t(x)
        distance = noise.weight * (other(x_t, noise.t) - exact(x_t, noise.t)).square().mean(1)
        excess = dsm_loss(other, x, noise) - dsm_loss(exact, x, noise)
    assert distance.mean() > 0.01
    assert (excess - distance).mean().abs() < 5 * (excess - distance).std() / math.sqrt(n)


@pytest.mark.parametrize("schedule", [VE(0.05, 20.0), Rectified()], ids=lambda s: type(s).__name__)
def test_fits_a_gaussian_to_its_closed_form(schedule: Schedule) -> None:
    """Trained on N(μ, s² I), μ ≠ 0 and s ≠ σ_d, the network becomes the exact denoiser.

    Root mean square errors in units of c_out (EDM's weight): more than 1 untrained, 0.034 after this much
    training with seed 0, 0.012 after eight times as many draws.
    """
    exact = GaussianMixture(torch.tensor([[0.8, -0.5]]), std=0.4, schedule=schedule)
    learned = Preconditioned(Network(2, torch.float32), 0.8, schedule)
    levels = NoiseLevels(schedule, LEVELS, named_weight("edm", 0.8), draws=2, antithetic=True)
    optimiser = torch.optim.Adam(learned.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 1200)
    rng = generator()

    def error(denoiser: Denoiser) -> float:
        noise = NoiseLevels(schedule, LEVELS, levels.weight).draw((2,), 4000, 0.0, generator(1))
        x_t = noise.x_t(exact.sample(4000, generator(2)))
        difference = denoiser(x_t, noise.t) - exact(x_t, noise.t)
        return float((noise.weight * difference.square().mean(1)).mean().sqrt())

    with torch.no_grad():
        assert error(learned) > 1
    for _ in range(1200):
        noise = levels.draw((2,), 256, 0.0, rng)
        loss = dsm_loss(learned, noise.rows(exact.sample(256, rng)), noise).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    with torch.no_grad():
        assert error(learned) < 0.06


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan])
def test_refused_sigma_data(sigma_data: float) -> None:
    with pytest.raises(UsageError, match="sigma_data must be a number, positive"):
        Preconditioned(nn.Identity(), sigma_data)


class Recorder(nn.Module):
    """A network that returns a constant and keeps its input."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.x, self.c = x, c
        return torch.full_like(x, self.value)


def scales(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t, α, σ and r = σ/α, (R,) each, r from 0.06 to 16."""
    t = schedule.time(torch.logspace(-1.2, 1.2, 9))
    alpha, sigma = schedule(t)
    return t, alpha, sigma, sigma / alpha


@pytest.mark.usefixtures("float64")
@every_schedule
def test_input_and_target_of_the_network_have_unit_variance(schedule: Schedule) -> None:
    """For x ~ N(0, σ_d²): x_t = α x + σ ε has coefficients of x and ε, and so have input and target."""
    sigma_data = 1.7
    t, alpha, sigma, ratio = scales(schedule)
    zero, one = (Preconditioned(Recorder(v), sigma_data, schedule) for v in (0.0, 1.0))
    of_x, of_eps = alpha[:, None], sigma[:, None]
    c_out = (one(of_x, t) - zero(of_x, t)).squeeze(1)
    skip = [zero(v, t).squeeze(1) for v in (of_x, of_eps)]
    inputs = []
    for v in (of_x, of_eps):
        zero(v, t)
        inputs.append(zero.network.x.squeeze(1))
    # the target F* = (x − c_skip x_t/α)/c_out
    target = [(1 - skip[0]) / c_out, -skip[1] / c_out]
    for on_x, on_eps in (inputs, target):
        torch.testing.assert_close(sigma_data**2 * on_x**2 + on_eps**2, torch.ones(len(t)))
    torch.testing.assert_close(zero.network.c, 0.25 * ratio.log())
    # c_skip is the best linear denoiser: input and target are uncorrelated
    torch.testing.assert_close(sigma_data**2 * inputs[0] * target[0] + inputs[1] * target[1], torch.zeros(len(t)))


@pytest.mark.usefixtures("float64")
@every_schedule
def test_edm_weight_makes_the_loss_that_of_the_network(schedule: Schedule) -> None:
    """w c_out² = 1, so the loss is ‖F − F*‖² at every level."""
    sigma_data = 1.7
    t, alpha, sigma, ratio = scales(schedule)
    total = (ratio**2 + sigma_data**2).sqrt()
    x, eps = normal(len(t), 1, 2, 2), normal(len(t), 1, 2, 2, seed=1)
    noise = Noise(t, alpha, sigma, named_weight("edm", sigma_data)(alpha, sigma), eps, len(t))
    denoiser = Preconditioned(Recorder(0.3), sigma_data, schedule)
    x_hat = noise.x_t(x).flatten(1) / alpha[:, None]
    c_skip, c_out = (sigma_data / total) ** 2, ratio * sigma_data / total
    target = (x.flatten(1) - c_skip[:, None] * x_hat) / c_out[:, None]
    loss = dsm_loss(denoiser, x, noise)
    assert loss.shape == (len(t),)
    torch.testing.assert_close(loss, (0.3 - target).pow(2).mean(1))


class Affine(nn.Module):
    """F(x, c) = x W + v."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.usefixtures("float64")
@every_schedule
@pytest.mark.parametrize("ratio", [0.05, 1.0, 20.0])
def test_best_affine_network_at_one_level_is_the_closed_form_denoiser(schedule: Schedule, ratio: float) -> None:
    """The loss is quadratic in the network's weights: one Newton step from any start ends at its minimum.

    Expectations over (x, ε) are exact: 2d points ±√d e_i match all moments that a quadratic has.
    """
    sigma_data, covariance = 1.7, torch.tensor([[2.0, 0.9], [0.9, 1.0]])
    exact = GaussianMixture(torch.tensor([[0.8, -0.5]]), covariances=covariance[None], schedule=schedule)
    points = 2.0 * torch.cat([torch.eye(4), -torch.eye(4)])
    clean, eps = points.split(2, 1)
    root = torch.linalg.cholesky(covariance)
    x = exact.means + clean @ root.T
    t = schedule.time(torch.full((8,), ratio))
    alpha, sigma = schedule(t)
    noise = Noise(t, alpha, sigma, named_weight("edm", sigma_data)(alpha, sigma), eps, 8)
    denoiser = Preconditioned(Affine(), sigma_data, schedule)
    shapes = {name: p.shape for name, p in denoiser.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

        def call(x_t: Tensor, t: Tensor) -> Tensor:
            return torch.func.functional_call(denoiser, weights, (x_t, t))

        return dsm_loss(call, x, noise).mean()  # type: ignore[arg-type]

    start = torch.nn.utils.parameters_to_vector(denoiser.parameters()).detach()
    slope = torch.autograd.functional.jacobian(loss, start)
    curvature = torch.autograd.functional.hessian(loss, start)
    assert torch.linalg.eigvalsh(curvature).min() > 0
    torch.nn.utils.vector_to_parameters(start - torch.linalg.solve(curvature, slope), denoiser.parameters())
    x_t = alpha[:, None] * (3 * normal(8, 2))
    torch.testing.assert_close(denoiser(x_t, t), exact(x_t, t), rtol=1e-8, atol=1e-8)
