"""The trainer: its numbers, its schedules, what it skips, keeps and refuses."""

from __future__ import annotations

import copy
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import small_runs
import vardistill as vd
from small_runs import assert_equal, run_small, small_distill, state
from vardistill.denoisers import GaussianMixture, Preconditioned
from vardistill.diffusion.noise import Draw
from vardistill.diffusion.schedules import VE
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP
from vardistill.objectives import DiffInstruct, Objective, VarDiU
from vardistill.posteriors.few import DiagonalGaussian, Posterior, Prior
from vardistill.runs.distill import distill
from vardistill.students.perceptron import MLP
from vardistill.students.student import Student
from vardistill.training import checks, clock as clock_module
from vardistill.training.books import StopRequest
from vardistill.training.checks import check_batch
from vardistill.training.clock import phase
from vardistill.training.config import NetworkConfig, TrainingConfig
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Diverged, Interrupted, Trainer, average_of, learning_rate
from vardistill.training.optimisers import adam_state


class TestFrozenParameters:
    """A run whose generator's first layer is frozen."""

    def trainer(self, folder: Path | None = None, **options: Any) -> Trainer:
        generator = small_runs.generator()
        generator.layers[0].requires_grad_(False)
        run = None if folder is None else RunFolder(folder)
        objective, levels = small_runs.objective(), small_runs.levels()
        return Trainer(generator, objective, levels, small_runs.config(**options), small_runs.evaluate, run)

    def test_they_are_shared_by_the_average_and_the_others_are_not(self) -> None:
        generator = self.trainer().student
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
        before = [p.detach().clone() for p in trainer.student.parameters()]
        trainer.advance(0.5)
        d = 1 / 10
        for a, p, old in zip(trainer.average.parameters(), trainer.student.parameters(), before, strict=True):
            assert torch.equal(p, old) == (not p.requires_grad)
            torch.testing.assert_close(a.detach(), d * old + (1 - d) * p.detach(), rtol=1e-12, atol=1e-12)
        states = {name.split("/")[0] for name in adam_state(trainer.optimizers["student"])}
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
        with pytest.raises(UsageError, match="the checkpoint is of another model: .* optimizer.student"):
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
        assert not torch.equal(first["network.student/layers.0.weight"], other["network.student/layers.0.weight"])

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
        expected = {"loss", "bound", "grad_norm_student", "grad_norm_posterior", "posterior_loss", "lr", "skipped"}
        expected |= {"cpu_seconds", "network_evaluations"}
        assert expected <= trainer.history[0].keys()
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == ["step-00000005", "step-00000010"]

    @pytest.mark.parametrize("steps", [100, 49])
    def test_no_milestone_is_lost_to_rounding(self, steps: int) -> None:
        _, trainer = run_small(steps=steps, milestones=steps, log_every=1000, eval_every=0)
        assert [line["step"] for line in trainer.history if line["kind"] == "eval"] == list(range(1, steps + 1))

    def test_milestones_are_spread_over_the_run(self, tmp_path: Path) -> None:
        every = {"log_every": 1000, "eval_every": 0, "checkpoint_every": 1000}
        _, trainer = run_small("learned", tmp_path, steps=10, milestones=4, keep_checkpoints=4, **every)
        steps = [(line["kind"], line["step"]) for line in trainer.history]
        assert steps == [(kind, step) for step in (3, 5, 8, 10) for kind in ("train", "eval")]
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == [f"step-{step:08}" for step in (3, 5, 8, 10)]

    def test_the_finished_generator_is_the_average(self, tmp_path: Path) -> None:
        run = small_distill(out=tmp_path)
        saved = MLP.from_pretrained(tmp_path / "generator")
        for p, q in zip(saved.parameters(), run.generator.parameters(), strict=True):
            torch.testing.assert_close(p, q, check_dtype=False)


class Normalised(Student):
    """x = A n(z) + b of batch-normalised latents, which `scale` may let overflow."""

    latent_shape = data_shape = (2,)
    data_std = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(2).double(), nn.Linear(2, 2).double()
        self.scale = 1.0

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.linear(self.norm(self.scale * z))
        return x


