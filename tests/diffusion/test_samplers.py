"""Samplers: convergence orders against closed forms, masses of a mixture's modes, `sample`'s contract."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vardistill.denoisers import GaussianMixture, reschedule
from vardistill.diffusion.samplers import METHODS, T_MAX, T_MIN, karras_times, sample
from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified, Schedule
from vardistill.errors import UsageError

SCHEDULES = [VE(0.05, 20.0), VP(), Cosine(), Rectified()]
ORDERS = {"euler": 1, "ddim": 1, "heun": 2}

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_method = pytest.mark.parametrize("method", METHODS)


class Recorder:
    """A denoiser that keeps the (x_t, t) it was asked about."""

    def __init__(self, denoiser: GaussianMixture) -> None:
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        self.calls.append((x_t, t))
        return self.denoiser(x_t, t, **condition)


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner_times(steps: int) -> Tensor:
    """A grid that stays away from the ends, where the slopes of some schedules are infinite."""
    return torch.linspace(0.8, 0.2, steps, dtype=torch.float64)


def last_x_t(denoiser: GaussianMixture, noise: Tensor, method: str, intervals: int) -> Tensor:
    """x at the last time of `inner_times`."""
    recorder = Recorder(denoiser)
    sample(recorder, noise, intervals + 1, method, inner_times(intervals + 1))
    return recorder.calls[-1][0]


def measured_order(error: dict[int, float]) -> float:
    (coarse, coarse_error), (fine, fine_error) = error.items()
    return math.log(coarse_error / fine_error) / math.log(fine / coarse)


@every_schedule
@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_order_on_a_gaussian(schedule: Schedule, method: str, order: int) -> None:
    """For N(μ, Σ) the flow keeps C_t^(−½)(x_t − α_t μ), C_t = α_t² Σ + σ_t² I."""
    mean = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
    root = normal(3, 3, seed=1)
    eigenvalues, vectors = torch.linalg.eigh(root @ root.T + 0.1 * torch.eye(3, dtype=torch.float64))
    covariance = vectors @ eigenvalues.diag() @ vectors.T
    denoiser = GaussianMixture(mean[None], covariances=covariance[None], schedule=schedule)
    noise = normal(50, 3)

    alpha, sigma = schedule(inner_times(2))
    variance = alpha[:, None] ** 2 * eigenvalues + sigma[:, None] ** 2
    scale = (variance[1] / variance[0]).sqrt()
    start = sigma[0] * noise - alpha[0] * mean
    exact = alpha[1] * mean + (start @ vectors * scale) @ vectors.T

    error = {n: float((last_x_t(denoiser, noise, method, n) - exact).abs().max()) for n in (128, 256)}
    assert error[256] < 0.1
    assert measured_order(error) == pytest.approx(order, abs=0.1)


@every_schedule
@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_order_on_a_mixture(schedule: Schedule, method: str, order: int) -> None:
    """In one dimension the flow keeps the probability below x_t, for any target."""
    components = torch.tensor([[-1.0, 0.3, 0.2], [0.4, 0.5, 0.5], [0.7, 0.2, 0.3]], dtype=torch.float64)
    means, stds, weights = components.T
    denoiser = GaussianMixture(means[:, None], std=stds, weights=weights, schedule=schedule)

    def below(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        std = (alpha**2 * stds**2 + sigma**2).sqrt()
        return (weights * torch.special.ndtr((x_t - alpha * means) / std)).sum(1)

    noise = normal(50, 1)
    alpha, sigma = schedule(inner_times(2))
    exact = below(sigma[0] * noise, alpha[0], sigma[0])

    def error(intervals: int) -> float:
        reached = below(last_x_t(denoiser, noise, method, intervals), alpha[1], sigma[1])
        return float((reached - exact).abs().mean())

    assert measured_order({n: error(n) for n in (256, 512)}) == pytest.approx(order, abs=0.15)


def ddpm_variance(schedule: Schedule, std: float, times: Tensor) -> float:
    """Variance of DDPM's last x_t for a target N(0, std²): each step is linear, with Gaussian noise."""
    alpha, sigma = schedule(times)
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    variance = sigma[0] ** 2
    for i, j in pairwise(range(len(times))):
        kept = (sigma[j] / sigma[i]) ** 2 * alpha[i] / alpha[j]
        injected = (sigma[i] ** 2 - (alpha[i] / alpha[j] * sigma[j]) ** 2) * (sigma[j] / sigma[i]) ** 2
        towards = alpha[j] - kept * alpha[i]
        variance = (kept + towards * gain[i]) ** 2 * variance + injected
    return float(variance)


