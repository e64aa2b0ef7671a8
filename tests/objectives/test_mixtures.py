"""SMD and SMT: gradients of α-skew Jensen–Shannon divergences, and what the critic's regression teaches the head."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from one_dimension import (
    S_DATA,
    SIGMA,
    ExactHead,
    S,
    critic,
    draw_of,
    normaliser,
    perceptron,
    reverse_kl,
    slope,
    teacher,
)
from tiny_models import tiny_unet
from vardistill.denoisers.diffusers import DiffusersDenoiser
from vardistill.denoisers.features import inner_layer
from vardistill.denoisers.of_mixtures import OfMixtures
from vardistill.diffusion.noise import Draw
from vardistill.diffusion.schedules import VE
from vardistill.objectives import DMD, SMD, SMT, Head, smd
from vardistill.objectives.smd import with_zeros

pytestmark = pytest.mark.usefixtures("float64")


class OfShare(SMD):
    """SMD at one α."""

    share = 1.0

    def shares(self, draw: Draw) -> Tensor:
        return torch.full_like(draw.noise.t, self.share)


def divergence(a: Tensor, alpha: float) -> Tensor:
    """D_α = 1/α KL(p_θ^t ‖ m) + 1/(1 − α) KL(p_d^t ‖ m), by the trapezoidal rule."""
    x = torch.linspace(-25, 25, 20_001)
    own, data = (Normal(0.0, v).log_prob(x) for v in ((a**2 + SIGMA**2).sqrt(), torch.tensor(math.sqrt(S))))
    mixed = torch.logaddexp(math.log(alpha) + data, math.log(1 - alpha) + own)
    kls = [torch.trapezoid(p.exp() * (p - mixed), x) for p in (own, data)]
    return kls[0] / alpha + kls[1] / (1 - alpha)


@pytest.mark.parametrize(("alpha", "known"), [(0.25, -0.4610), (0.5, -0.4001), (0.75, -0.3646)])
def test_smd_follows_its_divergence(alpha: float, known: float) -> None:
    a = 0.8
    head: Any = ExactHead(a)
    objective = OfShare(teacher(), critic(a), head, generator_gan=0.0)
    objective.share = alpha
    draw, generator = draw_of(a, nodes=60, weight=lambda x, x_t: normaliser(x, x_t) / SIGMA**2)
    scale = torch.tensor(a, requires_grad=True)
    (exact,) = torch.autograd.grad(divergence(scale, alpha), scale)
    assert float(exact) == pytest.approx(known, abs=5e-5)
    assert slope(objective, draw, generator) == pytest.approx(float(exact), rel=1e-5)


def test_smd_of_the_data_alone_is_dmd() -> None:
    a = 0.8
    head: Any = ExactHead(a)
    of_data = OfShare(teacher(), critic(a), head, generator_gan=1.0)
    slopes = [slope(objective, *draw_of(a)) for objective in (of_data, DMD(teacher(), critic(a)))]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-9)


def with_real(draw: Draw, u: float | Tensor = 0.8) -> Draw:
    """The same rule for (y, ε′) of the data, and α from u."""
    eta = torch.special.ndtri(torch.as_tensor(u)).expand(1, len(draw.z), 1)
    return replace(draw, real=S_DATA * draw.z, noise=replace(draw.noise, real_eps=draw.noise.eps), eta=eta, memo={})


class Shifted(ExactHead):
    """log p_d^t/p_θ^t + b, of the critic's unused features and x_t that it is told."""

    def __init__(self, a: float) -> None:
        super().__init__(a)
        self.b, self.x_t = nn.Parameter(torch.zeros(())), iter(())

    def forward(self, features: Tensor) -> Tensor:
        return self.logits(None, next(self.x_t), features, {}) + self.b  # type: ignore[arg-type]


@pytest.mark.parametrize("b", [0.0, 0.3, -0.3])
def test_the_regression_is_stationary_at_the_log_ratio_alone(b: float, monkeypatch: pytest.MonkeyPatch) -> None:
    a = 0.8
    head: Any = Shifted(a)
    head.b.data.fill_(b)
    own = critic(a)
    monkeypatch.setattr(smd.inside, "features_and_mean", lambda denoiser, x, t: (x, denoiser(x, t)))
    draw = with_real(draw_of(a, nodes=40)[0])
    head.x_t = iter([draw.noise.x_t(draw.x.detach()), draw.real_t])
    loss = draw.noise.weight * SMD(teacher(), own, head).critic_loss(draw)
    gradient = float(torch.autograd.grad(loss.sum(), head.b)[0])
    assert abs(gradient) < 1e-7 if b == 0 else gradient * b > 1e-4


