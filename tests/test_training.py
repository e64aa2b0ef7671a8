"""The trainer: its step against a bare loop, its schedules, what it skips, keeps and refuses."""

from __future__ import annotations

import copy
import itertools
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import small_runs
import vardistill as vd
from linear_gaussian import Linears, labelled_drawn
from small_runs import state
from vardistill import clock as clock_module
from vardistill import training as training_module
from vardistill.bookkeeping import StopRequest
from vardistill.clock import phase
from vardistill.config import TrainingConfig
from vardistill.data import Labels, StoredSamples
from vardistill.denoisers import GaussianMixture
from vardistill.errors import UsageError
from vardistill.generators import MLP, Generator
from vardistill.noise_levels import Draw
from vardistill.objectives import Objective, Part, VarDiU, VarFlow, WeightedSum
from vardistill.optimisers import adam_state
from vardistill.posteriors import Prior
from vardistill.runs import RunFolder
from vardistill.schedules import VE
from vardistill.steps import Drawn
from vardistill.training import (
    Diverged,
    Interrupted,
    Trainer,
    average_of,
    check_batch,
    default_levels,
    distill,
    learning_rate,
)


def run_small(kind: str = "batch", folder: Path | None = None, **options: Any) -> tuple[dict[str, Tensor], Trainer]:
    """The final state of a small run, by name, and its trainer."""
    trainer = small_runs.trainer(kind, None if folder is None else RunFolder(folder), **options)
    trainer.run()
    return state(trainer), trainer


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, v in a.items():
        assert torch.equal(v, b[name]), name


def small_distill(generator: Generator | None = None, **options: Any) -> training_module.Run:
    options = {"teacher": small_runs.teacher(), "training": small_runs.config(steps=2)} | options
    return distill(small_runs.generator() if generator is None else generator, **options)


