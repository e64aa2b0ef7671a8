"""VarFlow against closed forms for isotropic Gaussians, and against the plain expression.

Where draws are random, their groups are independent, and z-scores are held against `z_limit`: a right implementation
fails with probability 1e-4 at most, over all comparisons of a test together. The seeds are fixed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import small_runs
from linear_gaussian import (
    AtTimes,
    Linear,
    Linears,
    complete,
    gradient_rows,
    gradients,
    labelled_drawn,
    random_draw,
    z_limit,
    z_scores,
)
from vardistill.diffusion.noise import Draw, NoiseLevels
from vardistill.diffusion.schedules import VE, VP, Schedule
from vardistill.errors import UsageError
from vardistill.objectives import Needs, Part, VarFlow, WeightedSum
from vardistill.objectives.varflow import Cross
from vardistill.runs import distill as distill_module
from vardistill.runs.distill import distill
from vardistill.training.checks import check_batch
from vardistill.training.data import Labels
from vardistill.training.draws import Draws
from vardistill.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("float64")

every_schedule = pytest.mark.parametrize("schedule", [VE(), VP()], ids=lambda s: type(s).__name__)
every_beta = pytest.mark.parametrize("beta", [0.5, 1.0, 1.7])
every_cross = pytest.mark.parametrize("cross", ["all", "paired"])
every_dimension = pytest.mark.parametrize("d", [1, 3])

T = 0.4
MEAN, STD = 0.3, 0.8
"""Of every coordinate of the data."""


def expected_power(offset2: Tensor, variance: Tensor, d: int, beta: float) -> Tensor:
    """E‖u‖^β of u ~ N(m, v I_d), ‖m‖² = offset2: (2v)^{β/2} Γ((d+β)/2)/Γ(d/2) ₁F₁(−β/2; d/2; −‖m‖²/2v).

    By Kummer's transformation ₁F₁(a; b; −x) = e^{−x} ₁F₁(b−a; b; x), whose series has positive terms.
    """
    a, b, x = (d + beta) / 2, d / 2, offset2 / (2 * variance)
    term = total = torch.ones_like(x)
    for n in range(200):
        term = term * (a + n) / (b + n) * x / (n + 1)
        total = total + term
    return (2 * variance) ** (beta / 2) * math.exp(math.lgamma(a) - math.lgamma(b)) * (-x).exp() * total


def closed_form(std: Tensor, mean: Tensor, schedule: Schedule, beta: float) -> Tensor:
    """E‖x_t − y_t‖^β − ½ E‖x_t − x_t′‖^β for x ~ N(mean, std² I) and the data, differentiable; ‖·‖² a mean over d."""
    alpha, sigma = schedule(torch.tensor(T))
    student, data = alpha**2 * std**2 + sigma**2, alpha**2 * STD**2 + sigma**2
    offset2, d = alpha**2 * (mean - MEAN).pow(2).sum(), len(mean)
    cross = expected_power(offset2, student + data, d, beta)
    return (cross - 0.5 * expected_power(torch.zeros(()), 2 * student, d, beta)) / d ** (beta / 2)


def data(d: int) -> Any:
    return lambda n, rng: MEAN + STD * torch.randn(n, d, generator=rng)


def draw_groups(generator: Linear, schedule: Schedule, groups: int, size: int, rng: torch.Generator) -> Draw:
    """Independent groups of one level."""
    d = len(generator.b)
    return random_draw(generator, schedule, (T,), groups * size, rng, data=data(d), shared=groups)


def isotropic(d: int, std: float = 1.1, mean: float = -0.2) -> Linear:
    return Linear(std * torch.eye(d), torch.full((d,), mean))


def plain(draw: Draw, beta: float, cross: Cross) -> Tensor:
    """The loss written out, (R,), group by group."""
    x, y = (draw.noise.groups(v) / math.sqrt(v.shape[1]) for v in (draw.x_t, draw.real_t))
    K = x.shape[1]
    between = (x[:, :, None] - y[:, None]).norm(dim=3) ** beta
    mean_between = between.mean(2) if cross == "all" else between.diagonal(dim1=1, dim2=2)
    others = ~torch.eye(K, dtype=torch.bool)
    apart = (x[:, :, None] - x[:, None])[:, others].unflatten(1, (K, K - 1))
    return draw.noise.weight * draw.noise.ungroup(mean_between - 0.5 * (apart.norm(dim=3) ** beta).mean(2))


class TestValue:
    @every_schedule
    @every_dimension
    @every_beta
    @every_cross
    def test_both_estimators_are_unbiased(
        self, cross: Cross, beta: float, d: int, schedule: Schedule, rng: torch.Generator
    ) -> None:
        generator = isotropic(d)
        draw = draw_groups(generator, schedule, 4000, 3, rng)
        of_groups = draw.noise.groups(VarFlow(beta, cross).generator_loss(draw)).mean(1)
        expected = closed_form(generator.A[0, 0], generator.b, schedule, beta)
        assert z_scores(of_groups, expected).abs() < z_limit(1)

    @every_cross
    def test_two_samples_by_hand(self, cross: Cross) -> None:
        """x = (0, 3), y = (1, 7): the student's own pair counts once, not a point with itself."""
        generator = isotropic(1)
        draw = draw_groups(generator, VE(), 1, 2, torch.Generator().manual_seed(0))
        silent = replace(draw.noise, eps=torch.zeros(2, 1), real_eps=torch.zeros(2, 1))
        draw = replace(draw, x=torch.tensor([[0.0], [3.0]]), real=torch.tensor([[1.0], [7.0]]), noise=silent)
        own = 0.5 * 3
        expected = {"all": [(1 + 7) / 2 - own, (2 + 4) / 2 - own], "paired": [1 - own, 4 - own]}[cross]
        torch.testing.assert_close(VarFlow(1.0, cross).generator_loss(draw), torch.tensor(expected))

    @every_schedule
    @every_beta
    @every_cross
    def test_value_and_gradient_are_those_of_the_plain_expression(
        self, cross: Cross, beta: float, schedule: Schedule, rng: torch.Generator
    ) -> None:
        generator = isotropic(3)
        draw = random_draw(
            generator, schedule, (0.2, 0.5, 0.8), 24, rng, data=data(3), shared=4, draws=2, antithetic=True
        )
        draw = replace(draw, noise=replace(draw.noise, weight=1 + draw.noise.sigma))
        loss, expected = VarFlow(beta, cross).generator_loss(draw), plain(draw, beta, cross)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        probe = torch.rand(len(loss), generator=rng)
        actual = gradients(probe * loss, *generator.parameters())
        torch.testing.assert_close(actual, gradients(probe * expected, *generator.parameters()), rtol=1e-9, atol=1e-9)

    def test_rows_meet_those_of_their_level_alone(self, rng: torch.Generator) -> None:
        draw = random_draw(isotropic(2), VE(), (0.3, 0.6), 12, rng, data=data(2), shared=3, draws=2)
        objective = VarFlow()
        before = objective.generator_loss(draw)
        for row in (0, 7, 12, 23):
            moved = objective.generator_loss(replace(draw, x=draw.x + 5 * torch.eye(24)[row][:, None]))
            group = [other for other in range(24) if other // 12 == row // 12 and other % 3 == row % 3]
            assert (moved != before).nonzero().flatten().tolist() == group
            assert len(draw.noise.t[group].unique()) == 1

    @given(
        seed=st.integers(0, 2**32),
        beta=st.floats(0.05, 1.95),
        scale=st.floats(0.01, 100),
        cross=st.sampled_from(["all", "paired"]),
    )
    def test_it_is_invariant_to_motions_and_of_degree_beta(
        self, seed: int, beta: float, scale: float, cross: Cross
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        draw = random_draw(isotropic(3), VP(), (0.3, 0.6), 12, rng, data=data(3), shared=3)
        noise, objective = draw.noise, VarFlow(beta, cross)
        assert draw.real is not None
        assert noise.real_eps is not None
        turn = torch.linalg.qr(torch.randn(3, 3, generator=rng)).Q
        offset = torch.randn(3, generator=rng)
        turned = replace(noise, eps=scale * noise.eps @ turn, real_eps=scale * noise.real_eps @ turn)
        moved = replace(draw, x=scale * draw.x @ turn + offset, real=scale * draw.real @ turn + offset, noise=turned)
        expected = scale**beta * objective.generator_loss(draw)
        actual = objective.generator_loss(moved)
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7 * scale**beta)


class TestGradient:
    @every_schedule
    @every_dimension
    @every_beta
    @every_cross
    def test_it_is_unbiased(self, cross: Cross, beta: float, d: int, schedule: Schedule, rng: torch.Generator) -> None:
        std, mean = torch.tensor(1.1, requires_grad=True), torch.full((d,), -0.2, requires_grad=True)
        expected = gradients(closed_form(std, mean, schedule, beta), std, mean)
        actual = self.of_groups(isotropic(d), VarFlow(beta, cross), schedule, rng)
        z = z_scores(actual, expected)
        assert z.abs().max() < z_limit(z.numel())

    @every_schedule
    @every_cross
    def test_it_vanishes_where_student_and_data_agree(
        self, cross: Cross, schedule: Schedule, rng: torch.Generator
    ) -> None:
        z = z_scores(self.of_groups(isotropic(2, STD, MEAN), VarFlow(cross=cross), schedule, rng), 0.0)
        assert z.abs().max() < z_limit(z.numel())

    @staticmethod
    def of_groups(generator: Linear, objective: VarFlow, schedule: Schedule, rng: torch.Generator) -> Tensor:
        """Every group's gradient in its common standard deviation and its mean, (G, 1 + d)."""
        draw = draw_groups(generator, schedule, 4000, 3, rng)
        d = len(generator.b)
        rows = draw.noise.groups(gradient_rows(objective, draw)).mean(1)
        of_A, of_b = rows.split([d * d, d], 1)
        return torch.cat([of_A.unflatten(1, (d, d)).diagonal(dim1=1, dim2=2).sum(1, keepdim=True), of_b], 1)


class TestFeatures:
    def test_distances_are_taken_between_them(self, rng: torch.Generator) -> None:
        """A linear map of the samples is VarFlow of the mapped samples; the identity changes nothing.

        Both are root mean squares over their own axes.
        """
        draw = random_draw(isotropic(3), VE(), (0.5,), 8, rng, data=data(3), shared=2)
        M = torch.randn(3, 5, generator=rng)
        assert draw.real is not None
        assert draw.noise.real_eps is not None
        noise = replace(draw.noise, eps=draw.noise.eps @ M, real_eps=draw.noise.real_eps @ M)
        mapped = replace(draw, x=draw.x @ M, real=draw.real @ M, noise=noise)
        expected = VarFlow().generator_loss(mapped)
        torch.testing.assert_close(VarFlow(features=lambda v, t: v @ M).generator_loss(draw), expected)
        none = VarFlow().generator_loss(draw)
        assert torch.equal(VarFlow(features=lambda v, t: v).generator_loss(draw), none)
        assert (expected - none).abs().min() > 1e-3

    @pytest.mark.parametrize(
        ("features", "match"),
        [
            (nn.Linear(2, 3), "the feature map does not take noisy samples"),
            (lambda x_t, t: x_t.sum(1), r"must return \(R, \*features\), but returns \(2,\) for R = 2"),
            (lambda x_t, t: x_t.detach(), "no gradient passes the feature map"),
            (lambda x_t, t: x_t * math.nan, "the feature map returns NaN or infinity"),
            (lambda x_t, t: nn.Linear(2, 3).double()(x_t.detach()), "no gradient passes the feature map"),
            (lambda x_t, t: (x_t, t), "must return a tensor .*, but returns tuple"),
            (lambda x_t, t: x_t.nothing, "the feature map does not take noisy samples"),
        ],
    )
    def test_a_map_that_does_not_fit_is_refused(self, features: Any, match: str) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            VarFlow(features=features).check(small_runs.generator(), {})
        assert "\n" not in str(caught.value)
        VarFlow(features=lambda x_t, t: x_t.abs().log()).check(small_runs.generator(), {})  # noisy samples are never 0

    def test_their_map_is_frozen_and_not_kept(self, rng: torch.Generator) -> None:
        features = small_runs.OfSamples(nn.Linear(3, 4), nn.Dropout(0.5))
        objective = VarFlow(features=features)
        generator = isotropic(3)
        draw = random_draw(generator, VE(), (0.5,), 8, rng, data=data(3), shared=2)
        objective.generator_loss(draw).sum().backward()
        assert not any(module.training for module in features.modules())
        assert all(p.grad is None and not p.requires_grad for p in features.parameters())
        assert objective.networks == {}
        assert generator.A.grad is not None


class TestViews:
    """Features in several views, at several places."""

    @staticmethod
    def draw(rng: torch.Generator) -> Draw:
        return random_draw(isotropic(4), VE(), (0.3, 0.6), 12, rng, data=data(4), shared=2)

    @every_cross
    @every_beta
    def test_each_place_is_compared_by_itself_in_units_of_its_views_mean_distance(
        self, beta: float, cross: Cross, rng: torch.Generator
    ) -> None:
        draw = self.draw(rng)
        M = torch.randn(4, 3, generator=rng)
        maps = [lambda v: (v @ M)[:, None], lambda v: v.unflatten(1, (2, 2))]
        expected = []
        for of in maps:
            x, y = (draw.noise.groups(of(v)).transpose(1, 2) for v in (draw.x_t, draw.real_t))  # (G, places, K, f)
            scale = (x - y.roll(-1, 2)).norm(dim=3).mean()
            for place in range(x.shape[1]):
                a, b = x[:, place] / scale, y[:, place] / scale
                K = a.shape[1]
                between = (a[:, :, None] - b[:, None]).norm(dim=3) ** beta
                between = between.mean(2) if cross == "all" else between.diagonal(dim1=1, dim2=2)
                within = (a[:, :, None] - a[:, None]).norm(dim=3).pow(beta).sum(2) / (K - 1)
                expected.append((between - 0.5 * within) / x.shape[1])
        wanted = draw.noise.ungroup(torch.stack(expected).sum(0) / len(maps))
        loss = VarFlow(beta, cross, features=lambda v, t: [of(v) for of in maps]).generator_loss(draw)
        torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)

    def test_views_of_any_scale_count_alike(self, rng: torch.Generator) -> None:
        draw = self.draw(rng)
        small, large = (
            VarFlow(features=lambda v, t, c=c: [v[:, None, :2], c * v[:, None, 2:]]).generator_loss(draw)
            for c in (1, 1e3)
        )
        torch.testing.assert_close(small, large)

    @pytest.mark.parametrize(
        ("features", "match"),
        [
            (lambda x_t, t: [x_t[:, None], x_t], r"must return \(R, places, f\), but returns \(2, 2\) for R = 2"),
            (lambda x_t, t: [x_t[:, None], x_t[:, None].detach()], "no gradient passes the feature map"),
            (lambda x_t, t: [], r"must return a tensor \(R, \*features\), but returns list"),
        ],
    )
    def test_views_that_are_none_are_refused(self, features: Any, match: str) -> None:
        with pytest.raises(UsageError, match=match):
            VarFlow(features=features).check(small_runs.generator(), {})
        VarFlow(features=lambda x_t, t: [x_t[:, None]]).check(small_runs.generator(), {})


