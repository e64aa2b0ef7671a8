"""From configurations to parts: every preset's, the objectives' own settings, and what cannot be built."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from vardistill.runs.build import Geometric, build_generator, build_levels, build_network_denoiser, build_objective, build_problem, build_real_samples
from vardistill.runs.config import (
    Config,
    DiffInstructConfig,
    GeneratorConfig,
    LevelsConfig,
    TeachConfig,
    TrainingConfig,
    VarDiUConfig,
    VarDiUVarFlowConfig,
    VarFlowConfig,
)
from vardistill.training.data import StoredSamples
from vardistill.denoisers import Preconditioned
from vardistill.diffusion import Denoiser
from vardistill.errors import UsageError
from vardistill.students.perceptron import MLP
from vardistill.networks import LevelMLP
from vardistill.diffusion.noise import Draw
from vardistill.objectives import DiffInstruct, Objective, VarDiU, VarFlow, WeightedSum
from vardistill.objectives.weighted_sum import Part
from vardistill.posteriors.few import FullGaussian
from vardistill.domains.points.presets import PRESETS, PosteriorName, learned_posterior
from vardistill.domains.points.problems import Problem
from vardistill.training.loop import Trainer

SMALL = Config(problem="mixture2", generator=GeneratorConfig(depth=1, width=8))


def problem_of(config: Config) -> Problem:
    return build_problem(config.problem, config.levels.schedule)


def a_draw(config: Config, generator: MLP, rng: torch.Generator) -> Draw:
    """64 rows at the levels of the run's beginning."""
    levels = replace(build_levels(config.levels, problem_of(config)), draws=1, antithetic=False)
    z = generator.latents(64, rng)
    return Draw(z, generator(z), levels.draw(generator.data_shape, 64, progress=0.0, rng=rng), generator)


def learned(problem: Problem, schedule: str = "ve") -> Preconditioned:
    return build_network_denoiser(TeachConfig(depth=1, width=8, schedule=schedule), problem)


def objective_of(config: Config, teacher: Denoiser | None = None) -> Objective:
    problem = problem_of(config)
    if teacher is None:
        assert problem.denoiser is not None
        teacher = problem.denoiser
    return build_objective(config, problem, teacher)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_makes_a_step(name: str) -> None:
    config = PRESETS[name].config
    training = replace(config.training, batch=32, steps=1, device="cpu", precision="no")
    config = replace(config, training=training)
    problem = problem_of(config)
    objective = objective_of(config, problem.denoiser)
    student, levels = build_generator(config, problem), build_levels(config.levels, problem)
    data = build_real_samples(config, problem, problem.denoiser) if problem.denoiser else None
    assert (data is not None) == objective.needs_real
    trainer = Trainer(student, objective, levels, training, data=data)
    trainer.advance(0.5)
    assert float(trainer.skipped) == 0
    assert all(v.isfinite().all() for v in student.state_dict().values())


class TestLearnedPosterior:
    @pytest.mark.parametrize("family", ["diagonal", "full", "mixture", "nsf"])
    def test_it_begins_as_the_exact_one_of_the_presets_student(
        self, family: PosteriorName, rng: torch.Generator
    ) -> None:
        """p(z | x_t) = p(z) N(x_t; αg(z), σ²I)/p(x_t), and x = g(z) is Gaussian, with two axes for two dimensions."""
        config = learned_posterior(family)
        problem = problem_of(config)
        generator, objective = build_generator(config, problem), objective_of(config)
        assert isinstance(objective, VarDiU)
        draw = a_draw(config, generator, rng)
        alpha, sigma = draw.noise.alpha, draw.noise.sigma
        with torch.no_grad():
            slope = generator.slope
            covariance = alpha[:, None, None] ** 2 * (slope.T @ slope) + sigma[:, None, None] ** 2 * torch.eye(2)
            log_joint = Normal(0.0, 1.0).log_prob(draw.z) + Normal(alpha[:, None] * draw.x, sigma[:, None]).log_prob(
                draw.x_t
            )
            marginal = MultivariateNormal(alpha[:, None] * generator.offset, covariance)
            exact = log_joint.sum(1) - marginal.log_prob(draw.x_t)
            q = objective.posterior(draw.x_t, alpha, sigma)
            torch.testing.assert_close(q.log_prob(draw.z), exact, atol=5e-3, rtol=1e-3)

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_its_network_is_the_configurations(self, precision: Literal["no", "bf16"]) -> None:
        config = learned_posterior("full")
        objective = objective_of(replace(config, training=replace(config.training, precision=precision)))
        assert isinstance(objective, VarDiU)
        assert isinstance(objective.posterior, FullGaussian)
        network = objective.posterior.network
        assert isinstance(network, LevelMLP)
        assert network.mixed == (precision == "bf16")
        assert any(isinstance(layer, nn.ReLU) for layer in network.layers)


