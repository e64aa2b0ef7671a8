"""Conditions: labels and others reach student, teacher, critic and posterior, and what has to fit for that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small_runs
from linear_gaussian import complete
from vardistill.denoisers import Preconditioned
from vardistill.diffusion.schedules import VE
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP
from vardistill.objectives import DiffInstruct, Objective, Part, VarDiU, VarFlow, WeightedSum
from vardistill.posteriors.few import Conditional, DiagonalGaussian, Posterior, Prior
from vardistill.runs.distill import distill
from vardistill.students.student import Student
from vardistill.training.data import Labels, StoredSamples
from vardistill.training.loop import Trainer

SHIFT = 3.0


class Prompted(Student):
    """x = A z + SHIFT c, under prompts c ∈ R²."""

    latent_shape = data_shape = (2,)
    data_std = 2.0

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(2, 2).double()

    @property
    def condition_names(self) -> tuple[str, ...]:
        return ("prompt",)

    def forward(self, z: Tensor, prompt: Tensor) -> Tensor:
        x: Tensor = self.linear(z) + SHIFT * prompt
        return x


class Told(nn.Module):
    """A denoiser of what is shifted by the prompts, which notes them."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.seen: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        self.seen.append(prompt)
        denoised: Tensor = self.denoiser(x_t - SHIFT * prompt, t) + SHIFT * prompt
        return denoised


