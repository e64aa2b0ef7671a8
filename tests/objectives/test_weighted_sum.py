"""A weighted sum against its parts: values, gradients, one generator pass, curves, state and refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import small_runs
from linear_gaussian import AtTimes, Linear, gradients, random_draw, student, target
from small_runs import state
from vardistill.denoisers import Preconditioned
from vardistill.diffusion.noise import Draw, NoiseLevels
from vardistill.diffusion.schedules import VE
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP
from vardistill.objectives import DiffInstruct, Part, VarDiU, VarFlow, WeightedSum
from vardistill.objectives.weighted_sum import PartWeight
from vardistill.posteriors.few import DiagonalGaussian, FullGaussian, Prior
from vardistill.runs.distill import distill
from vardistill.training.checks import check_batch
from vardistill.training.defaults import with_default_levels
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("float64")

TEACHER = target(VE()).double()
OWN = NoiseLevels(VE(), AtTimes((0.2, 0.6)), lambda alpha, sigma: sigma, draws=3, shared=4)


def posterior() -> FullGaussian:
    torch.manual_seed(0)
    return FullGaussian(3, 2, 1.0, depth=1, width=8)


def critic() -> Preconditioned:
    torch.manual_seed(1)
    return Preconditioned(LevelMLP(3, 3, depth=1, width=8), 1.0, VE())


@pytest.fixture
def generator() -> Linear:
    return student()


def a_draw(generator: Linear, rng: torch.Generator, progress: float = 0.3) -> Draw:
    """24 rows of 8 latents and four shared levels, and 24 rows under levels of a part's own."""
    draw = random_draw(
        generator, VE(), (0.3, 0.5), 8, rng, candidates=2, data=TEACHER.sample, shared=4, draws=2, antithetic=True
    )
    other = OWN.draw((3,), 8, progress, rng, torch.float64, real=True)
    return replace(draw, progress=progress, other_noise=(other,))


@pytest.mark.parametrize("weight", [0.4, lambda progress: 2 - progress], ids=["constant", "moving"])
@pytest.mark.parametrize("own", [False, True], ids=["the run's levels", "own levels"])
def test_value_and_gradient_are_the_weighted_sums_of_the_parts(
    own: bool, weight: PartWeight, generator: Linear, rng: torch.Generator
) -> None:
    vardiu, varflow = VarDiU(TEACHER, posterior(), candidates=2), VarFlow(beta=0.8)
    both = WeightedSum([Part(vardiu, 1.5), Part(varflow, weight, OWN if own else None)])
    draw = a_draw(generator, rng)
    share = weight(draw.progress) if callable(weight) else weight
    seen = draw.under(draw.other_noise[0]) if own else draw
    first, second = vardiu.generator_loss(draw), varflow.generator_loss(seen)
    assert len(second) == (24 if own else 16)
    loss = both.generator_loss(draw)
    assert loss.shape == (16,)
    expected = 1.5 * first.mean() + share * second.mean()
    torch.testing.assert_close(loss.mean(), expected)
    parameters = [*generator.parameters(), *vardiu.networks["posterior"].parameters()]
    torch.testing.assert_close(gradients(loss.mean(), *parameters), gradients(expected, *parameters))
    if not own:
        torch.testing.assert_close(loss, 1.5 * first + share * second)


def test_a_part_sees_the_same_latents_and_real_samples_under_its_own_noise(
    generator: Linear, rng: torch.Generator
) -> None:
    draw = a_draw(generator, rng)
    noise = draw.other_noise[0]
    seen = draw.under(noise)
    assert draw.real is not None
    assert seen.real is not None
    for rows, latents in ((seen.z, draw.z), (seen.x, draw.x), (seen.real, draw.real)):
        assert torch.equal(rows, noise.rows(latents[:8]))
    assert torch.equal(seen.x_t, noise.x_t(seen.x))
    assert (seen.progress, seen.eta, seen.other_noise) == (draw.progress, None, ())


