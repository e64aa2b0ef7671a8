"""How wrong a denoiser is, against denoisers whose error is known."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vardistill.diffusion import Denoiser
from vardistill.diffusion.schedules import VE, VP, Schedule
from vardistill.domains.points import teach
from vardistill.domains.points.config import PointsTeachConfig
from vardistill.domains.points.problems import PROBLEMS, Problem
from vardistill.domains.points.teach import WEIGHTS, load_teacher, teacher_errors
from vardistill.errors import UsageError
from vardistill.training import checkpoints, fitting
from vardistill.training.config import TrainingConfig
from vardistill.training.fitting import Fit
from vardistill.training.loop import Diverged, Interrupted

CPU = torch.device("cpu")
SMALL = PointsTeachConfig(problem="mixture2", samples=100, steps=6, batch=8, depth=1, width=8, device="cpu")


class Scored:
    """The exact denoiser with its score scaled: D = (x_t + σ² c s)/α, c = 1 + error."""

    def __init__(self, exact: Denoiser, error: float) -> None:
        self.exact, self.error, self.schedule = exact, error, exact.schedule

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha = self.schedule(t)[0][:, None]
        exact: Tensor = self.exact(x_t, t)
        return exact + self.error * (exact - x_t / alpha)


@pytest.mark.parametrize("schedule", [VE(), VP()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("error", [0.0, 0.25])
def test_the_relative_error_of_the_score_is_measured(error: float, schedule: Schedule) -> None:
    problem = PROBLEMS["mixture2"](schedule)
    assert problem.denoiser is not None
    found = teacher_errors(Scored(problem.denoiser, error), problem, CPU)
    assert found["relative_score_error"] == pytest.approx([error] * 7, abs=2e-3)
    assert found["ratios"][0] == pytest.approx(problem.data_std / 230)
    assert found["ratios"][-1] == pytest.approx(1.7 * problem.data_std)


class HeldOut(Problem):
    """Data alone."""

    name, data_shape, data_std = "held out", (2,), 1.0

    def __init__(self, held_out: Tensor | None) -> None:
        self.held_out = held_out

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        return torch.randn(n, 2, generator=rng)


class Offset:
    """x_t, off by a constant: its error at α = 1 is σ² + c² per dimension."""

    schedule = VE()

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t + 0.5


def test_held_out_data_measure_a_teacher_without_an_exact_one(rng: torch.Generator) -> None:
    """40,000 squares have a relative error of 0.7 %: within 5 % but for less than 1e-4; seed 0."""
    found = teacher_errors(Offset(), HeldOut(torch.randn(20_000, 2, generator=rng)), CPU)
    expected = [ratio**2 + 0.25 for ratio in found["ratios"]]
    assert found["held_out_error"] == pytest.approx(expected, rel=0.05)
    with pytest.raises(UsageError, match="neither an exact denoiser nor held-out data to measure a teacher with"):
        teacher_errors(Offset(), HeldOut(None), CPU)


def test_a_teacher_is_fitted_on_the_best_device_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cpu:0 stands for an accelerator, of which torch's optimisers are not told."""
    seen: list[torch.device] = []

    def errors(denoiser: Any, problem: Problem, device: torch.device) -> dict[str, list[float]]:
        seen.extend((device, next(denoiser.parameters()).device))
        return {}

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda **options: None if options else torch.device("cpu:0")
    )
    monkeypatch.setattr(teach, "teacher_errors", errors)
    teach.teach(PointsTeachConfig(problem="mixture2", steps=1, batch=4, width=8, depth=1, samples=10), tmp_path)
    assert seen[0] == torch.device("cpu:0") != CPU
    assert json.loads((tmp_path / "environment.json").read_text())["torch"] == torch.__version__


class Killed(BaseException):
    """Stands for a kill: nothing is written after it."""