def test_a_quarter_of_the_critics_rows_sees_the_student_alone() -> None:
    u = (torch.arange(1000) + 0.5) / 1000
    alpha = with_zeros(u)
    assert float((alpha == 0).double().mean()) == 0.25
    torch.testing.assert_close(alpha[250:], (torch.arange(750) + 0.5) / 750)


@pytest.mark.parametrize("u", [0.0, 0.25, 1.0])
def test_shares_at_their_ends_leave_all_finite(u: float) -> None:
    own, head = perceptron(0), Head(8)
    draw, generator = draw_of(0.8)
    draw = with_real(draw, u)
    for objective in (SMD(teacher(), own, head), SMT(OfMixtures(own, 8), head)):
        losses = objective.critic_loss(draw), objective.generator_loss(draw)
        networks = [p for n in objective.networks.values() for p in n.parameters()]
        for loss, parameters in zip(losses, (networks, [generator.A]), strict=True):
            assert loss.isfinite().all()
            gradients = torch.autograd.grad(loss.sum(), parameters, retain_graph=True, allow_unused=True)
            assert all(g.isfinite().all() for g in gradients if g is not None)


class Exact(nn.Module):
    """E[x | x_t] of all mixtures, h D_T + (1 − h) D_θ."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.schedule, self.a, self.head, self.denoiser = VE(), a, ExactHead(a), None

    def forward(self, x_t: Tensor, t: Tensor, share: Tensor) -> Tensor:
        logits = self.head.logits(None, x_t, t, {})  # type: ignore[arg-type]
        h = (logits + share.logit()).sigmoid()[:, None]
        return h * teacher()(x_t, t) + (1 - h) * critic(self.a)(x_t, t)


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_smt_has_smds_direction_and_the_length_of_dmd(u: float) -> None:
    a, exact = 0.8, ExactHead(0.8)
    head: Any = exact
    everything: Any = Exact(a)
    draw, _ = draw_of(a)
    draw = with_real(draw, u)
    (field,) = torch.autograd.grad(SMT(everything, head, generator_gan=0.0).generator_loss(draw).sum(), draw.x)
    (of_dmd,) = torch.autograd.grad(DMD(teacher(), critic(a)).generator_loss(draw).sum(), draw.x)
    torch.testing.assert_close(field, of_dmd)  # in one dimension the direction is a sign
    if u == 1.0:
        assert reverse_kl(a) < 0


@pytest.mark.parametrize("which", ["perceptron", "unet"])
def test_a_denoiser_of_mixtures_is_its_denoiser_until_it_learns(which: str) -> None:
    picture = which == "unet"
    torch.manual_seed(0)
    denoiser = DiffusersDenoiser(tiny_unet().double(), diffusers.DDIMScheduler()) if picture else perceptron(0)
    x_t, t = torch.randn(3, *(denoiser.data_shape if picture else (1,))), torch.full((3,), 0.5)
    seen: list[Tensor] = []
    hook = inner_layer(denoiser).register_forward_hook(lambda m, a, out: seen.append(out))
    plain = denoiser(x_t, t)
    hook.remove()
    of_all = OfMixtures(denoiser, seen[0].shape[1])
    for share in (None, torch.zeros(3), torch.full((3,), 0.5)):
        torch.testing.assert_close(of_all(x_t, t, share), plain, rtol=1e-12, atol=1e-12)
    nn.init.normal_(of_all.modulation[-1].weight)
    values = [of_all(x_t, t, torch.full((3,), share)) for share in (0.0, 0.5, 1.0)]
    assert all(float((u - v).detach().abs().max()) > 1e-4 for u, v in zip(values, values[1:], strict=False))
    torch.testing.assert_close(of_all(x_t, t), values[-1])
    torch.testing.assert_close(denoiser(x_t, t), plain, rtol=0, atol=0)