class TestStep:
    @pytest.mark.parametrize("kind", [*small_runs.KINDS, *small_runs.CONDITIONAL])
    def test_it_is_that_of_a_bare_loop(self, kind: str) -> None:
        config = small_runs.config(
            steps=12, lr=3e-2, auxiliary_lr=1e-2, clip=0.5, ema=0.9, warmup=0.3, lr_final=0.1, weight_decay=0.1
        )
        g, objective, levels = small_runs.generator_of(kind), small_runs.objective(kind), small_runs.levels(kind)
        conditions = small_runs.conditions(kind) or (lambda n, rng: {})
        average = copy.deepcopy(g)
        groups = [list(g.parameters()), objective.auxiliary_parameters()]
        adams = [torch.optim.AdamW(group or [torch.zeros(())], betas=(0.9, 0.99), weight_decay=0.1) for group in groups]
        rng = torch.Generator().manual_seed(config.seed)

        def update(progress: float, critic: bool) -> None:
            z = g.latents(config.batch, rng)
            noise, *others = [
                some.draw((2,), config.batch, progress, rng, torch.float64, real=objective.needs_real)
                for some in (levels, *objective.other_levels)
            ]
            eta = pool = real = None
            batch = {name: torch.cat([v, v]) for name, v in conditions(config.batch, rng).items()}
            if objective.needs_real:
                of_latents = {name: v[: config.batch] for name, v in batch.items()}
                real = noise.rows(small_runs.data(kind)(config.batch, rng, **of_latents))
            if k := objective.fresh_latents:
                eta = torch.randn(k, 2 * config.batch, 2, generator=rng, dtype=torch.float64)
            if m := objective.pool_latents:
                pool = g.latents(m, rng)

            def generate(z: Tensor) -> Tensor:
                return g(z, **{name: torch.cat([v] * (len(z) // len(v))) for name, v in batch.items()})

            z = noise.rows(z)
            draw = Draw(
                z, generate(z), noise, generate, eta, pool, batch, real, progress, other_noise=tuple(others)
            )  # fmt: skip
            loss = objective.critic_loss(draw) if critic else objective.generator_loss(draw)
            loss.mean().backward()
            for group, adam in list(zip(groups, adams, strict=True))[critic:]:
                reached = [p for p in group if p.grad is not None]
                norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reached))
                for p in reached:
                    p.grad *= min(1.0, 0.5 / (norm + 1e-6))
                adam.step()
            for p in [*groups[0], *groups[1]]:
                p.grad = None

        for n in range(config.steps):
            progress = n / config.steps
            decayed = 0.1 + 0.9 * (1 + math.cos(math.pi * (progress - 0.3) / 0.7)) / 2
            rate = progress / 0.3 if progress < 0.3 else decayed
            adams[0].param_groups[0]["lr"], adams[1].param_groups[0]["lr"] = 3e-2 * rate, 1e-2 * rate
            for _ in range(objective.critic_steps):
                update(progress, critic=True)
            update(progress, critic=False)
            d = min(0.9, (1 + n) / (10 + n))
            for a, p in zip(average.parameters(), g.parameters(), strict=True):
                a.data = d * a.data + (1 - d) * p.data

        trainer = small_runs.trainer(kind, **{f: getattr(config, f) for f in vars(config)})
        trainer.run()
        for ours, theirs in ((trainer.generator, g), (trainer.average, average), (trainer.objective, objective)):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)

    def test_the_critic_is_updated_posterior_steps_minus_one_times_and_alone(self) -> None:
        trainer = small_runs.trainer("learned")
        calls = []
        critic_loss = trainer.objective.critic_loss

        def counted(draw: Draw) -> Tensor:
            calls.append(draw.x.requires_grad)
            return critic_loss(draw)

        trainer.objective.critic_loss = counted
        trainer.run()
        assert calls == [False] * 20

        trainer = small_runs.trainer("drawn", warmup=0.0)
        trainer.objective.critic_loss = trainer.objective.generator_loss
        trainer.advance(0.0)
        before = state(trainer)
        trainer.update(0.0, critic=True)
        moved = {name for name, v in state(trainer).items() if not torch.equal(v, before[name])}
        assert {name.split("/")[0] for name in moved} == {"objective", "optimizer.objective", "random", "counters"}

    @pytest.mark.parametrize("kind", ["diff-instruct", "learned"])
    def test_the_critics_figures_are_those_of_the_last_update_that_reached_it(self, kind: str) -> None:
        trainer = small_runs.trainer(kind, warmup=0.0)
        losses, norms = [], []
        critic_loss, optimizer = trainer.objective.critic_loss, trainer.optimizers["objective"]

        def recorded(draw: Draw) -> Tensor:
            loss = critic_loss(draw)
            losses.append(float(loss.detach().mean()))
            return loss

        def measure(*ignored: Any) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(nn.utils.get_total_norm(gradients)))

        trainer.objective.critic_loss = recorded
        optimizer.register_step_pre_hook(measure)
        for _ in range(3):
            trainer.advance(0.5)
        assert len(norms) == 6  # two a step: of the critic, or of the critic and of all together
        assert float(trainer.figures["critic_loss"]) == pytest.approx(losses[-1])
        assert float(trainer.figures["grad_norm_objective"]) == pytest.approx(norms[-1]) != 0

    def test_rates_are_the_groups_own(self) -> None:
        trainer = small_runs.trainer("learned", lr=1e-2, auxiliary_lr=3e-3, lr_schedule="constant", warmup=0.2)
        for progress, share in ((0.1, 0.5), (0.7, 1.0)):
            trainer.advance(progress)
            rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in trainer.optimizers.items()}
            assert rates == pytest.approx({"generator": 1e-2 * share, "objective": 3e-3 * share})

    def test_gradients_are_clipped_by_group(self) -> None:
        trainer = small_runs.trainer("learned", clip=1e-3)
        norms: dict[str, float] = {}

        def watch(name: str, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
            def measure() -> None:
                gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
                norms[name] = float(nn.utils.get_total_norm(gradients))

            return measure

        for name, optimizer in trainer.optimizers.items():
            optimizer.step = watch(name, optimizer)
        trainer.advance(0.5)
        assert norms == pytest.approx({"generator": 1e-3, "objective": 1e-3}, rel=1e-3)
        assert float(trainer.figures["grad_norm_generator"]) > 1e-3

    def test_an_objective_must_return_a_value_per_row(self) -> None:
        objective = small_runs.objective()
        loss = objective.generator_loss
        objective.generator_loss = lambda draw: loss(draw).mean()
        with pytest.raises(UsageError, match=r"one value per row, \(16,\), but got \(\)"):
            small_distill(teacher=None, objective=objective, levels=small_runs.levels())

    def test_parameters_that_the_loss_does_not_reach_are_kept_and_resumed(self, tmp_path: Path) -> None:
        def generator() -> MLP:
            g = small_runs.generator()
            g.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
            return g

        small_distill(generator(), out=tmp_path)
        resumed = small_distill(generator(), out=tmp_path, resume=True, training=small_runs.config(steps=4))
        assert torch.equal(resumed.generator.unused, torch.ones(3, dtype=torch.float64))

    def test_tied_weights_are_kept_and_resumed(self, tmp_path: Path) -> None:
        def generator() -> MLP:
            g = small_runs.generator()
            g.tied = g.layers[0].weight
            return g

        small_distill(generator(), out=tmp_path)
        resumed = small_distill(generator(), out=tmp_path, resume=True, training=small_runs.config(steps=4)).generator
        assert torch.equal(resumed.tied, resumed.layers[0].weight)


class TestHeadStart:
    """Its first share of a run's steps, here 8 of 20, is the objective's networks' alone."""

    @pytest.mark.parametrize("kind", ["learned", "diff-instruct", "sum"])
    def test_only_the_objectives_networks_learn_in_it(self, kind: str) -> None:
        trainer = small_runs.trainer(kind, head_start=0.4, warmup=0.0)
        rows = []
        trainer.generator.register_forward_hook(lambda module, inputs, x: rows.append(x.requires_grad))
        before = state(trainer)
        for n in range(20):
            trainer.advance(*phase(trainer.config, n / 20))
            own = {name.split("/")[0] for name, v in state(trainer).items() if not torch.equal(v, before[name])}
            expected = {"objective", "optimizer.objective", "random", "counters"}
            assert own == (expected if n < 8 else expected | {"generator", "average", "optimizer.generator"})
        steps = trainer.objective.critic_steps
        assert rows == [False] * 8 * steps + ([False] * steps + [True]) * 12

    def test_levels_and_rates_go_through_both_parts(self) -> None:
        trainer = small_runs.trainer("learned", head_start=0.4, lr_schedule="cosine", warmup=0.1)
        seen, draw = [], trainer.draw

        def watched(progress: float) -> Drawn:
            seen.append(progress)
            return draw(progress)

        trainer.draw = watched
        rates = []
        for n in range(20):
            trainer.advance(*phase(trainer.config, n / 20))
            rates.append(trainer.optimizers["objective"].param_groups[0]["lr"] / trainer.config.auxiliary_lr)
        expected = [n / 8 for n in range(8)] + [n / 12 for n in range(12)]
        assert seen[:8] + seen[8::2] == pytest.approx(expected)
        assert rates == pytest.approx([learning_rate(trainer.config, progress) for progress in expected])

    def test_the_average_begins_after_it(self) -> None:
        """With d = min(ema, (1 + n)/(10 + n)) after n updates of the generator: of its start 0.1 · 2/11 are left."""
        trainer = small_runs.trainer("learned", head_start=0.9, ema=0.9, lr=1e-12)
        for n in range(20):
            before = [p.clone() for p in trainer.average.parameters()]
            with torch.no_grad():
                for p in trainer.generator.parameters():
                    p.fill_(float(n))
            trainer.advance(*phase(trainer.config, n / 20))
            share = {18: 0.1, 19: 2 / 11}.get(n, 1.0)
            for p, q in zip(trainer.average.parameters(), before, strict=True):
                torch.testing.assert_close(p, share * q + (1 - share) * n, rtol=1e-6, atol=1e-6)

    def test_a_budget_of_time_has_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of 20 quarters of a minute, the first 8."""
        trainer = small_runs.trainer("learned", head_start=0.4, steps=10**6, max_minutes=5.0)
        monkeypatch.setattr(trainer.clock, "elapsed", lambda: 15.0 * trainer.step)
        trainer.run()
        assert (trainer.step, trainer.updates) == (20, 12)

    def test_its_network_evaluations_are_those_of_the_critics_steps(self) -> None:
        """A step here is one of the critic's, 8 latents and 16 rows of q, and one of both, with 16 of the teacher."""
        counts = {}
        for share in (0.0, 0.4):
            trainer = small_runs.trainer("learned", head_start=share)
            counts[share] = trainer.run().history[-1]["network_evaluations"]
        assert counts == {0.0: 20 * (24 + 40), 0.4: 20 * 24 + 12 * 40}

    def test_in_it_the_student_has_no_rate_and_no_progress(self) -> None:
        """Signs of warning look away at the start of the student's own progress."""
        trainer = small_runs.trainer("learned", head_start=0.4, log_every=4, lr_schedule="constant", warmup=0.0)
        lines = [line for line in trainer.run().history if line["kind"] == "train"]
        assert [line["lr"] for line in lines] == [0, *[trainer.config.lr] * 4]
        assert [line["progress"] for line in lines] == pytest.approx([0, 0, 4 / 12, 8 / 12, 1])

    @pytest.mark.parametrize("kind", ["batch", "varflow", "drawn"])
    def test_objectives_without_steps_of_their_own_refuse_it(self, kind: str) -> None:
        with pytest.raises(UsageError, match="a head start is for the objective's own networks, but Var"):
            small_runs.trainer(kind, head_start=0.2)

    @pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
    def test_it_is_a_share(self, share: float) -> None:
        with pytest.raises(UsageError, match=r"head_start must be in \[0, 1\)"):
            small_runs.config(head_start=share)


class TestAccumulation:
    @pytest.mark.parametrize("kind", ["learned", "drawn", "diff-instruct", "labels", "labels-diff-instruct"])
    @pytest.mark.parametrize("parts", [2, 4])
    def test_the_parts_of_a_batch_do_what_the_whole_does(self, kind: str, parts: int) -> None:
        whole, _ = run_small(kind, clip=0.5)
        in_parts, trainer = run_small(kind, clip=0.5, accumulate=parts)
        for name, v in whole.items():
            torch.testing.assert_close(in_parts[name], v, rtol=1e-10, atol=1e-10)
        losses = [line["loss"] for line in trainer.history if line["kind"] == "train"]
        assert all(math.isfinite(loss) for loss in losses)

    def test_the_networks_see_a_part_at_a_time(self) -> None:
        trainer = small_runs.trainer("learned", accumulate=4)
        rows = []
        trainer.generator.register_forward_hook(lambda module, inputs, x: rows.append(len(x)))
        trainer.advance(0.5)
        assert rows == [2] * 4 * 2

    @pytest.mark.parametrize("kind", ["batch", "pool", "varflow", "sum"])
    def test_losses_that_compare_rows_refuse_it(self, kind: str) -> None:
        name = type(small_runs.objective(kind)).__name__
        with pytest.raises(UsageError, match=f"{name} compares the rows of a batch, which accumulate=2 would part"):
            small_runs.trainer(kind, accumulate=2)

    def test_a_batch_that_does_not_split_is_refused(self) -> None:
        with pytest.raises(UsageError, match="batch must be divisible by 3, accumulate times processes, but is 8"):
            small_runs.trainer("learned", accumulate=3)


class TestConditions:
    def drawn(self, rng: torch.Generator, **options: Any) -> tuple[Linears, Drawn]:
        generator = small_runs.labelled_generator()
        levels = {"draws": 2, "antithetic": True} | options
        return generator, labelled_drawn(generator, VE(), (0.3, 0.6), 6, rng, data=small_runs.labelled_data, **levels)

    def test_rows_and_candidates_have_the_labels_of_their_latents(self, rng: torch.Generator) -> None:
        generator, drawn = self.drawn(rng)
        draw, labels = drawn.complete(generator), drawn.condition["labels"]
        assert labels.unique().tolist() == [0, 1]
        assert draw.batch["labels"].tolist() == labels.tolist() * 2
        for row in range(12):
            alone = generator.of(int(labels[row % 6]))
            torch.testing.assert_close(draw.x[row], alone(drawn.z[row % 6][None])[0])
        candidates = torch.randn(3, 12, 2, generator=rng, dtype=torch.float64)
        x = draw.generator(candidates.flatten(0, 1)).unflatten(0, (3, 12))
        for k, row in itertools.product(range(3), range(12)):
            alone = generator.of(int(labels[row % 6]))
            torch.testing.assert_close(x[k, row], alone(candidates[k, row][None])[0])

    def test_conditions_may_have_further_axes(self, rng: torch.Generator) -> None:
        """A shift of every sample, (N, 2)."""
        _, drawn = self.drawn(rng)
        shift = torch.randn(6, 2, generator=rng, dtype=torch.float64)
        draw = drawn._replace(condition={"shift": shift}).complete(lambda z, shift: z + shift)
        torch.testing.assert_close(draw.x, (drawn.z + shift).repeat(2, 1))
        torch.testing.assert_close(draw.generator(torch.zeros(36, 2)), shift.repeat(6, 1))

    @pytest.mark.parametrize("parts", [2, 3])
    def test_parts_of_a_step_keep_them_with_their_rows(self, parts: int, rng: torch.Generator) -> None:
        generator, drawn = self.drawn(rng)
        whole, n = drawn.complete(generator), 6 // parts
        for part in range(parts):
            share = drawn.shard(part, parts).complete(generator)
            rows = torch.arange(12).view(2, 6)[:, part * n : (part + 1) * n].flatten()
            for name in ("z", "x", "x_t", "real_t"):
                assert torch.equal(getattr(share, name), getattr(whole, name)[rows]), name
            assert torch.equal(share.batch["labels"], whole.batch["labels"][rows])
            z = torch.zeros(2 * len(rows), 2, dtype=torch.float64)
            torch.testing.assert_close(share.generator(z), generator.b[whole.batch["labels"][rows]].repeat(2, 1))

    def refuses(self, match: str, kind: str = "labels", **options: Any) -> None:
        arguments: dict[str, Any] = {
            "generator": small_runs.labelled_generator(),
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
        unconditional = {"generator": small_runs.generator(), "objective": small_runs.objective("drawn")}
        self.refuses("conditions are for a conditional generator, but this one takes no labels", **unconditional)
        self.refuses("the conditions are 3 labels, but the generator takes 2", conditions=Labels(torch.ones(3)))

    def test_the_objective_has_to_take_them(self) -> None:
        shared = VarDiU(small_runs.labelled_teacher(), Prior(), candidates="batch")
        for objective in (shared, WeightedSum([Part(VarFlow(classes=2)), Part(shared)])):
            levels = small_runs.levels("varflow")
            self.refuses("candidates of the batch have other labels", objective=objective, levels=levels)
        for objective in (VarFlow(), VarFlow(classes=1)):
            self.refuses("the generator takes 2 labels: tell VarFlow, classes=2", objective=objective)

    def test_the_teacher_has_to_take_them(self) -> None:
        class Deaf(nn.Module):
            schedule = VE()

            def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
                return x_t

        self.refuses(
            r"the teacher does not take the generator's samples, .* with labels: .*'labels'",
            objective=VarDiU(Deaf(), Prior()),
        )
        of_labels = VarDiU(small_runs.labelled_teacher(), Prior())
        self.refuses(
            r"the teacher does not take the generator's samples, .*float64: .*'labels'",
            generator=small_runs.generator(), objective=of_labels, conditions=None,
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


class TestFrozenParameters:
    """A run whose generator's first layer is frozen."""

    def trainer(self, folder: Path | None = None, **options: Any) -> Trainer:
        generator = small_runs.generator()
        generator.layers[0].requires_grad_(False)
        run = None if folder is None else RunFolder(folder)
        objective, levels = small_runs.objective(), small_runs.levels()
        return Trainer(generator, objective, levels, small_runs.config(**options), small_runs.evaluate, run)

    def test_they_are_shared_by_the_average_and_the_others_are_not(self) -> None:
        generator = self.trainer().generator
        average = average_of(generator)
        assert not average.training
        for a, p in zip(average.parameters(), generator.parameters(), strict=True):
            assert torch.equal(a, p)
            assert not a.requires_grad
            assert (a is p) == (not p.requires_grad)
        assert sum(p.requires_grad for p in generator.parameters()) == 2
        assert torch.equal(average.sample(3), generator.sample(3))

    def test_the_rest_is_trained_and_averaged(self) -> None:
        trainer = self.trainer(warmup=0.0, ema=0.9)
        before = [p.detach().clone() for p in trainer.generator.parameters()]
        trainer.advance(0.5)
        d = 1 / 10
        for a, p, old in zip(trainer.average.parameters(), trainer.generator.parameters(), before, strict=True):
            assert torch.equal(p, old) == (not p.requires_grad)
            torch.testing.assert_close(a.detach(), d * old + (1 - d) * p.detach(), rtol=1e-12, atol=1e-12)
        states = {name.split("/")[0] for name in adam_state(trainer.optimizers["generator"])}
        assert states == {"0", "1"}

    def test_it_resumes_to_the_bits_of_an_unbroken_run(self, tmp_path: Path) -> None:
        unbroken = self.trainer()
        unbroken.run()
        (tmp_path / "run").mkdir()
        stopped = self.trainer(tmp_path / "run")
        small_runs.interrupt(stopped.objective, 7)
        with pytest.raises(Interrupted):
            stopped.run()
        resumed = self.trainer(tmp_path / "run")
        finished = resumed.run(resume=True).generator
        assert_equal(state(resumed), state(unbroken))
        weights = load_file(tmp_path / "run" / "generator" / "model.safetensors")
        assert all(torch.equal(weights[name], v.to(weights[name])) for name, v in finished.state_dict().items())

    def test_a_checkpoint_resumes_with_the_same_ones_frozen_only(self, tmp_path: Path) -> None:
        self.trainer(tmp_path, steps=4).run()
        unfrozen = small_runs.trainer("batch", RunFolder(tmp_path))
        with pytest.raises(UsageError, match="the checkpoint is of another model: .* optimizer.generator"):
            unfrozen.run(resume=True)

    def test_a_generator_that_is_frozen_as_a_whole_is_refused(self) -> None:
        with pytest.raises(UsageError, match="nothing to train: every parameter is frozen") as caught:
            small_distill(small_runs.generator().requires_grad_(False))
        assert "\n" not in str(caught.value)


class TestNumbers:
    def test_the_seed_fixes_them(self) -> None:
        first, _ = run_small("learned", seed=3)
        again, _ = run_small("learned", seed=3)
        other, _ = run_small("learned", seed=4)
        assert_equal(first, again)
        assert not torch.equal(first["generator/layers.0.weight"], other["generator/layers.0.weight"])

    def test_books_do_not_change_them(self, tmp_path: Path) -> None:
        plain, _ = run_small("drawn", log_every=1000, eval_every=0, checkpoint_every=1000)
        watched, _ = run_small("drawn", tmp_path, log_every=1, eval_every=1, checkpoint_every=1)
        assert_equal(plain, watched)

    def test_books_do_not_change_them_where_the_mode_matters(self) -> None:
        def run(**options: Any) -> dict[str, Tensor]:
            generator = small_runs.generator()
            generator.layers.insert(1, nn.BatchNorm1d(8).double())
            config = small_runs.config(ema=0.0, **options)
            trainer = Trainer(generator, small_runs.objective(), small_runs.levels(), config, small_runs.evaluate)
            trainer.run()
            return state(trainer)

        assert_equal(run(log_every=1000, eval_every=0), run(log_every=1, eval_every=1))

    def test_global_randomness_is_neither_used_nor_changed(self) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first, _ = run_small("learned")
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(6)
        second, _ = run_small("learned")
        assert_equal(first, second)

    def test_the_average_of_no_average_is_the_student(self) -> None:
        run = small_distill(training=small_runs.config(steps=2, ema=0.0), evaluate=small_runs.evaluate)
        assert all(p.requires_grad for p in run.generator.parameters())
        assert not run.generator.training

    def test_books_are_kept_where_due_and_once_at_the_end(self, tmp_path: Path) -> None:
        _, trainer = run_small("learned", tmp_path, steps=10, log_every=4, eval_every=5, checkpoint_every=5)
        steps = [(line["kind"], line["step"]) for line in trainer.history]
        assert steps == [("train", 4), ("eval", 5), ("train", 8), ("train", 10), ("eval", 10)]
        assert trainer.folder is not None
        assert trainer.folder.history() == trainer.history
        expected = {"loss", "bound", "grad_norm_generator", "grad_norm_objective", "lr", "skipped"}
        expected |= {"cpu_seconds", "network_evaluations"}
        assert expected <= trainer.history[0].keys()
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == ["step-00000005", "step-00000010"]

    def test_the_finished_generator_is_the_average(self, tmp_path: Path) -> None:
        run = small_distill(out=tmp_path)
        saved = MLP.from_pretrained(tmp_path / "generator")
        for p, q in zip(saved.parameters(), run.generator.parameters(), strict=True):
            torch.testing.assert_close(p, q, check_dtype=False)


class TestSkipping:
    def spoiled(self, spoil: Callable[[Tensor, Draw], Tensor], at: set[int]) -> Trainer:
        """A trainer whose loss is spoiled at these updates, counted from 1."""
        trainer = small_runs.trainer("drawn", warmup=0.0)
        loss, calls = trainer.objective.generator_loss, iter(range(1, sys.maxsize))

        def spoiling(draw: Draw) -> Tensor:
            value = loss(draw)
            return spoil(value, draw) if next(calls) in at else value

        trainer.objective.generator_loss = spoiling
        return trainer

    @staticmethod
    def infinite_gradient(loss: Tensor, draw: Draw) -> Tensor:
        draw.x.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        return loss

    @pytest.mark.parametrize(
        "spoil",
        [
            pytest.param(lambda loss, draw: loss * math.nan, id="NaN"),
            pytest.param(lambda loss, draw: loss + math.nan, id="NaN with a finite gradient"),
            pytest.param(lambda loss, draw: loss * math.inf, id="infinite"),
            pytest.param(infinite_gradient, id="infinite gradient"),
        ],
    )
    def test_a_step_that_is_not_finite_leaves_all_alone(self, spoil: Callable[[Tensor, Draw], Tensor]) -> None:
        trainer = self.spoiled(spoil, at={3})
        for _ in range(2):
            trainer.advance(0.5)
        before = state(trainer, "random", "counters", "average")
        average = copy.deepcopy(trainer.average)
        trainer.advance(0.5)
        assert_equal(state(trainer, "random", "counters", "average"), before)
        assert float(trainer.skipped) == 1
        decay = 3 / 12
        for a, b, p in zip(
            trainer.average.parameters(), average.parameters(), trainer.generator.parameters(), strict=True
        ):
            torch.testing.assert_close(a, decay * b + (1 - decay) * p, rtol=1e-12, atol=1e-12)
        trainer.advance(0.5)
        assert not torch.equal(state(trainer)["generator/layers.0.weight"], before["generator/layers.0.weight"])
        assert float(trainer.skipped) == 1
        assert all(v.isfinite().all() for v in state(trainer).values())

    def test_too_many_end_the_run_with_a_state_that_resumes(self, tmp_path: Path) -> None:
        objective = small_runs.objective("learned")
        loss = objective.generator_loss
        objective.generator_loss = lambda draw: loss(draw) * math.nan
        options: dict[str, Any] = {"teacher": None, "levels": small_runs.levels(), "out": tmp_path}
        training = small_runs.config(max_skipped=3, checkpoint_every=100)
        with pytest.raises(Diverged, match="4 updates up to step 4 had gradients that are not finite"):
            small_distill(objective=objective, training=training, **options)
        run = small_distill(objective=small_runs.objective("learned"), training=training, resume=True, **options)
        assert run.history[-1]["step"] == 20
        assert run.history[-1]["skipped"] == 4
        assert all(p.isfinite().all() for p in run.generator.parameters())


class TestLearningRate:
    def test_it_warms_up_and_follows_the_cosine(self) -> None:
        config = TrainingConfig(warmup=0.1, lr_final=0.2)
        expected = {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 0.6, 1.0: 0.2}
        for progress, share in expected.items():
            assert learning_rate(config, progress) == pytest.approx(share)

    def test_it_may_be_constant(self) -> None:
        config = TrainingConfig(warmup=0.0, lr_schedule="constant")
        assert [learning_rate(config, progress) for progress in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


class TestClock:
    @pytest.fixture
    def second_a_step(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Objective], None]:
        """A clock that an objective's loss moves on by a second."""
        now = 100.0
        monkeypatch.setattr(clock_module.time, "monotonic", lambda: now)

        def tick(objective: Objective) -> None:
            def ticking(draw: Draw) -> None:
                nonlocal now
                now += 1.0

            small_runs.in_training(objective, lambda loss: lambda draw: (ticking(draw), loss(draw))[1])

        return tick

    def test_a_budget_ends_the_run_and_the_schedules_follow_it(
        self, second_a_step: Callable[[Objective], None], tmp_path: Path
    ) -> None:
        options: dict[str, Any] = {"steps": 1000, "max_minutes": 0.5, "log_every": 5, "warmup": 0.0}
        trainer = small_runs.trainer("batch", RunFolder(tmp_path), **options)
        second_a_step(trainer.objective)
        trainer.run()
        lines = [line for line in trainer.history if line["kind"] == "train"]
        assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
        assert [line["seconds"] for line in lines] == [5, 10, 15, 20, 25, 30]
        for line in lines:
            assert line["lr"] == pytest.approx(1e-2 * (1 + math.cos(math.pi * line["step"] / 30)) / 2)
        assert [line["step"] for line in trainer.history if line["kind"] == "eval"][-2:] == [25, 30]

        shutil.rmtree(tmp_path / "checkpoints" / "step-00000030")
        resumed = small_runs.trainer("batch", RunFolder(tmp_path), **options)
        second_a_step(resumed.objective)
        resumed.run(resume=True)
        assert (resumed.step, resumed.clock.spent) == (30, 28)

    def test_steps_end_a_run_before_its_budget(self) -> None:
        _, trainer = run_small(steps=3, max_minutes=60.0)
        assert trainer.step == 3


class TestStopping:
    def test_a_second_ctrl_c_stops_at_once(self) -> None:
        trainer = small_runs.trainer()

        def twice(draw: Draw) -> Tensor:
            small_runs.press_ctrl_c()
            small_runs.press_ctrl_c()
            raise AssertionError

        trainer.objective.generator_loss = twice
        with pytest.raises(KeyboardInterrupt):
            trainer.run()

    def test_a_stop_in_the_last_step_lets_the_run_finish(self) -> None:
        trainer = small_runs.trainer(steps=3)
        small_runs.interrupt(trainer.objective, 3)
        assert trainer.run().history[-1]["step"] == 3

    def test_sigterm_is_a_stop_too(self) -> None:
        trainer = small_runs.trainer()
        loss = trainer.objective.generator_loss
        trainer.objective.generator_loss = lambda draw: (os.kill(os.getpid(), 15), loss(draw))[1]
        with pytest.raises(Interrupted, match="step 1"):
            trainer.run()

    def test_a_wish_needs_no_accelerator(self) -> None:
        """Of one process: the first signal is a wish, the second stops at once, and handlers come back."""
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        stop = StopRequest()
        with stop.heeded():
            assert not stop.agreed()
            signal.raise_signal(signal.SIGTERM)
            assert stop.made
            assert stop.agreed()
            with pytest.raises(KeyboardInterrupt):
                small_runs.press_ctrl_c()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    def test_a_run_may_live_in_a_thread(self) -> None:
        runs: list[Any] = []
        thread = threading.Thread(target=lambda: runs.append(run_small(steps=2)))
        thread.start()
        thread.join()
        assert runs[0][1].step == 2


class TestWhatIsSeen:
    def test_a_log_file_is_not_flooded(self, capsys: pytest.CaptureFixture[str]) -> None:
        run_small(steps=200, log_every=1, eval_every=0)
        assert capsys.readouterr().err.count("step") < 4

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("event", [None, "interrupt"])
    def test_tensorboard_has_the_curves_however_the_run_ends(self, event: str | None, tmp_path: Path) -> None:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        out = tmp_path / "run"
        out.mkdir()
        task = small_runs.Task(
            str(tmp_path / "result"), out=str(out), event=event, at=9, training={"tracker": "tensorboard"}
        )
        small_runs.run(task)
        events = accumulator.EventAccumulator(str(out / "logs"))
        events.Reload()
        last = 8 if event else 20
        assert [scalar.step for scalar in events.Scalars("train/loss")] == list(range(2, last + 1, 2))
        assert [scalar.step for scalar in events.Scalars("eval/mean")] == list(range(5, last + 1, 5))


class TestModes:
    def test_bf16_runs_and_keeps_full_precision_weights(self) -> None:
        generator = MLP(latent=2, data=2, depth=1, width=8)
        teacher = GaussianMixture(small_runs.MEANS.float(), std=0.5, schedule=VE())
        run = distill(generator, teacher=teacher, training=small_runs.config(steps=4, precision="bf16"))
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.generator.parameters())

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
    def test_compiled_networks_do_what_others_do(self) -> None:
        compiled, _ = run_small("drawn", compile=True, steps=4)
        plain, _ = run_small("drawn", steps=4)
        for name, v in plain.items():
            torch.testing.assert_close(compiled[name], v, rtol=1e-8, atol=1e-8)

    def test_default_levels_scale_with_the_data(self, rng: torch.Generator) -> None:
        small, large = (default_levels(small_runs.teacher(), std, 2).distribution for std in (1.0, 10.0))
        u = torch.rand(100, generator=rng)
        torch.testing.assert_close(large(u, 0.3, VE()), 10 * small(u, 0.3, VE()))


class TestRefusals:
    def refuses(self, match: str, *, generator: Generator | None = None, **options: Any) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            small_distill(generator, **options)
        assert "\n" not in str(caught.value)

    def test_both_or_neither_of_teacher_and_objective(self) -> None:
        self.refuses("either a teacher .* or an objective", teacher=None)
        self.refuses("either a teacher .* or an objective", objective=small_runs.objective())

    @pytest.mark.parametrize("device", ["cuda:7", "tpu"])
    def test_a_device_that_is_not_there(self, device: str) -> None:
        self.refuses(f"no device '{device}' here.*cpu", training=small_runs.config(device=device))

    def test_a_batch_of_one_with_candidates_from_the_batch(self) -> None:
        self.refuses("a batch of at least 2, but batch=1", training=small_runs.config(batch=1))

    @pytest.mark.parametrize("batch", [8, 9])
    def test_a_batch_or_a_pool_that_does_not_split(self, batch: int) -> None:
        with pytest.raises(UsageError, match=r"(pool|batch) must be divisible by the 4 processes, but is [69]"):
            check_batch(batch, 4, small_runs.objective("pool"), small_runs.levels())

    def test_odd_draws_in_antithetic_pairs(self) -> None:
        with pytest.raises(UsageError, match="even number of noise draws per latent, but draws=3"):
            small_runs.levels(draws=3)

    def test_a_teacher_of_another_dtype(self) -> None:
        teacher = GaussianMixture(small_runs.MEANS.float(), std=0.5, schedule=VE())
        self.refuses("teacher", teacher=teacher)

    def test_a_teacher_of_another_shape(self) -> None:
        self.refuses(
            "teacher.*generator", teacher=GaussianMixture(torch.eye(3, dtype=torch.float64), std=1.0, schedule=VE())
        )

    def test_a_resume_without_a_folder(self) -> None:
        self.refuses("resume needs the run folder", resume=True)

    def test_a_resume_of_nothing(self, tmp_path: Path) -> None:
        self.refuses("nothing to resume: no checkpoint in", resume=True, out=tmp_path)
        self.refuses("nothing to resume: no checkpoint in", resume=True, out=tmp_path / "none")

    def test_a_folder_in_use(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        self.refuses("is not empty", out=tmp_path)

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        self.refuses("cannot write the run folder", out=tmp_path / "file" / "run")

    def test_a_critic_without_steps(self) -> None:
        with pytest.raises(UsageError, match="posterior_steps must be at least 1, and 1 for the prior, but is 2"):
            training_module.VarDiU(small_runs.teacher(), Prior(), posterior_steps=2)


def test_levels_of_another_schedule_than_the_teachers_are_refused() -> None:
    teacher = vd.denoisers.GaussianMixture(torch.zeros(1, 2), std=1.0, schedule=vd.schedules.VP())
    levels = vd.NoiseLevels(vd.schedules.VE(), vd.levels.EDM())
    with pytest.raises(vd.UsageError, match="reschedule"):
        vd.distill(vd.generators.MLP(), teacher=teacher, levels=levels, training=vd.TrainingConfig(steps=1))


def test_any_generator_leaves_its_weights(tmp_path: Path) -> None:
    class Affine(Generator):
        latent_shape = data_shape = (2,)

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, z: Tensor) -> Tensor:
            return self.layer(z)

    teacher = GaussianMixture(torch.zeros(1, 2), std=1.0)
    training = TrainingConfig(steps=2, batch=8, tracker="none")
    run = vd.distill(Affine(), teacher=teacher, training=training, out=tmp_path / "run")
    weights = load_file(tmp_path / "run" / "generator" / "model.safetensors")
    assert torch.equal(weights["layer.weight"], run.generator.layer.weight)
