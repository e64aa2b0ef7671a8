"""A bench of pictures, really run, in seconds; and what the bench `steps` says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vardistill.bench import BENCHES, Bench, Budget, Cell, Results, grid, run_bench, running, steps, work
from vardistill.bench.cells import Settings
from vardistill.bench.named import PICTURES, STEPS, with_student
from vardistill.bench.page import page
from vardistill.bench.results import Result
from vardistill.domains.pictures import config as pictures, parts, teach
from vardistill.runs import experiment
from vardistill.runs.config import Config


def small(config: Config) -> Config:
    training = replace(config.training, batch=8, eval_samples=12, device="cpu")
    return replace(config, training=training)


def tiny_fit(data: str) -> pictures.PicturesTeachConfig:
    return pictures.PicturesTeachConfig(
        data, network=pictures.UNetConfig((8, 16)), steps=4, batch=8, checkpoint_every=2, eval_samples=12
    )


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tasks: Iterable[running.Task], *ignored: Any) -> None:
        for task in tasks:
            if not running.is_finished(task.folder):
                assert work.ACTIONS[task.words[0]](Path(task.words[1]), *task.words[2:]) == 0

    fit = teach.fit_classifier
    monkeypatch.setattr(running, "_run_tasks", run)
    monkeypatch.setattr(pictures, "fit_of", tiny_fit)
    monkeypatch.setattr(teach, "STEPS", (2,))
    monkeypatch.setattr(parts, "TEACHER_STEPS", 2)
    monkeypatch.setattr(parts, "TIMED", 4)
    monkeypatch.setattr(experiment, "write_report", lambda *ignored: None)
    monkeypatch.setattr(teach, "fit_classifier", lambda *given: fit(*given, steps=20))


@pytest.mark.usefixtures("_in_this_process")
def test_students_of_pictures_share_a_teacher_from_the_data_that_are_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = tmp_path / "shapes.npz"
    np.savez(data, images=rng.integers(256, size=(80, 8, 8), dtype=np.uint8), labels=np.arange(80) % 2)
    objectives = {
        "Diff-Instruct, 2 steps": with_student(small(PICTURES["Diff-Instruct"]), steps_per_sample=2),
        "VarFlow": small(PICTURES["VarFlow"]),
    }
    bench = Bench(
        "shapes", "of noise", lambda seeds: grid(objectives, seeds=seeds), ("fd", "coverage", "evaluations"), ("fd",),
        budget=Budget("steps", 2), one_teacher=True,
    )  # fmt: skip
    results = run_bench(bench, tmp_path / "bench", seeds=1, data=str(data))
    assert len(results.finished) == 2
    assert [path.name for path in (tmp_path / "bench" / "teachers").iterdir() if path.is_dir()] == ["shapes-seed0"]
    assert {name: results.values(row, "evaluations") for row in results.rows for name in [row.objective]} == {
        "Diff-Instruct, 2 steps": [2.0],
        "VarFlow": [1.0],
    }
    assert all("fd" in result.curve[-1] for result in results.finished)
    kept = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert kept["teachers"]["shapes-seed0"]["2 steps"]["evaluations"] == 3
    assert "shapes-seed0, 2 steps" in (tmp_path / "bench" / "report.html").read_text()
    assert running.report(bench, tmp_path / "bench").finished == results.finished
    assert len(run_bench(bench, tmp_path / "bench", seeds=1, data=str(data)).finished) == 2


def of_steps(values: dict[str, list[float]]) -> Results:
    found = [
        Result(Cell(row, "learned", "digits", seed, Config()), {"fd": fd, "recall": 0.5, "label_accuracy": 0.9}, [])
        for row, seeds in values.items()
        for seed, fd in enumerate(seeds)
    ]
    return Results(BENCHES["steps"], Settings("steps", 3, Budget("cpu", 2)), {}, found, [], [])


@pytest.mark.parametrize(
    ("four", "said"),
    [([0.5, 0.51, 0.52], "four steps beat one"), ([2.0, 2.1, 2.2], "four steps lose to one"),
     ([0.1, 1.0, 1.9], "four steps and one are not told apart"), ([], "no answer yet")],
)  # fmt: skip
def test_the_bench_of_steps_says_whether_four_beat_one(four: list[float], said: str, tmp_path: Path) -> None:
    measured = of_steps({"VarFlow, 1 step": [1.0, 1.01, 1.02], "VarFlow, 4 steps": four})
    ((title, figure),) = steps.figures(measured).items()
    assert title.startswith(f"Quality against the number of steps: VarFlow, {said}")
    lines = [line.get_xydata().tolist() for line in figure.axes[0].get_lines() if line.get_linestyle() != "None"]
    assert [point[0] for point in lines[0]] == ([1, 4] if four else [1])
    assert said in page(measured, tmp_path)


def test_a_student_of_one_step_is_the_recipe_itself() -> None:
    for name in ("Diff-Instruct", "VarFlow"):
        assert STEPS[f"{name}, 1 step"] == PICTURES[name]
        assert STEPS[f"{name}, 4 steps"].domain.student.steps_per_sample == 4
