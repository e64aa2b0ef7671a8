"""Benches that train nothing: what is run and what not, kills, failures, and what the results say."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fake_work
import killed_bench
from fake_work import BENCH, METRICS, TAUGHT
from vardistill.bench import BENCHES, Bench, Budget, Cell, grid, run_bench, running, work
from vardistill.bench.page import page, sets
from vardistill.bench.results import Failure, print_results, spread, table
from vardistill.cli import main as cli
from vardistill.domains.pictures.config import PicturesConfig
from vardistill.domains.points import config as scales
from vardistill.domains.points.config import PointsTeachConfig
from vardistill.errors import UsageError
from vardistill.objectives.registry import PartConfig, SumConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.runs.config import Config
from vardistill.training.config_files import write
from vardistill.training.folder import RunFolder

COMMAND = running.command

TIMINGS = ("seconds", "cpu_seconds")


@pytest.fixture(autouse=True)
def _train_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "command", fake_work.command)
    monkeypatch.setenv("FAKE", "{}")


@pytest.fixture
def _real_work(monkeypatch: pytest.MonkeyPatch, _train_nothing: None) -> None:
    monkeypatch.setattr(running, "command", COMMAND)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "unbroken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "command", fake_work.command)
        patch.setenv("FAKE", "{}")
        run_bench(BENCH, folder, jobs=2, seeds=2)
    return folder


def befall(monkeypatch: pytest.MonkeyPatch, **cells: str) -> None:
    monkeypatch.setenv("FAKE", json.dumps(cells))


def untimed(folder: Path) -> Any:
    """The results but for their timings."""
    data = json.loads((folder / "results.json").read_text())
    for cell in data["cells"]:
        for values in (cell["values"], *cell["curve"]):
            for name in TIMINGS:
                values.pop(name)
    return data


def until(holds: Callable[[], object]) -> None:
    give_up = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def is_free(folder: Path) -> bool:
    """Whether no process of a bench is left in the folder."""
    running.PATIENCE, before = 0.0, running.PATIENCE
    try:
        with running.occupied(folder):
            return True
    except UsageError:
        return False
    finally:
        running.PATIENCE = before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_bench_that_was_stopped_goes_on_and_ends_as_an_unbroken_one(number, unbroken, tmp_path):
    folder, waiting = tmp_path / "bench", "bad-b_true_mog40_seed0"
    environment = os.environ | {"FAKE": json.dumps({waiting: "wait"})}
    words = [sys.executable, fake_work.__file__, "bench", str(folder)]
    if number is signal.SIGINT:
        words.append("--foreground")
    else:
        words = ["sh", "-c", "trap '' INT; exec \"$@\"", "in the background", *words]
    bench = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    finished = folder / "good_true_mog40_seed0" / "evaluation.json"
    until(lambda: (folder / waiting / "waiting").exists() and running.is_finished(finished.parent))
    before = finished.stat().st_mtime_ns
    bench.send_signal(number)
    assert bench.wait() != 0
    until(lambda: is_free(folder))
    assert (folder / waiting / "interrupted").exists()
    assert not running.is_finished(folder / waiting)
    results = run_bench(BENCH, folder, jobs=2, seeds=2)
    assert finished.stat().st_mtime_ns == before
    assert untimed(folder) == untimed(unbroken)
    assert len(results.finished) == 6


def test_a_bench_that_was_killed_between_cells_begins_the_next(unbroken, tmp_path):
    bench = subprocess.run([sys.executable, fake_work.__file__, "bench", str(tmp_path), "--die-between-cells"])
    assert bench.returncode == -signal.SIGKILL
    assert [running.is_finished(tmp_path / cell.name) for cell in BENCH.plan(seeds=2)] == 2 * [True] + 4 * [False]
    assert not (tmp_path / "worse_true_mog40_seed0.log").exists()  # which begins with its process
    run_bench(BENCH, tmp_path, jobs=2, seeds=2)
    assert untimed(tmp_path)["cells"] == untimed(unbroken)["cells"]


def test_fewer_seeds_than_before_hide_none_of_the_results(tmp_path):
    run_bench(BENCH, tmp_path, seeds=2, only=["good"])
    results = run_bench(BENCH, tmp_path, seeds=1)
    assert results.settings.seeds == 2
    assert [result.cell.seed for result in results.finished if result.cell.objective == "good"] == [0, 1]
    assert len(results.finished) == 4
    assert len(results.missing) == 2


def test_an_evaluation_that_was_cut_short_is_made_again(unbroken, tmp_path):
    run_bench(BENCH, tmp_path, seeds=1, only=["good"])
    cut = tmp_path / "good_true_mog40_seed0" / "evaluation.json"
    cut.write_text(cut.read_text()[:10])
    (result,) = run_bench(BENCH, tmp_path, seeds=1, only=["good"]).finished
    assert result.values["log_mmd"] == 1.0


def test_a_failing_cell_is_told_and_the_rest_goes_on(monkeypatch, tmp_path):
    befall(monkeypatch, worse_true_mog40_seed0="fail")
    results = run_bench(BENCH, tmp_path, seeds=1, jobs=2)
    (failure,) = results.failures
    assert (failure.name, failure.exit) == ("worse_true_mog40_seed0", 1)
    assert failure.reason == "vardistill: updates had <gradients> that are not finite"
    assert [result.cell.objective for result in results.finished] == ["good", "bad, <b>"]
    assert "updates had &lt;gradients&gt; that" in (tmp_path / "report.html").read_text()
    assert running.report(BENCH, tmp_path).failures == results.failures
    befall(monkeypatch)
    again = run_bench(BENCH, tmp_path, seeds=1)
    assert not again.failures
    assert len(again.finished) == 3


def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of every process that begins from now on."""
    begun: list[str] = []
    start = running.command

    def counted(task: running.Task) -> Any:
        begun.append(" ".join(Path(word).name for word in task.words))
        return start(task)

    monkeypatch.setattr(running, "command", counted)
    return begun


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_cells_that_share_a_process_end_as_those_with_their_own(jobs, monkeypatch, unbroken, tmp_path):
    begun = starts(monkeypatch)
    shared = dataclasses.replace(BENCH, one_process=True)
    run_bench(shared, tmp_path, jobs=jobs, seeds=2)
    names = [cell.name for cell in shared.plan(seeds=2)]
    size = {1: 6, 2: 3, 5: 2}[jobs]
    chains = [names[i : i + size] for i in range(0, 6, size)]
    assert begun == [" --then ".join(f"train {name}" for name in chain) for chain in chains]
    assert untimed(tmp_path)["cells"] == untimed(unbroken)["cells"]
    assert all((tmp_path / f"{name}.log").is_file() for name in names)


