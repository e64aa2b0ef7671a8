"""Updates: against a bare loop, apart from each other, in a head start, in parts, and by their networks' settings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small_runs
from linear_gaussian import complete
from small_runs import run_small, small_distill, state
from vardistill.diffusion.noise import Draw
from vardistill.errors import UsageError
from vardistill.objectives import Objective, Part, Update, VarDiU, VarFlow, WeightedSum
from vardistill.objectives.base import inner
from vardistill.posteriors.few import FullGaussian
from vardistill.students.perceptron import MLP
from vardistill.training.clock import phase
from vardistill.training.config import NetworkConfig
from vardistill.training.draws import Drawn, Draws
from vardistill.training.loop import Trainer, learning_rate

EVERY = (*small_runs.KINDS, *small_runs.CONDITIONAL, *small_runs.FEW)


def networks_of(trainer: Trainer, before: dict[str, Tensor]) -> set[str]:
    """The networks and sections of which something has changed."""
    moved = {name.split("/")[0] for name, v in state(trainer).items() if not torch.equal(v, before[name])}
    return {section.removeprefix("network.") for section in moved if not section.startswith("optimizer.")}


class Bare:
    """An objective's loop written out: plain optimisers, gradients by autograd of what each update trains."""

    def __init__(self, kind: str, **settings: Any) -> None:
        self.config = small_runs.config(**settings)
        self.student, self.objective = small_runs.generator_of(kind), small_runs.objective(kind)
        self.average = copy.deepcopy(self.student)
        self.networks = {"student": self.student, **self.objective.networks}
        self.adams = {
            name: torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=self.config.weight_decay)
            for name, network in self.networks.items()
        }
        self.draws = Draws(
            self.student, small_runs.levels(kind), small_runs.data(kind), small_runs.conditions(kind),
            self.config.batch, self.config.seed, torch.device("cpu"), torch.float64,
        )  # fmt: skip

    def step(self, n: int) -> None:
        config, number = self.config, 0
        progress = n / config.steps
        for update in self.objective.updates(progress):
            for _ in range(update.repeats):
                self.update(update, progress, n, number)
                number += 1
        d = min(config.ema, (1 + n) / (10 + n))
        for a, p in zip(self.average.parameters(), self.student.parameters(), strict=True):
            a.data = d * a.data + (1 - d) * p.data

    def update(self, update: Update, progress: float, n: int, number: int) -> None:
        loss = update.loss(complete(self.draws(update.needs, progress, n, number), self.student)).mean()
        for name in update.trains:
            own = list(self.networks[name].parameters())
            gradients = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
            for p, g in zip(own, gradients, strict=True):
                p.grad = None if g is None else g * min(1.0, self.config.clip / (norm + 1e-6))
        for name in update.trains:
            self.adams[name].param_groups[0]["lr"] = self.rate(name, progress)
            self.adams[name].step()
            self.adams[name].zero_grad()

    def rate(self, name: str, progress: float) -> float:
        """A warm-up of 0.3 that counts the step itself, and half a cosine down to 0.1."""
        peak = self.config.lr if name == "student" else self.config.auxiliary_lr
        end = progress + 1 / self.config.steps
        decayed = 0.1 + 0.9 * (1 + math.cos(math.pi * max(0, progress - 0.3) / 0.7)) / 2
        return peak * (end / 0.3 if end < 0.3 else decayed)


class ThroughCritic(Objective):
    """‖D_ψ(x_t, t)‖²/d, whose gradient passes through the critic; D_ψ learns the opposite."""

    def __init__(self) -> None:
        diff_instruct = small_runs.objective("diff-instruct")
        super().__init__(diff_instruct.teacher, diff_instruct.networks)

    def updates(self, progress: float = 0.0) -> list[Update]:
        critic = Update("critic", ("critic",), lambda draw: -self.generator_loss(draw))
        return [critic, Update("student", ("student",), self.generator_loss)]

    def generator_loss(self, draw: Draw) -> Tensor:
        denoised = self.networks["critic"](draw.x_t, draw.noise.t)
        return inner(denoised, denoised)