LABEL_DISTANCE = 0.5


def corners(labels: Tensor) -> Tensor:
    """√(λ/2) e_c, written out."""
    return math.sqrt(LABEL_DISTANCE / 2) * torch.eye(2)[labels]


class TestLabels:
    """The joint law of samples and labels; the data of label c are N(m_c, s_c² I)."""

    means = torch.tensor([[0.9, 0.1], [-0.7, 0.4]])
    stds = torch.tensor([0.8, 0.5])

    def data(self, d: int) -> Any:
        return lambda n, rng, labels: (
            self.means[labels, :d] + self.stds[labels, None] * torch.randn(n, d, generator=rng)
        )

    def at_the_data(self, d: int = 2) -> Linears:
        return Linears(self.stds[:, None, None] * torch.eye(d), self.means[:, :d].clone())

    def away(self, d: int) -> Linears:
        return Linears(
            torch.tensor([1.1, 0.7])[:, None, None] * torch.eye(d), torch.tensor([[0.2], [0.5]]).repeat(1, d)
        )

    def draw(self, generator: Linears, rng: torch.Generator, groups: int = 4000, size: int = 3) -> Draw:
        data = self.data(len(generator.b[0]))
        return complete(labelled_drawn(generator, VE(), (T,), groups * size, rng, data=data, shared=groups), generator)

    @staticmethod
    def objective(beta: float = 1.0, cross: Cross = "all") -> VarFlow:
        return VarFlow(beta, cross, classes=2, label_distance=LABEL_DISTANCE)

    @staticmethod
    def plain(x: Tensor, y: Tensor, beta: float, cross: Cross) -> Tensor:
        """For points by groups, (G, K, d), (G, K)."""
        K = x.shape[1]
        others = [[j for j in range(K) if j != i] for i in range(K)]
        chosen = others if cross == "all" else [[(i + 1) % K] for i in range(K)]
        between = torch.stack([(x[:, [i]] - y[:, chosen[i]]).norm(dim=2).pow(beta).mean(1) for i in range(K)], 1)
        within = torch.stack([(x[:, [i]] - x[:, others[i]]).norm(dim=2).pow(beta).mean(1) for i in range(K)], 1)
        return between - 0.5 * within

    @every_cross
    @pytest.mark.parametrize("beta", [0.7, 1.0])
    def test_distances_are_between_points_with_a_corner_for_the_label(
        self, beta: float, cross: Cross, rng: torch.Generator
    ) -> None:
        """The plain expression, where no row meets the real sample that was drawn under its own label."""
        generator = self.away(2)
        drawn = labelled_drawn(
            generator, VE(), (0.3, 0.6), 20, rng, data=self.data(2), shared=4, draws=2, antithetic=True
        )
        draw = complete(drawn, generator)
        corner = corners(draw.batch["labels"])
        x, y = (draw.noise.groups(torch.cat([v / math.sqrt(2), corner], 1)) for v in (draw.x_t, draw.real_t))
        expected = self.plain(x, y, beta, cross)
        loss = self.objective(beta, cross).generator_loss(draw)
        torch.testing.assert_close(loss, draw.noise.ungroup(expected), rtol=1e-10, atol=1e-10)
        actual = gradients(loss, *generator.parameters())
        torch.testing.assert_close(actual, gradients(expected, *generator.parameters()), rtol=1e-9, atol=1e-9)

    def test_other_pairs_are_those_of_plain_varflow_on_the_same_points(self, rng: torch.Generator) -> None:
        """All K² pairs are those that count here and the K pairs of one label, K A = (K − 1) B + P."""
        draw = self.draw(self.away(2), rng, groups=4, size=5)
        made = replace(draw, batch={})

        def points(v: Tensor, t: Tensor) -> Tensor:
            assert torch.equal(t, draw.noise.t)
            return 2 * torch.cat([v / math.sqrt(2), corners(draw.batch["labels"])], 1)  # a mean over four axes

        of_all, of_pairs = (VarFlow(cross=cross, features=points).generator_loss(made) for cross in get_args(Cross))
        torch.testing.assert_close(self.objective().generator_loss(draw), (5 * of_all - of_pairs) / 4)

    @every_cross
    @pytest.mark.parametrize("beta", [0.7, 1.0, 1.7])
    def test_both_estimators_are_unbiased(self, beta: float, cross: Cross, rng: torch.Generator) -> None:
        """Against E (u² + λ [c ≠ c′])^{β/2} of u ~ N(m, v), by the trapezoidal rule."""
        generator = self.away(1)
        draw = self.draw(generator, rng)
        of_groups = draw.noise.groups(self.objective(beta, cross).generator_loss(draw)).mean(1)
        sigma2 = VE()(torch.tensor(T))[1] ** 2
        student = list(zip(generator.b[:, 0].detach(), generator.A[:, 0, 0].detach() ** 2 + sigma2, strict=True))
        real = list(zip(self.means[:, 0], self.stds**2 + sigma2, strict=True))

        def mean_power(first: list[Any], second: list[Any]) -> Tensor:
            u = torch.linspace(-12, 12, 20_001)
            density = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
            total = torch.zeros(())
            for c, k in itertools.product(range(2), range(2)):
                (m, v), (n, w) = first[c], second[k]
                distance2 = (m - n + (v + w).sqrt() * u) ** 2 + LABEL_DISTANCE * (c != k)
                total = total + torch.trapezoid(density * distance2 ** (beta / 2), u) / 4
            return total

        expected = mean_power(student, real) - 0.5 * mean_power(student, student)
        assert z_scores(of_groups, expected).abs() < z_limit(1)

    @every_cross
    def test_the_gradient_vanishes_where_the_joint_laws_agree(self, cross: Cross, rng: torch.Generator) -> None:
        """Of groups of three, in every class's offset and scale."""
        generator = self.at_the_data()
        draw = self.draw(generator, rng)
        (g,) = torch.autograd.grad(self.objective(cross=cross).generator_loss(draw).sum(), draw.x)
        rows = torch.cat([g, (g * draw.z).sum(1, keepdim=True)], 1)
        of_labels = torch.eye(2)[draw.batch["labels"]][:, :, None] * rows[:, None]
        z = z_scores(draw.noise.groups(of_labels.flatten(1)).mean(1), 0.0)
        assert z.abs().max() < z_limit(z.numel())

    def test_the_distance_vanishes_where_the_joint_laws_agree_alone(self, rng: torch.Generator) -> None:
        """With the labels exchanged the student has the data's law, but not together with its labels."""

        def logged(generator: Linears) -> Tensor:
            draws = [self.draw(generator, rng, groups=8, size=6) for _ in range(300)]
            return torch.stack([self.objective().measure(draw)["half_energy_distance"] for draw in draws])

        right = self.at_the_data()
        exchanged = Linears(right.A.detach().flip(0), right.b.detach().flip(0))
        assert z_scores(logged(right), 0.0).abs() < z_limit(1)
        assert z_scores(logged(exchanged), 0.0) > z_limit(1)

    @pytest.mark.parametrize("label_distance", [0.0, -1.0, math.nan, math.inf])
    def test_distances_between_labels_that_are_none(self, label_distance: float) -> None:
        with pytest.raises(UsageError, match="label_distance must be positive and finite, but is") as caught:
            VarFlow(classes=2, label_distance=label_distance)
        assert "\n" not in str(caught.value)

    def test_labels_without_their_number(self, rng: torch.Generator) -> None:
        with pytest.raises(UsageError, match="steps draw labels: tell VarFlow their number, classes=K"):
            VarFlow().generator_loss(self.draw(self.away(2), rng, groups=2))


