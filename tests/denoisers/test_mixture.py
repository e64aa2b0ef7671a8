"""Mixture denoisers against autograd of the log-density, quadrature and other libraries' densities."""

from __future__ import annotations

import math
import resource

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from operator_counter import OperatorCounter
from vardistill.denoisers import Empirical, GaussianMixture, mixture, reschedule
from vardistill.denoisers.mixture import mixture_of_points
from vardistill.diffusion import DensityDenoiser, score
from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified, Schedule
from vardistill.errors import UsageError

SCHEDULES = [VE(0.05, 20.0), VP(), Cosine(), Rectified()]
KINDS = ["shared", "isotropic", "full"]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dimension = pytest.mark.parametrize("d", [1, 2, 3, 4, 5])

pytestmark = pytest.mark.usefixtures("float64")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def components(kind: str, k: int, d: int) -> tuple[dict[str, Tensor | float], Tensor]:
    """Arguments of a `GaussianMixture`, and its covariances (k, d, d)."""
    if kind == "full":
        root = normal(k, d, d, seed=1)
        covariances = 0.3 * root @ root.mT + 0.05 * torch.eye(d)
        return {"covariances": covariances}, covariances
    std = torch.full((k,), 0.6) if kind == "shared" else torch.linspace(0.3, 0.9, k)
    return {"std": 0.6 if kind == "shared" else std}, std[:, None, None] ** 2 * torch.eye(d)


def make(kind: str, d: int, schedule: Schedule, k: int = 4) -> GaussianMixture:
    weights = torch.linspace(1, 3, k)
    return GaussianMixture(2 * normal(k, d), weights=weights, schedule=schedule, **components(kind, k, d)[0])


def queries(d: int, schedule: Schedule, n: int = 12) -> tuple[Tensor, Tensor]:
    """x_t (n, d), scaled like the noisy marginals, and t (n,), all different."""
    t = torch.linspace(0.02, 0.98, n)
    alpha, sigma = schedule(t)
    return (4 * alpha**2 + sigma**2).sqrt()[:, None] * normal(n, d, seed=2), t


def brute_force(denoiser: GaussianMixture, covariances: Tensor, alpha: Tensor, sigma: Tensor) -> MixtureSameFamily:
    """The noisy marginal at one level, by torch's own distributions."""
    noisy = alpha**2 * covariances + sigma**2 * torch.eye(covariances.shape[-1])
    return MixtureSameFamily(
        Categorical(probs=denoiser.weights),
        MultivariateNormal(alpha * denoiser.means, covariance_matrix=noisy),
    )