class TestStep:
    @pytest.mark.parametrize("kind", EVERY)
    def test_it_is_that_of_a_bare_loop(self, kind: str) -> None:
        settings: dict[str, Any] = {"steps": 12, "lr": 3e-2, "auxiliary_lr": 1e-2, "clip": 0.05, "ema": 0.9}
        settings |= {"warmup": 0.3, "lr_final": 0.1, "weight_decay": 0.1}
        bare = Bare(kind, **settings)
        for n in range(12):
            bare.step(n)
        trainer = small_runs.trainer(kind, **settings)
        trainer.run()
        pairs = [(trainer.average, bare.average)]
        pairs += [(network, bare.networks[name]) for name, network in trainer.networks.items()]
        for ours, theirs in pairs:
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)

    def test_updates_of_frozen_networks_are_left_out(self) -> None:
        """A posterior that is used as it is has no steps of its own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            posterior = FullGaussian(2, 2, 2.0, depth=1, width=8).double().requires_grad_(False)
        before = {name: v.clone() for name, v in posterior.state_dict().items()}
        objective = VarDiU(small_runs.teacher(), posterior, posterior_steps=3)
        run = small_runs.small_distill(teacher=None, objective=objective, levels=small_runs.levels())
        assert all(torch.equal(v, before[name]) for name, v in posterior.state_dict().items())
        first = torch.cat([p.flatten() for p in small_runs.generator().parameters()])
        assert not torch.equal(torch.cat([p.flatten() for p in run.generator.parameters()]), first)

    @pytest.mark.parametrize("kind", EVERY)
    def test_an_update_moves_what_it_trains_and_nothing_else(self, kind: str) -> None:
        """Bit for bit: no other network, no other optimiser's state, not the teacher."""
        trainer = small_runs.trainer(kind, warmup=0.0)
        teacher = copy.deepcopy(trainer.objective.teacher)
        for step in range(3):
            number = 0
            for update in trainer.objective.updates(0.5):
                for _ in range(update.repeats):
                    before = state(trainer)
                    trainer.update(update, 0.5, number)
                    assert networks_of(trainer, before) - {"counters"} == set(update.trains)
                    after = state(trainer)
                    of_optimisers = {
                        name.split("/")[0]
                        for name, v in after.items()
                        if name.startswith("optimizer.") and not torch.equal(v, before[name])
                    }
                    assert of_optimisers == {f"optimizer.{name}" for name in update.trains}
                    assert all(p.grad is None for n in trainer.networks.values() for p in n.parameters())
                    number += 1
            trainer.step = step
        if isinstance(teacher, nn.Module):
            for v, w in zip(
                teacher.state_dict().values(), trainer.objective.teacher.state_dict().values(), strict=True
            ):
                assert torch.equal(v, w)

    def test_gradients_pass_through_what_is_not_trained(self) -> None:
        """Frozen for parameters, not for inputs: the critic has no gradient, and the student's is through it."""
        objective = ThroughCritic()
        trainer = Trainer(small_runs.generator(), objective, small_runs.levels(), small_runs.config(warmup=0.0))
        critic, student = objective.networks["critic"], trainer.student
        of_critic, of_student = objective.updates()
        drawn = trainer.draw(of_student, 0.5, 0)
        trainer.backward(of_student, drawn)
        assert all(p.grad is None and not p.requires_grad for p in critic.parameters())
        gradients = [p.grad for p in student.parameters()]
        loss = objective.generator_loss(complete(drawn, student)).mean()
        for g, expected in zip(gradients, torch.autograd.grad(loss, list(student.parameters())), strict=True):
            torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-12)
            assert expected.abs().max() > 0
        before = state(trainer)
        trainer.update(of_student, 0.5, 0)
        assert networks_of(trainer, before) - {"counters"} == {"student"}
        before = state(trainer)
        trainer.update(of_critic, 0.5, 1)
        assert networks_of(trainer, before) - {"counters"} == {"critic"}

    def test_target_copies_have_a_hook(self) -> None:
        """After every step, those of a head start among them, with its progress."""
        trainer, seen = small_runs.trainer("learned", steps=4, head_start=0.5), []
        trainer.objective.after_step = seen.append
        trainer.run()
        assert seen == [0.0, 0.5, 0.0, 0.5]
        both = WeightedSum([Part(small_runs.objective("varflow"))])
        both.parts[0].after_step = seen.append
        both.after_step(0.7)
        assert seen[-1] == 0.7

    @pytest.mark.parametrize(("kind", "network"), [("diff-instruct", "critic"), ("learned", "posterior")])
    def test_figures_are_those_of_the_last_update_of_their_name(self, kind: str, network: str) -> None:
        trainer = small_runs.trainer(kind, warmup=0.0)
        losses: list[float] = []
        norms: list[float] = []
        (own, student), optimizer = trainer.objective.updates(0.5), trainer.optimizers[network]

        def recorded(draw: Draw) -> Tensor:
            loss = own.loss(draw)
            losses.append(float(loss.detach().mean()))
            return loss

        def measure(*ignored: Any) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(nn.utils.get_total_norm(gradients)))

        trainer.objective.updates = lambda progress=0.0: [replace(own, loss=recorded), student]
        optimizer.register_step_pre_hook(measure)
        for _ in range(3):
            trainer.advance(0.5)
        assert len(norms) == 6  # two a step: two of the critic, or of the posterior and of both
        assert float(trainer.figures[f"{network}_loss"]) == pytest.approx(losses[-1])
        assert float(trainer.figures[f"grad_norm_{network}"]) == pytest.approx(norms[-1]) != 0

    def test_rates_are_the_networks_own(self) -> None:
        """Of 20 steps, at progress 0.1 the third: three quarters of a warm-up of four."""
        trainer = small_runs.trainer("learned", lr=1e-2, auxiliary_lr=3e-3, lr_schedule="constant", warmup=0.2)
        for progress, share in ((0.1, 0.75), (0.7, 1.0)):
            trainer.advance(progress)
            rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in trainer.optimizers.items()}
            assert rates == pytest.approx({"student": 1e-2 * share, "posterior": 3e-3 * share})

    def test_gradients_are_clipped_by_network(self) -> None:
        own = (NetworkConfig("posterior", clip=2e-4),)
        trainer = small_runs.trainer("learned", clip=1e-3, networks=own)
        norms: dict[str, float] = {}

        def watch(name: str, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
            def measure() -> None:
                gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
                norms[name] = float(nn.utils.get_total_norm(gradients))

            return measure

        for name, optimizer in trainer.optimizers.items():
            optimizer.step = watch(name, optimizer)
        trainer.advance(0.5)
        assert norms == pytest.approx({"student": 1e-3, "posterior": 2e-4}, rel=1e-2)
        assert float(trainer.figures["grad_norm_student"]) > 1e-3

    def test_settings_of_a_network_reach_its_optimiser(self) -> None:
        own = (
            NetworkConfig("critic", lr=5e-4, beta1=0.0, beta2=0.9, weight_decay=0.3),
            NetworkConfig("student", lr=7e-3),
        )
        options: dict[str, Any] = {"beta1": 0.5, "beta2": 0.95, "weight_decay": 0.1, "warmup": 0.0}
        trainer = small_runs.trainer("diff-instruct", networks=own, lr_schedule="constant", **options)
        trainer.advance(0.0)
        found = {
            name: [optimizer.param_groups[0][key] for key in ("lr", "betas", "weight_decay")]
            for name, optimizer in trainer.optimizers.items()
        }
        assert found == {"critic": [5e-4, (0.0, 0.9), 0.3], "student": [7e-3, (0.5, 0.95), 0.1]}

    def test_of_a_sum_settings_go_by_the_networks_name_with_or_without_the_part(self) -> None:
        first, second = small_runs.objective("learned"), small_runs.objective("learned")
        second.teacher = first.teacher
        both = WeightedSum([Part(first, name="a"), Part(second, name="b")])
        config = small_runs.config(
            networks=(NetworkConfig("posterior", lr=2e-3), NetworkConfig("b.posterior", beta1=0.1))
        )
        trainer = Trainer(small_runs.generator(), both, small_runs.levels(), config)
        assert trainer.settings["a.posterior"].lr == trainer.settings["b.posterior"].lr == 2e-3
        assert (trainer.settings["a.posterior"].beta1, trainer.settings["b.posterior"].beta1) == (0.9, 0.1)

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
        trainer.student.register_forward_hook(lambda module, inputs, x: rows.append(x.requires_grad))
        before = state(trainer)
        expected = {*trainer.objective.networks, "counters"}
        for n in range(20):
            trainer.advance(*phase(trainer.config, n / 20))
            assert networks_of(trainer, before) == (expected if n < 8 else expected | {"student", "average"})
        repeats = trainer.objective.updates()[0].repeats
        assert rows == [False] * 8 * repeats + ([False] * repeats + [True]) * 12

    def test_levels_and_rates_go_through_both_parts(self) -> None:
        trainer = small_runs.trainer("learned", head_start=0.4, lr_schedule="cosine", warmup=0.1)
        seen, draw = [], trainer.draw

        def watched(update: Update, progress: float, number: int) -> Drawn:
            seen.append(progress)
            return draw(update, progress, number)

        trainer.draw = watched
        rates = []
        for n in range(20):
            trainer.advance(*phase(trainer.config, n / 20))
            rates.append(trainer.optimizers["posterior"].param_groups[0]["lr"] / trainer.config.auxiliary_lr)
        expected = [n / 8 for n in range(8)] + [n / 12 for n in range(12)]
        assert seen[:8] + seen[8::2] == pytest.approx(expected)
        assert rates == pytest.approx([learning_rate(trainer.config, progress) for progress in expected])

    def test_the_average_begins_after_it(self) -> None:
        """With d = min(ema, (1 + n)/(10 + n)) after n updates of the generator: of its start 0.1 · 2/11 are left."""
        trainer = small_runs.trainer("learned", head_start=0.9, ema=0.9, lr=1e-12)
        for n in range(20):
            before = [p.clone() for p in trainer.average.parameters()]
            with torch.no_grad():
                for p in trainer.student.parameters():
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


class Sorted(Objective):
    """A critic whose loss couples rows, too: squared distances of its values at neighbours, ordered by them."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            super().__init__(None, {"critic": nn.Linear(2, 1).double()})

    def updates(self, progress: float = 0.0) -> list[Update]:
        loss = self.generator_loss
        return [
            Update("critic", ("critic",), lambda draw: -loss(draw), couples_rows=True),
            Update("student", ("student",), loss, couples_rows=True),
        ]

    def generator_loss(self, draw: Draw) -> Tensor:
        values = self.networks["critic"](draw.x_t).flatten()
        return (values - values[values.argsort().roll(1)].roll(1)).pow(2)


class TestAccumulation:
    @pytest.mark.parametrize("parts", [2, 4])
    @pytest.mark.parametrize("kind", EVERY)
    def test_the_parts_of_a_batch_do_what_the_whole_does(self, kind: str, parts: int) -> None:
        """Where rows are coupled (groups, the batch's candidates and a pool, their sums) the loss is cut at x."""
        whole, _ = run_small(kind, clip=0.05, batch=16)
        in_parts, trainer = run_small(kind, clip=0.05, batch=16, accumulate=parts)
        for name, v in whole.items():
            torch.testing.assert_close(in_parts[name], v, rtol=1e-10, atol=1e-10)
        losses = [line["loss"] for line in trainer.history if line["kind"] == "train"]
        assert all(math.isfinite(loss) for loss in losses)

    @pytest.mark.parametrize("parts", [2, 4])
    def test_candidates_from_a_posterior_beside_a_loss_of_groups(self, parts: int) -> None:
        """The student's gradient is through x, which is cut, and through its candidates, which are not."""

        def trained(parts: int) -> dict[str, Tensor]:
            both = WeightedSum([Part(small_runs.objective("drawn")), Part(VarFlow(), 0.5)])
            training = small_runs.config(batch=16, steps=6, accumulate=parts)
            trainer = Trainer(
                small_runs.generator(), both, small_runs.levels("varflow"), training, data=small_runs.data()
            )
            trainer.run()
            return state(trainer)

        whole = trained(1)
        for name, v in trained(parts).items():
            torch.testing.assert_close(v, whole[name], rtol=1e-10, atol=1e-10)

    def test_a_critics_loss_may_couple_rows_too(self) -> None:
        def trained(parts: int) -> dict[str, Tensor]:
            training = small_runs.config(batch=16, steps=6, accumulate=parts)
            trainer = Trainer(small_runs.generator(), Sorted(), small_runs.levels(), training)
            trainer.run()
            return state(trainer)

        whole = trained(1)
        for name, v in trained(4).items():
            torch.testing.assert_close(v, whole[name], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("kind", ["varflow", "pool", "few-sum"])
    def test_cut_at_x_the_student_sees_a_part_at_a_time(self, kind: str) -> None:
        """With gradient: first without, then with the loss's gradient in x; a pool's forward pass has none."""
        trainer = small_runs.trainer(kind, batch=16, accumulate=4)
        rows: list[tuple[int, bool]] = []
        trainer.student.register_forward_hook(lambda module, inputs, x: rows.append((len(x), x.requires_grad)))
        *_, update = trainer.objective.updates(0.5)
        trainer.backward(update, trainer.draw(update, 0.5, 0, student_step=trainer.student.steps))
        assert [n for n, with_gradient in rows if with_gradient] == [4] * 4
        assert max(n for n, _ in rows) <= 6

    def test_the_networks_see_a_part_at_a_time(self) -> None:
        trainer = small_runs.trainer("learned", accumulate=4)
        rows = []
        trainer.student.register_forward_hook(lambda module, inputs, x: rows.append(len(x)))
        trainer.advance(0.5)
        assert rows == [2] * 4 * 2

    def test_a_batch_that_does_not_split_is_refused(self) -> None:
        with pytest.raises(UsageError, match="batch must be divisible by 3, accumulate times processes, but is 8"):
            small_runs.trainer("learned", accumulate=3)