def test_a_cell_that_fails_in_a_shared_process_leaves_the_rest_to_the_next(monkeypatch, tmp_path):
    begun = starts(monkeypatch)
    first, second, third = (cell.name for cell in BENCH.plan(seeds=1))
    befall(monkeypatch, **{second: "fail"})
    results = run_bench(dataclasses.replace(BENCH, one_process=True), tmp_path, seeds=1)
    assert begun == [f"train {first} --then train {second} --then train {third}", f"train {third}"]
    (failure,) = results.failures
    assert (failure.name, failure.exit) == (second, 1)
    assert failure.reason == "vardistill: updates had <gradients> that are not finite"
    assert len(results.finished) == 2
    assert (tmp_path / f"{first}.log").read_text() == ""
    assert "too many" in (tmp_path / f"{second}.log").read_text()


def test_teachers_are_fitted_once_and_shared(tmp_path):
    results = run_bench(TAUGHT, tmp_path, seeds=2, jobs=2)
    assert len(results.finished) == 8
    assert {path.name for path in (tmp_path / "teachers").iterdir() if path.is_dir()} == {
        "mog40-64-seed0",
        "mog40-64-seed1",
    }
    fits = [(tmp_path / "teachers" / f"mog40-64-seed{seed}.log").read_text() for seed in (0, 1)]
    assert fits == ["fitted\n", "fitted\n"]
    assert {(row.teacher, row.objective) for row, metric in results.best() if metric == "log_mmd"} == {
        ("exact", "good"),  # rows of other teachers are no rivals
        ("fitted", "good"),
    }


def test_a_failing_teacher_fails_its_cells_alone(monkeypatch, tmp_path):
    befall(monkeypatch, teacher="fail")
    results = run_bench(TAUGHT, tmp_path, seeds=2, jobs=2)
    assert [failure.name for failure in results.failures] == ["good_fitted_mog40_seed1", "worse_fitted_mog40_seed1"]
    assert results.failures[0].reason == "its teacher mog40-64-seed1 failed: RuntimeError: no such luck"
    assert len(results.finished) == 6


def test_a_bench_may_be_moved(monkeypatch, tmp_path):
    befall(monkeypatch, good_fitted_mog40_seed0="fail")
    assert len(run_bench(TAUGHT, tmp_path / "here", seeds=1).failures) == 1
    befall(monkeypatch)
    (tmp_path / "here").rename(tmp_path / "there")
    assert len(run_bench(TAUGHT, tmp_path / "there", seeds=1).finished) == 4


def test_a_cell_of_another_configuration_is_refused(tmp_path):
    run_bench(BENCH, tmp_path, seeds=1, only=["good"])
    with pytest.raises(UsageError, match=r"good_true_mog40_seed0 was made with training.steps = 30, but now it is 40"):
        run_bench(BENCH, tmp_path, seeds=1, budget=Budget("steps", 40))
    with pytest.raises(UsageError, match="holds the bench fake: choose another --out for taught"):
        run_bench(TAUGHT, tmp_path)
    with pytest.raises(UsageError, match="is not a bench's folder"):
        running.report(BENCH, tmp_path / "good_true_mog40_seed0")
    with pytest.raises(UsageError, match="good_true_mog40_seed0 is a run: choose another --out"):
        run_bench(BENCH, tmp_path / "good_true_mog40_seed0")