class ToldPosterior(Posterior):
    """q(z | x_t, c) of what is shifted by the prompts, which notes them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = DiagonalGaussian(2, 2, 2.0, depth=1, width=8).double(), []

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, prompt: Tensor) -> Conditional:
        self.seen.append(prompt)
        return self.inner(x_t - SHIFT * prompt, alpha, sigma)


def prompts(n: int, rng: torch.Generator) -> dict[str, Tensor]:
    return {"prompt": torch.randn(n, 2, generator=rng, dtype=torch.float64)}


def data(n: int, rng: torch.Generator, prompt: Tensor) -> Tensor:
    return small_runs.teacher().sample(n, rng) + SHIFT * prompt


def points(condition: Mapping[str, Tensor]) -> Tensor:
    return 0.5 * condition["prompt"]


def critic() -> Told:
    return Told(Preconditioned(LevelMLP(2, 2, depth=1, width=8), 2.0, VE()).double())


def prompted(kind: str, **options: Any) -> Trainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        objectives: dict[str, Objective] = {
            "learned": VarDiU(Told(small_runs.teacher()), ToldPosterior(), posterior_steps=2),
            "drawn": VarDiU(Told(small_runs.teacher()), ToldPosterior(), candidates=2),
            "diff-instruct": DiffInstruct(Told(small_runs.teacher()), critic(), sigma_data=2.0),
            "varflow": VarFlow(condition_features=points),
        }
    levels = small_runs.levels("varflow" if kind == "varflow" else "learned")
    objective, training = objectives[kind], small_runs.config(batch=16, steps=6, **options)
    return Trainer(Prompted(), objective, levels, training, data=data, conditions=prompts)


class TestPrompts:
    @pytest.mark.parametrize("kind", ["learned", "drawn", "diff-instruct", "varflow"])
    def test_they_reach_every_network_with_their_rows(self, kind: str) -> None:
        trainer = prompted(kind)
        told = [trainer.objective.teacher, *trainer.objective.networks.values()]
        networks: list[Any] = [network for network in told if network is not None]
        for number, update in enumerate(trainer.objective.updates(0.5)):
            for network in networks:
                network.seen.clear()
            drawn = trainer.draw(update, 0.5, number)
            trainer.backward(update, drawn)
            rows = drawn.noise.rows(drawn.condition["prompt"])
            asked = networks if update.trains_student else networks[1:]
            for network in asked:
                assert all(torch.equal(seen, rows) for seen in network.seen)
                assert network.seen
            draw = complete(drawn, trainer.student)
            torch.testing.assert_close(draw.x, trainer.student.linear(draw.z) + SHIFT * rows)

    @pytest.mark.parametrize("parts", [1, 4])
    @pytest.mark.parametrize("kind", ["learned", "drawn", "diff-instruct", "varflow"])
    def test_runs_train_with_them_in_parts_too(self, kind: str, parts: int) -> None:
        before, trainer = Prompted(), prompted(kind, accumulate=parts, eval_every=0)
        whole = prompted(kind, eval_every=0)
        for job in (trainer, whole):
            job.run()
        assert all(line.get("skipped", 0) == 0 for line in trainer.history)
        for p, q, old in zip(*(s.parameters() for s in (trainer.student, whole.student, before)), strict=True):
            assert not torch.equal(p, old)
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)

    def test_varflow_takes_what_stands_for_them_into_its_distances(self) -> None:
        """Written out: no row meets the real sample that was drawn under its own prompt."""
        trainer = prompted("varflow")
        *_, update = trainer.objective.updates(0.5)
        draw = complete(trainer.draw(update, 0.5, 0), trainer.student)
        own = points(draw.batch)
        x, y = (draw.noise.groups(torch.cat([v / 2**0.5, own], 1)) for v in (draw.x_t, draw.real_t))
        others = ~torch.eye(x.shape[1], dtype=torch.bool)
        between, within = ((x[:, :, None] - v[:, None]).norm(dim=3)[:, others].view(*x.shape[:2], -1) for v in (y, x))
        expected = draw.noise.weight * draw.noise.ungroup(between.mean(2) - 0.5 * within.mean(2))
        torch.testing.assert_close(update.loss(draw), expected, rtol=1e-10, atol=1e-10)

    def refuses(
        self, match: str, objective: Objective, student: Student | None = None, conditions: Any = prompts
    ) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            Trainer(
                student or Prompted(), objective, small_runs.levels("varflow"), small_runs.config(), data=data,
                conditions=conditions,
            )  # fmt: skip
        assert "\n" not in str(caught.value)

    def test_varflow_is_told_what_their_distances_are(self) -> None:
        for objective in (VarFlow(), VarFlow(classes=2), WeightedSum([Part(VarFlow())])):
            self.refuses("steps draw the conditions prompt, and VarFlow .* give condition_features", objective)

    def test_the_batchs_candidates_have_others(self) -> None:
        objective = VarDiU(Told(small_runs.teacher()), Prior(), candidates="batch")
        self.refuses("candidates of the batch have other conditions", objective)

    def test_networks_that_do_not_take_them_are_refused(self) -> None:
        deaf = small_runs.objective("diff-instruct")
        teacher = Preconditioned(LevelMLP(2, 2, depth=1, width=8), 2.0, VE()).double()
        self.refuses("the teacher does not take .* with prompt: ", DiffInstruct(teacher, deaf.critic))
        self.refuses("the critic does not take .* with prompt: ", DiffInstruct(Told(small_runs.teacher()), deaf.critic))
        posterior = DiagonalGaussian(2, 2, 2.0, depth=1, width=8).double()
        self.refuses("the posterior does not take", VarDiU(Told(small_runs.teacher()), posterior))

    def test_student_and_conditions_have_the_same_names(self) -> None:
        objective = VarFlow(condition_features=points)
        self.refuses("the generator is conditional: give conditions, e.g. of prompt", objective, conditions=None)
        self.refuses(
            "the conditions are labels, but the generator takes prompt", objective, conditions=Labels(torch.ones(2))
        )
        self.refuses(
            "conditions are for a conditional generator, but this one takes none", objective, small_runs.generator()
        )


class TestLabels:
    def refuses(self, match: str, kind: str = "labels", **options: Any) -> None:
        arguments: dict[str, Any] = {
            "student": small_runs.labelled_generator(),
            "objective": small_runs.objective(kind),
            "conditions": small_runs.conditions(),
            "data": small_runs.labelled_data,
            "training": small_runs.config(steps=1),
        }
        arguments |= options
        with pytest.raises(UsageError, match=match) as caught:
            distill(**arguments)
        assert "\n" not in str(caught.value)

    def test_generator_and_conditions_have_to_fit(self) -> None:
        self.refuses(r"the generator is conditional: give conditions, e.g. vardistill.data.Labels", conditions=None)
        unconditional = {"student": small_runs.generator(), "objective": small_runs.objective("drawn")}
        self.refuses("conditions are for a conditional generator, but this one takes none", **unconditional)
        self.refuses("the conditions are 3 labels, but the generator takes 2", conditions=Labels(torch.ones(3)))

    def test_the_objective_has_to_take_them(self) -> None:
        shared = VarDiU(small_runs.labelled_teacher(), Prior(), candidates="batch")
        for objective in (shared, WeightedSum([Part(VarFlow(classes=2)), Part(shared)])):
            levels = small_runs.levels("varflow")
            self.refuses("candidates of the batch have other conditions", objective=objective, levels=levels)
        for objective in (VarFlow(), VarFlow(classes=1)):
            self.refuses("the generator takes 2 labels: tell VarFlow, classes=2", objective=objective)

    def test_the_teacher_has_to_take_them(self) -> None:
        class Deaf(nn.Module):
            schedule = VE()

            def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
                return x_t

        self.refuses(
            r"the teacher does not take the generator's samples, .* with labels: .*'labels'",
            objective=VarDiU(Deaf(), Prior(), candidates=1),
        )
        of_labels = VarDiU(small_runs.labelled_teacher(), Prior(), candidates=1)
        self.refuses(
            r"the teacher does not take the generator's samples, .*float64: .*'labels'",
            student=small_runs.generator(), objective=of_labels, conditions=None,
        )  # fmt: skip

    def test_the_data_have_to_have_them(self) -> None:
        points = torch.zeros(4, 2)
        self.refuses("the data have no labels, but the generator is conditional", "labels-varflow", data=points)
        alike = StoredSamples(points, torch.zeros(4, dtype=torch.int64))
        self.refuses("the data have samples of 1 labels, but the generator takes 2", "labels-varflow", data=alike)
        self.refuses(
            r"the data are no function of \(n, rng, labels\)", "labels-varflow", data=small_runs.teacher().sample
        )

    def test_stored_data_are_left_as_they_were(self) -> None:
        stored = StoredSamples(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))
        run = distill(
            small_runs.labelled_generator(), objective=small_runs.objective("labels-varflow"), data=stored,
            conditions=small_runs.conditions(), training=small_runs.config(steps=2),
        )  # fmt: skip
        assert stored.data.dtype == torch.float32
        assert all(p.dtype == torch.float64 for p in run.generator.parameters())
