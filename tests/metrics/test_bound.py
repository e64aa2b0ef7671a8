"""The exact gap against closed forms: a linear generator and a Gaussian target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from operator_counter import OperatorCounter
from vardistill.denoisers import GaussianMixture
from vardistill.diffusion.schedules import VE, VP, Schedule
from vardistill.errors import UsageError
from vardistill.metrics import bound_gap
from vardistill.metrics.bound import Quadrature, diffusive_kl
from vardistill.objectives import VarDiU
from vardistill.posteriors.few import Posterior, Prior, Triangular
from vardistill.students.perceptron import MLP
from vardistill.students.student import Student

SIGMAS = 4.5
"""Of a normal estimate: a failure rate of 7e-6 a comparison."""

STUDENT_19 = 6.0
"""Of a mean of 20 runs over its estimated error: Student's t with 19 degrees exceeds it at 9e-6 a comparison."""

RATIOS = [0.3, 1.0, 5.0]


class Linear(Student):
    """x = A z + b."""

    def __init__(self, A: Tensor, b: Tensor) -> None:
        super().__init__()
        self.A, self.b = nn.Parameter(A, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self.latent_shape, self.data_shape = (A.shape[1],), (A.shape[0],)

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.A.T + self.b

    def noisy(self, alpha: Tensor, sigma: Tensor) -> MultivariateNormal:
        """p_θ^t for scalar scales."""
        covariance = alpha**2 * self.A @ self.A.T + sigma**2 * torch.eye(len(self.b), dtype=self.b.dtype)
        return MultivariateNormal(alpha * self.b, covariance)


class Curved(Student):
    """A smooth map of the plane with folds, in single precision."""

    latent_shape, data_shape = (2,), (2,)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * (z + torch.sin(2 * z).flip(1))


class ExactPosterior(Posterior):
    """p(z | x_t) of a linear generator: covariance S = (I + r⁻² AᵀA)⁻¹, mean S Aᵀ (x_t/α − b)/r², r = σ/α."""

    def __init__(self, generator: Linear) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Triangular:
        A, b = self.generator.A, self.generator.b
        ratio2 = ((sigma / alpha) ** 2)[:, None, None]
        covariance = torch.linalg.inv(torch.eye(A.shape[1], dtype=A.dtype) + A.T @ A / ratio2)
        loc = covariance / ratio2 @ ((x_t / alpha[:, None] - b) @ A)[..., None]
        return Triangular(loc.squeeze(-1), torch.linalg.cholesky(covariance))


@dataclass
class Case:
    generator: Linear
    teacher: GaussianMixture

    def kl(self, ratio: float) -> float:
        """KL(p_θ^t ‖ p_d^t)."""
        t = self.teacher.schedule.time(torch.tensor([ratio], dtype=torch.float64))
        alpha, sigma = (v[0] for v in self.teacher.schedule(t))
        means, covariance = self.teacher.means[0], target_covariance(len(self.teacher.means[0]))
        eye = torch.eye(len(means), dtype=torch.float64)
        target = MultivariateNormal(alpha * means, alpha**2 * covariance + sigma**2 * eye)
        return float(kl_divergence(self.generator.noisy(alpha, sigma), target))


def target_covariance(d: int) -> Tensor:
    B = torch.eye(d, dtype=torch.float64) + 0.3 * torch.ones(d, d, dtype=torch.float64).tril()
    return B @ B.T


def linear_case(k: int, d: int, schedule: Schedule) -> Case:
    rng = torch.Generator().manual_seed(k + 10 * d)
    A, b = torch.randn(d, k, generator=rng).double(), torch.randn(d, generator=rng).double()
    means = torch.randn(1, d, generator=rng).double()
    teacher = GaussianMixture(means, covariances=target_covariance(d)[None], schedule=schedule)
    return Case(Linear(A, b), teacher)


@pytest.mark.parametrize("schedule", [VE(), VP()])
@pytest.mark.parametrize(("k", "d", "nodes"), [(1, 1, 128), (1, 3, 128), (2, 2, 128), (3, 2, 96)])
def test_quadrature_equals_the_closed_form(
    k: int, d: int, nodes: int, schedule: Schedule, rng: torch.Generator
) -> None:
    case = linear_case(k, d, schedule)
    for ratio in (0.5, 1.0, 5.0):
        alpha, sigma = schedule(schedule.time(torch.tensor(ratio, dtype=torch.float64)))
        noisy = case.generator.noisy(alpha, sigma)
        x_t = noisy.mean + torch.randn(50, d, generator=rng).double() @ noisy.scale_tril.T
        quadrature = Quadrature(case.generator, nodes, rng.device)
        found = quadrature.log_density(x_t, alpha.expand(50), sigma.expand(50))
        torch.testing.assert_close(found, noisy.log_prob(x_t), atol=1e-4, rtol=0)


def test_quadrature_has_scales_for_every_row(rng: torch.Generator) -> None:
    case = linear_case(1, 2, VE())
    x_t = torch.randn(300, 2, generator=rng).double()
    alpha, sigma = 1 + torch.rand(2, 300, generator=rng).double()
    quadrature = Quadrature(case.generator, 64, rng.device)
    together = quadrature.log_density(x_t, alpha, sigma)
    alone = [quadrature.log_density(*(v[i : i + 1] for v in (x_t, alpha, sigma))) for i in (0, 255, 256, 299)]
    torch.testing.assert_close(together[[0, 255, 256, 299]], torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [VE(), VP()])
@pytest.mark.parametrize(("k", "d", "nodes"), [(1, 1, 128), (1, 3, 128), (2, 2, 128)])
def test_score_equals_the_closed_form(k: int, d: int, nodes: int, schedule: Schedule, rng: torch.Generator) -> None:
    """−C⁻¹ (x_t − α b) with C = α² A Aᵀ + σ² I, for single rows and where they have scales of their own."""
    case = linear_case(k, d, schedule)
    quadrature = Quadrature(case.generator, nodes, rng.device)
    points = []
    for ratio in (0.5, 1.0, 5.0):
        alpha, sigma = schedule(schedule.time(torch.tensor(ratio, dtype=torch.float64)))
        noisy = case.generator.noisy(alpha, sigma)
        x_t = noisy.mean + torch.randn(300, d, generator=rng).double() @ noisy.scale_tril.T
        expected = -(x_t - noisy.mean) @ noisy.precision_matrix
        points.append((x_t, alpha.expand(300), sigma.expand(300), expected))
        torch.testing.assert_close(quadrature.score(*points[-1][:3]), expected, atol=1e-4, rtol=1e-4)
    x_t, alpha, sigma, expected = map(torch.cat, zip(*points, strict=True))
    torch.testing.assert_close(quadrature.score(x_t, alpha, sigma), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", [VE(), VP()])
def test_diffusive_kl_is_that_of_the_closed_form(schedule: Schedule, rng: torch.Generator) -> None:
    """Means of 20 runs against the exact value, with their own standard error."""
    case = linear_case(2, 2, schedule)
    runs = torch.stack([diffusive_kl(case.teacher, case.generator, RATIOS, rng, 200, nodes=64) for _ in range(20)])
    exact = torch.tensor([case.kl(r) for r in RATIOS], dtype=torch.float64)
    assert runs.dtype == torch.float64
    z = (runs.mean(0) - exact) / (runs.std(0) / math.sqrt(20))
    assert (z.abs() < STUDENT_19).all()


@pytest.mark.parametrize("schedule", [VE(), VP()])
def test_exact_posterior_has_no_gap(schedule: Schedule, rng: torch.Generator) -> None:
    case = linear_case(2, 2, schedule)
    objective = VarDiU(case.teacher, ExactPosterior(case.generator))
    result = bound_gap(objective, case.generator, RATIOS, rng, n=512, nodes=128)
    exact = torch.tensor([case.kl(r) for r in RATIOS], dtype=torch.float64)
    assert (result.gap.abs() < 1e-5).all()
    assert ((result.dikl - exact).abs() < SIGMAS * result.dikl_error + 1e-5).all()
    assert ((result.diu - exact).abs() < SIGMAS * result.diu_error + 1e-5).all()
    assert (result.gap_error < 1e-3 * result.diu_error).all()


def test_batches_are_draws_of_their_own(rng: torch.Generator) -> None:
    """16 batches of 64 have the errors of 1024 draws, and the mean of the bound with a batch's 63 candidates."""
    case = linear_case(2, 2, VE())
    several, one = (
        bound_gap(VarDiU(case.teacher, Prior()), case.generator, RATIOS, rng, n=n, nodes=32, batches=b)
        for n, b in ((64, 16), (1024, 1))
    )
    torch.testing.assert_close(several.dikl_error, one.dikl_error, rtol=0.2, atol=0)
    errors = (several.diu_error**2 + one.diu_error**2).sqrt()
    assert ((several.diu - one.diu).abs() < SIGMAS * errors).all()
    shared = VarDiU(case.teacher, Prior(), candidates="batch")
    few, many = (
        bound_gap(shared, case.generator, RATIOS, rng, n=n, nodes=32, batches=b) for n, b in ((16, 64), (1024, 1))
    )
    assert (few.gap > many.gap).all()


def test_gap_of_the_prior_is_the_mutual_information(rng: torch.Generator) -> None:
    """E KL(p(z | x_t) ‖ p(z)) = ½ ln det(I + A Aᵀ/r²)."""
    case = linear_case(2, 3, VP())
    result = bound_gap(VarDiU(case.teacher, Prior()), case.generator, RATIOS, rng, n=2000, nodes=64)
    A = case.generator.A
    eye = torch.eye(3, dtype=torch.float64)
    exact = torch.stack([0.5 * torch.logdet(eye + A @ A.T / r**2) for r in RATIOS])
    assert ((result.gap - exact).abs() < SIGMAS * result.gap_error + result.quadrature_error).all()
    assert torch.equal(result.ratio, torch.tensor(RATIOS, dtype=torch.float64))
    assert (result.gap_error < 0.15 * exact).all()


@pytest.mark.parametrize("candidates", [4, "batch"])
def test_more_candidates_close_the_gap(candidates: int, rng: torch.Generator) -> None:
    case = linear_case(2, 2, VE())
    results = [
        bound_gap(VarDiU(case.teacher, Prior(), candidates=c), case.generator, RATIOS, rng, n=1000, nodes=64)
        for c in (0, candidates)
    ]
    assert (results[1].gap < results[0].gap).all()
    assert (results[1].gap > -SIGMAS * results[1].gap_error - results[1].quadrature_error).all()


def test_single_precision_and_a_curved_generator(rng: torch.Generator) -> None:
    """Twice the nodes move the KL by less than the stated quadrature error."""
    teacher = GaussianMixture(torch.tensor([[-5.0, 0.0], [5.0, 0.0]]), std=1.0)
    objective = VarDiU(teacher, Prior())
    coarse, fine = (
        bound_gap(objective, Curved(), [0.5, 2.0], torch.Generator().manual_seed(1), n=200, nodes=nodes)
        for nodes in (64, 128)
    )
    assert ((fine.dikl - coarse.dikl).abs() <= coarse.quadrature_error + 1e-9).all()
    assert (fine.quadrature_error < 1e-3).all()
    assert (fine.dikl > 0).all()


def test_too_few_nodes_are_told(rng: torch.Generator) -> None:
    case = linear_case(2, 2, VE())
    objective = VarDiU(case.teacher, ExactPosterior(case.generator))
    result = bound_gap(objective, case.generator, [0.02], rng, n=200, nodes=8)
    assert float(result.quadrature_error) > 1
    assert float(result.gap.abs()) > 0.1


class NoDensity(nn.Module):
    schedule = VE()

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t


def test_bad_input_is_refused(rng: torch.Generator) -> None:
    case = linear_case(1, 1, VE())
    objective = VarDiU(case.teacher, Prior())
    with pytest.raises(UsageError, match="needs a teacher with log_prob, but NoDensity has none"):
        diffusive_kl(NoDensity(), case.generator, RATIOS, rng)
    with pytest.raises(UsageError, match="ratios must be positive and finite"):
        diffusive_kl(case.teacher, case.generator, [0.0], rng)
    with pytest.raises(UsageError, match="needs a teacher with log_prob, but NoDensity has none"):
        bound_gap(VarDiU(NoDensity(), Prior()), case.generator, RATIOS, rng)
    with pytest.raises(UsageError, match="at most 3 latent dimensions, but there are 4"):
        bound_gap(VarDiU(case.teacher, Prior()), MLP(latent=4, data=1), RATIOS, rng)
    for ratios in ([], [0.0], [1.0, -1.0], [math.nan], [math.inf]):
        with pytest.raises(UsageError, match="ratios must be positive and finite"):
            bound_gap(objective, case.generator, ratios, rng)
    with pytest.raises(UsageError, match="n must be at least 2, but is 1"):
        bound_gap(objective, case.generator, RATIOS, rng, n=1)
    with pytest.raises(UsageError, match="nodes must be at least 2, but is 1"):
        bound_gap(objective, case.generator, RATIOS, rng, nodes=1)
    with pytest.raises(UsageError, match="batches must be at least 1"):
        bound_gap(objective, case.generator, RATIOS, rng, batches=0)
    with pytest.raises(UsageError, match=r"nodes\^1 must be at most 16777216"):
        bound_gap(objective, case.generator, RATIOS, rng, nodes=2**25)


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 16), ("meta", 1)])
def test_blocks_fill_the_device(device: str, blocks: int) -> None:
    """1024 samples × 2048 nodes: 4 × 4 blocks of a processor's cache, one of an accelerator (the meta device)."""
    generator = Linear(torch.ones(2, 1), torch.zeros(2)).to(device)
    quadrature = Quadrature(generator, 2048, torch.device(device))
    x_t, one = torch.zeros(1024, 2, device=device), torch.ones(1024, device=device)
    with OperatorCounter("aten.amax") as operators:
        quadrature.log_density(x_t, one, one)
    assert operators.count == blocks
