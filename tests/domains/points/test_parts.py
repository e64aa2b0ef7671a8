"""What points provide: the objectives' settings arrive, networks are those of the seed, and what cannot be built."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from vardistill.denoisers import Preconditioned
from vardistill.diffusion.config import LevelsConfig
from vardistill.diffusion.noise import Draw
from vardistill.domains.points.config import PerceptronConfig, PointsConfig, PointsTeachConfig, TeacherConfig
from vardistill.domains.points.parts import Points
from vardistill.domains.points.teach import build_network_denoiser
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP
from vardistill.objectives import DiffInstruct, Objective, VarDiU, VarFlow, WeightedSum
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.registry import PartConfig, SumConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.objectives.weighted_sum import Geometric
from vardistill.posteriors.few import FullGaussian
from vardistill.runs.config import Config
from vardistill.runs.presets.points import LearnedPosterior, learned_posterior
from vardistill.students import DenoisingStudent
from vardistill.training.config import TrainingConfig
from vardistill.training.data import StoredSamples

SMALL = PointsConfig("mixture2", student=PerceptronConfig(depth=1, width=8))


def points(config: PointsConfig = SMALL, takes_teacher: bool = True, **training: Any) -> Points:
    found = Points(config, TrainingConfig(**training), takes_teacher)
    found.load(None)
    return found


def objective_of(config: Any, domain: Points | None = None) -> Objective:
    built: Objective = config.build(points() if domain is None else domain)
    return built


def a_draw(config: Config, domain: Points, rng: torch.Generator) -> Draw:
    """64 rows at the levels of the run's beginning."""
    levels = replace(config.levels, draws=1, antithetic=False).build(domain.schedule, domain.data_std)
    z = domain.student.latents(64, rng)
    noise = levels.draw(domain.student.data_shape, 64, progress=0.0, rng=rng)
    return Draw(z, domain.student(z), noise, domain.student)


def learned(domain: Points) -> Preconditioned:
    return build_network_denoiser(PointsTeachConfig(depth=1, width=8), domain.problem)


class TestLearnedPosterior:
    @pytest.mark.parametrize("family", ["diagonal", "full", "mixture", "nsf"])
    def test_it_begins_as_the_exact_one_of_the_presets_student(
        self, family: LearnedPosterior, rng: torch.Generator
    ) -> None:
        """p(z | x_t) = p(z) N(x_t; αg(z), σ²I)/p(x_t), and x = g(z) is Gaussian, with two axes for two dimensions."""
        config = learned_posterior(family)
        domain = points(config.domain)
        objective = objective_of(config.objective, domain)
        assert isinstance(objective, VarDiU)
        draw, student = a_draw(config, domain, rng), domain.student
        alpha, sigma = draw.noise.alpha, draw.noise.sigma
        with torch.no_grad():
            slope = student.slope
            covariance = alpha[:, None, None] ** 2 * (slope.T @ slope) + sigma[:, None, None] ** 2 * torch.eye(2)
            log_joint = Normal(0.0, 1.0).log_prob(draw.z) + Normal(alpha[:, None] * draw.x, sigma[:, None]).log_prob(
                draw.x_t
            )
            marginal = MultivariateNormal(alpha[:, None] * student.offset, covariance)
            exact = log_joint.sum(1) - marginal.log_prob(draw.x_t)
            q = objective.of_step(draw)(draw.x_t, alpha, sigma)
            torch.testing.assert_close(q.log_prob(draw.z), exact, atol=5e-3, rtol=1e-3)

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_its_network_is_the_configurations(self, precision: Literal["no", "bf16"]) -> None:
        config = learned_posterior("full")
        objective = objective_of(config.objective, points(config.domain, precision=precision))
        posterior = objective.networks["posterior"]
        assert isinstance(posterior, FullGaussian)
        network = posterior.network
        assert isinstance(network, LevelMLP)
        assert network.mixed == (precision == "bf16")
        assert network.layers[0].out_features == 128
        assert any(isinstance(layer, nn.ReLU) for layer in network.layers)

    def test_a_student_of_several_steps_has_one_for_each(self) -> None:
        domain = points(replace(SMALL, student=PerceptronConfig(depth=1, width=8, steps_per_sample=3)))
        objective = objective_of(VarDiUConfig(posterior="full", posterior_width=8), domain)
        posteriors = objective.networks["posterior"]
        assert isinstance(posteriors, nn.ModuleList)
        assert len(posteriors) == 3
        first, second = (posterior.state_dict() for posterior in list(posteriors)[:2])
        assert not all(torch.equal(v, second[name]) for name, v in first.items())

    def test_families_are_those_of_the_domain(self) -> None:
        with pytest.raises(UsageError, match="unknown posterior of points 'coupling': known: diagonal, full, .*prior"):
            objective_of(VarDiUConfig(posterior="coupling"))


