"""What trackers are told, and what a resumed run leaves in them; the progress bar's total."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from vardistill.training.books import Books
from vardistill.training.folder import RunFolder


def accelerator_of(path: Path, tracker: str | None) -> Accelerator:
    return Accelerator(cpu=True, log_with=tracker, project_dir=str(path))


def test_the_total_of_a_budget_is_what_its_pace_lets_expect() -> None:
    """Of a number of steps it is that number at every step, without the rounding of step/progress."""
    books = Books(None, accelerator_of(Path(), None))
    with books.opened(3, None):
        books.advance(4, 0.0, math.inf)
        assert (books.bar.n, books.bar.total) == (4, None)
        for step, progress, total in ((5, 0.001, 5000), (10, 0.1, 100), (60, 0.5, 120), (130, 1.0, 130)):
            books.advance(step, progress, 1.0)
            assert (books.bar.n, books.bar.total) == (step, total)
    for steps in (7, 1000, 123_457):
        with books.opened(0, steps):
            for step in range(1, steps + 1, 1 + steps // 500):
                books.advance(step, step / steps, 1.0)
                assert books.bar.total == steps


@pytest.mark.parametrize("steps", [None, 1000])
def test_a_file_gets_plain_lines_with_the_time_left_and_all_figures(
    steps: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    books = Books(None, accelerator_of(Path(), None))
    values = {"log_mmd": -4.0, "modes_found": 40.0, "loss": -1234.5678, "bound": 2.0, "log_density": -7.25}
    with books.opened(0, steps):
        books.record("train", 30, 1.0, values)
        books.advance(30, 0.5, 247.0)
    told = capsys.readouterr().err
    assert not set(told) & {"\r", "\033"}
    assert told.splitlines()[-1] == (
        " 50% 30/60 steps, 4:07 left, log_mmd -4, modes_found 40, loss -1235, bound 2, log_density -7.25"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [80, 132])
def test_a_terminal_gets_a_bar_that_fits_with_whole_figures(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    books = Books(None, accelerator_of(Path(), None))
    with books.opened(0, 20_000):
        values = {"log_mmd": -4.125, "modes_found": 40.0, "loss": -1234.5678, "bound": 2.25, "log_density": -7.25}
        books.record("train", 10_000, 1.0, values)
        books.advance(10_000, 0.5, 36_247.0)
    shown = terminal.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[-1].rstrip()
    assert len(shown) < min(width, 121)
    assert "10000/20000 steps, 10:04:07 left, log_mmd -4.125" in shown
    assert ("bound" in shown) == (width > 100)
    assert re.fullmatch(r".* steps, [\d:]+ left(, \w+ [-\d.]*\d)+", shown)


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
