"""Runs that are killed, stopped or shared by processes end with the numbers of an unbroken run of one process."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import small_runs
from small_runs import CONDITIONAL, FEW, KINDS, Result, Task
from vardistill.training import checkpoints

SCRIPT = Path(small_runs.__file__)


def launch(folder: Path, tasks: list[Task], **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(small_runs.tasks_file(folder, tasks))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning"} | variables
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def lines(result: Result) -> list[dict[str, object]]:
    return [{key: v for key, v in line.items() if not key.endswith("seconds")} for line in result.history]


def assert_same(a: Result, b: Result) -> None:
    assert (a.outcome, a.step, a.skipped) == (b.outcome, b.step, b.skipped)
    assert lines(a) == lines(b)
    assert a.tensors.keys() == b.tensors.keys()
    for name, v in a.tensors.items():
        assert torch.equal(v, b.tensors[name]), name


@pytest.fixture(scope="module")
def unbroken_kinds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """An unbroken run of a kind, made once."""

    @cache
    def make(kind: str) -> Result:
        folder = tmp_path_factory.mktemp("unbroken")
        task = Task(str(folder / "result"), kind, out=str(folder / "run"))
        (folder / "run").mkdir()
        small_runs.run(task)
        return small_runs.result(task)

    return make


@pytest.fixture
def unbroken(unbroken_kinds: Callable[[str], Result]) -> Result:
    return unbroken_kinds("learned")


@pytest.mark.parametrize(
    ("event", "at", "kind"),
    [
        ("kill in step", 11, "learned"),
        ("kill after save", 2, "learned"),
        ("kill in save", 3, "learned"),
        ("kill in save", 5, "learned"),
        ("kill in log", 5, "learned"),
        ("kill in step", 11, "varflow"),
        ("kill after save", 2, "diff-instruct"),
        ("kill in save", 3, "sum"),
        ("kill in step", 11, "few-sum"),
    ],
)
def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(
    event: str, at: int, kind: str, unbroken_kinds: Callable[[str], Result], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    task = Task(str(tmp_path / "result"), kind, out=str(tmp_path / "run"), event=event, at=at)
    process = launch(tmp_path, [task])
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    left = dataclasses.replace(task, event=None, resume=True)
    small_runs.run(left)
    assert_same(small_runs.result(left), unbroken_kinds(kind))
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial-*"))


@pytest.mark.slow
def test_a_run_that_is_killed_at_fifteen_moments_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """Wherever that finds them: in steps, saves, lines and evaluations. All lives together are six tenths of a run."""
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    training = {"steps": 80, "checkpoint_every": 3}
    unbroken = Task(str(tmp_path / "expected"), "learned", out=str(tmp_path / "unbroken"), training=training)
    begun = time.monotonic()
    small_runs.run(unbroken)
    longest = (time.monotonic() - begun) / 12
    rng = random.Random(0)
    killed = Task(
        str(tmp_path / "result"), "learned", out=str(tmp_path / "killed"), training=training,
        lives=[rng.uniform(0, longest) for _ in range(15)],
    )  # fmt: skip
    process = launch(tmp_path, [killed])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same(small_runs.result(killed), small_runs.result(unbroken))


@pytest.mark.parametrize("kind", [*KINDS, *CONDITIONAL, *FEW])
def test_ctrl_c_keeps_the_step_reached_and_resumes_to_the_same_bits(
    kind: str, unbroken_kinds: Callable[[str], Result], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    task = Task(str(tmp_path / "result"), kind=kind, out=str(tmp_path / "run"), event="interrupt", at=7)
    before = signal.getsignal(signal.SIGINT)
    small_runs.run(task)
    stopped = small_runs.result(task)
    assert (stopped.outcome, stopped.step) == ("Interrupted", 7)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints.latest(tmp_path / "run" / "checkpoints").name == "step-00000007"
    left = dataclasses.replace(task, event=None, resume=True)
    small_runs.run(left)
    assert_same(small_runs.result(left), unbroken_kinds(kind))


@pytest.mark.parametrize(("event", "at"), [("kill after save", 1), ("kill in step", 3)])
def test_a_run_that_is_killed_in_or_after_its_head_start_resumes_to_the_same_bits(
    event: str, at: int, tmp_path: Path
) -> None:
    """The head start lasts for 8 of 20 steps: the first checkpoint is of step 4, the third loss of step 11."""
    training = {"head_start": 0.4}
    tasks = [
        Task(str(tmp_path / f"{name}.result"), "learned", out=str(tmp_path / name), training=training)
        for name in ("broken", "unbroken")
    ]
    for name in ("broken", "unbroken"):
        (tmp_path / name).mkdir()
    process = launch(tmp_path, [dataclasses.replace(tasks[0], event=event, at=at)])
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    small_runs.run(dataclasses.replace(tasks[0], resume=True))
    small_runs.run(tasks[1])
    assert_same(*map(small_runs.result, tasks))


def test_resuming_a_finished_run_changes_nothing(unbroken: Result, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    task = Task(str(tmp_path / "result"), kind="learned", out=str(tmp_path / "run"))
    small_runs.run(task)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    small_runs.run(dataclasses.replace(task, resume=True))
    assert_same(small_runs.result(task), unbroken)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def two_processes(tmp_path: Path, tasks: list[Task]) -> None:
    """Make the runs on two gloo processes that share each batch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [launch(tmp_path, tasks, RANK=str(i), LOCAL_RANK=str(i), **common) for i in range(2)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "own").mkdir()
    several = [Task(str(tmp_path / kind), kind) for kind in (*KINDS, *CONDITIONAL, *FEW)]
    several += [
        Task(str(tmp_path / f"{kind} accumulated"), kind, training={"accumulate": 2, "batch": 16})
        for kind in ("drawn", "pool", "varflow", "few-sum")
    ]
    several += [
        Task(str(tmp_path / "head start"), "diff-instruct", training={"head_start": 0.4, "accumulate": 2}),
        Task(str(tmp_path / "auto"), training={"device": "auto"}),
        Task(str(tmp_path / "measured"), training={"eval_every": 2}, bound=True),
        Task(str(tmp_path / "nan"), "learned", event="nan", at=5, rank=1),
        Task(str(tmp_path / "stopped"), "learned", str(tmp_path / "shared"), event="interrupt", at=7, rank=1),
        Task(str(tmp_path / "resumed"), "learned", str(tmp_path / "shared"), resume=True),
    ]
    two_processes(tmp_path, several)

    for task in several:
        one = dataclasses.replace(task, result=task.result + "-one", rank=0, out=None, resume=False)
        if task.event == "interrupt":
            one = dataclasses.replace(one, out=str(tmp_path / "own"), at=8)
        small_runs.run(one)
        expected, main, other = small_runs.result(one), small_runs.result(task, 0), small_runs.result(task, 1)
        assert (main.outcome, main.step, main.skipped) == (expected.outcome, expected.step, expected.skipped)
        assert (other.outcome, other.step, other.skipped) == (expected.outcome, expected.step, expected.skipped)
        for name, v in expected.tensors.items():
            torch.testing.assert_close(main.tensors[name], v, rtol=1e-10, atol=1e-10)
            assert torch.equal(other.tensors[name], main.tensors[name]), name
        for line, expected_line in zip(lines(main), lines(expected), strict=True):
            assert line.keys() == expected_line.keys()
            for key in (
                "loss",
                "bound",
                "mean",
                "half_energy_distance",
                "critic_loss",
                "posterior_loss",
                "varflow/loss",
            ):
                assert line.get(key, 0.0) == pytest.approx(expected_line.get(key, 0.0), rel=1e-9, nan_ok=True)


@pytest.mark.slow
def test_only_gradients_of_what_an_update_trains_are_reduced(tmp_path: Path) -> None:
    """Beside them one number, whether all are finite."""
    kinds = ("drawn", "learned", "diff-instruct", "labels-diff-instruct")
    several = [Task(str(tmp_path / kind), kind, counted=True, training={"eval_every": 0}) for kind in kinds]
    two_processes(tmp_path, several)
    flag = torch.zeros(()).nbytes
    for task in several:
        reduced = small_runs.result(task).reduced
        assert len(reduced) == {"drawn": 20, "learned": 40}.get(task.kind, 60)
        assert all(total == trained + flag for trained, total in reduced)
    sizes = {
        kind: {trained for trained, _ in small_runs.result(task).reduced}
        for kind, task in zip(kinds, several, strict=True)
    }
    assert all(len(sizes[kind]) == 2 for kind in kinds[1:])