@every_schedule
@every_kind
@every_dimension
def test_is_tweedie_of_the_log_density(kind: str, d: int, schedule: Schedule) -> None:
    """∇ log p_t(x_t) = (α D − x_t)/σ²."""
    denoiser = make(kind, d, schedule)
    x_t, t = queries(d, schedule)
    x_t.requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser.log_prob(x_t, t).sum(), x_t)
    alpha, sigma = schedule(t)
    tweedie = (x_t + sigma[:, None] ** 2 * gradient) / alpha[:, None]
    torch.testing.assert_close(denoiser(x_t, t), tweedie, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(score(denoiser, x_t, t), gradient, rtol=1e-9, atol=1e-9)


@every_schedule
@every_kind
@every_dimension
def test_log_density(kind: str, d: int, schedule: Schedule) -> None:
    denoiser, (_, covariances) = make(kind, d, schedule), components(kind, 4, d)
    x_t, t = queries(d, schedule)
    expected = [
        brute_force(denoiser, covariances, *schedule(t_i)).log_prob(x_i) for x_i, t_i in zip(x_t, t, strict=True)
    ]
    torch.testing.assert_close(denoiser.log_prob(x_t, t), torch.stack(expected), rtol=1e-10, atol=1e-10)
    clean = brute_force(denoiser, covariances, torch.tensor(1.0), torch.tensor(0.0))
    torch.testing.assert_close(denoiser.log_prob(x_t), clean.log_prob(x_t), rtol=1e-10, atol=1e-10)


@every_schedule
@every_kind
def test_against_quadrature(kind: str, schedule: Schedule) -> None:
    """In one dimension: E[x | x_t] and p_t(x_t) as integrals over x, by the trapezoidal rule."""
    denoiser = make(kind, 1, schedule)
    x_t, t = queries(1, schedule)
    alpha, sigma = schedule(t)
    x = torch.linspace(-12, 12, 40_001)
    log_joint = denoiser.log_prob(x[:, None]) - 0.5 * ((x_t - alpha[:, None] * x) / sigma[:, None]) ** 2
    joint = log_joint.exp() / (sigma[:, None] * math.sqrt(2 * math.pi))
    marginal = torch.trapezoid(joint, x)
    torch.testing.assert_close(denoiser.log_prob(x_t, t), marginal.log(), rtol=1e-8, atol=1e-8)
    mean = torch.trapezoid(joint * x, x) / marginal
    torch.testing.assert_close(denoiser(x_t, t)[:, 0], mean, rtol=1e-8, atol=1e-8)


@every_schedule
@every_dimension
def test_isotropic_is_full_with_a_multiple_of_the_identity(d: int, schedule: Schedule) -> None:
    """Also the shared std, which takes a shorter path, is a vector of equal ones."""
    x_t, t = queries(d, schedule)
    for kind in ("shared", "isotropic"):
        isotropic, (_, covariances) = make(kind, d, schedule), components(kind, 4, d)
        full = GaussianMixture(isotropic.means, covariances=covariances, weights=isotropic.weights, schedule=schedule)
        torch.testing.assert_close(isotropic(x_t, t), full(x_t, t), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(isotropic.log_prob(x_t, t), full.log_prob(x_t, t), rtol=1e-9, atol=1e-9)


@every_kind
@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("block_entries", [1, 12 * 3, 12 * 5 * 7, 2**22])
def test_blocked_is_dense(kind: str, d: int, block_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, for blocks of one component, a few, and all; 23 components leave a remainder."""
    denoiser = make(kind, d, VP(), k=23)
    x_t, t = queries(d, VP())
    x_t.requires_grad_()

    def evaluate() -> list[Tensor]:
        log_prob, mean = denoiser.log_prob(x_t, t), denoiser(x_t, t)
        return [log_prob, mean, *torch.autograd.grad(log_prob.sum() + (mean**3).sum(), x_t)]

    dense = evaluate()
    monkeypatch.setattr(mixture, "BLOCK_ENTRIES", block_entries)
    for blocked, whole in zip(evaluate(), dense, strict=True):
        torch.testing.assert_close(blocked, whole, rtol=1e-11, atol=1e-11)


@every_kind
def test_gradient(kind: str) -> None:
    denoiser = make(kind, 3, Cosine())
    x_t, t = queries(3, Cosine(), n=4)
    assert torch.autograd.gradcheck(lambda x: denoiser(x, t), x_t.requires_grad_())


@pytest.mark.parametrize("bandwidth", [0.0, 0.3])
@every_schedule
@every_dimension
def test_empirical_is_the_mixture_at_the_data(
    bandwidth: float, d: int, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, (x_t, t) = normal(50, d, seed=3), queries(d, schedule)
    exact = GaussianMixture(data, covariances=(bandwidth**2 + 1e-12) * torch.eye(d).expand(50, d, d), schedule=schedule)
    monkeypatch.setattr(mixture, "BLOCK_ENTRIES", 12 * 7)
    empirical = Empirical(data, bandwidth, schedule)
    torch.testing.assert_close(empirical(x_t, t), exact(x_t, t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(empirical.log_prob(x_t, t), exact.log_prob(x_t, t), rtol=1e-6, atol=1e-6)


@every_schedule
@every_dimension
def test_empirical_is_a_softmax_average(d: int, schedule: Schedule) -> None:
    data, (x_t, t) = normal(50, d, seed=3), queries(d, schedule)
    alpha, sigma = schedule(t)
    distance = (x_t[:, None] - alpha[:, None, None] * data) / sigma[:, None, None]
    average = (-0.5 * distance.square().sum(-1)).softmax(1) @ data
    torch.testing.assert_close(Empirical(data, schedule=schedule)(x_t, t), average, rtol=1e-9, atol=1e-9)


@every_dimension
def test_empirical_at_small_noise_returns_the_data(d: int) -> None:
    data = normal(30, d, seed=4)
    t = torch.zeros(30)
    x_t = data + 1e-5 * normal(30, d)
    torch.testing.assert_close(Empirical(data, schedule=VE(1e-4, 1.0))(x_t, t), data, rtol=0, atol=1e-12)


def test_empirical_memory_is_bounded() -> None:
    """10⁵ points against 10³ queries: one dense temporary would be 400 MB, and there are several."""
    data = torch.randn(100_000, 2, generator=generator(), dtype=torch.float32)
    x_t = torch.randn(1000, 2, generator=generator(1), dtype=torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Empirical(data)(x_t, torch.full((1000,), 0.5, dtype=torch.float32))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 300_000


@every_kind
@pytest.mark.parametrize("native", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("other", SCHEDULES, ids=lambda s: type(s).__name__)
def test_unchanged_under_another_schedule(kind: str, native: Schedule, other: Schedule) -> None:
    """The rescheduled mixture is the mixture made under the other schedule, its density included."""
    rescheduled, direct = reschedule(make(kind, 3, native), other), make(kind, 3, other)
    assert isinstance(rescheduled, DensityDenoiser)
    x_t, t = queries(3, other)
    torch.testing.assert_close(rescheduled(x_t, t), direct(x_t, t), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(rescheduled.log_prob(x_t, t), direct.log_prob(x_t, t), rtol=1e-8, atol=1e-8)


@every_dimension
@every_kind
@given(shift=st.floats(-1e3, 1e3), t=st.floats(0.02, 0.98))
def test_moves_with_its_means(kind: str, d: int, shift: float, t: float) -> None:
    """Under VE, x_t + c against means + c is the mean plus c."""
    arguments, _ = components(kind, 4, d)
    means, (x_t, _) = normal(4, d), queries(d, VE())
    time = torch.full((12,), t)
    here = GaussianMixture(means, **arguments)(x_t, time)
    there = GaussianMixture(means + shift, **arguments)(x_t + shift, time)
    torch.testing.assert_close(there - shift, here, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d", [2, 5])
@every_kind
def test_single_precision_far_from_the_origin(kind: str, d: int) -> None:
    """Means at distance 100, σ = 0.1: squares near 10⁴ must differ to within 10⁻²."""
    exact = make(kind, d, VE(0.1, 10.0))
    exact.means += 100
    x_t = exact.means + 0.3 * normal(4, d, seed=5)
    t = torch.zeros(4)
    expected = exact(x_t, t)
    rounded = exact.float()(x_t.float(), t.float())
    torch.testing.assert_close(rounded.double(), expected, rtol=0, atol=2e-3)


@every_kind
@pytest.mark.parametrize("d", [2, 5])
def test_finite_far_away(kind: str, d: int) -> None:
    """No underflow where every component's density is 0 in floating point."""
    denoiser = make(kind, d, VE(0.1, 10.0)).float()
    x_t = torch.full((3, d), 1e6, dtype=torch.float32)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float32)
    assert denoiser(x_t, t).isfinite().all()
    assert denoiser.log_prob(x_t, t).isfinite().all()


@every_kind
@pytest.mark.parametrize("d", [1, 2, 5])
def test_samples(kind: str, d: int) -> None:
    """Seed 0, n = 100,000. Each moment is within 5.5 standard errors: 20 moments or fewer fail at 1e-6."""
    denoiser, (_, covariances) = make(kind, d, VE()), components(kind, 4, d)
    n = 100_000
    x = denoiser.sample(n, generator())
    assert x.shape == (n, d)
    weights, means = denoiser.weights, denoiser.means
    mean = weights @ means
    second = torch.einsum("k,kij->ij", weights, covariances + means[:, :, None] * means[:, None, :])
    products = x[:, :, None] * x[:, None, :]
    assert ((x.mean(0) - mean).abs() < 5.5 * x.std(0) / math.sqrt(n)).all()
    assert ((products.mean(0) - second).abs() < 5.5 * products.std(0) / math.sqrt(n)).all()


def test_sample_is_determined_by_rng() -> None:
    denoiser = make("full", 2, VE())
    assert torch.equal(denoiser.sample(9, generator(1)), denoiser.sample(9, generator(1)))
    assert not torch.equal(denoiser.sample(9, generator(1)), denoiser.sample(9, generator(2)))


@every_kind
def test_state_dict_round_trip(kind: str) -> None:
    one = make(kind, 3, VP())
    other = GaussianMixture(torch.zeros(4, 3), schedule=VP(), **components(kind, 4, 3)[0])
    other.load_state_dict(one.state_dict())
    x_t, t = queries(3, VP())
    assert torch.equal(other(x_t, t), one(x_t, t))


def test_attributes() -> None:
    isotropic, full = make("isotropic", 2, VE()), make("full", 2, VE())
    assert isotropic.std is not None
    torch.testing.assert_close(isotropic.std, torch.linspace(0.3, 0.9, 4))
    assert full.std is None
    torch.testing.assert_close(full.weights, torch.linspace(1, 3, 4) / 8)
    torch.testing.assert_close(GaussianMixture(torch.zeros(5, 1), std=1.0).weights, torch.full((5,), 0.2))
    assert isinstance(full, DensityDenoiser)


NAN = torch.tensor([[0.0, math.nan]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"means": torch.zeros(0, 2), "std": 1.0}, r"non-empty \(K, d\).*\(0, 2\)"),
        ({"means": torch.zeros(3), "std": 1.0}, r"non-empty \(K, d\).*\(3,\)"),
        ({"means": NAN, "std": 1.0}, "means must be finite"),
        ({"means": torch.zeros(3, 2)}, "either std .* or covariances"),
        (
            {"means": torch.zeros(1, 2), "std": 1.0, "covariances": torch.eye(2)[None]},
            "either std .* or covariances",
        ),
        ({"means": torch.zeros(1, 2), "covariances": torch.zeros(1, 2, 2)}, "positive definite"),
    ],
)
def test_refused_mixtures(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GaussianMixture(**arguments)


@pytest.mark.parametrize(
    ("data", "bandwidth", "message"),
    [
        (torch.zeros(0, 2), 0.0, "the data are empty"),
        (NAN, 0.0, "NaN or infinity in 1 of 2"),
        (torch.zeros(3, 2), -0.1, "bandwidth must be 0 or positive"),
        (torch.zeros(3, 2), math.nan, "bandwidth must be 0 or positive"),
    ],
)
def test_refused_data(data: Tensor, bandwidth: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Empirical(data, bandwidth)


@pytest.mark.parametrize("sigma", [0.01, 0.02, 0.1, 0.4, 3.0])
def test_empirical_keeps_single_precision_at_small_noise(sigma: float, rng: torch.Generator) -> None:
    data = 80 * (torch.rand(2000, 2, generator=rng) - 0.5)
    x_t = data[:256] + sigma * torch.randn(256, 2, generator=rng)
    t = VE().time(torch.full((256,), sigma, dtype=torch.float64))
    exact = Empirical(data.double(), schedule=VE())(x_t.double(), t)
    single = Empirical(data, schedule=VE())(x_t, t.float())
    assert ((single - exact).abs().max() / sigma) < 0.02


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 16), ("meta", 1)])
def test_blocks_fill_the_device(device: str, blocks: int, rng: torch.Generator) -> None:
    """2²¹ pairs are 16 blocks of a processor's cache, and one of an accelerator (the meta device)."""
    x_t, points = (torch.randn(n, 5, generator=rng).to(device) for n in (2**11, 2**10))
    with OperatorCounter("aten.amax") as operators:
        mixture_of_points(x_t, points, torch.ones_like(x_t[:, 0]), torch.ones_like(x_t[:, 0]))
    assert operators.count == blocks