class TestPerCondition:
    """m latents of a group share a condition, and meet each other alone."""

    labels = TestLabels()

    def drawn(self, generator: Linears, m: int, groups: int, size: int, seed: int = 0, **levels: Any) -> Draw:
        of_levels = NoiseLevels(VE(), AtTimes((T,)), shared=groups, **levels)
        samples, conditions = self.labels.data(len(generator.b[0])), Labels(torch.ones(2))
        draws = Draws(
            generator, of_levels, samples, conditions, groups * size, seed, torch.device("cpu"), torch.float64
        )
        return complete(draws(Needs(real=True, per_condition=m), 0.0, 0, 0), generator)

    @pytest.mark.parametrize(("m", "groups", "size", "draws"), [(2, 4, 6, 1), (3, 2, 12, 2), (4, 3, 8, 1)])
    def test_latents_of_a_group_share_their_condition(self, m: int, groups: int, size: int, draws: int) -> None:
        generator = self.labels.away(1)
        of_levels = NoiseLevels(VE(), AtTimes((T,)), shared=groups, draws=draws)
        samples, conditions = (lambda n, rng, labels: torch.zeros(n, 1)), Labels(torch.ones(10_000))
        made = Draws(generator, of_levels, samples, conditions, groups * size, 0, torch.device("cpu"), torch.float64)
        drawn = made(Needs(real=True, per_condition=m), 0.0, 0, 0)
        of_conditions = drawn.noise.groups(drawn.noise.rows(drawn.condition["labels"])).unflatten(1, (-1, m))
        assert (of_conditions == of_conditions[..., :1]).all()
        assert len(of_conditions.unique()) == groups * size // m

    @every_beta
    @every_cross
    def test_the_plain_expression_within_each_condition(self, cross: Cross, beta: float) -> None:
        generator, m = self.labels.away(2), 3
        draw = self.drawn(generator, m, 2, 12, draws=2)
        x, y = (draw.noise.groups(v / math.sqrt(2)).unflatten(1, (-1, m)) for v in (draw.x_t, draw.real_t))
        between = (x[:, :, :, None] - y[:, :, None]).norm(dim=4) ** beta
        mean_between = between.mean(3) if cross == "all" else between.diagonal(dim1=2, dim2=3)
        others = ~torch.eye(m, dtype=torch.bool)
        apart = (x[:, :, :, None] - x[:, :, None])[:, :, others].unflatten(2, (m, m - 1)).norm(dim=4) ** beta
        expected = draw.noise.ungroup((mean_between - 0.5 * apart.mean(3)).flatten(1))
        loss = VarFlow(beta, cross, per_condition=m).generator_loss(draw)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)

    @every_beta
    @every_cross
    def test_it_is_the_mean_of_the_conditions_energy_distances(self, cross: Cross, beta: float) -> None:
        generator, m = self.labels.away(2), 2
        draw = self.drawn(generator, m, 1, 16_000)
        loss = VarFlow(beta, cross, per_condition=m).generator_loss(draw)
        of_conditions = draw.noise.groups(loss).unflatten(1, (-1, m)).mean(2).flatten()
        sigma2 = VE()(torch.tensor(T))[1] ** 2
        expected = torch.zeros(())
        for c in range(2):
            student = generator.A[c, 0, 0].detach() ** 2 + sigma2
            offset2 = (generator.b[c].detach() - self.labels.means[c]).square().sum()
            cross_term = expected_power(offset2, student + self.labels.stds[c] ** 2 + sigma2, 2, beta)
            own = expected_power(torch.zeros(()), 2 * student, 2, beta)
            expected = expected + (cross_term - 0.5 * own) / 2 / 2 ** (beta / 2)
        assert z_scores(of_conditions, expected).abs() < z_limit(1)

    def test_the_distance_vanishes_where_the_conditional_laws_agree_alone(self) -> None:
        """With the labels exchanged the student has the data's law, but not under its labels."""

        def logged(generator: Linears) -> Tensor:
            objective = VarFlow(per_condition=2)
            draws = [self.drawn(generator, 2, 4, 16, seed) for seed in range(200)]
            return torch.stack([objective.measure(draw)["half_energy_distance"] for draw in draws])

        right = self.labels.at_the_data()
        exchanged = Linears(right.A.detach().flip(0), right.b.detach().flip(0))
        assert z_scores(logged(right), 0.0).abs() < z_limit(1)
        assert z_scores(logged(exchanged), 0.0) > z_limit(1)

    def test_numbers_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(UsageError, match="per_condition must be 0, or at least 2"):
            VarFlow(per_condition=1)
        with pytest.raises(
            UsageError, match="batch must be divisible by 12, shared levels times processes times the 3"
        ):
            check_batch(16, 2, VarFlow(per_condition=3), NoiseLevels(VE(), AtTimes((T,)), shared=2))
        parts = [Part(VarFlow(per_condition=m), name=f"{m}") for m in (0, 2)]
        with pytest.raises(UsageError, match="must have the same per_condition"):
            WeightedSum(parts)


