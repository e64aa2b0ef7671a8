"""What trackers are told, and what a resumed run leaves in them; the progress bar's total."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from vardistill.training.books import Books
from vardistill.training.folder import RunFolder


def accelerator_of(path: Path, tracker: str | None) -> Accelerator:
    return Accelerator(cpu=True, log_with=tracker, project_dir=str(path))


class Bar:
    """Stands in the place of the progress bar."""

    n, total = 3, None

    def update(self, steps: int) -> None:
        self.n += steps


def test_the_total_of_a_budget_is_what_its_pace_lets_expect() -> None:
    """Of a number of steps it is that number at every step, without the rounding of step/progress."""
    books = Books(None, accelerator_of(Path(), None))
    books.bar = Bar()  # type: ignore[assignment]
    books.advance(4, 0.0)
    assert (books.bar.n, books.bar.total) == (4, None)
    for step, progress, total in ((5, 0.001, 5000), (10, 0.1, 100), (60, 0.5, 120), (130, 1.0, 130)):
        books.advance(step, progress)
        assert (books.bar.n, books.bar.total) == (step, total)
    for steps in (7, 1000, 123_457):
        for step in range(1, steps + 1, 1 + steps // 500):
            books.advance(step, step / steps)
            assert books.bar.total == steps


@pytest.mark.parametrize("steps", [None, 1000])
def test_the_bar_tells_the_time_left(steps: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    """After half of the time it is as much again, whatever the number of steps that the budget comes before."""
    books = Books(None, accelerator_of(Path(), None))
    with books.opened(0, steps):
        books.advance(30, 0.5)
        figures = books.bar.format_dict
        assert (figures["n"], figures["total"]) == (30, 60)
    assert "30/60" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("resumed_at", [0, 4, 6])
def test_a_resumed_run_repeats_no_point_in_tensorboard(resumed_at: int, tmp_path: Path) -> None:
    """Lines after the checkpoint are written again: of each step the later one counts, and no other is there."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, values in ((0, (1.0, 2.0, 3.0)), (resumed_at, (10.0, 20.0, 30.0))):
        books = Books(RunFolder(tmp_path), accelerator_of(tmp_path, "tensorboard"))
        with books.opened(start, 10):
            for step, value in zip((2, 4, 6), values, strict=True):
                if step > start:
                    books.record("train", step, 0.0, {"loss": value})
    events = accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    expected = [(step, (step // 2.0) * (1 if step <= resumed_at else 10)) for step in (2, 4, 6)]
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")] == expected


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_run_elsewhere(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Project, name and a stable id, by what is handed over; another run of that name is another one."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def init_trackers(project: str, init_kwargs: dict[str, dict[str, Any]]) -> None:
        seen.append((project, init_kwargs[tracker]))

    for folder in ("a/mine", "a/mine", "b/mine"):
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        accelerator = accelerator_of(path, None)
        monkeypatch.setattr(accelerator, "log_with", [tracker])
        monkeypatch.setattr(accelerator, "init_trackers", init_trackers)
        with Books(RunFolder(path), accelerator).opened(0, 10):
            pass
    (project, first), (_, again), (_, other) = seen
    assert project == "vardistill"
    assert again == first != other
    assert first.pop("resume") == "allow"
    known = (tmp_path / "a/mine/tracker_id.txt").read_text()
    assert len(known) == 8
    assert first == ({"name": "mine", "id": known} if tracker == "wandb" else {"name": f"mine-{known}"})