class Plain(Normalised):
    """x = A z + b."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()


class AlwaysDropout(nn.Module):
    """Dropout in every mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class WithDropout(Student):
    """A linear map of z with dropout somewhere in it."""

    latent_shape = data_shape = (2,)
    data_std = 2.0

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4).double(), nn.Linear(4, 2).double()
        self.inner: nn.Module = nn.Dropout(0.5)
        if kind == "attention":
            self.inner = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True).double()
        elif kind == "recurrent":
            self.inner = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True).double()

    def forward(self, z: Tensor) -> Tensor:
        h = self.inner(self.first(z)[:, None])
        x: Tensor = self.last((h[0] if isinstance(h, tuple) else h)[:, 0])
        return x


class NormalisedDistance(Objective):
    """‖n(x) − z‖² of batch-normalised samples."""

    def __init__(self) -> None:
        super().__init__(None)
        self.networks["norm"] = nn.BatchNorm1d(2).double()

    def generator_loss(self, draw: Draw) -> Tensor:
        distance: Tensor = (self.networks["norm"](draw.x) - draw.z).pow(2).mean(1)
        return distance


class TestSkipping:
    def spoiled(self, spoil: Callable[[Tensor, Draw], Tensor], at: set[int]) -> Trainer:
        """A trainer whose loss is spoiled at these updates, counted from 1."""
        trainer = small_runs.trainer("drawn", warmup=0.0)
        calls = iter(range(1, sys.maxsize))

        def spoiled(loss: small_runs.Loss) -> small_runs.Loss:
            return lambda draw: spoil(loss(draw), draw) if next(calls) in at else loss(draw)

        small_runs.in_training(trainer.objective, spoiled)
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
        before = state(trainer, "counters", "average")
        average = copy.deepcopy(trainer.average)
        trainer.advance(0.5)
        assert_equal(state(trainer, "counters", "average"), before)
        assert float(trainer.skipped) == 1
        decay = 3 / 12
        for a, b, p in zip(
            trainer.average.parameters(), average.parameters(), trainer.student.parameters(), strict=True
        ):
            torch.testing.assert_close(a, decay * b + (1 - decay) * p, rtol=1e-12, atol=1e-12)
        trainer.advance(0.5)
        assert not torch.equal(
            state(trainer)["network.student/layers.0.weight"], before["network.student/layers.0.weight"]
        )
        assert float(trainer.skipped) == 1
        assert all(v.isfinite().all() for v in state(trainer).values())

    @pytest.mark.parametrize(("scale", "statistics"), [(math.inf, ("running", "num")), (1e200, ("running_var",))])
    def test_statistics_that_overflow_are_forgotten(self, scale: float, statistics: tuple[str, ...]) -> None:
        """Latents that are infinite skip the update; at 1e200 the loss is finite, but the variance is not."""
        generator, objective = Normalised(), NormalisedDistance()
        trainer = Trainer(generator, objective, small_runs.levels(), small_runs.config(warmup=0.0))
        trainer.advance(0.5)
        before = state(trainer)
        generator.scale = scale
        trainer.advance(0.5)
        skipped, after = float(trainer.skipped), state(trainer)
        assert skipped == (scale == math.inf)
        student = "network.student/norm.", "average/norm."
        for section in (*student, "network.norm/") if skipped else student:
            names = [name for name in before if name.startswith(tuple(f"{section}{v}" for v in statistics))]
            assert len(names) == (3 if skipped else 1)
            for name in names:
                assert torch.equal(after[name], before[name]), name
        generator.scale = 1.0
        trainer.advance(0.5)
        assert float(trainer.skipped) == skipped
        last = state(trainer)
        assert all(v.isfinite().all() for v in last.values())
        assert not torch.equal(last["network.student/norm.running_var"], before["network.student/norm.running_var"])

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
        assert [line["skipped"] for line in run.history if "skipped" in line][-1] == 4
        assert all(p.isfinite().all() for p in run.generator.parameters())