@every_schedule
def test_ddpm_variance_converges(schedule: Schedule) -> None:
    """At first order, to that of the reverse-time SDE, which remembers part of the start's missing α²s²."""
    std = 0.6

    def times(intervals: int) -> Tensor:
        return inner_times(intervals + 1)

    alpha, sigma = schedule(times(1))
    marginal = alpha**2 * std**2 + sigma**2
    ratio = sigma / alpha
    regression = alpha[1] / alpha[0] * (std**2 + ratio[1] ** 2) / (std**2 + ratio[0] ** 2)
    exact = float(marginal[1] - regression**2 * (marginal[0] - sigma[0] ** 2))

    error = {n: abs(ddpm_variance(schedule, std, times(n)) - exact) for n in (256, 512)}
    assert error[256] < 0.05 * exact
    assert measured_order(error) == pytest.approx(1, abs=0.1)


@every_schedule
def test_ddpm_follows_its_variance(schedule: Schedule, rng: torch.Generator) -> None:
    """Seed 0; a variance of n normal draws has relative sd √(2/n): 5 of them fail at 6e-7."""
    std, n, times = 0.6, 100_000, inner_times(9)
    recorder = Recorder(GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), std=std, schedule=schedule))
    noise = torch.randn(n, 1, generator=rng, dtype=torch.float64)
    sample(recorder, noise, 9, "ddpm", times, rng)
    variance = float(recorder.calls[-1][0].var())
    assert variance == pytest.approx(ddpm_variance(schedule, std, times), rel=5 * math.sqrt(2 / n))


@every_schedule
def test_ddim_is_exact_for_a_point(schedule: Schedule) -> None:
    """For a point mass at m every x_t is α_t m + σ_t ε with the start's ε, after one step of any length."""
    point = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
    noise, times = normal(20, 2), torch.tensor([0.9, 0.15], dtype=torch.float64)
    recorder = Recorder(GaussianMixture(point, std=0.0, schedule=schedule))
    x = sample(recorder, noise, 2, "ddim", times)
    alpha, sigma = schedule(times)
    eps = (sigma[0] * noise - alpha[0] * point) / sigma[0]
    reached = recorder.calls[-1][0]
    torch.testing.assert_close(reached, alpha[1] * point + sigma[1] * eps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x, point.expand(20, 2), rtol=1e-12, atol=1e-12)


def forty_modes(schedule: Schedule) -> GaussianMixture:
    """40 separate modes of unequal weight, of standard deviation near 1 together."""
    grid = torch.cartesian_prod(torch.linspace(-1.6, 1.6, 8), torch.linspace(-1.6, 1.6, 5)).double()
    return GaussianMixture(
        grid + 0.04 * normal(40, 2, seed=2), std=0.03, weights=torch.linspace(1, 3, 40), schedule=schedule
    )


@pytest.mark.parametrize("schedule", [VE(), VP(), Cosine(), Rectified()], ids=lambda s: type(s).__name__)
@every_method
def test_masses_of_forty_modes(schedule: Schedule, method: str, rng: torch.Generator) -> None:
    """Seed 0; Pearson's χ² of the modes' counts against their weights fails at 1e-4."""
    target, n = forty_modes(schedule), 2000
    noise = torch.randn(n, 2, generator=rng, dtype=torch.float64)
    steps = {"heun": 40, "euler": 1000 if isinstance(schedule, VE) else 150}.get(method, 150)
    x = sample(target, noise, steps, method, rng=rng)
    distance, mode = torch.cdist(x, target.means).min(1)
    expected = n * target.weights
    chi2 = ((mode.bincount(minlength=40) - expected) ** 2 / expected).sum()
    assert distance.max() < 6 * 0.03
    assert torch.special.gammaincc(torch.tensor(39 / 2), chi2 / 2) > 1e-4


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@every_schedule
def test_unchanged_under_another_schedule(method: str, schedule: Schedule) -> None:
    """At the same ratios σ/α, DDIM and DDPM (same draws) give the same samples under every schedule."""
    native = forty_modes(VE())
    times = karras_times(native.schedule, 12)
    alpha, sigma = native.schedule(times)

    def draw(denoiser: GaussianMixture, times: Tensor, noise: Tensor) -> Tensor:
        return sample(denoiser, noise, 12, method, times, torch.Generator().manual_seed(3))

    torch.testing.assert_close(
        draw(reschedule(native, schedule), schedule.time(sigma / alpha), normal(30, 2)),
        draw(native, times, normal(30, 2)),
        rtol=1e-8,
        atol=1e-8,
    )


