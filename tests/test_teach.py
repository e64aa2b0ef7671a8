"""How wrong a denoiser is, against denoisers whose error is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vardistill import teach
from vardistill.config import TeachConfig
from vardistill.denoisers import Denoiser
from vardistill.errors import UsageError
from vardistill.problems import PROBLEMS, Problem
from vardistill.schedules import VE, VP, Schedule
from vardistill.teach import teacher_errors

CPU = torch.device("cpu")


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
    teach.teach(TeachConfig(problem="mixture2", steps=1, batch=4, width=8, depth=1, samples=10), tmp_path)
    assert seen[0] == torch.device("cpu:0") != CPU
    assert json.loads((tmp_path / "environment.json").read_text())["torch"] == torch.__version__