def test_a_sum_that_differs_in_one_weight_is_told_by_its_name(tmp_path):
    def bench(weight: float) -> Bench:
        parts = (PartConfig(VarDiUConfig()), PartConfig(VarFlowConfig(), weight))
        return dataclasses.replace(
            BENCH, cells=lambda seeds: grid({"sum": Config(objective=SumConfig(parts))}, seeds=1)
        )

    (cell,) = bench(0.5).plan()
    running.check_folder(bench(0.5), [cell], tmp_path)
    running._task(tmp_path / cell.name, cell.config, None)
    running.check_folder(bench(0.5), [cell], tmp_path)
    told = r"was made with objective.parts\[1\].weight = 0.5, but now it is 2.0"
    with pytest.raises(UsageError, match=told):
        running.check_folder(bench(2.0), bench(2.0).plan(), tmp_path)


def test_a_cell_of_an_earlier_version_is_refused(unbroken, tmp_path):
    folder = tmp_path / "bench"
    shutil.copytree(unbroken, folder)
    (folder / "good_true_mog40_seed0" / "config.yaml").write_text("problem: mog40\ngenerator: {}\n")
    with pytest.raises(UsageError, match=r"good_true_mog40_seed0/config.yaml is .* of an earlier version"):
        run_bench(BENCH, folder, seeds=2)


PICTURES = Bench(
    "pictures",
    "of digits",
    lambda seeds: grid({"a": Config(PicturesConfig(data="digits"))}, seeds=seeds),
    ("fd",),
    budget=Budget("steps", 2),
    one_teacher=True,
)