def test_the_distance_is_logged_and_vanishes_where_student_and_data_agree(rng: torch.Generator) -> None:
    """In the mean over 300 draws: a U-statistic has no bias."""

    def logged(generator: Linear) -> Tensor:
        draws = [draw_groups(generator, VE(), 8, 6, rng) for _ in range(300)]
        return torch.stack([VarFlow().measure(draw)["half_energy_distance"] for draw in draws])

    assert z_scores(logged(isotropic(2, STD, MEAN)), 0.0).abs() < z_limit(2)
    away = isotropic(2, 1.1, -0.2)
    own = 0.5 * expected_power(torch.zeros(()), (STD**2 + VE()(torch.tensor(T))[1] ** 2), 2, 1.0)
    assert z_scores(logged(away), closed_form(away.A[0, 0], away.b, VE(), 1.0).detach() - own).abs() < z_limit(2)


class TestEndToEnd:
    @pytest.mark.parametrize("given", ["tensor", "function"])
    def test_it_needs_no_teacher_and_shares_the_default_levels(self, given: str) -> None:
        sample = small_runs.data()
        samples = sample(200, torch.Generator().manual_seed(0)) if given == "tensor" else sample
        training = small_runs.config(steps=100, batch=64, lr=3e-2, ema=0.9, log_every=100)
        before = self.distance(small_runs.generator(), sample)
        run = distill(small_runs.generator(), objective=VarFlow(), data=samples, training=training)
        assert self.distance(run.objective, sample, run.generator) < 0.5 * before
        assert "half_energy_distance" in run.history[-1]

    @staticmethod
    def distance(first: Any, sample: Any, generator: Any = None) -> float:
        rng = torch.Generator().manual_seed(3)
        x = (first if generator is None else generator).sample(500)
        y = sample(500, rng)
        with torch.no_grad():
            return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())

    @pytest.mark.parametrize(("batch", "shared"), [(64, 8), (16, 8), (8, 4), (12, 2), (9, 1), (2, 1)])
    def test_default_levels_leave_groups_of_two_at_least(self, batch: int, shared: int) -> None:
        objective = VarFlow()
        seen = []
        loss = objective.generator_loss
        objective.generator_loss = lambda draw: (seen.append(draw.noise), loss(draw))[1]
        training = small_runs.config(steps=1, batch=batch)
        distill(small_runs.generator(), objective=objective, data=small_runs.data(), training=training)
        assert {noise.shared for noise in seen} == {shared}
        assert seen[0].groups(seen[0].t).shape[1] >= 2

    @pytest.mark.parametrize(("batch", "processes"), [(24, 4), (16, 2), (64, 4), (12, 3), (64, 1)])
    def test_default_levels_split_among_the_processes(
        self, batch: int, processes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def trainer(generator: Any, objective: Any, levels: NoiseLevels, training: Any, *rest: Any) -> Any:
            check_batch(training.batch, processes, objective, levels)
            raise KeyboardInterrupt

        for name, value in small_runs.launched(processes).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distill_module, "Trainer", trainer)
        with pytest.raises(KeyboardInterrupt):
            distill(small_runs.generator(), objective=VarFlow(), training=small_runs.config(batch=batch))