def test_the_same_seed_builds_the_same_networks() -> None:
    for o in (VarDiUConfig(posterior="full"), DiffInstructConfig()):
        (first,), (again,), (other,) = (
            [network.state_dict() for network in objective_of(o, points(seed=seed)).networks.values()]
            for seed in (0, 0, 1)
        )
        assert all(torch.equal(v, again[name]) for name, v in first.items())
        assert not all(torch.equal(v, other[name]) for name, v in first.items())
    ours, again, other = (points(seed=seed).student.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(v, again[name]) for name, v in ours.items())
    assert not all(torch.equal(v, other[name]) for name, v in ours.items())


class TestStudent:
    def test_of_several_steps_it_is_a_denoiser_at_as_many_levels(self) -> None:
        domain = points(replace(SMALL, student=PerceptronConfig(depth=1, width=8, steps_per_sample=4)))
        assert isinstance(domain.student, DenoisingStudent)
        assert domain.student.steps == 4
        assert domain.student.latent_shape == domain.student.data_shape == (2,)
        alpha, sigma = domain.schedule(torch.tensor(domain.student.times))
        ratios = sigma / alpha
        assert float(ratios[0]) == pytest.approx(5 * domain.data_std, rel=1e-4)
        assert (ratios.diff() < 0).all()

    def test_of_one_step_it_may_be_one(self) -> None:
        student = PerceptronConfig(depth=1, width=8, kind="denoiser", ratio=3.0)
        domain = points(replace(SMALL, student=student))
        assert isinstance(domain.student, DenoisingStudent)
        assert domain.student.steps == 1
        alpha, sigma = domain.schedule(torch.tensor(domain.student.times))
        assert float(sigma / alpha) == pytest.approx(3.0, rel=1e-4)


class TestVarFlow:
    @pytest.mark.parametrize("kind", ["exact", "learned", "data"])
    def test_real_samples_are_the_teachers_or_the_problems(self, kind: str) -> None:
        domain = points()
        if kind == "learned":
            domain.teacher = learned(domain)
        samples = domain.real("data" if kind == "data" else "teacher", 50, 3)
        if kind == "learned":
            assert isinstance(samples, StoredSamples)
            assert samples.data.shape == (50, 2)
        else:
            expected = domain.problem.sample(7, torch.Generator().manual_seed(0))
            assert torch.equal(samples(7, torch.Generator().manual_seed(0)), expected)

    def test_its_settings_arrive(self) -> None:
        varflow = objective_of(VarFlowConfig(beta=0.7, cross="paired"))
        assert isinstance(varflow, VarFlow)
        assert (varflow.beta, varflow.cross) == (0.7, "paired")
        assert varflow.teacher is not None

    def test_from_data_it_has_no_teacher(self) -> None:
        config = VarFlowConfig(real="data")
        assert not config.takes_teacher
        digits = PointsConfig("digits", student=PerceptronConfig(latent=4, depth=1, width=8))
        assert objective_of(config, points(digits, takes_teacher=False)).teacher is None

    def test_points_have_no_features(self) -> None:
        with pytest.raises(UsageError, match="points have no features, so .* space must be data, but is teacher"):
            objective_of(VarFlowConfig(space="teacher"))


