"""Discriminators: hinge and approximate R1 of linear heads; LADD, ADD, SiDA and ADM against what they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear_gaussian import gauss_hermite
from one_dimension import S_DATA, SIGMA, critic, draw_of, perceptron, slope, teacher
from vardistill.denoisers.features import features
from vardistill.diffusion import Denoiser
from vardistill.diffusion.noise import Draw, Noise
from vardistill.objectives import ADM, LADD, SDS, Head, SiD, SiDA
from vardistill.objectives.critic import error_of
from vardistill.objectives.discriminator import approximate_r1, of_head, of_student

pytestmark = pytest.mark.usefixtures("float64")


class LinearHead(nn.Module):
    """C = ⟨v, x_t⟩: features are x_t itself."""

    def __init__(self, v: Tensor) -> None:
        super().__init__()
        self.v = nn.Parameter(v)

    def logits(self, trunk: Denoiser, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return x_t @ self.v


def with_real(draw: Draw, real: Tensor) -> Draw:
    return replace(draw, real=real, noise=replace(draw.noise, real_eps=draw.noise.eps.flip(0)), memo={})


def test_a_linear_hinge_draws_by_its_weights_until_the_margin_is_met() -> None:
    v = torch.tensor([2.0], requires_grad=True)
    generated, real = torch.tensor([[-0.9], [0.3]]), torch.tensor([[0.7], [-0.2]])
    inside = generated @ v > -1, real @ v < 1
    (gradient,) = torch.autograd.grad(of_head(real @ v, generated @ v, "hinge").sum(), v)
    torch.testing.assert_close(gradient, generated[inside[0]].sum(0) - real[inside[1]].sum(0))
    x = generated.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(of_student(x @ v, "hinge").sum(), x)
    torch.testing.assert_close(pulled, -v.detach().expand(2, 1))


def test_r1_of_a_linear_logit_is_its_squared_weight() -> None:
    """In units of the noisy samples' scale, α² σ_d² + σ²; the mean over n by a rule that is exact for squares."""
    n, weights = gauss_hermite(2, 3)
    v, scales = torch.tensor([0.7, -1.1]), torch.ones(len(n))
    noise = Noise(0.5 * scales, 0.8 * scales, 0.6 * scales, scales, n, len(n))
    x_t = torch.randn(len(n), 2, generator=torch.Generator().manual_seed(0))
    penalty = approximate_r1(lambda x: x @ v, x_t @ v, x_t, noise, sigma_data=2.0)
    expected = (0.8**2 * 2.0**2 + 0.6**2) * v.square().sum()
    torch.testing.assert_close((weights * penalty).sum(), expected)


@pytest.mark.parametrize("loss", ["logistic", "hinge"])
def test_ladd_is_its_two_losses(loss: Any) -> None:
    head: Any = LinearHead(torch.tensor([0.8]))
    draw = with_real(draw_of(0.8)[0], torch.linspace(-2, 2, 9)[:, None])
    objective = LADD(perceptron(0), head, loss=loss, r1=0.0)
    generated, real = draw.x_t.detach() @ head.v, draw.real_t @ head.v
    torch.testing.assert_close(objective.head_loss(draw), draw.noise.weight * of_head(real, generated, loss))
    torch.testing.assert_close(objective.generator_loss(draw), draw.noise.weight * of_student(generated, loss))
    with_penalty = LADD(perceptron(0), head, loss=loss, r1=0.5)
    extra = draw.noise.weight * 0.5 * (S_DATA**2 + SIGMA**2) * head.v**2 * draw.noise.eps.flatten() ** 2
    of_penalty = LADD(perceptron(0), head, loss=loss, r1=0.5, sigma_data=S_DATA).head_loss(draw)
    torch.testing.assert_close(of_penalty - objective.head_loss(draw), extra)
    assert with_penalty.head_loss(draw).sum() != of_penalty.sum()


def test_adds_second_term_is_score_distillation_sampling() -> None:
    """λ c/(d σ_d²) ‖x − D_T‖² has the gradient of SDS under the weight 2 λ c σ²/σ_d², in every row (α = 1)."""
    head: Any = LinearHead(torch.zeros(1))
    draw, _ = draw_of(0.8)
    own = perceptron(0)
    objective = LADD(own, head, loss="hinge", distillation=2.5, sigma_data=S_DATA)
    (found,) = torch.autograd.grad(objective.generator_loss(draw).sum(), draw.x)
    weight = 2 * 2.5 * SIGMA**2 / (S_DATA * (SIGMA**2 + S_DATA**2) ** 0.5)
    weighted = replace(draw, noise=replace(draw.noise, weight=weight * draw.noise.weight), memo={})
    (expected,) = torch.autograd.grad(SDS(own).generator_loss(weighted).sum(), draw.x)
    torch.testing.assert_close(found, expected)


def test_sida_is_sid_and_a_weighted_adversarial_term() -> None:
    own = perceptron(0)
    draw, _ = draw_of(0.8)
    plain, with_gan = (SiDA(teacher(), own, generator_gan=gan) for gan in (0.0, 0.7))
    of_sid = SiD(teacher(), own, a=1.0)
    losses = plain.generator_loss(draw), of_sid.generator_loss(draw)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), draw.x, retain_graph=True)[0] for v in losses))
    logit = features(own, draw.x_t, draw.noise.t).mean(1)
    term = nn.functional.softplus(-logit) / error_of(teacher()(draw.x_t, draw.noise.t), draw.x).flatten()
    torch.testing.assert_close(
        with_gan.generator_loss(draw) - plain.generator_loss(draw), 0.7 * draw.noise.weight * term
    )


def test_adm_has_nothing_to_tell_where_critic_and_teacher_agree() -> None:
    torch.manual_seed(0)
    head, own = Head(8), perceptron(0)
    draw, generator = draw_of(0.8)
    objective = ADM(perceptron(0), own, head)
    weight = {p: torch.autograd.grad(objective.critic_loss(draw).sum(), p)[0] for p in head.parameters()}
    matching = super(ADM, objective).critic_loss(draw)
    torch.testing.assert_close(objective.critic_loss(draw) - matching, torch.full_like(matching, 2.0))
    assert all(float(g.abs().max()) < 1e-12 for g in weight.values())
    assert slope(objective, draw, generator) != 0


def test_adms_step_is_the_samplers() -> None:
    """DDIM from t to half the ratio, seen by a head that returns it."""
    head: Any = LinearHead(torch.ones(1))
    draw, _ = draw_of(0.8)
    objective = ADM(perceptron(0), critic(0.8), head, shrink=0.5)
    denoised = critic(0.8)(draw.x_t, draw.noise.t)
    eps = (draw.x_t - denoised) / SIGMA
    expected = -draw.noise.weight * (denoised + 0.5 * SIGMA * eps).flatten()
    torch.testing.assert_close(objective.generator_loss(draw), expected)