class TestMistakes:
    @pytest.mark.parametrize("beta", [0.0, 2.0, -1.0, 3.0, math.nan, math.inf])
    def test_powers_that_are_no_distance(self, beta: float) -> None:
        with pytest.raises(UsageError, match=r"beta must be in \(0, 2\), but is"):
            VarFlow(beta)

    def test_an_unknown_cross_term(self) -> None:
        with pytest.raises(UsageError, match="unknown cross term 'al': did you mean all"):
            VarFlow(cross="al")

    def test_draws_without_shared_levels_or_real_samples(self, rng: torch.Generator) -> None:
        unshared = random_draw(isotropic(2), VE(), (0.5,), 8, rng, data=data(2))
        with pytest.raises(UsageError, match="every row has a noise level of its own"):
            VarFlow().generator_loss(unshared)
        without = random_draw(isotropic(2), VE(), (0.5,), 8, rng, shared=2)
        with pytest.raises(UsageError, match="compares with real samples, but none were drawn"):
            VarFlow().generator_loss(without)
        with pytest.raises(UsageError, match="no noise was drawn for real samples"):
            VarFlow().generator_loss(replace(without, real=without.x))

    @pytest.mark.parametrize(
        ("batch", "shared", "data", "match"),
        [
            (8, 8, small_runs.data(), "groups need at least 2 latents each, but batch=8 has 8 shared levels"),
            (8, 0, small_runs.data(), "VarFlow compares groups of one level: share the levels, e.g. shared=8"),
            (8, 3, small_runs.data(), "batch must be divisible by 3, shared levels times processes, but is 8"),
            (1, 1, small_runs.data(), "VarFlow needs a batch of at least 2, but batch=1"),
            (8, 2, None, "VarFlow compares with real samples: give data"),
        ],
    )
    def test_runs_are_refused_before_a_step(self, batch: int, shared: int, data: Any, match: str) -> None:
        levels, training = small_runs.levels(shared=shared), small_runs.config(batch=batch)
        with pytest.raises(UsageError, match=match) as caught:
            Trainer(small_runs.generator(), VarFlow(), levels, training, data=data)
        assert "\n" not in str(caught.value)