def killed() -> None:
    raise Killed


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class TestResuming:
    @pytest.fixture(autouse=True)
    def checkpoints_every_two_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(teach, "TrainingConfig", partial(TrainingConfig, checkpoint_every=2, log_every=2))

    @staticmethod
    def at_step(step: int, event: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
        """Let something happen at the beginning of the update after `step` updates."""
        advance = Fit.advance

        def advance_or(fit: Fit[Any], progress: float) -> Tensor:
            if fit.step == step:
                event()
            return advance(fit, progress)

        patch.setattr(fitting.Fit, "advance", advance_or)

    @staticmethod
    def left(run: Path) -> tuple[bytes, str, list[tuple[int, float]], dict[str, dict[str, Tensor]]]:
        """What a fit leaves that is the same every time."""
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        state = checkpoints.load(checkpoints.latest(run / "checkpoints"))
        losses = [(line["step"], line["loss"]) for line in lines]
        return (run / WEIGHTS).read_bytes(), (run / "evaluation.json").read_text(), losses, state.tensors

    def assert_same(self, run: Path, other: Path) -> None:
        (*ours, tensors), (*theirs, expected) = self.left(run), self.left(other)
        assert ours == theirs
        for section, own in expected.items():
            assert all(torch.equal(v, tensors[section][name]) for name, v in own.items()), section

    @pytest.mark.parametrize(
        ("step", "event", "end"), [(1, killed, Killed), (3, killed, Killed), (2, interrupted, Interrupted)]
    )
    def test_a_stopped_fit_resumes_to_the_bits_of_an_unbroken_one(
        self, step: int, event: Callable[[], None], end: type[BaseException], tmp_path: Path
    ) -> None:
        """Before the first checkpoint, after it, and by Ctrl-C."""
        teach.teach(SMALL, tmp_path / "unbroken")
        with pytest.MonkeyPatch.context() as patch:
            self.at_step(step, event, patch)
            with pytest.raises(end):
                teach.teach(SMALL, tmp_path / "run")
        assert not (tmp_path / "run" / WEIGHTS).exists()
        teach.teach(SMALL, tmp_path / "run", resume=True)
        self.assert_same(tmp_path / "run", tmp_path / "unbroken")

    def test_a_finished_fit_is_resumed_to_itself(self, tmp_path: Path) -> None:
        """And measured again, where it was killed on the way."""
        average = teach.teach(SMALL, tmp_path / "run")
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        (tmp_path / "again" / "evaluation.json").unlink()
        again = teach.teach(SMALL, tmp_path / "again", resume=True)
        self.assert_same(tmp_path / "again", tmp_path / "run")
        for denoiser in (again, load_teacher(tmp_path / "again")):
            for name, v in denoiser.state_dict().items():
                assert torch.equal(v, average.state_dict()[name])


class TestStepsThatAreNotFinite:
    def test_they_are_skipped_and_counted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = iter(range(SMALL.steps + 1))  # the last one is of the result
        original = teach.dsm_loss
        monkeypatch.setattr(teach, "TrainingConfig", partial(TrainingConfig, log_every=2))
        monkeypatch.setattr(
            teach, "dsm_loss", lambda *inputs: original(*inputs) * (float("nan") if next(calls) == 2 else 1)
        )
        teacher = teach.teach(SMALL, tmp_path)
        assert all(v.isfinite().all() for v in teacher.state_dict().values())
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(line["step"], line["skipped"]) for line in lines] == [(2, 0), (4, 1), (6, 1)]

    def test_too_many_end_the_fit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = teach.dsm_loss
        with monkeypatch.context() as patch:
            patch.setattr(teach, "TrainingConfig", partial(TrainingConfig, log_every=2, max_skipped=1))
            patch.setattr(teach, "dsm_loss", lambda *inputs: original(*inputs) * float("nan"))
            with pytest.raises(Diverged, match=r"2 updates up to step 2 .* \(limit 1\); .*: try a smaller lr$"):
                teach.teach(SMALL, tmp_path)
        assert not (tmp_path / WEIGHTS).exists()
        teacher = teach.teach(SMALL, tmp_path, resume=True)
        assert all(v.isfinite().all() for v in teacher.state_dict().values())

    @pytest.mark.parametrize("lr", [1e10, 1e20, 1e37])
    def test_a_teacher_that_is_not_finite_is_not_kept(self, lr: float, tmp_path: Path) -> None:
        """Its weights, or finite ones whose loss is not; too few steps were skipped."""
        with pytest.raises(Diverged, match="the teacher is not finite after step 6: try a smaller lr"):
            teach.teach(replace(SMALL, lr=lr), tmp_path)
        assert not any((tmp_path / name).exists() for name in (WEIGHTS, "evaluation.json"))

    def test_errors_that_are_not_finite_are_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(teach, "teacher_errors", lambda *ignored: {"ratios": [1.0], "held_out_error": [1e400]})
        with pytest.raises(Diverged, match="the teacher's errors are not finite: try a smaller lr"):
            teach.teach(SMALL, tmp_path)
        assert not (tmp_path / "evaluation.json").exists()
