"""Chains: EM distillation against Diff-Instruct and in the long run, and a chain in the exact posterior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linear_gaussian import z_limit, z_scores
from one_dimension import SIGMA, S, critic, draw_of, every_scale, reverse_kl, slope, teacher
from vardistill.diffusion.noise import Draw, Noise
from vardistill.diffusion.schedules import VE
from vardistill.errors import UsageError
from vardistill.objectives import EMD, MomentMatching, VarDiU
from vardistill.objectives.chain import chain_score, posterior_chain
from vardistill.posteriors import Prior

pytestmark = pytest.mark.usefixtures("float64")


def noisy(generator: Callable[[Tensor], Tensor], n: int, seed: int, eta: int = 0, xi: int = 0) -> Draw:
    """n independent rows at one level."""
    rng = torch.Generator().manual_seed(seed)
    z, eps = torch.randn(2, n, 1, generator=rng)
    t = VE().time(torch.full((n,), SIGMA))
    alpha, sigma = VE()(t)
    more = [torch.randn(k, n, 1, generator=rng) for k in (eta, xi)]
    noise = Noise(t, alpha, sigma, torch.ones(n), eps, n)
    return Draw(z, generator(z), noise, generator, more[0], xi=more[1])


@every_scale
def test_one_step_in_noise_alone_is_diff_instruct(a: float) -> None:
    """γ_ε times it, whatever noise comes in."""
    draw, generator = draw_of(a)
    rng = torch.Generator().manual_seed(0)
    draw = replace(draw, **{name: torch.randn(1, len(draw.z), 1, generator=rng) for name in ("eta", "xi")})
    objective = EMD(teacher(), critic(a), chain_length=1, noise_step=0.2, latent_step=0.0)
    assert slope(objective, draw, generator) == pytest.approx(0.2 * reverse_kl(a), abs=1e-9)


@pytest.mark.parametrize("a", [0.6, 1.9])
def test_in_the_long_run_the_chain_has_the_teachers_law(a: float) -> None:
    """The variance of x_t is S whatever a is. Of 10,000 rows its standard error is 1.4 %: the limit of 8 % leaves 1.5 %
    for the steps' own error, of order γ/2, and a failure rate below 1e-4."""
    draw = noisy(lambda z: a * z, 10_000, 0, eta=150, xi=150)
    objective = EMD(teacher(), critic(a), chain_length=150, noise_step=0.03, latent_step=0.03)
    z, eps, _ = objective.chain(draw)
    assert float((a * z + SIGMA * eps).var()) == pytest.approx(S, rel=0.08)
    assert abs(a**2 + SIGMA**2 - S) > 0.3 * S


def bent(z: Tensor) -> Tensor:
    return 1.2 * z + 0.8 * (2 * z).sin()


def test_states_of_a_posterior_chain_are_as_good_as_the_latent_that_made_x_t() -> None:
    """E (x_k^p − x_0^p) x_t^q = 0 for every state, though g is folded; 12 comparisons at a failure rate of 1e-4."""
    draw = noisy(bent, 20_000, 1, eta=8)
    states = posterior_chain(draw, steps=4, step=0.5, sigma_data=1.3)
    assert float((states[-1] != draw.x).double().mean()) > 0.5
    scores = [
        z_scores(((states[k] ** p - draw.x**p) * draw.x_t**q).flatten(), 0.0)
        for k in (0, 3)
        for p in (1, 2)
        for q in (0, 1, 2)
    ]
    assert torch.stack(scores).abs().max() < z_limit(12)


@pytest.mark.parametrize("a", [0.8, 1.9])
def test_a_long_chain_tells_the_students_score(a: float) -> None:
    """E (ŝ − s_θ) z = 0 once the chain has left z_0: what Diff-Instruct needs a critic for; failure rate 1e-4."""
    draw = noisy(lambda z: a * z, 4_000, 2, eta=80)
    exact = -draw.x_t / (a**2 + SIGMA**2)
    estimate = chain_score(draw, steps=40, step=0.5, sigma_data=a)
    assert abs(z_scores(((estimate - exact) * draw.z).flatten(), 0.0)) < z_limit(2)


def test_vardiu_with_a_chain_has_the_gradient_of_the_diffusive_kl() -> None:
    """Less the control variate's, which cancels; with one step it is score distillation sampling's nearly."""
    a, n = 0.8, 20_000
    scale = torch.tensor(a, requires_grad=True)
    draw = noisy(lambda z: scale * z, n, 3, eta=32)
    objective = VarDiU(teacher(), Prior(), candidates="chain", chain_length=16, chain_rate=0.5, sigma_data=a)
    (rows,) = torch.autograd.grad(objective.generator_loss(draw).sum(), draw.x, retain_graph=True)
    assert abs(z_scores((rows * draw.z).flatten(), reverse_kl(a))) < z_limit(1)
    short = VarDiU(teacher(), Prior(), candidates="chain", chain_length=1, chain_rate=0.01, sigma_data=a)
    (rows,) = torch.autograd.grad(short.generator_loss(draw).sum(), draw.x)
    assert abs(z_scores((rows * draw.z).flatten(), reverse_kl(a))) > 10


def test_a_chain_has_no_bound_and_needs_its_latents() -> None:
    objective = VarDiU(teacher(), Prior(), candidates="chain")
    assert not objective.has_bound
    assert objective.measure(noisy(bent, 4, 0, eta=16)) == {}
    with pytest.raises(UsageError, match="a chain gives the gradient of a bound, but not its value"):
        objective.bound(noisy(bent, 4, 0, eta=16))
    with pytest.raises(UsageError, match="a chain of 8 steps needs 16 further latents"):
        objective.generator_loss(noisy(bent, 4, 0, eta=15))


@every_scale
def test_moment_matching_is_half_of_diff_instruct(a: float) -> None:
    """With the critic halfway between student and teacher, under the weight (σ/α)²."""
    draw, generator = draw_of(a, weight=lambda x, x_t: 0 * x_t + SIGMA**-2)

    class Halfway(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.schedule = critic(a), VE()

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return (self.own(x_t, t) + teacher()(x_t, t)) / 2

    objective = MomentMatching(teacher(), Halfway())
    assert slope(objective, draw, generator) == pytest.approx(reverse_kl(a) / 2, abs=1e-9)
    loss = (draw.noise.weight * objective.critic_loss(draw)).sum()  # whose optimum that critic is
    gradients = torch.autograd.grad(loss, list(objective.critic.parameters()), allow_unused=True)  # type: ignore[attr-defined]
    assert all(float(g.abs().max()) < 1e-9 for g in gradients if g is not None)