def test_the_same_seed_builds_the_same_objective() -> None:
    for o in (VarDiUConfig(posterior="full"), DiffInstructConfig()):
        first, again, other = (
            objective_of(replace(SMALL, objective=o, training=TrainingConfig(seed=seed))).auxiliary_state()
            for seed in (0, 0, 1)
        )
        assert all(torch.equal(v, again[name]) for name, v in first.items())
        assert not all(torch.equal(v, other[name]) for name, v in first.items())


class TestVarFlow:
    @pytest.mark.parametrize("kind", ["exact", "learned", "data"])
    def test_real_samples_are_the_teachers_or_the_problems(self, kind: str, rng: torch.Generator) -> None:
        o = VarFlowConfig(real="data" if kind == "data" else "teacher", real_samples=50, real_steps=3)
        config = replace(SMALL, objective=o)
        problem = problem_of(config)
        assert problem.denoiser is not None
        teacher = learned(problem) if kind == "learned" else problem.denoiser
        samples = build_real_samples(config, problem, teacher)
        assert samples is not None
        if kind == "learned":
            assert isinstance(samples, StoredSamples)
            assert samples.data.shape == (50, *problem.data_shape)
        else:
            expected = problem.sample(7, torch.Generator().manual_seed(0))
            assert torch.equal(samples(7, torch.Generator().manual_seed(0)), expected)

    def test_its_settings_arrive(self) -> None:
        varflow = objective_of(replace(SMALL, objective=VarFlowConfig(beta=0.7, cross="paired")))
        assert isinstance(varflow, VarFlow)
        assert (varflow.beta, varflow.cross) == (0.7, "paired")
        assert varflow.teacher is not None


class TestDiffInstruct:
    def test_a_critic_may_start_from_a_learned_teacher(self) -> None:
        config = replace(SMALL, objective=DiffInstructConfig(critic_start="teacher", critic_steps=3))
        teacher = learned(problem_of(config))
        objective = objective_of(config, teacher)
        assert isinstance(objective, DiffInstruct)
        assert objective.critic_steps == 3
        pairs = list(zip(objective.critic.parameters(), teacher.parameters(), strict=True))
        assert all(torch.equal(p, q) and p is not q for p, q in pairs)
        assert all(p.requires_grad and not q.requires_grad for p, q in pairs)

    def test_it_cannot_start_from_an_exact_one(self) -> None:
        with pytest.raises(UsageError, match="no weights that a critic could start from: use critic_start fresh"):
            objective_of(replace(SMALL, objective=DiffInstructConfig(critic_start="teacher")))

    @pytest.mark.parametrize("schedule", ["ve", "vp", "rectified"])
    def test_a_fresh_one_follows_the_runs_schedule(self, schedule: str) -> None:
        config = replace(SMALL, objective=DiffInstructConfig(critic_depth=2, critic_width=16))
        config = replace(config, levels=LevelsConfig(schedule=schedule))
        objective = objective_of(config)
        assert isinstance(objective, DiffInstruct)
        assert objective.critic.schedule == objective.teacher.schedule
        assert [p.shape[0] for p in objective.auxiliary_parameters() if p.ndim == 2] == [16, 16, 2]


class TestSum:
    def test_it_has_both_parts_and_varflows_levels(self) -> None:
        o = VarDiUVarFlowConfig(VarDiUConfig(candidates="batch"), VarFlowConfig(beta=1.5), 4.0, 1.0, varflow_shared=16)
        levels = LevelsConfig(draws=2, antithetic=True, stratified=True)
        both = objective_of(replace(SMALL, objective=o, levels=levels))
        assert isinstance(both, WeightedSum)
        vardiu, varflow = both.parts
        assert isinstance(vardiu, VarDiU)
        assert isinstance(varflow, VarFlow)
        assert (vardiu.candidates, varflow.beta) == ("batch", 1.5)
        (own,) = both.other_levels
        assert (own.shared, own.draws, own.antithetic, own.stratified) == (16, 1, False, True)
        weights: list[Part] = list(both.terms)
        assert [weights[1].weight_at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([4.0, 2.0, 1.0])
        assert weights[0].weight_at(0.5) == 1

    def test_a_weight_moves_geometrically(self) -> None:
        assert [Geometric(1.0, 0.01)(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.1, 0.01])


class TestLinearStart:
    def test_student_and_posterior_start_from_the_same_axes(self) -> None:
        config = replace(SMALL, objective=VarDiUConfig(posterior="full"), generator=GeneratorConfig(linear=True))
        problem = problem_of(config)
        student, objective = build_generator(config, problem), objective_of(config)
        assert isinstance(objective, VarDiU)
        q = objective.posterior
        torch.testing.assert_close(student.slope, (q.directions * q.scales).T)
        assert torch.equal(student.offset, q.mean)
        spread = student.sample(20_000).std(0)
        torch.testing.assert_close(spread, problem.sample(20_000, torch.Generator()).std(0), rtol=0.05, atol=0)

    def test_more_latents_than_dimensions_are_refused(self) -> None:
        config = replace(SMALL, generator=GeneratorConfig(latent=5, linear=True))
        with pytest.raises(UsageError, match="a linear start takes at most 2 latents on mixture2"):
            build_generator(config, problem_of(config))