def test_pictures_have_one_teacher_for_all_seeds_and_points_one_for_each():
    for bench, labels in ((PICTURES, ["digits-seed0"] * 2), (TAUGHT, ["mog40-64-seed0", "mog40-64-seed1"])):
        fits = [running.shared_teacher(cell.config, bench.one_teacher) for cell in bench.plan(seeds=2)]
        assert [fit.label for fit in fits if fit is not None][:: len(fits) // 4 or 1] == labels


def test_data_are_other_pictures(tmp_path):
    (cell,) = PICTURES.plan(seeds=1, data=str(tmp_path / "mnist.npz"))
    assert (cell.config.domain.data, cell.problem) == (str(tmp_path / "mnist.npz"), "digits")
    fit = running.shared_teacher(cell.config)
    assert (fit.data, fit.label) == (cell.config.domain.data, "mnist-seed0")
    with pytest.raises(UsageError, match="fake has cells without pictures, good_true_mog40_seed0 for example"):
        run_bench(BENCH, tmp_path / "new", data="mnist.npz")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("_real_work")
def test_pictures_that_are_not_there_are_told_in_one_line(tmp_path):
    words = "the bench's teacher none-seed0 cannot be fitted: there is no file .*none.npz"
    with pytest.raises(UsageError, match=words):
        run_bench(PICTURES, tmp_path / "bench", data=str(tmp_path / "none.npz"))


def test_what_a_run_keeps_may_differ_between_a_folders_cells(tmp_path):
    """Lines of metrics, evaluations and checkpoints change nothing of a run."""
    run_bench(BENCH, tmp_path, seeds=1)

    def kept_otherwise(cell):
        kept = dataclasses.replace(cell.config.training, log_every=7, checkpoint_every=3)
        return dataclasses.replace(cell, config=dataclasses.replace(cell.config, training=kept))

    other = dataclasses.replace(BENCH, cells=lambda seeds: [kept_otherwise(cell) for cell in BENCH.cells(seeds)])
    assert len(run_bench(other, tmp_path, seeds=2).finished) == 6
    assert len(running.report(BENCH, tmp_path).finished) == 6
    by_the_wall = Budget("wall", 1.0)  # where they cost training
    run_bench(BENCH, tmp_path / "wall", seeds=1, budget=by_the_wall)
    with pytest.raises(UsageError, match="was made with training.log_every"):
        run_bench(other, tmp_path / "wall", seeds=1, budget=by_the_wall)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"figures": "no_such_module:figures"}, "there is no function no_such_module:figures"),
        ({"measure": "fake_work:nothing"}, "there is no function fake_work:nothing"),
        ({"better": {"log_mmd": "up"}}, "unknown direction of log_mmd 'up'"),
    ],
)
def test_a_bench_that_could_not_be_shown_is_refused_before_it_runs(changes, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        run_bench(dataclasses.replace(BENCH, **changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_page_that_fails_costs_no_results(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run_bench(dataclasses.replace(BENCH, figures="fake_work:fails"), tmp_path, seeds=1)
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 3
    assert (tmp_path / "results.csv").exists()


def test_a_teacher_of_another_configuration_is_refused(tmp_path):
    teacher = tmp_path / "teachers" / "mog40-64-seed0"
    teacher.mkdir(parents=True)
    write(PointsTeachConfig(samples=64, steps=7), teacher / "config.yaml")
    (teacher / "evaluation.json").write_text("{}")
    with pytest.raises(UsageError, match="mog40-64-seed0 was made with steps = 7, but now it is"):
        run_bench(TAUGHT, tmp_path, seeds=1)


def test_an_unfinished_teacher_is_fitted_anew_whatever_it_left(tmp_path):
    teacher = tmp_path / "teachers" / "mog40-64-seed0"
    teacher.mkdir(parents=True)
    (teacher / "config.yaml").write_text("samples: [6")
    running._teach(running.shared_teacher(TAUGHT.plan(seeds=1)[1].config), tmp_path)
    assert not teacher.exists()


@pytest.mark.parametrize("remnant", ["", '{"bench": "fa', "[1]", '{"bench": "fake", "budget": [3]}'])
def test_settings_that_cannot_be_read_are_written_anew(remnant, unbroken, tmp_path):
    folder = tmp_path / "bench"
    shutil.copytree(unbroken, folder)
    whole = (folder / "bench.json").read_text()
    (folder / "bench.json").write_text(remnant)
    with pytest.raises(UsageError, match="has no bench.json that can be read"):
        running.report(BENCH, folder)
    assert len(run_bench(BENCH, folder, jobs=2, seeds=2).finished) == 6
    assert (folder / "bench.json").read_text() == whole


def test_foreign_files_in_cells_end_in_results_without_them(unbroken, tmp_path):
    folder = tmp_path / "bench"
    shutil.copytree(unbroken, folder)
    run = RunFolder(folder / "good_true_mog40_seed0")
    run.metrics.write_text('[1]\n"eval"\n{"kind": "eval", "step": "1"}\n' + run.metrics.read_text())
    (run.path / "evaluation.json").write_text(f'{{"log_mmd": 1{"0" * 400}, "modes_found": [1], "\\ud800": 1}}')
    run.environment.write_text('{"processor": ["abacus"], "threads": {"a": 1}, "cores": "\\ud800"}')
    first, *_ = running.report(BENCH, folder).finished
    assert [line["step"] for line in first.curve] == list(range(10))
    assert not {"log_mmd", "modes_found"} & first.values.keys()
    environment = json.loads((folder / "results.json").read_text())["environment"]
    assert environment["processor"] == "['abacus']; abacus"
    run.metrics.write_text('{"kind": "eval", "step": 1, "seconds": 1, "log_mmd": 1' + "0" * 5000 + "}\n")
    with pytest.raises(UsageError, match="cannot read .*metrics.jsonl"):
        running.report(BENCH, folder)


def test_samples_outside_of_the_bench_stay_there(unbroken, tmp_path):
    folder = tmp_path / "bench"
    shutil.copytree(unbroken, folder)
    kept = folder / "good_true_mog40_seed0" / "samples.npz"
    for target, shown in ((tmp_path / "secret.npz", False), (folder / "own.npz", True)):
        np.savez(target, samples=np.zeros((3, 2), dtype=np.float32))
        kept.symlink_to(target)
        running.report(BENCH, folder)
        assert ("<h2>Samples</h2>" in (folder / "report.html").read_text()) == shown
        kept.unlink()


def test_a_row_of_true_samples_and_a_small_figure_of_them_stand_beside_the_students(unbroken, tmp_path):
    folder = tmp_path / "bench"
    shutil.copytree(unbroken, folder)
    for cell in ("good_true_mog40_seed0", "bad-b_true_mog40_seed0"):
        np.savez(folder / cell / "samples.npz", samples=np.zeros((3, 2), dtype=np.float32))
    shown = page(running.report(BENCH, folder), folder)
    (line,) = re.findall(r'<tr><th scope="row">true samples</th>.*?</tr>', shown)
    assert re.findall(r"<td[^>]*>(.*?)</td>", line)[1:] == ["−8.524 ± 0.1", "40", "0 ± 0.01", "uniform in (0, 1)"]
    titles = re.findall(r"<h3>(.*? · .*?)</h3>", shown)
    assert titles == ["True samples · mog40", "good · true · mog40", "bad, &lt;b&gt; · true · mog40"]


def test_pictures_stand_beside_their_teachers(tmp_path):
    run = RunFolder(tmp_path)
    np.savez(tmp_path / "samples.npz", samples=np.zeros((3, 1, 8, 8)), teacher=np.ones((3, 1, 8, 8)))
    cell = Cell("a", "t", "p", 0, Config(PicturesConfig("t")))
    shown = {title: draw().axes[0].images[0].get_array().max() for title, draw in sets(run, cell, "a").items()}
    assert shown == {"Teacher · t · p": 255, "a": 128}


def test_results_are_written_by_one_process_at_a_time_and_each_file_whole(unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "bench"
    shutil.copytree(unbroken, folder)
    before = (folder / "results.json").read_text()
    monkeypatch.setattr(running, "PATIENCE", 0.0)
    with running.occupied(folder):  # by a bench whose cells run
        running.report(BENCH, folder)
    with running.occupied(folder, ".results.lock"), pytest.raises(UsageError, match="another bench is at work"):
        running.report(BENCH, folder)

    def stop(*ignored: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        running.report(dataclasses.replace(BENCH, about="else"), folder)
    assert (folder / "results.json").read_text() == before


def test_a_running_table_tells_of_each_cell_as_it_ends_and_of_the_time_left(monkeypatch, tmp_path, capsys):
    befall(monkeypatch, **{"bad-b_true_mog40_seed0": "fail"})
    run_bench(BENCH, tmp_path, seeds=1)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == f"fake: 3 runs of 30 steps, 1 at a time, in {tmp_path}"
    heads, good, bad, worse = (line.split() for line in lines)
    assert heads == ["run", "seconds", *METRICS, "left"]
    assert (good[0], good[2:6]) == ("good_true_mog40_seed0", ["1", "40", "-1", "0.5"])
    assert " ".join(bad) == (
        "bad-b_true_mog40_seed0 failed with exit code 1: vardistill: updates had <gradients> that are not finite"
    )
    assert worse[-1] == "0:00"
    assert (
        len({line.rindex("left") + 4 if "left" in line else len(line) for line in (lines[0], lines[1], lines[3])}) == 1
    )


@pytest.mark.parametrize(("jobs", "left"), [(1, "0:14"), (2, "0:07")])
def test_the_time_left_is_of_the_tasks_that_ended_less_what_runs(jobs, left, monkeypatch, tmp_path, capsys):
    """After one of 10 s two more take 20 s, of which one has done 6 s."""
    tasks = [running.Task(tmp_path / name, ()) for name in "abc"]
    progress = running.Progress(tasks, jobs, ())
    monkeypatch.setattr(running.time, "monotonic", lambda: 100.0)
    under_way = [SimpleNamespace(task=tasks[1], started=94.0)]
    assert progress.left(under_way) == "?"
    progress.ended(SimpleNamespace(task=tasks[0], started=90.0), None, under_way)
    assert capsys.readouterr().err.split()[-1] == left


def test_only_what_was_asked_for_runs_and_all_that_is_there_is_shown(tmp_path):
    first = run_bench(BENCH, tmp_path, seeds=2, only=["good", "worse_true_mog40_seed0"])
    assert [result.cell.name for result in first.finished] == [
        "good_true_mog40_seed0",
        "worse_true_mog40_seed0",
        "good_true_mog40_seed1",
    ]
    assert first.missing == ["bad-b_true_mog40_seed0", "bad-b_true_mog40_seed1", "worse_true_mog40_seed1"]
    second = run_bench(BENCH, tmp_path, seeds=2, only=["bad"])
    assert second.missing == ["worse_true_mog40_seed1"]
    for word in ("wurst", ["wurst"]):
        with pytest.raises(UsageError, match="no cell's name contains 'wurst'"):
            run_bench(BENCH, str(tmp_path), seeds=2, only=word)


def test_two_benches_do_not_share_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(running, "PATIENCE", 0.0)
    with running.occupied(tmp_path), pytest.raises(UsageError, match="another bench is at work"):
        run_bench(BENCH, tmp_path)


def test_what_the_cells_ran_with_is_kept_when_nothing_is_left_to_run(tmp_path):
    run_bench(BENCH, tmp_path, seeds=1, jobs=3, threads=2)
    results = run_bench(BENCH, tmp_path, seeds=1, jobs=1, threads=1)
    assert (results.settings.jobs, results.settings.threads, results.environment["threads"]) == (3, 2, "2")


def test_rows_are_marked_by_the_seeds(unbroken):
    """log-MMD differs by 1 with a spread of 0.007; the modes are the same, and one seed is not enough."""
    results = running.report(BENCH, unbroken)
    good = results.finished[0].cell.row
    assert results.best() == {(good, "log_mmd"), (good, "log_density_gap")}
    single = dataclasses.replace(results, finished=results.finished[:3])
    assert single.best() == set()
    rows = json.loads((unbroken / "results.json").read_text())["rows"]
    assert [row["best"] for row in rows] == [["log_mmd", "log_density_gap"], [], []]


def test_a_collapsed_student_is_not_best_by_its_density(unbroken):
    """On few of the modes the mean log-density is above the target's own."""
    results = running.report(BENCH, unbroken)
    bench = dataclasses.replace(BENCH, metrics=("log_density", "log_density_gap"))
    good, other = results.finished[0].cell.row, results.finished[2].cell.row
    values = {good: [(-7.0, -0.1), (-7.01, -0.11)], other: [(-5.1, 1.8), (-5.11, 1.79)]}
    finished = []
    for row, found in values.items():
        cells = [result for result in results.finished if result.cell.row == row]
        for result, (density, gap) in zip(cells, found, strict=True):
            finished.append(dataclasses.replace(result, values={"log_density": density, "log_density_gap": gap}))
    assert dataclasses.replace(results, bench=bench, finished=finished).best() == {(good, "log_density_gap")}


def test_nothing_is_marked_where_a_run_failed(unbroken):
    """The survivors are no fair sample. Other teachers' rows stay as they are."""
    results = running.report(BENCH, unbroken)
    good = results.finished[0].cell.row
    failed = dataclasses.replace(results, failures=[Failure("bad", 1, "too hot", good)])
    assert failed.best() == set()
    elsewhere = good._replace(teacher="another")
    assert dataclasses.replace(results, failures=[Failure("bad", 1, "too hot", elsewhere)]).best() == results.best()


def test_nothing_is_marked_where_a_value_is_lost(unbroken, tmp_path):
    """A loss that ends as NaN is no missing rival: its metric is not told apart, and says of how many seeds it is."""
    shutil.copytree(unbroken, tmp_path / "bench")
    path = tmp_path / "bench" / "worse_true_mog40_seed1" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"log_mmd": None}))
    results = running.report(BENCH, tmp_path / "bench")
    assert {metric for _, metric in results.best()} == {"log_density_gap"}
    headings, rows = table(results)
    texts = [row[headings.index("log_mmd")].text for row in rows.values()]
    assert texts == ["1.0050 ± 0.0071", "2.0050 ± 0.0071", "3 (1 of 2)"]


def test_a_bench_says_which_values_of_its_own_metrics_are_good(unbroken):
    results = running.report(BENCH, unbroken)
    worse = results.finished[2].cell.row
    opposite = dataclasses.replace(BENCH, better={"log_mmd": "higher"})
    assert (worse, "log_mmd") in dataclasses.replace(results, bench=opposite).best()


def test_the_csv_has_a_line_for_every_cell(unbroken):
    with (unbroken / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["objective"] for line in lines] == 2 * ["good", "bad, <b>", "worse"]
    assert [line["seed"] for line in lines] == ["0", "0", "0", "1", "1", "1"]
    assert float(lines[1]["log_mmd"]) == 2.0
    assert float(lines[1]["network_evaluations"]) == 576


def test_the_json_has_everything(unbroken):
    data = json.loads((unbroken / "results.json").read_text())
    assert data["environment"] == {"processor": "abacus", "threads": "1"}
    assert data["settings"]["budget"] == {"kind": "steps", "amount": 30}
    cell = data["cells"][0]
    assert [line["step"] for line in cell["curve"]] == list(range(10))
    assert cell["values"]["gap"] == 1.0  # from the last line of metrics
    assert cell["values"]["log_mmd"] == 1.0  # from the final evaluation, which comes first


class Links(HTMLParser):
    """Everything that a page refers to, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for name, v in attrs if name in ("href", "src", "xlink:href", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_opens_without_a_network_and_shows_what_it_should(unbroken):
    run = unbroken / "good_true_mog40_seed0"
    (run / "report.html").write_text("the run's page")
    np.savez(run / "samples.npz", samples=np.zeros((3, 2), dtype=np.float32))
    running.report(BENCH, unbroken)
    page = (unbroken / "report.html").read_text()
    (run / "samples.npz").unlink()
    links = Links(page)
    outside = [link for link in links.found if not link.startswith(("data:", "#"))]
    assert outside == 2 * ["good_true_mog40_seed0/report.html"]  # from the table and from the samples
    assert "url(http" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert "<b>1.0050 ± 0.0071</b>" in page
    assert "40 ± " not in page
    assert "bad, &lt;b&gt;" in page
    assert "runs that &amp; train nothing" in page
    for told in ("Welch", "Holm", "30 steps", "abacus", "processor seconds", "network evaluations"):
        assert told in links.text


def test_of_many_cells_that_are_missing_a_few_are_named(unbroken, capsys):
    missing = [f"cell-{i}" for i in range(129)]
    results = dataclasses.replace(running.report(BENCH, unbroken), missing=missing)
    print_results(results)
    told = " ".join(capsys.readouterr().out.split())
    assert told.endswith("not finished: cell-0, cell-1, cell-2, cell-3, cell-4, cell-5 and 123 more")
    assert "cell-5 and 123 more." in page(results, unbroken)


def test_the_terminal_has_the_whole_table_however_narrow(unbroken, monkeypatch, capsys):
    results = running.report(BENCH, unbroken)
    shown = {}
    for width in ("60", "200"):
        monkeypatch.setenv("COLUMNS", width)
        print_results(results)
        shown[width] = capsys.readouterr().out
    for out in shown.values():
        for told in ("1.0050 ± 0.0071", "network_evaluations", "mmd_p_value", "0.5, 0.5", "Holm"):
            assert told in out
        assert "…" not in out
    assert shown["60"].count("good") > shown["200"].count("good") == 1


def test_a_bench_without_results_has_a_page(monkeypatch, tmp_path, capsys):
    befall(monkeypatch, **{cell.name: "fail" for cell in BENCH.plan(seeds=1)})
    results = run_bench(BENCH, tmp_path, seeds=1)
    print_results(results)
    assert "No cell is finished yet" in (tmp_path / "report.html").read_text()
    assert "no cell is finished yet" in capsys.readouterr().out


def test_a_bench_may_measure_instead_of_training(tmp_path):
    """The subprocess's work is done here, where `fake_work` can be imported."""
    bench = Bench(
        "variance", "gradients", lambda seeds: grid({"a": Config()}, seeds=seeds), ("snr",), ("snr",),
        measure="fake_work:measure", figures="fake_work:figures",
    )  # fmt: skip
    cells = bench.plan(seeds=1)
    task = running._task(tmp_path / cells[0].name, cells[0].config, bench.measure)
    for _ in range(2):  # what is measured again begins anew
        assert work.ACTIONS[task.words[0]](Path(task.words[1]), *task.words[2:]) == 0
    results = run_bench(bench, tmp_path, seeds=1)
    (result,) = results.finished
    assert result.values["snr"] == 3.0
    assert "undefined" not in result.values
    assert [line["snr"] for line in result.curve] == [1, 2]
    assert "<h2>Signal to noise</h2>" in (tmp_path / "report.html").read_text()


def test_a_subprocess_fits_a_teacher(tmp_path):
    write(PointsTeachConfig(samples=64, steps=2, width=8, depth=1, batch=16), tmp_path / "teacher.yaml")
    assert work.teach(tmp_path / "teacher", str(tmp_path / "teacher.yaml")) == 0
    assert running.is_finished(tmp_path / "teacher")


def test_a_subprocess_tells_a_mistake_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work, "stop_with_parent", lambda: None)
    write(Config(), RunFolder(tmp_path).config)
    assert work.main(["measure", str(tmp_path), "no_such_module:function"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vardistill: there is no function no_such_module:function")


def test_budgets_limit_what_they_count():
    own = Config()
    assert Budget().limit(own).training == dataclasses.replace(own.training, tracker="none")
    assert Budget("steps", 20).limit(own, milestones=3).training.milestones == 3
    steps = Budget("steps", 200).limit(own).training
    assert (steps.steps, steps.max_minutes) == (200, None)
    for kind in ("wall", "cpu"):
        training = Budget(kind, 0.5).limit(own).training
        assert (training.max_minutes, training.clock) == (0.5, kind)
        assert training.steps >= 10**9
        assert (training.eval_every, training.milestones) == (steps.eval_every, steps.milestones) == (0, 10)
    for amount in (None, 0.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match=f"the minutes of a budget must be positive and finite, but is {amount}"):
            Budget("cpu", amount)


def test_a_grid_has_every_combination_and_replaces_nothing_else():
    config = Config(objective=VarDiUConfig(posterior="nsf"))
    teachers, problems = (
        {"t": {"teacher": config.domain.teacher}},
        {name: {"problem": name} for name in ("mog9", "mog40")},
    )
    cells = grid({"nsf": config}, teachers, problems, seeds=2)
    assert [cell.name for cell in cells] == [
        "nsf_t_mog9_seed0",
        "nsf_t_mog40_seed0",
        "nsf_t_mog9_seed1",
        "nsf_t_mog40_seed1",
    ]
    for cell in cells:
        training = dataclasses.replace(cell.config.training, seed=0)
        assert cell.config.training.seed == cell.seed
        assert cell.config.domain.problem == cell.problem
        domain = dataclasses.replace(cell.config.domain, problem="mog40")
        assert dataclasses.replace(cell.config, domain=domain, training=training) == config


def test_labels_that_make_the_same_name_are_refused():
    bench = Bench("b", "", lambda seeds: grid({"a b": Config(), "a-b": Config()}, seeds=seeds), ())
    with pytest.raises(UsageError, match="2 cells of the bench b are named a-b_true_mog40_seed0"):
        bench.plan(seeds=1)


def test_every_named_bench_can_be_planned():
    for name, bench in BENCHES.items():
        assert name == bench.name
        assert bench.plan()


@pytest.mark.parametrize(
    ("values", "text"),
    [([1.0, 1.0], "1"), ([-1.234567], "−1.235"), ([1.0, 2.0], "1.50 ± 0.71"), ([0, 200], "100 ± 141")],
)
def test_spreads_round_to_what_the_deviation_allows(values, text):
    assert spread(values) == text


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


def test_mistakes_get_one_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "did you mean smoke?" in refused(capsys, "smok")
    assert "needs a name before its flags" in refused(capsys, "--seeds", "3")
    assert "unknown flag 'seds': did you mean seeds" in refused(capsys, "smoke", "--seds", "3")
    assert "counts steps: give --steps, or choose --budget wall" in refused(capsys, "smoke", "--minutes", "3")
    assert "counts minutes: give --minutes, or choose" in refused(capsys, "smoke", "--budget", "cpu", "--steps", "3")
    assert "the minutes of a budget must be positive" in refused(capsys, "smoke", "--budget", "cpu")
    assert "--only needs a word" in refused(capsys, "smoke", "--only", "--out", str(tmp_path / "new"))
    assert "seeds must be at least 1" in refused(capsys, "smoke", "--seeds", "0", "--out", str(tmp_path / "new"))
    assert "jobs must be at least 1" in refused(capsys, "smoke", "--jobs", "0", "--out", str(tmp_path / "new"))
    assert "cannot write the bench's folder" in refused(capsys, "smoke", "--out", str(tmp_path / "file"))
    assert "is not a bench's folder" in refused(capsys, "smoke", "--report-only", "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_the_command_runs_a_bench_and_says_what_failed(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(BENCHES, "fake", BENCH)
    befall(monkeypatch, worse_true_mog40_seed0="fail")
    words = ["bench", "fake", "--out", str(tmp_path / "b"), "--seeds", "1", "--jobs", "2"]
    assert cli.run(words) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "vardistill: 1 of the bench's cells failed: worse_true_mog40_seed0"
    assert captured.err.startswith("fake: 3 runs of 30 steps, 2 at a time")
    assert f"report: {tmp_path / 'b' / 'report.html'}" in captured.out
    befall(monkeypatch)
    assert cli.run([*words, "--report-only"]) == 1
    assert cli.run(words) == 0


def test_a_stopped_command_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def press_ctrl_c(*ignored: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "_run_tasks", press_ctrl_c)
    assert cli.run(["bench", "smoke", "--out", str(tmp_path)]) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "vardistill: interrupted; the same command goes on where this stopped"


def test_report_writes_a_benchs_page_anew(capsys, monkeypatch, unbroken, tmp_path):
    (unbroken / "report.html").unlink()
    assert cli.run(["report", str(unbroken)]) == 2
    assert "unknown bench 'fake'" in capsys.readouterr().err
    monkeypatch.setitem(BENCHES, "fake", BENCH)
    assert cli.run(["report", str(unbroken)]) == 0
    assert capsys.readouterr().out == f"{unbroken / 'report.html'}\n"
    assert "Welch" in (unbroken / "report.html").read_text()


def test_without_a_name_the_benches_are_listed(capsys):
    assert cli.run(["bench"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, bench in BENCHES.items():
        assert name in out
        assert bench.about in out


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from vardistill.cli.main import run\n"
        "try: run(['bench', 'smoke', '--help'])\n"
        "except SystemExit as stop: sys.exit(stop.code or int('torch' in sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--report-only" in shown.stdout


@pytest.fixture
def of_small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "command", killed_bench.command)
    monkeypatch.setattr(scales, "teacher_fit", killed_bench.fit)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "never killed"
    subprocess.run([sys.executable, killed_bench.__file__, "bench", str(folder)], check=True)
    return folder


CHECKPOINTS = {"fit": [], "save": [2], "step": [6, 8], "evaluation": [18, 20]}
"""That a run has when it is killed at one place after the other, each time to go on with what was left."""

ENDED_WITH_ITS_STEP = {"fit": [3], "step": [8, 10]}
"""The same of one whose bench alone was killed: it ends its step, and keeps it."""


@pytest.mark.slow
@pytest.mark.parametrize("victims", [("bench", "run", "both", "bench"), ("both", "both", "bench", "run")])
def test_real_runs_that_are_killed_again_and_again_end_as_unbroken_ones(victims, of_small_runs, never_killed, tmp_path):
    """In a shared teacher's fit, in a save, in a step and before the evaluation; never without work that is left."""
    (cell,) = killed_bench.BENCH.plan()
    words = [sys.executable, killed_bench.__file__, "bench", str(tmp_path)]
    for place, victim in zip(CHECKPOINTS, victims, strict=True):
        bench = subprocess.run(words, env=os.environ | {"KILL": f"{place} {victim}"}, stderr=subprocess.DEVNULL)
        assert bench.returncode == (0 if victim == "run" else -signal.SIGKILL)
        until(lambda: is_free(tmp_path))
        broken = tmp_path / ("teachers/mog40-64-seed0" if place == "fit" else cell.name)
        assert (broken / "config.yaml").is_file()
        assert not running.is_finished(broken)
        left = ENDED_WITH_ITS_STEP.get(place, CHECKPOINTS[place]) if victim == "bench" else CHECKPOINTS[place]
        assert sorted(path.name for path in broken.glob("checkpoints/step-*")) == [f"step-{n:08d}" for n in left]
    run_bench(killed_bench.BENCH, tmp_path)
    assert untimed(tmp_path)["cells"] == untimed(never_killed)["cells"] != []
    weights = Path(cell.name, "generator", "model.safetensors")
    assert (tmp_path / weights).read_bytes() == (never_killed / weights).read_bytes()
