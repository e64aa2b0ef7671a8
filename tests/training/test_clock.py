"""Progress by steps and by two clocks, the processor's standing still while books are kept."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import small_runs
from vardistill.diffusion.noise import Draw
from vardistill.training import clock as clock_module
from vardistill.training.clock import Clock
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Trainer


class Time:
    """Two clocks that a test moves on."""

    def __init__(self) -> None:
        self.wall, self.cpu = 100.0, 40.0

    def monotonic(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.cpu

    def passes(self, wall: float, cpu: float) -> None:
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(clock_module, "time", time)
    return time


def a_clock(**training: Any) -> Clock:
    alone: Any = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    return Clock(small_runs.config(**training), alone)


@pytest.mark.parametrize(
    ("minutes", "left"), [(None, 950.0), (4.0, 190.0), (100.0, 950.0)], ids=["steps", "minutes first", "steps first"]
)
def test_the_time_left_is_that_of_whichever_ends_first(minutes: float | None, left: float, time: Time) -> None:
    """After 5 of 100 steps in 50 s, in which resumed work has no part."""
    clock = a_clock(steps=100, max_minutes=minutes)
    assert clock.left(0) == math.inf
    time.passes(wall=50, cpu=0)
    assert clock.left(5) == pytest.approx(left)
    clock.start(step=5)
    time.passes(wall=10, cpu=0)
    assert clock.left(6) == pytest.approx(min(940.0, 230.0 if minutes == 4 else math.inf))


def test_processor_time_stands_still_while_books_are_kept(time: Time) -> None:
    clock = a_clock()
    time.passes(wall=3, cpu=2)
    with clock.paused():
        time.passes(wall=5, cpu=4)
        assert clock.cpu_elapsed() == 2
    time.passes(wall=1, cpu=1)
    assert (clock.elapsed(), clock.cpu_elapsed()) == (9, 3)


def test_it_goes_on_after_books_that_failed(time: Time) -> None:
    clock = a_clock()

    def fail() -> None:
        with clock.paused():
            time.passes(wall=1, cpu=7)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    time.passes(wall=1, cpu=1)
    assert clock.cpu_elapsed() == 1


@pytest.mark.parametrize(("of", "at_once"), [("wall", 0.5), ("cpu", 0.25)])
def test_progress_is_the_further_of_steps_and_time(of: str, at_once: float, time: Time) -> None:
    clock = a_clock(steps=10, max_minutes=1.0, clock=of)
    time.passes(wall=30, cpu=15)
    assert [clock.progress(step) for step in (0, 8, 10)] == [at_once, 0.8, 1.0]
    time.passes(wall=1000, cpu=1000)
    assert clock.progress(0) == 1
    assert a_clock(steps=10).progress(5) == 0.5


def ticking(trainer: Trainer, time: Time) -> None:
    """A step takes 3 seconds, 2 of them of the processor; an evaluation as many more."""

    def step(loss: small_runs.Loss) -> small_runs.Loss:
        def take(draw: Draw) -> torch.Tensor:
            time.passes(wall=3, cpu=2)
            return loss(draw)

        return take

    def evaluate(student: Any) -> dict[str, float]:
        time.passes(wall=3, cpu=2)
        return {}

    small_runs.in_training(trainer.objective, step)
    trainer.evaluate = evaluate


@pytest.mark.parametrize(("of", "last"), [("cpu", 15), ("wall", 9)])
def test_a_budget_of_processor_time_leaves_the_books_out(of: str, last: int, time: Time) -> None:
    """30 seconds are 15 steps of 2; by the wall, 8 steps of 3, two evaluations, and the step that was next."""
    options: dict[str, Any] = {"steps": 1000, "max_minutes": 0.5, "clock": of, "log_every": 1, "warmup": 0.0}
    trainer = small_runs.trainer(eval_every=4, **options)
    ticking(trainer, time)
    trainer.run()
    lines = [line for line in trainer.history if line["kind"] == "train"]
    assert lines[-1]["step"] == last
    assert [line["cpu_seconds"] for line in lines] == [2.0 * line["step"] for line in lines]
    if of == "cpu":
        for line in lines:
            assert line["lr"] == pytest.approx(1e-2 * (1 + math.cos(math.pi * line["step"] / 15)) / 2)


def test_milestones_are_shares_of_the_budget_and_the_same_after_a_resume(time: Time, tmp_path: Path) -> None:
    """Of 30 seconds of processor time, 2 a step: a tenth is passed at every second and third step in turn."""
    options: dict[str, Any] = {"steps": 1000, "max_minutes": 0.5, "clock": "cpu", "log_every": 1, "eval_every": 0}
    options |= {"milestones": 10, "checkpoint_every": 1000, "keep_checkpoints": 10}
    first = small_runs.trainer("batch", RunFolder(tmp_path), **options)
    ticking(first, time)
    small_runs.interrupt(first.objective, 7)
    with pytest.raises(small_runs.Interrupted):
        first.run()
    again = small_runs.trainer("batch", RunFolder(tmp_path), **options)
    ticking(again, time)
    again.run(resume=True)
    assert [line["step"] for line in again.history if line["kind"] == "eval"] == [2, 3, 5, 6, 8, 9, 11, 12, 14, 15]


def test_a_resumed_run_goes_on_with_the_time_it_had(time: Time, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 1000, "max_minutes": 0.5, "clock": "cpu", "log_every": 1, "eval_every": 0}
    first = small_runs.trainer("batch", RunFolder(tmp_path), **options)
    ticking(first, time)
    small_runs.interrupt(first.objective, 6)
    with pytest.raises(small_runs.Interrupted):
        first.run()
    time.passes(wall=500, cpu=500)
    again = small_runs.trainer("batch", RunFolder(tmp_path), **options)
    ticking(again, time)
    again.run(resume=True)
    assert again.step == 15
    assert again.clock.cpu_spent == 12
    train = [line for line in again.history if line["kind"] == "train"]
    assert [line["cpu_seconds"] for line in train] == [2.0 * step for step in range(1, 16)]