class TestDiffInstruct:
    def test_a_critic_may_start_from_a_learned_teacher(self) -> None:
        domain = points()
        teacher = domain.teacher = learned(domain)
        objective = objective_of(DiffInstructConfig(critic_start="teacher", critic_steps=3), domain)
        assert isinstance(objective, DiffInstruct)
        critic, student = objective.updates()
        assert (critic.name, critic.trains, critic.repeats) == ("critic", ("critic",), 3)
        assert student.trains == ("student",)
        pairs = list(zip(objective.networks["critic"].parameters(), teacher.parameters(), strict=True))
        assert all(torch.equal(p, q) and p is not q for p, q in pairs)
        assert all(p.requires_grad and not q.requires_grad for p, q in pairs)

    @pytest.mark.parametrize("teacher", ["true", "empirical"])
    def test_it_cannot_start_from_an_exact_one(self, teacher: Any) -> None:
        domain = points(replace(SMALL, teacher=TeacherConfig(teacher, teacher_samples=50)))
        with pytest.raises(UsageError, match="no weights that a critic could start from: use critic_start fresh"):
            objective_of(DiffInstructConfig(critic_start="teacher"), domain)

    def test_a_critic_of_points_has_no_adapters(self) -> None:
        domain = points()
        domain.teacher = learned(domain)
        with pytest.raises(UsageError, match="critics of points have no adapters: leave out critic_rank"):
            objective_of(DiffInstructConfig(critic_start="teacher", critic_rank=2), domain)

    @pytest.mark.parametrize("schedule", ["ve", "vp", "rectified"])
    def test_a_fresh_one_follows_the_runs_schedule(self, schedule: Any) -> None:
        domain = points(replace(SMALL, schedule=schedule))
        objective = objective_of(DiffInstructConfig(critic_depth=2, critic_width=16), domain)
        assert isinstance(objective, DiffInstruct)
        assert domain.teacher is not None
        assert objective.networks["critic"].schedule == objective.teacher.schedule == domain.teacher.schedule
        assert [p.shape[0] for p in objective.networks["critic"].parameters() if p.ndim == 2] == [16, 16, 2]


class TestSum:
    def test_it_has_both_parts_and_varflows_levels(self) -> None:
        own = LevelsConfig(stratified=True, shared=16)
        terms = PartConfig(VarDiUConfig(candidates="batch")), PartConfig(VarFlowConfig(beta=1.5), 4.0, 1.0, own)
        both = objective_of(SumConfig(terms))
        assert isinstance(both, WeightedSum)
        vardiu, varflow = both.parts
        assert isinstance(vardiu, VarDiU)
        assert isinstance(varflow, VarFlow)
        assert (vardiu.candidates, varflow.beta) == ("batch", 1.5)
        (levels,) = both.needs.other_levels
        assert (levels.shared, levels.draws, levels.antithetic, levels.stratified) == (16, 1, False, True)
        first, second = both.summands
        assert [second.weight_at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([4.0, 2.0, 1.0])
        assert first.weight_at(0.5) == 1

    def test_a_weight_moves_geometrically(self) -> None:
        assert [Geometric(1.0, 0.01)(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.1, 0.01])


class TestLinearStart:
    def test_student_and_posterior_start_from_the_same_axes(self) -> None:
        domain = points(replace(SMALL, student=replace(SMALL.student, linear=True)))
        student = domain.student
        q = objective_of(VarDiUConfig(posterior="full"), domain).networks["posterior"]
        torch.testing.assert_close(student.slope, (q.directions * q.scales).T)
        assert torch.equal(student.offset, q.mean)
        spread = student.sample(20_000).std(0)
        torch.testing.assert_close(spread, domain.problem.sample(20_000, torch.Generator()).std(0), rtol=0.05, atol=0)

    def test_more_latents_than_dimensions_are_refused(self) -> None:
        with pytest.raises(UsageError, match="a linear start takes at most 2 latents on mixture2"):
            points(replace(SMALL, student=PerceptronConfig(latent=5, linear=True)))


class TestTeacher:
    def test_one_that_has_yet_to_be_fitted_is_stood_in_for(self) -> None:
        domain = points(replace(SMALL, schedule="vp", teacher=TeacherConfig("learned")))
        assert isinstance(domain.teacher, Preconditioned)
        assert domain.teacher.schedule == domain.schedule

    def test_the_fit_of_one_has_the_runs_data_schedule_seed_and_device(self) -> None:
        config = replace(SMALL, schedule="vp", teacher=TeacherConfig("learned", teacher_samples=500))
        fit = config.learns_from(TrainingConfig(seed=3, device="cpu"))
        assert (fit.problem, fit.schedule, fit.samples, fit.seed, fit.device) == ("mixture2", "vp", 500, 3, "cpu")

    def test_an_empirical_one_is_of_the_seeds_sample(self) -> None:
        config = replace(SMALL, teacher=TeacherConfig("empirical", teacher_samples=20, bandwidth=0.5))
        a, b, c = (points(config, seed=seed).teacher for seed in (0, 0, 1))
        x_t, t = torch.zeros(2, 2), torch.full((2,), 0.5)
        assert a is not None
        assert b is not None
        assert c is not None
        assert torch.equal(a(x_t, t), b(x_t, t))
        assert not torch.equal(a(x_t, t), c(x_t, t))