def test_its_updates_are_those_of_the_parts_networks_and_one_of_the_student(
    generator: Linear, rng: torch.Generator
) -> None:
    """A part's levels are its networks' own; its weight is a posterior's, which the student's loss trains, too, and
    none of a critic's, whose loss is its own.
    """
    vardiu, diff_instruct = VarDiU(TEACHER, posterior(), posterior_steps=3), DiffInstruct(TEACHER, critic(), 4)
    both = WeightedSum([Part(vardiu, 0.1), Part(diff_instruct, 0.1, OWN), Part(VarFlow(), 0.1)])
    of_posterior, of_critic, of_student = both.updates()
    assert [(u.name, u.trains, u.repeats, u.needs.levels) for u in (of_posterior, of_critic, of_student)] == [
        ("posterior", ("posterior",), 2, None),
        ("critic", ("critic",), 4, OWN),
        ("student", ("student", "posterior"), 1, None),
    ]
    assert (of_student.couples_rows, of_posterior.couples_rows, of_critic.couples_rows) == (True, False, False)
    assert of_student.needs.other_levels == (OWN,)
    draw = a_draw(generator, rng)
    torch.testing.assert_close(of_posterior.loss(draw), 0.1 * vardiu.posterior_loss(draw))
    torch.testing.assert_close(of_critic.loss(draw), diff_instruct.critic_loss(draw))
    assert not of_critic.needs.real
    assert of_student.needs.real


def test_the_generator_makes_one_pass_for_all_parts() -> None:
    trainer = small_runs.trainer("sum", steps=1, log_every=10, eval_every=0)
    calls = []
    trainer.student.register_forward_hook(lambda module, inputs, x: calls.append(len(x)))
    trainer.update(trainer.objective.updates(0.0)[-1], 0.0, 1)
    assert calls == [8]


def test_curves_have_the_parts_names(generator: Linear, rng: torch.Generator) -> None:
    both = WeightedSum([
        Part(VarDiU(TEACHER, Prior()), 2.0, name="first"),
        Part(VarDiU(TEACHER, posterior()), name="second"),
        Part(VarFlow(), lambda progress: progress, OWN),
    ])  # fmt: skip
    draw = a_draw(generator, rng, progress=0.25)
    table = both.measure(draw)
    names = {f"{part}/{name}" for part in ("first", "second", "varflow") for name in ("loss", "weight")}
    assert table.keys() >= names | {"bound", "second/bound", "half_energy_distance"}
    assert (float(table["first/weight"]), float(table["varflow/weight"])) == (2.0, 0.25)
    first, second, varflow = both.parts
    torch.testing.assert_close(table["bound"], first.measure(draw)["bound"])
    torch.testing.assert_close(table["second/bound"], second.measure(draw)["bound"])
    torch.testing.assert_close(table["second/loss"], second.generator_loss(draw).mean().detach())
    expected = varflow.generator_loss(draw.under(draw.other_noise[0])).mean().detach()
    torch.testing.assert_close(table["varflow/loss"], expected)
    assert not any(v.requires_grad for v in table.values())


def test_a_part_without_a_pool_does_not_take_anothers(generator: Linear, rng: torch.Generator) -> None:
    without, pooled = VarDiU(TEACHER, Prior(), "batch"), VarDiU(TEACHER, Prior(), "batch", pool=6)
    draw = a_draw(generator, rng)
    full = replace(draw, pool=generator.latents(6, rng))
    both = WeightedSum([Part(without, name="a"), Part(pooled, name="b")])
    assert both.needs.pool == 6
    expected = without.generator_loss(draw) + pooled.generator_loss(full)
    torch.testing.assert_close(both.generator_loss(full), expected)


