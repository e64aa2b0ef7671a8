"""A step: against a bare loop, in a head start, in parts, under conditions, and what has to fit for it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small_runs
from linear_gaussian import Linears, labelled_drawn
from small_runs import run_small, small_distill, state
from vardistill.diffusion.noise import Draw
from vardistill.diffusion.schedules import VE
from vardistill.errors import UsageError
from vardistill.objectives import Part, VarDiU, VarFlow, WeightedSum
from vardistill.posteriors.few import Prior
from vardistill.students.perceptron import MLP
from vardistill.training.clock import phase
from vardistill.training.data import Labels, StoredSamples
from vardistill.training.loop import distill, learning_rate
from vardistill.training.step import Drawn


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
            objective=VarDiU(Deaf(), Prior(), candidates=1),
        )
        of_labels = VarDiU(small_runs.labelled_teacher(), Prior(), candidates=1)
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
