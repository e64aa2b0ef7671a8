"""Objectives with a critic against their closed forms, and the features that discriminators see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from one_dimension import (
    SIGMA,
    ExactHead,
    S,
    critic,
    draw_of,
    every_scale,
    normaliser,
    perceptron,
    reverse_kl,
    slope,
    teacher,
)
from tiny_models import tiny_dit, tiny_unet
from vardistill.denoisers.diffusers import DiffusersDenoiser
from vardistill.denoisers.features import features, features_and_mean, inner_layer
from vardistill.diffusion import Denoiser
from vardistill.diffusion.noise import Draw
from vardistill.errors import UsageError
from vardistill.objectives import DMD, DMD2, SDS, DiffInstruct, FDistill, Head, SiD, SiDConfig, SiM, f_distill

pytestmark = pytest.mark.usefixtures("float64")


@every_scale
def test_diff_instruct_and_dmd_follow_the_reverse_kl(a: float) -> None:
    draw, generator = draw_of(a)
    assert slope(DiffInstruct(teacher(), critic(a)), draw, generator) == pytest.approx(reverse_kl(a), abs=1e-9)
    draw, generator = draw_of(a, weight=lambda x, x_t: normaliser(x, x_t) / SIGMA**2)
    assert slope(DMD(teacher(), critic(a)), draw, generator) == pytest.approx(reverse_kl(a), abs=1e-9)


@every_scale
def test_score_distillation_sampling_shrinks_every_student(a: float) -> None:
    draw, generator = draw_of(a)
    assert slope(SDS(teacher()), draw, generator) == pytest.approx(a / S, abs=1e-9)


@every_scale
@pytest.mark.parametrize("weight", [0.5, 1.0, 1.2])
def test_sid_is_a_fisher_divergence(a: float, weight: float) -> None:
    draw, generator = draw_of(a, weight=lambda x, x_t: normaliser(x, x_t) / SIGMA**4)
    A = a**2 + SIGMA**2
    k = 1 / A - 1 / S
    found = slope(SiD(teacher(), critic(a), a=weight), draw, generator)
    assert found == pytest.approx(-2 * a * k * (1 / S + weight * k), abs=1e-8)
    if weight == 0.5:  # half the gradient of E‖s_θ − s_T‖² = A k²
        assert found == pytest.approx(a * (1 / S**2 - 1 / A**2), abs=1e-8)


@every_scale
def test_sim_is_the_fisher_divergence_under_a_frozen_law(a: float) -> None:
    draw, generator = draw_of(a)
    A = a**2 + SIGMA**2
    found = slope(SiM(teacher(), critic(a), distance="square"), draw, generator)
    assert found == pytest.approx(SIGMA**2 * 4 * a * (1 / S - 1 / A) / A, abs=1e-8)


def test_sim_with_squares_is_sid_row_by_row() -> None:
    own = perceptron(0)
    draw, generator = draw_of(0.8, nodes=5)
    of_sid = SiD(teacher(), own, a=1.0).generator_loss(draw)
    to_sid = SIGMA**2 / (2 * normaliser(draw.x, draw.x_t).flatten().detach())
    weighted = replace(draw, noise=replace(draw.noise, weight=draw.noise.weight * to_sid), memo={})
    of_sim = SiM(teacher(), own, distance="square").generator_loss(weighted)
    torch.testing.assert_close(of_sim, of_sid, atol=1e-9, rtol=1e-7)
    ours, theirs = (torch.autograd.grad(v.sum(), generator.A, retain_graph=True)[0] for v in (of_sim, of_sid))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


def test_a_wide_pseudo_huber_distance_is_half_the_square() -> None:
    draw, _ = draw_of(0.8)
    square = SiM(teacher(), critic(1.1), distance="square").generator_loss(draw)
    wide = SiM(teacher(), critic(1.1), c=1e5).generator_loss(draw)
    torch.testing.assert_close(1e5 * wide, square / 2, atol=1e-9, rtol=1e-6)


def of_divergence(a: float, divergence: Any, **weights: float) -> FDistill:
    head: Any = ExactHead(a)
    return FDistill(teacher(), critic(a), head, divergence=divergence, **weights)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [("reverse-kl", reverse_kl), ("forward-kl", lambda a: a * (1 / (a**2 + SIGMA**2) - S / (a**2 + SIGMA**2) ** 2))],
)
@pytest.mark.parametrize("a", [1.1, 1.5, 1.9])
def test_f_distill_follows_its_divergence(
    a: float, divergence: str, expected: Callable[[float], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f_distill, "RATIOS", (0.0, 1e300))
    monkeypatch.setattr(f_distill, "LARGEST_LOGIT", 500.0)
    draw, generator = draw_of(a, nodes=60, weight=lambda x, x_t: normaliser(x, x_t) / SIGMA**2)
    objective = of_divergence(a, divergence, generator_gan=0.0)
    logits = objective.head.logits(objective.critic, draw.x_t, draw.noise.t, {})
    mean = float(f_distill.WEIGHTS[divergence](logits.detach().exp()).mean())  # that the batch is divided by
    assert mean * slope(objective, draw, generator) == pytest.approx(expected(a), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("divergence", f_distill.WEIGHTS)
def test_weights_of_a_divergence_have_mean_one(divergence: str) -> None:
    weights = of_divergence(1.0, divergence).field_weight(torch.linspace(-15, 15, 31))
    assert float(weights.mean()) == pytest.approx(1.0)
    assert (weights > 0).all()


@every_scale
def test_the_ideal_adversarial_term_is_a_weighted_score_difference(a: float) -> None:
    draw, _ = draw_of(a)
    head: Any = ExactHead(a)
    both, alone = (DMD2(teacher(), critic(a), head, generator_gan=weight) for weight in (1.0, 0.0))
    rows = (both.generator_loss(draw) - alone.generator_loss(draw)).sum()
    (gradient,) = torch.autograd.grad(rows, draw.x)
    logits = head.logits(None, draw.x_t, draw.noise.t, {})
    difference = draw.score(both.critic) - draw.score(both.teacher)
    torch.testing.assert_close(gradient, difference / (1 + logits.exp())[:, None], atol=1e-10, rtol=1e-8)


def test_a_discriminator_treats_real_and_generated_alike() -> None:
    """With the signs of the logits and the two samples swapped, its loss is the same."""
    own, head = perceptron(0), Head(8)
    draw, _ = draw_of(0.8)
    x, y = draw.x.detach(), torch.linspace(-2, 2, len(draw.x))[:, None]
    noise = replace(draw.noise, real_eps=draw.noise.eps.flip(0))
    given = replace(draw, x=x, real=y, noise=noise)
    swapped = replace(given, x=y, real=x, noise=replace(noise, eps=noise.real_eps, real_eps=noise.eps), memo={})
    objective = DMD2(teacher(), own, head, critic_gan=1.0)

    def told_apart(draw: Draw) -> Tensor:
        matching = super(DMD2, objective).critic_loss(draw)
        return objective.critic_loss(draw) - matching

    first = told_apart(given)
    with torch.no_grad():
        head.layers[-1].weight.neg_()
        head.layers[-1].bias.neg_()
    torch.testing.assert_close(told_apart(swapped), first)


def denoisers() -> list[tuple[Denoiser, Tensor]]:
    torch.manual_seed(0)
    picture = DiffusersDenoiser(tiny_unet().double(), diffusers.DDIMScheduler())
    return [(perceptron(0), torch.randn(3, 1)), (picture, torch.randn(3, *picture.data_shape))]


@pytest.mark.parametrize("which", [0, 1])
def test_features_are_those_of_a_whole_run_and_leave_no_hook(which: int) -> None:
    denoiser, x_t = denoisers()[which]
    t = torch.full((3,), 0.5)
    x_t.requires_grad_()
    alone = features(denoiser, x_t, t)
    beside, mean = features_and_mean(denoiser, x_t, t)
    assert torch.equal(alone, beside)
    torch.testing.assert_close(mean, denoiser(x_t, t), atol=0, rtol=0)
    assert not inner_layer(denoiser)._forward_hooks
    (gradient,) = torch.autograd.grad(Head(alone.shape[1])(alone).sum(), x_t)
    assert (gradient != 0).any()


def test_a_critic_without_an_inner_layer_has_no_features() -> None:
    with pytest.raises(UsageError, match="GaussianDenoiser has no middle block"):
        features(critic(1.0), torch.zeros(1, 1), torch.full((1,), 0.5))


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_sids_critic_is_guided_by_its_label_for_no_class(scale: float) -> None:
    """At 0 it is blind to labels (Zero-CFG)."""
    network = DiffusersDenoiser(tiny_dit().double(), diffusers.DDIMScheduler())
    parts: Any = SimpleNamespace(teacher=copy.deepcopy(network), critic=lambda start, **sizes: network, data_std=0.5)
    own = SiDConfig(a=1.0, critic_guidance=scale).build(parts).critic
    x_t = torch.randn(2, *network.data_shape, generator=torch.Generator().manual_seed(0))
    t, labels = torch.full((2,), 0.5), torch.tensor([0, 1])
    of_none = network(x_t, t, labels=torch.full_like(labels, int(network.null_label or 0)))
    torch.testing.assert_close(own(x_t, t, labels=labels), of_none + scale * (network(x_t, t, labels=labels) - of_none))


def test_a_critic_without_a_label_for_no_class_is_not_guided() -> None:
    parts: Any = SimpleNamespace(teacher=teacher(), critic=lambda start, **sizes: perceptron(0), data_std=1.0)
    with pytest.raises(UsageError, match="a conditional denoiser with a label for no class"):
        SiDConfig(critic_guidance=0.0).build(parts)