class TestState:
    def test_it_is_that_of_the_parts_networks(self) -> None:
        vardiu, diff_instruct = VarDiU(TEACHER, posterior()), DiffInstruct(TEACHER, critic())
        both = WeightedSum([Part(vardiu), Part(diff_instruct, name="di")])
        assert both.networks == vardiu.networks | diff_instruct.networks

    def test_names_that_several_parts_have_are_with_the_parts(self) -> None:
        first, second = VarDiU(TEACHER, posterior(), posterior_steps=2), VarDiU(TEACHER, posterior(), posterior_steps=3)
        both = WeightedSum([Part(first, name="a"), Part(second, name="b"), Part(DiffInstruct(TEACHER, critic()))])
        assert list(both.networks) == ["a.posterior", "b.posterior", "critic"]
        assert both.networks["b.posterior"] is second.networks["posterior"]
        assert [(update.name, update.trains) for update in both.updates()] == [
            ("a.posterior", ("a.posterior",)),
            ("b.posterior", ("b.posterior",)),
            ("critic", ("critic",)),
            ("student", ("student", "a.posterior", "b.posterior")),
        ]

    def test_it_comes_back_from_a_checkpoint(self, tmp_path: Any) -> None:
        folder = RunFolder(tmp_path)
        trained = small_runs.trainer("sum", folder, steps=6)
        trained.run()
        resumed = small_runs.trainer("sum", folder, steps=6)
        fresh = state(resumed)
        resumed.restore()
        after = state(resumed)
        names = [name for name in after if name.startswith("network.posterior")]
        assert names
        assert all(torch.equal(after[name], v) for name, v in state(trained).items())
        assert any(not torch.equal(after[name], fresh[name]) for name in names)

    def test_the_teacher_stays_frozen_and_the_map_of_features_too(self) -> None:
        teacher = critic()
        features = small_runs.OfSamples(torch.nn.Linear(3, 4))
        both = WeightedSum([Part(VarDiU(teacher, posterior())), Part(VarFlow(features=features))])
        assert not any(module.training for module in (*teacher.modules(), features))
        assert not any(p.requires_grad for p in (*teacher.parameters(), *features.parameters()))
        assert list(both.networks) == ["posterior"]
        assert features in both.frozen


