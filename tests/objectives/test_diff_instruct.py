"""Diff-Instruct where everything is closed form: a linear generator, a Gaussian target and affine critics.

The generator's loss is then a polynomial in (z, ε) of degree two, and the critic's, too: a Gauss–Hermite rule gives
their expectations, and those of their gradients, without Monte-Carlo error. Losses are means over the `DATA` axes.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small_runs
from linear_gaussian import (
    ByLabel,
    GaussianDenoiser,
    Linear,
    complete,
    diffusive_kl,
    exact_critic,
    gradients,
    labelled_drawn,
    of_label,
    predicted_bias,
    quadrature,
    random_draw,
    student,
    student_marginal,
    students,
    target,
    target_marginal,
    targets,
    wrong_critic,
)
from vardistill.denoisers import Preconditioned
from vardistill.diffusion import score
from vardistill.diffusion.noise import Draw
from vardistill.diffusion.schedules import VE, VP, Schedule
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP
from vardistill.objectives import DiffInstruct, Part, WeightedSum
from vardistill.students.perceptron import MLP
from vardistill.training.loop import Trainer, evaluation_mode

pytestmark = pytest.mark.usefixtures("float64")

DATA = 3

every_level = pytest.mark.parametrize(
    ("schedule", "t"), [(schedule, t) for schedule in (VE(), VP()) for t in (0.1, 0.3, 0.6)]
)


@pytest.fixture
def generator() -> Linear:
    return student()


class WithDropout(nn.Module):
    """A critic that is random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = VE()
        self.weight, self.dropout = nn.Parameter(torch.ones(())), nn.Dropout(0.5)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Half of w x_t in training."""
        return self.weight * self.dropout(x_t)


def test_a_critic_with_dropout_is_not_random(generator: Linear, rng: torch.Generator) -> None:
    """As a run asks it, alone and in a sum."""
    objective = DiffInstruct(target(VE()), WithDropout().train())
    for asked in (objective, WeightedSum([Part(DiffInstruct(target(VE()), WithDropout()))])):
        Trainer(generator, asked, replace(small_runs.levels(), schedule=VE()), small_runs.config(steps=1))
    state = torch.get_rng_state()
    for ask in (objective.score_difference, objective.generator_loss, objective.critic_loss):
        draws = [random_draw(generator, VE(), (0.3,), 8, rng.manual_seed(0)) for _ in range(2)]
        assert torch.equal(ask(draws[0]), ask(draws[1]))
    assert torch.equal(torch.get_rng_state(), state)


class TestGenerator:
    @every_level
    def test_with_the_exact_critic_mean_gradient_is_that_of_the_kl(
        self, generator: Linear, schedule: Schedule, t: float
    ) -> None:
        objective = DiffInstruct(target(schedule), exact_critic(generator, schedule))
        parameters = list(generator.parameters())
        actual = gradients(objective.generator_loss(quadrature(generator, schedule, t)), *parameters)
        expected = gradients(diffusive_kl(*parameters, objective.teacher, t) / DATA, *parameters)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    @every_level
    @pytest.mark.parametrize(("shift", "widen"), [(0.3, 1.0), (0.0, 1.3), (-0.2, 0.6)])
    def test_a_wrong_critic_adds_the_bias_that_its_score_predicts(
        self, generator: Linear, schedule: Schedule, t: float, shift: float, widen: float
    ) -> None:
        critic = wrong_critic(generator, schedule, shift, widen)
        objective = DiffInstruct(target(schedule), critic)
        parameters = list(generator.parameters())
        actual = gradients(objective.generator_loss(quadrature(generator, schedule, t)), *parameters)
        exact = gradients(diffusive_kl(*parameters, objective.teacher, t) / DATA, *parameters)
        bias = predicted_bias(generator, critic, t) / DATA
        assert bias.norm() > 1e-3 * exact.norm()
        torch.testing.assert_close(actual - exact, bias, rtol=1e-8, atol=1e-9)

    def test_it_reaches_neither_critic_nor_teacher(self, generator: Linear, rng: torch.Generator) -> None:
        teacher = learned()
        objective = DiffInstruct(teacher, copy.deepcopy(teacher))
        objective.generator_loss(random_draw(generator, VE(), (0.5,), 8, rng)).sum().backward()
        assert generator.A.grad is not None
        assert all(p.grad is None for p in (*teacher.parameters(), *objective.critic.parameters()))
        assert not any(p.requires_grad for p in teacher.parameters())
        assert not any(module.training for module in teacher.modules())
        assert objective.networks == {"critic": objective.critic}

    def test_a_row_has_its_weight(self, generator: Linear, rng: torch.Generator) -> None:
        objective = DiffInstruct(target(VE()), wrong_critic(generator, VE()))
        draw = random_draw(generator, VE(), (0.3, 0.6), 8, rng, draws=2)
        weight = torch.rand(16, generator=rng)
        weighted = replace(draw, noise=replace(draw.noise, weight=weight))
        torch.testing.assert_close(objective.generator_loss(weighted), weight * objective.generator_loss(draw))
        torch.testing.assert_close(objective.critic_loss(weighted), objective.critic_loss(draw))

    def test_the_fisher_divergence_is_logged(self, generator: Linear) -> None:
        """d E ‖s_θ − s_T‖² of two Gaussians: tr(H C Hᵀ) + |P_T α (b − m)|², H = P_θ − P_T, P the precisions."""
        schedule, t = VP(), 0.4
        objective = DiffInstruct(target(schedule), exact_critic(generator, schedule))
        draw = quadrature(generator, schedule, t)
        logged = objective.measure(draw)["fisher"] * len(draw.z) * DATA
        scales = schedule(torch.tensor(t))
        own, data = student_marginal(generator.A, generator.b, *scales), target_marginal(objective.teacher, *scales)
        H = own.precision_matrix - data.precision_matrix
        mean = data.precision_matrix @ (own.mean - data.mean)
        expected = (H @ own.covariance_matrix @ H).trace() + mean.pow(2).sum()
        torch.testing.assert_close(logged, expected.detach(), rtol=1e-9, atol=1e-9)


class TestCritic:
    @every_level
    def test_the_exact_denoiser_is_its_optimum(self, generator: Linear, schedule: Schedule, t: float) -> None:
        """The gradient of the expected loss vanishes there, and nowhere near; the loss grows away from it."""

        def expected(critic: GaussianDenoiser) -> tuple[Tensor, Tensor]:
            objective = DiffInstruct(target(schedule), critic)
            draw = quadrature(generator, schedule, t)
            unweighted = replace(draw, noise=replace(draw.noise, weight=torch.ones_like(draw.noise.weight)))
            loss = (draw.noise.weight * objective.critic_loss(unweighted)).sum()
            return loss, gradients(loss, *critic.parameters())

        least, at_optimum = expected(exact_critic(generator, schedule))
        assert at_optimum.abs().max() < 1e-8 * (1 + least)
        for shift, widen in ((0.05, 1.0), (-0.05, 1.0), (0.0, 1.05), (0.0, 0.95)):
            loss, slope = expected(wrong_critic(generator, schedule, shift, widen))
            assert loss > least
            assert slope.norm() > 1e-5

    def test_it_is_weighted_as_in_edm(self, generator: Linear, rng: torch.Generator) -> None:
        schedule, std = VP(), 1.7
        critic = wrong_critic(generator, schedule)
        draw = random_draw(generator, schedule, (0.2, 0.7), 8, rng)
        ratio = draw.noise.sigma / draw.noise.alpha
        weight = (ratio**2 + std**2) / (ratio * std) ** 2
        expected = weight * (critic(draw.x_t, draw.noise.t) - draw.x).pow(2).mean(1)
        actual = DiffInstruct(target(schedule), critic, sigma_data=std).critic_loss(draw)
        torch.testing.assert_close(actual, expected)

    def test_it_does_not_reach_the_generator(self, generator: Linear, rng: torch.Generator) -> None:
        objective = DiffInstruct(target(VE()), wrong_critic(generator, VE()))
        objective.critic_loss(random_draw(generator, VE(), (0.5,), 8, rng)).sum().backward()
        assert generator.A.grad is None
        assert all(p.grad is not None for p in objective.critic.parameters())

    def test_it_learns_the_function_that_the_run_returns(self) -> None:
        """In training and in evaluation the student is one function of z: bit for bit."""
        trainer = small_runs.trainer("diff-instruct", ema=0.0, steps=3, log_every=1)
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        objective = trainer.objective

        def watched(loss: small_runs.Loss) -> small_runs.Loss:
            def take(draw: Draw) -> Tensor:
                z = draw.z[: draw.noise.latents]
                with evaluation_mode(trainer.student):
                    seen.append((z, draw.x[: len(z)], trainer.student(z)))
                return loss(draw)

            return take

        objective.critic_loss = watched(objective.critic_loss)
        objective.generator_loss = watched(objective.generator_loss)
        run = trainer.run()
        assert len(seen) >= 3 * 3
        assert all(torch.equal(trained, evaluated) for _, trained, evaluated in seen)
        z, trained, _ = seen[-1]  # the books' draw after the last step
        assert torch.equal(run.generator(z), trained)


def test_under_labels_losses_and_gradients_are_those_of_each_class_alone(rng: torch.Generator) -> None:
    schedule, generator, teacher = VP(), students(), targets(VP())
    critics = [wrong_critic(generator.of(c), schedule, shift=0.1 + c) for c in range(2)]
    both = DiffInstruct(teacher, ByLabel(critics))
    draw = complete(labelled_drawn(generator, schedule, (0.2, 0.6), 16, rng, draws=2), generator)
    loss, critic_loss = both.generator_loss(draw), both.critic_loss(draw)
    of_A, of_b = torch.autograd.grad(loss.sum(), list(generator.parameters()))
    for c, (critic, denoiser) in enumerate(zip(critics, teacher.of_label, strict=True)):
        alone, objective = generator.of(c), DiffInstruct(denoiser, copy.deepcopy(critic))
        own, rows = of_label(draw, c, alone)
        assert 0 < len(rows) < 32
        torch.testing.assert_close(loss[rows], objective.generator_loss(own), rtol=1e-10, atol=1e-10)
        expected = gradients(objective.generator_loss(own), *alone.parameters())
        torch.testing.assert_close(torch.cat([of_A[c].flatten(), of_b[c]]), expected, rtol=1e-10, atol=1e-10)
        expected = gradients(objective.critic_loss(own), *objective.critic.parameters())
        torch.testing.assert_close(gradients(critic_loss, *critic.parameters()), expected, rtol=1e-9, atol=1e-9)


def learned() -> Preconditioned:
    return Preconditioned(LevelMLP(3, 3, depth=1, width=8), 1.0, VE())


class TestMistakes:
    def test_arguments(self, generator: Linear) -> None:
        teacher = target(VE())
        mistakes: list[tuple[Any, int, str]] = [
            (exact_critic(generator, VE()), 0, "critic_steps must be a whole number, at least 1, but is 0"),
            (teacher, 1, "the critic must be a module with parameters, but GaussianMixture has none"),
            (lambda x_t, t: x_t, 1, "the critic must be a module with parameters, but function has none"),
            (exact_critic(generator, VP()), 1, "the critic's schedule is VP.*, but the teacher's is VE"),
        ]
        for critic, steps, match in mistakes:
            with pytest.raises(UsageError, match=match) as caught:
                DiffInstruct(teacher, critic, steps)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("inf"), float("nan")])
    def test_a_scale_of_the_data_that_is_none(self, sigma_data: float) -> None:
        with pytest.raises(UsageError, match="sigma_data must be positive and finite"):
            DiffInstruct(target(VE()), learned(), sigma_data=sigma_data)

    def test_a_critic_that_cuts_the_graph(self) -> None:
        class Cut(Preconditioned):
            @torch.no_grad()
            def forward(self, x_t: torch.Tensor, t: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
                return super().forward(x_t, t, **condition)

        critic = Cut(LevelMLP(3, 3, depth=1, width=8), 1.0, VE())
        with pytest.raises(UsageError, match="no gradient reaches the critic's parameters"):
            DiffInstruct(learned(), critic).check(MLP(latent=3, data=3), {})

    def test_a_critic_of_the_teachers_own_weights(self) -> None:
        teacher = learned()
        sharing = Preconditioned(teacher.network, 2.0, VE())
        for critic in (teacher, sharing):
            with pytest.raises(UsageError, match=r"give a copy\.deepcopy of the teacher"):
                DiffInstruct(teacher, critic)

    def test_levels_of_another_schedule(self) -> None:
        levels = replace(small_runs.levels(), schedule=VP())
        with pytest.raises(UsageError, match="reschedule"):
            Trainer(small_runs.generator(), small_runs.objective("diff-instruct"), levels, small_runs.config())


def test_score_difference_is_that_of_the_denoisers(generator: Linear, rng: torch.Generator) -> None:
    critic, teacher = wrong_critic(generator, VP()), target(VP())
    draw = random_draw(generator, VP(), (0.4,), 8, rng)
    actual = DiffInstruct(teacher, critic).score_difference(draw)
    expected = score(critic, draw.x_t, draw.noise.t) - score(teacher, draw.x_t, draw.noise.t)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected.detach())