def test_euler_is_ddim_for_rectified_flow() -> None:
    """There the velocity is constant along a step of either."""
    target, noise = forty_modes(Rectified()), normal(30, 2)
    torch.testing.assert_close(sample(target, noise, 20, "euler"), sample(target, noise, 20, "ddim"))


def test_heun_is_edm_algorithm_1_for_ve() -> None:
    target, noise = forty_modes(VE()), normal(30, 2)
    times = karras_times(target.schedule, 10)
    sigma = [*target.schedule(times)[1], torch.tensor(0.0)]
    x = sigma[0] * noise
    for i, t in enumerate(times):
        slope = (x - target(x, t.expand(30))) / sigma[i]
        guess = x + (sigma[i + 1] - sigma[i]) * slope
        if sigma[i + 1] > 0:
            slope = (slope + (guess - target(guess, times[i + 1].expand(30))) / sigma[i + 1]) / 2
        x = x + (sigma[i + 1] - sigma[i]) * slope
    torch.testing.assert_close(sample(target, noise, 10, "heun"), x, rtol=1e-9, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_grids(schedule: Schedule, steps: int) -> None:
    karras = karras_times(schedule, steps)
    assert karras.shape == (steps,)
    assert (karras.diff() < 0).all()
    assert float(karras[0]) == pytest.approx(T_MAX, rel=1e-9)
    if steps > 1:
        assert float(karras[-1]) == pytest.approx(T_MIN, rel=1e-9)
        alpha, sigma = schedule(karras)
        curvature = ((sigma / alpha) ** (1 / 7)).diff().diff()
        torch.testing.assert_close(curvature, torch.zeros_like(curvature), rtol=0, atol=1e-9)


@every_method
def test_costs_and_times(method: str, rng: torch.Generator) -> None:
    """n evaluations, 2n − 1 with Heun; at times of shape (B,) on the grid."""
    recorder = Recorder(forty_modes(VP()))
    times = torch.linspace(T_MAX, T_MIN, 6, dtype=torch.float64)
    sample(recorder, normal(4, 2), 6, method, times, rng)
    assert len(recorder.calls) == (11 if method == "heun" else 6)
    for x_t, t in recorder.calls:
        assert x_t.shape == (4, 2)
        assert t.shape == (4,)
        assert (t[0] == times).any()


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_condition(method: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Data of any shape; the denoiser gets the condition; nothing asks for a gradient."""

    class Shifted:
        schedule = Cosine()

        def __call__(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
            return condition["label"][:, None, None, None].expand_as(x_t)

    noise = torch.randn(3, 2, 4, 4, generator=rng, dtype=dtype, requires_grad=True)
    x = sample(Shifted(), noise, 5, method, rng=rng, label=torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    assert x.dtype == dtype
    assert x.shape == noise.shape
    assert not x.requires_grad
    assert x[:, 0, 0, 0].tolist() == [1.0, 2.0, 3.0]


def test_randomness_comes_from_rng() -> None:
    target, noise = forty_modes(VP()), normal(30, 2)

    def draw(seed: int) -> Tensor:
        return sample(target, noise, 10, "ddpm", rng=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a whole number, at least 1, but is 0"),
        ({"method": "huen"}, "did you mean heun"),
        ({"method": "ddpm"}, "torch.Generator"),
        ({"times": torch.tensor([0.9, 0.5])}, r"shape \(3,\)"),
        ({"times": torch.tensor([0.1, 0.5, 0.9])}, "must decrease"),
    ],
)
def test_mistakes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sample(forty_modes(VP()), normal(2, 2), **{"steps": 3, **arguments})  # type: ignore[arg-type]