def test_by_default_parts_that_compare_groups_have_levels_of_their_own() -> None:
    """VarDiU's weight is a length, and VarFlow's is 1: see docs/theory.md."""
    g, teacher = small_runs.generator(), small_runs.teacher()
    vardiu, varflow = VarDiU(teacher, Prior(), candidates="batch"), VarFlow()
    both, levels = with_default_levels(WeightedSum([Part(vardiu), Part(varflow, 0.3)]), g, 4)
    assert levels.shared == 0
    assert [own.shared for own in both.needs.other_levels] == [4]
    assert both.parts == (vardiu, varflow)
    r = torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert torch.equal(both.needs.other_levels[0].weight(torch.ones(2), r), torch.ones(2, dtype=torch.float64))
    assert levels.weight(torch.ones(2), r).unique().numel() == 2
    alone, shared = with_default_levels(WeightedSum([Part(VarFlow())]), g, 4)

    class Doubled(WeightedSum):
        def generator_loss(self, draw: Draw) -> Tensor:
            return 2 * super().generator_loss(draw)

    own, _ = with_default_levels(Doubled([Part(vardiu), Part(varflow, 0.3)]), g, 4)
    assert isinstance(own, Doubled)
    assert own.needs.other_levels[0].shared == 4
    assert (shared.shared, alone.needs.other_levels) == (4, ())
    run = distill(
        g, objective=WeightedSum([Part(vardiu), Part(varflow, 0.3)]), data=torch.randn(32, 2, dtype=torch.float64),
        training=small_runs.config(steps=2),
    )  # fmt: skip
    assert [own.shared for own in run.objective.needs.other_levels] == [4]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda vardiu: WeightedSum([vardiu]), r"are Part\(objective, weight\), but one is VarDiU"),
        (lambda vardiu: Part("VarDiU"), "a part of a sum must be an objective, but is str"),
        (lambda vardiu: Part(vardiu, "0.5"), "weight must be a finite number, or a function"),
        (lambda vardiu: Part(vardiu, math.nan), "weight must be a finite number, or a function"),
    ],
)
def test_mistakes_in_its_parts(make: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make(VarDiU(small_runs.teacher(), Prior(), candidates="batch"))


def counted(trainer: Trainer) -> list[int]:
    """Rows that networks are called with, as hooks see them."""
    rows: list[int] = []
    networks = [trainer.student.denoiser if trainer.student.times else trainer.student, trainer.objective.teacher]
    for network in trainer.objective.networks.values():
        networks += network if isinstance(network, torch.nn.ModuleList) else [network]
    for network in (n for n in (*networks, *trainer.objective.frozen) if isinstance(n, torch.nn.Module)):
        network.register_forward_hook(lambda module, inputs, out: rows.append(len(inputs[0])))
    return rows


def with_features() -> WeightedSum:
    """Two parts with critics of different numbers of steps, and a map of features under levels of its own."""
    teacher = small_runs.teacher()
    vardiu = VarDiU(teacher, DiagonalGaussian(2, 2, 2.0, depth=1, width=8), candidates=2, posterior_steps=2)
    of_critic = Preconditioned(LevelMLP(2, 2, depth=1, width=8), 2.0, VE())
    own = small_runs.levels(shared=4, draws=4)
    return WeightedSum([
        Part(vardiu), Part(DiffInstruct(teacher, of_critic, critic_steps=3)),
        Part(VarFlow(features=small_runs.OfSamples(torch.nn.Linear(2, 3))), 1.0, own),
    ])  # fmt: skip


@pytest.mark.parametrize("kind", [*small_runs.KINDS, *small_runs.FEW, "features"])
def test_network_evaluations_are_counted(kind: str) -> None:
    """As hooks count them, for every kind of objective; also the steps before the one that is trained."""
    training = small_runs.config(steps=3, log_every=100, eval_every=0)
    objective = with_features() if kind == "features" else small_runs.objective(kind)
    student, levels = small_runs.generator_of(kind), small_runs.levels(kind)
    trainer = Trainer(student, objective, levels, training, data=small_runs.data())
    rows = counted(trainer)
    for step in range(3):
        trainer.advance(step / 3)
    assert sum(rows) == trainer.evaluations


class TestMistakes:
    @pytest.mark.parametrize(
        ("parts", "match"),
        [
            (lambda: [], "a sum needs at least one part"),
            (lambda: [Part(VarFlow()), Part(VarFlow())], r"need different names, but are varflow, varflow: give Part"),
            (
                lambda: [Part(VarDiU(TEACHER, Prior())), Part(VarFlow(teacher=copy.deepcopy(TEACHER)))],
                "must have the same teacher",
            ),
            (
                lambda: [Part(VarDiU(TEACHER, posterior(), candidates=2), levels=OWN)],
                "needs further latents or noise needs the run's levels",
            ),
            (
                lambda: [Part(VarFlow(), levels=replace(OWN, shared=0))],
                "varflow compares groups of one level: share its levels, for example shared=8",
            ),
            (
                lambda: [Part(WeightedSum([Part(VarFlow())]))],
                "a sum of sums is one sum: list its parts directly",
            ),
            (
                lambda: [Part(VarDiU(TEACHER, Prior(), "batch", pool=m), name=str(m)) for m in (4, 6)],
                r"parts with pools of candidates share one pool, but these want \[4, 6\]",
            ),
        ],
    )
    def test_arguments(self, parts: Callable[[], list[Part]], match: str) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            WeightedSum(parts())
        assert "\n" not in str(caught.value)

    def test_a_draw_without_the_parts_own_noise(self, generator: Linear, rng: torch.Generator) -> None:
        both = WeightedSum([Part(VarDiU(TEACHER, Prior())), Part(VarFlow(), levels=OWN)])
        with pytest.raises(UsageError, match="the sum needs 1 further draws of noise as draw.other_noise"):
            both.generator_loss(replace(a_draw(generator, rng), other_noise=()))

    def test_a_batch_that_does_not_split_over_a_parts_levels(self) -> None:
        both = WeightedSum([Part(VarDiU(TEACHER, Prior())), Part(VarFlow(), levels=OWN)])
        with pytest.raises(UsageError, match="batch must be divisible by 8, shared levels times processes, but is 12"):
            check_batch(12, 2, both, NoiseLevels(VE(), AtTimes((0.5,))))
        with pytest.raises(UsageError, match="groups need at least 2 latents each, but batch=4 has 4 shared levels"):
            check_batch(4, 1, both, NoiseLevels(VE(), AtTimes((0.5,))))


def test_a_posterior_has_one_weighting_in_all_of_its_updates(generator: Linear, rng: torch.Generator) -> None:
    """Its gradient is the same in its own update and in the student's, for any weight of the part, which may move."""
    q = posterior()
    both = WeightedSum([Part(VarDiU(TEACHER, q, posterior_steps=2), lambda progress: 0.01 + progress), Part(VarFlow())])
    own, student = both.updates()
    draw = a_draw(generator, rng)
    parameters = list(q.parameters())
    gradients = [torch.autograd.grad(u.loss(draw).mean(), parameters, allow_unused=True) for u in (own, student)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