class TestLearningRate:
    def test_it_warms_up_and_follows_the_cosine(self) -> None:
        """A step is counted in its warm-up: of ten, the first has a tenth of the rate."""
        config = TrainingConfig(steps=100, warmup=0.1, lr_final=0.2)
        expected = {0.0: 0.1, 0.04: 0.5, 0.09: 1.0, 0.1: 1.0, 0.55: 0.6, 1.0: 0.2}
        for progress, share in expected.items():
            assert learning_rate(config, progress) == pytest.approx(share)

    @given(
        steps=st.integers(1, 10**7), warmup=st.floats(0, 0.99), share=st.floats(0, 0.99), cosine=st.booleans(),
        done=st.floats(0, 1),
    )  # fmt: skip
    def test_no_update_is_made_at_0(self, steps: int, warmup: float, share: float, cosine: bool, done: float) -> None:
        """Neither the first of a run nor that after a head start, whatever the schedule."""
        schedule = "cosine" if cosine else "constant"
        config = TrainingConfig(steps=steps, warmup=warmup, head_start=share, lr_schedule=schedule)
        for step in (0, int(done * (steps - 1)), min(math.ceil(share * steps), steps - 1), steps - 1):
            assert 0 < learning_rate(config, phase(config, step / steps).progress) <= 1

    def test_a_single_step_trains(self) -> None:
        before = small_runs.generator().parameters()
        run = small_distill(training=TrainingConfig(steps=1, batch=8, device="cpu", tracker="none", ema=0.0))
        assert all(not torch.equal(p, q) for p, q in zip(run.generator.parameters(), before, strict=True))

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

        small_runs.in_training(trainer.objective, lambda loss: twice)
        with pytest.raises(KeyboardInterrupt):
            trainer.run()

    def test_a_stop_in_the_last_step_lets_the_run_finish(self) -> None:
        trainer = small_runs.trainer(steps=3)
        small_runs.interrupt(trainer.objective, 3)
        assert trainer.run().history[-1]["step"] == 3

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
    def test_other_signals_are_a_stop_too(
        self, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A checkpoint of the step is kept; whatever the tests themselves were started by: nohup ignores SIGHUP."""
        monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
        trainer = small_runs.trainer(folder=RunFolder(tmp_path))
        small_runs.in_training(
            trainer.objective, lambda loss: lambda draw: (os.kill(os.getpid(), number), loss(draw))[1]
        )
        with pytest.raises(Interrupted, match="step 1"):
            trainer.run()
        assert [path.name for path in RunFolder(tmp_path).checkpoints.iterdir()] == ["step-00000001"]

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
        assert capsys.readouterr().err.count("step/s") < 4

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

    @pytest.mark.parametrize("kind", ["dropout", "attention", "recurrent"])
    def test_dropout_is_silent(self, kind: str) -> None:
        """The seed holds all that a run draws; also after lines of metrics and evaluations."""

        def weights(seed: int) -> dict[str, Tensor]:
            torch.manual_seed(0)
            generator = WithDropout(kind)
            torch.manual_seed(seed)
            training = small_runs.config(steps=5, log_every=2, eval_every=2)
            return small_distill(generator, training=training).generator.state_dict()

        with torch.random.fork_rng(devices=[]):
            first, second = weights(1), weights(2)
        assert_equal(first, second)

    @pytest.mark.parametrize("place", ["generator", "teacher", "critic", "posterior"])
    def test_dropout_that_ignores_evaluation_mode_is_refused(self, place: str) -> None:
        student, teacher = small_runs.generator(), small_runs.teacher()
        critic = Preconditioned(LevelMLP(2, 2, depth=1, width=8), 2.0, VE()).double()
        posterior = DiagonalGaussian(2, 2, 2.0, depth=1, width=8).double()
        if place == "generator":
            student.layers.insert(1, AlwaysDropout())
        elif place == "posterior":
            posterior.network.layers.insert(1, AlwaysDropout())
        else:
            critic.network.layers.insert(1, AlwaysDropout())
        objective: Objective = VarDiU(critic if place == "teacher" else teacher, posterior)
        if place == "critic":
            objective = DiffInstruct(teacher, critic)
        with pytest.raises(UsageError, match=f"the {place} is random beside its (input|latents)") as caught:
            small_distill(student, teacher=None, objective=objective)
        assert "\n" not in str(caught.value)

    def test_other_layers_see_batches_as_they_are_trained_to(self) -> None:
        """Normalisation by the batch, whose statistics no check has a part in and evaluations leave alone."""
        generator = small_runs.generator()
        norm = nn.BatchNorm1d(8).double()
        generator.layers.insert(1, norm)
        steps, batch = 4, small_runs.config().batch
        seen = []
        norm.register_forward_hook(lambda module, inputs, output: seen.append((module.training, len(inputs[0]))))
        small_distill(generator, training=small_runs.config(steps=steps, log_every=2, eval_every=2, ema=0.0))
        assert [rows for trained, rows in seen if trained] == steps * [batch]
        assert norm.num_batches_tracked == steps
        assert not norm.training

    def test_wrapped_generators_and_teachers_are_what_they_wrap(self) -> None:
        """As far as attributes are passed on, by `torch.compile` for example; seen also by Python 3.12's isinstance."""
        compiled = torch.compile(small_runs.generator(), backend="eager")
        assert small_distill(compiled).history

        class Learned(nn.Module):  # a module's submodules are no attributes that a class or an instance's dict has
            def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
                return VE()(t)

            def time(self, ratio: Tensor) -> Tensor:
                return VE().time(ratio)

        teacher = vd.denoisers.from_module(nn.Identity(), Learned())
        vd.diffusion.require_denoiser(teacher, "teacher")


class TestRefusals:
    def test_settings_of_a_network_that_is_not_there(self) -> None:
        training = small_runs.config(networks=(NetworkConfig("posterior", lr=1e-4),))
        self.refuses("unknown network 'posterior': known: student", training=training)

    @pytest.mark.parametrize("options", [{"accumulate": 2}, {}])
    def test_batch_normalisation_of_a_parted_batch(
        self, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By accumulation, or by two processes: its statistics would be those of parts."""
        if not options:
            for name, value in small_runs.launched(2).items():
                monkeypatch.setenv(name, value)
        match = "has BatchNorm1d, whose statistics are those of a whole batch: set accumulate=1, with one process and a"
        for generator, objective in ((Normalised(), small_runs.objective()), (Plain(), NormalisedDistance())):
            with pytest.raises(UsageError, match=match) as caught:
                Trainer(generator, objective, small_runs.levels(), small_runs.config(**options))
            assert "\n" not in str(caught.value)

    def refuses(self, match: str, *, generator: Student | None = None, **options: Any) -> None:
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

    def test_a_network_that_is_no_denoiser(self) -> None:
        self.refuses("the teacher must be a denoiser.*but is Linear: wrap it", teacher=nn.Linear(2, 2))
        with pytest.raises(UsageError, match="the critic must be a denoiser.*but is Linear"):
            DiffInstruct(small_runs.teacher(), nn.Linear(2, 2))

    @pytest.mark.parametrize("shape", [2, [2], (2.0,), (0,), None])
    @pytest.mark.parametrize("name", ["latent_shape", "data_shape"])
    def test_a_shape_that_is_none(self, name: str, shape: Any) -> None:
        generator = small_runs.generator()
        vars(generator)[name] = shape
        self.refuses(f"the generator's {name} must be a tuple of positive whole numbers", generator=generator)

    def test_a_denoiser_in_the_place_of_an_objective(self) -> None:
        match = "objective must be a vardistill.objectives.Objective, but is GaussianMixture: give a denoiser as teach"
        with pytest.raises(UsageError, match=match):
            distill(small_runs.generator(), objective=cast(Objective, small_runs.teacher()))

    def test_a_tracker_that_is_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks, "get_available_trackers", lambda: ["tensorboard"])
        training = small_runs.config(steps=1, tracker="wandb")
        self.refuses("the tracker wandb is not installed: pip install wandb", training=training, out=tmp_path)

    def test_a_module_that_is_no_generator(self) -> None:
        self.refuses(
            "must be a vardistill.students.Student .* but Linear has no latent_shape",
            generator=nn.Linear(2, 2),
        )
        empty = Student()
        self.refuses("must be a .*Student .* but Student has no latent_shape, data_shape, data_std", generator=empty)
        empty.latent_shape, empty.data_shape, empty.data_std = (2,), (2,), 1.0
        self.refuses("must have parameters to train, but Student has none", generator=empty)

    def test_a_generator_that_cuts_the_graph(self) -> None:
        class Cut(MLP):
            @torch.no_grad()
            def forward(self, z: Tensor) -> Tensor:
                return super().forward(z)

        self.refuses("no gradient reaches the generator's parameters", generator=Cut(depth=1, width=8).double())

    def test_data_beside_a_teacher_alone(self) -> None:
        data = torch.randn(8, 2, dtype=torch.float64)
        self.refuses("no default objective compares with data", teacher=small_runs.teacher(), data=data)

    def test_a_generator_in_half_precision(self) -> None:
        """Its draws would be, too: 1024 stratified levels are 271 in bfloat16."""
        self.refuses(
            "single or double precision, but is in torch.bfloat16", generator=small_runs.generator().bfloat16()
        )

    def test_a_generator_whose_samples_are_not_what_it_says(self) -> None:
        generator = small_runs.generator()
        generator.data_shape = (3,)
        self.refuses(
            r"data_shape is \(3,\), but for \(2, 2\) of torch.float64 it returns \(2, 2\)", generator=generator
        )
        generator = small_runs.generator()
        generator.latent_shape = (3,)
        self.refuses(r"the generator does not take its latents, \(2, 3\): ", generator=generator)
        generator = small_runs.generator()
        nn.init.constant_(generator.layers[0].bias, float("nan"))
        self.refuses("the generator returns NaN or infinity", generator=generator)

    @pytest.mark.parametrize("latent", [1, 5])
    def test_a_posterior_of_other_latents(self, latent: int) -> None:
        """One of a single latent would otherwise be broadcast, and be no density: ∫ q over two is not 1."""
        objective = VarDiU(small_runs.teacher(), DiagonalGaussian(2, latent, 2.0).double())
        self.refuses(f"the posterior has {latent} latents, the generator 2", teacher=None, objective=objective)

    def test_a_posterior_of_other_data(self) -> None:
        objective = VarDiU(small_runs.teacher(), DiagonalGaussian(3, 2, 2.0).double())
        self.refuses(
            r"the posterior does not take the generator's samples, \(2, 2\)", teacher=None, objective=objective
        )

    def test_a_posterior_without_a_forward_pass(self) -> None:
        """Its error has no words of its own."""
        objective = VarDiU(small_runs.teacher(), Posterior())
        self.refuses(r"the posterior does not take .*: NotImplementedError", teacher=None, objective=objective)

    def test_a_critic_of_other_data(self) -> None:
        critic = Preconditioned(LevelMLP(3, 3), 2.0, VE()).double()
        objective = DiffInstruct(small_runs.teacher(), critic)
        self.refuses("the critic does not take the generator's samples", teacher=None, objective=objective)

    def test_a_bound_that_nothing_holds_up(self) -> None:
        objective = VarDiU(small_runs.teacher(), Prior())
        self.refuses("no candidates lets the student collapse", teacher=None, objective=objective)

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
            VarDiU(small_runs.teacher(), Prior(), posterior_steps=2)


def test_levels_of_another_schedule_than_the_teachers_are_refused() -> None:
    teacher = vd.denoisers.GaussianMixture(torch.zeros(1, 2), std=1.0, schedule=vd.schedules.VP())
    levels = vd.NoiseLevels(vd.schedules.VE(), vd.levels.EDM())
    with pytest.raises(vd.UsageError, match="reschedule"):
        vd.distill(vd.students.MLP(), teacher=teacher, levels=levels, training=vd.TrainingConfig(steps=1))


def test_any_generator_leaves_its_weights(tmp_path: Path) -> None:
    class Affine(Student):
        latent_shape = data_shape = (2,)
        data_std = 1.0

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
