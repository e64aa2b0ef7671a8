"""Runs the cells of a bench, a few at a time, each in a process of its own.

A bench's folder holds, for every cell, the run's folder CELL, what the process said (CELL.log) and, where it failed,
why (CELL.failed). `bench.json` tells what was asked for, and `teachers/` holds what several cells learn from. A cell
is finished when its folder has an `evaluation.json` that can be read; every other one is begun, or gone on with, by
the next `run_bench`. Whichever way a bench ends, its processes keep a checkpoint and end with it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from vardistill.bench.cells import Bench, Budget, Cell, Direction, Settings, load
from vardistill.bench.results import Results, collect, failure_file, read_json
from vardistill.bench.work import THEN, log_file
from vardistill.errors import UsageError, unknown
from vardistill.files import locked, reason, write_whole
from vardistill.progress import bar, clock, columns, fitting, say
from vardistill.runs.config import Config, TeachConfig
from vardistill.training import config_files
from vardistill.training.folder import RunFolder

BOOKS = ("log_every", "eval_every", "milestones", "checkpoint_every", "keep_checkpoints", "tracker")
"""What a run keeps of its training: settings in which the cells of a folder may differ, unless the wall counts it."""

MISTAKE = 2
"""What a process ends with whose user made a mistake."""

PATIENCE = 30.0
"""Seconds in which the processes of a bench that was killed have to end."""


@dataclass(frozen=True)
class Task:
    """A process to run until `folder/evaluation.json` is there: `vardistill.bench.work` with these words."""

    folder: Path
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.folder.name


def run_bench(
    bench: Bench,
    folder: str | Path,
    seeds: int | None = None,
    budget: Budget | None = None,
    jobs: int = 1,
    threads: int = 1,
    only: str | Sequence[str] = (),
    data: str | None = None,
) -> Results:
    """Run the cells that are not finished and write the bench's results, see `page.write`.

    Args:
        bench: what to measure.
        folder: new, or of the same bench.
        seeds: of each row, to run; default the bench's. The results show all seeds that the folder was ever asked for.
        budget: of each cell; default the bench's.
        jobs: cells at a time.
        threads: of each cell.
        only: runs cells whose names contain this word, or one of these, alone; the results show all that are there.
        data: pictures instead of the bench's, as `vardistill teach` takes them.

    Raises:
        UsageError: for a folder that cannot be used, a cell in it that was made with another configuration, a bench
            that could not be shown, or a teacher that cannot be fitted, its data not being there for example.
        KeyboardInterrupt: after Ctrl-C, once the cells that ran have kept a checkpoint.
    """
    asked = bench.seeds if seeds is None else seeds
    settings = Settings(bench.name, asked, budget or bench.budget, jobs, threads, data)
    chosen = select(bench.plan(asked, settings.budget, data), (only,) if isinstance(only, str) else only)
    check_bench(bench)
    folder = Path(folder)
    with occupied(folder) as lock:
        with contextlib.suppress(UsageError):  # a bench.json that cannot be read is written anew
            before = read_settings(folder)
            settings = replace(settings, seeds=max(settings.seeds, before.seeds))
            if all(is_finished(folder / cell.name) for cell in chosen):  # then these are what the cells ran with
                settings = replace(settings, jobs=before.jobs, threads=before.threads)
        cells = bench.plan(settings.seeds, settings.budget, data)
        check_folder(bench, cells, folder)
        write_whole(folder / "bench.json", json.dumps(asdict(settings), indent=2))
        say(f"{bench.name}: {len(chosen)} runs of {settings.budget.about}, {jobs} at a time, in {folder}")
        run_cells(
            chosen, folder, jobs, threads, bench.measure, lock, bench.one_teacher, bench.metrics, bench.one_process
        )
        return _collect_and_write(bench, cells, settings, folder)


def report(bench: Bench, folder: Path) -> Results:
    """Write the results of what the bench's folder holds anew, and run nothing.

    Raises:
        UsageError: where the folder is not this bench's.
    """
    settings = read_settings(folder)
    cells = bench.plan(settings.seeds, settings.budget, settings.data)
    check_folder(bench, cells, folder)
    return _collect_and_write(bench, cells, settings, folder)


def _collect_and_write(bench: Bench, cells: Sequence[Cell], settings: Settings, folder: Path) -> Results:
    """The results, written by one process at a time: files and figures of one moment, the latest."""
    from vardistill.bench.page import write  # imports torch, as reading the results does

    with occupied(folder, ".results.lock"):
        results = collect(folder, bench, cells, settings)
        write(results, folder)
    return results


def read_settings(folder: Path) -> Settings:
    """What the bench in this folder was asked for; raises UsageError where there is none."""
    data = read_json(folder / "bench.json") or {}
    try:
        return Settings(**{**data, "budget": Budget(**data["budget"])})
    except (TypeError, KeyError) as error:
        raise UsageError(f"{folder} is not a bench's folder: it has no bench.json that can be read") from error


def select(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells whose names contain one of the words, all without words; raises UsageError for a word of none."""
    for word in only:
        if not any(word in cell.name for cell in cells):
            raise UsageError(f"no cell's name contains '{word}'; they are {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if not only or any(word in cell.name for word in only)]


@contextlib.contextmanager
def occupied(folder: Path, name: str = ".lock") -> Iterator[int]:
    """Make the folder and hold a lock in it; yields the lock's file descriptor, for the cells' processes to share."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write the bench's folder {folder}: {reason(error)}") from error
    busy = f"another bench is at work in {folder}: wait, or choose another folder"
    with locked(folder / name, busy, PATIENCE) as lock:
        yield lock


def check_bench(bench: Bench) -> None:
    """Raise UsageError for functions that are not there, and directions that are none."""
    for reference in (bench.measure, bench.figures):
        if reference is not None:
            load(reference)
    for metric, direction in bench.better.items():
        if direction not in get_args(Direction):
            raise unknown(f"direction of {metric}", direction, get_args(Direction))


def check_folder(bench: Bench, cells: Iterable[Cell], folder: Path) -> None:
    """Raise UsageError where the folder holds another bench, or a cell of another configuration."""
    if RunFolder(folder).config.exists():
        raise UsageError(f"{folder} is a run: choose another --out for a bench")
    there = (read_json(folder / "bench.json") or {}).get("bench", bench.name)
    if there != bench.name:
        raise UsageError(f"{folder} holds the bench {there}: choose another --out for {bench.name}")
    for cell in cells:
        path = RunFolder(folder / cell.name).config
        if path.exists():
            _check_same(config_files.read(Config, path), cell.config, path.parent)


def _check_same(there: Any, wanted: Any, path: Path) -> None:
    """Raise UsageError for the first setting that differs; `BOOKS` and where a shared teacher lies do not count."""
    if isinstance(wanted, Config) and wanted.domain.learns_from(wanted.training) is not None:
        there = replace(there, domain=there.domain.with_teacher(None))
    old, new = (dict(_settings(config_files.to_dict(config))) for config in (there, wanted))
    counted = new.get("training.max_minutes") is not None and new.get("training.clock") == "wall"
    for name in () if counted else BOOKS:
        for settings in (old, new):
            settings.pop(f"training.{name}", None)
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            raise UsageError(
                f"{path} was made with {name} = {old.get(name)}, but now it is {new.get(name)}: choose another --out, "
                "or remove that folder to measure it anew"
            )


def _settings(data: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The single values of a configuration, by their names: objective.parts[1].weight."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _settings(value, f"{name}.{key}" if name else key)
    elif isinstance(data, tuple) and any(isinstance(v, Mapping) for v in data):
        for i, value in enumerate(data):
            yield from _settings(value, f"{name}[{i}]")
    else:
        yield name, data


def run_cells(
    cells: Iterable[Cell],
    folder: Path,
    jobs: int,
    threads: int,
    measure: str | None = None,
    lock: int | None = None,
    one_teacher: bool = False,
    metrics: Sequence[str] = (),
    one_process: bool = False,
) -> None:
    """Run the cells that are not finished, after the teachers that several of them learn from.

    Args:
        cells: with their budgets.
        folder: where each has, or gets, a folder of its name.
        jobs: cells at a time.
        threads: of each.
        measure: what cells do instead of being trained, see `Bench`.
        lock: a file descriptor that the processes inherit.
        one_teacher: whether all seeds learn from the first seed's teacher.
        metrics: to tell of each cell as it ends.
        one_process: whether a job's cells share a process, see `Bench`.

    Raises:
        UsageError: for a teacher that cannot be fitted as it is asked for.
    """
    waiting = [cell for cell in cells if not is_finished(folder / cell.name)]
    shared = {cell.name: fit for cell in waiting if (fit := shared_teacher(cell.config, one_teacher)) is not None}
    fits = {fit.label: fit for fit in shared.values()}
    _run_tasks([_teach(fit, folder) for fit in fits.values()], jobs, threads, lock)
    tasks = []
    for cell in waiting:
        path, config = folder / cell.name, cell.config
        if cell.name in shared:
            teacher = folder / "teachers" / shared[cell.name].label
            if not is_finished(teacher):
                failure = read_json(failure_file(teacher)) or {}
                if failure.get("exit") == MISTAKE:
                    reason = str(failure.get("reason")).removeprefix("vardistill: ")
                    raise UsageError(f"the bench's teacher {teacher.name} cannot be fitted: {reason}")
                _record_failure(path, failure, f"its teacher {teacher.name} failed: ")
                continue
            config = replace(config, domain=config.domain.with_teacher(teacher))
        tasks.append(_task(path, config, measure))
    _run_tasks(tasks, jobs, threads, lock, metrics, one_process)


def _task(path: Path, config: Config, measure: str | None) -> Task:
    """The cell's task; its folder has its configuration before it runs."""
    path.mkdir(exist_ok=True)
    config_files.write(config, RunFolder(path).config)
    return Task(path, ("train", str(path)) if measure is None else ("measure", str(path), measure))


def _teach(fit: TeachConfig, folder: Path) -> Task:
    """The task of fitting a shared teacher, whose unfinished folder is removed."""
    path = folder / "teachers" / fit.label
    path.parent.mkdir(exist_ok=True)
    if is_finished(path):
        _check_same(config_files.read(type(fit), path / "config.yaml"), fit, path)
    else:
        shutil.rmtree(path, ignore_errors=True)
    source = path.with_name(f"{path.name}.yaml")
    config_files.write(fit, source)
    return Task(path, ("teach", str(path), str(source)))


def shared_teacher(config: Config, one_teacher: bool = False) -> TeachConfig | None:
    """The fit of the teacher that the configuration wants and has no run of; None for any other."""
    training = replace(config.training, seed=0) if one_teacher else config.training
    return config.domain.learns_from(training)


def is_finished(path: Path) -> bool:
    """Whether the run in this folder is."""
    return read_json(path / "evaluation.json") is not None


def command(task: Task) -> list[str]:
    """The command line of a task's process."""
    return [sys.executable, "-m", "vardistill.bench.work", *task.words]


def chain(tasks: Iterable[Task]) -> Task:
    """One task that does these, one after another, and ends with the first that fails."""
    first, *others = tasks
    return replace(first, words=(*first.words, *(word for task in others for word in (THEN, *task.words))))


@dataclass
class _Process:
    """Tasks one after another, the first of which is under way, and since when."""

    tasks: deque[Task]
    popen: subprocess.Popen[bytes]
    started: float

    @property
    def task(self) -> Task:
        """The one that is under way."""
        return self.tasks[0]

    def go_on(self) -> None:
        """To the next task, the first being finished."""
        self.tasks.popleft()
        self.started = time.monotonic()


def _run_tasks(
    tasks: Iterable[Task],
    jobs: int,
    threads: int,
    lock: int | None,
    metrics: Sequence[str] = (),
    one_process: bool = False,
) -> None:
    """Run the unfinished tasks, a few at a time; Ctrl-C stops them with a checkpoint each."""
    waiting = deque(task for task in tasks if not is_finished(task.folder))
    running: list[_Process] = []
    if not waiting:
        return
    progress = Progress(waiting, jobs, metrics)
    share = math.ceil(len(waiting) / jobs) if one_process else 1
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                own = [waiting.popleft() for _ in range(min(share, len(waiting)))]
                running.append(_start(own, threads, lock))
            time.sleep(0.05)
            for process in list(running):
                ended = process.popen.poll() is not None  # asked first: what it finished is then all there
                while len(process.tasks) > 1 and is_finished(process.task.folder):
                    progress.ended(process, None, running)
                    process.go_on()
                if ended:
                    running.remove(process)
                    progress.ended(process, _end(process), running)
                    waiting.extend(list(process.tasks)[1:])
            progress.show(running)
    except KeyboardInterrupt:
        for process in running:
            process.popen.send_signal(signal.SIGINT)
        for process in running:
            process.popen.wait()
        raise
    finally:
        if progress.bar is not None:
            progress.bar.close()


def _start(tasks: Sequence[Task], threads: int, lock: int | None) -> _Process:
    """Begin the tasks in a session of its own, which the terminal's Ctrl-C does not reach."""
    for task in tasks:
        failure_file(task.folder).unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"PYTHONIOENCODING": "utf-8"}
    with log_file(tasks[0].folder).open("ab") as log:
        popen = subprocess.Popen(
            command(chain(tasks)), env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=() if lock is None or os.name == "nt" else (lock,),
        )  # fmt: skip
    return _Process(deque(tasks), popen, time.monotonic())


def _end(process: _Process) -> str | None:
    """Keep the reason of a failure and return it, None for a task that is finished."""
    assert process.popen.stdin is not None
    process.popen.stdin.close()
    code, path = process.popen.returncode, process.task.folder
    if code == 0 and is_finished(path):
        return None
    return _record_failure(path, {"exit": code, "reason": last_line(log_file(path))})


def _record_failure(path: Path, failure: Mapping[str, Any], before: str = "") -> str:
    record = {"exit": failure.get("exit"), "reason": before + str(failure.get("reason", ""))}
    write_whole(failure_file(path), json.dumps(record))
    return f"failed with exit code {record['exit']}: {record['reason']}"


def last_line(log: Path) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")


def last_evaluation(run: RunFolder) -> dict[str, Any]:
    """Of a run's metrics, {} without one."""
    with contextlib.suppress(UsageError):  # results tell of what cannot be read
        return next((line for line in reversed(run.history()) if line.get("kind") == "eval"), {})
    return {}


class Progress:
    """A running table, a line for every task that ended; on a terminal, below it what runs and for how long.

    Args:
        tasks: to come.
        jobs: of these at a time.
        metrics: columns, as many of the first ones as a terminal has a place for.
    """

    def __init__(self, tasks: Sequence[Task], jobs: int, metrics: Sequence[str]) -> None:
        terminal, self.tasks, self.jobs = sys.stderr.isatty(), len(tasks), jobs
        self.width, self.spent, self.done, self.shown = max(len(t.name) for t in tasks), 0.0, 0, 0.0
        place = columns() - self.width - len("  seconds     left") if terminal else 10**6
        self.metrics = [name for i, name in enumerate(metrics) if sum(map(len, metrics[: i + 1])) + 2 * i + 2 <= place]
        self.bar = bar(total=self.tasks, unit="runs") if terminal else None
        self._say("run", ["seconds", *self.metrics, "left"])

    def show(self, running: Sequence[_Process]) -> None:
        """Name what runs, with its seconds: every second."""
        now = time.monotonic()
        if self.bar is not None and now > self.shown + 1:
            self.shown = now
            names = (f"{process.task.name} {now - process.started:.0f} s" for process in running)
            self.bar.set_postfix_str(fitting([f"{self.left(running)} left", *names]))

    def left(self, running: Sequence[_Process]) -> str:
        """The time to the end, at the pace of those that ended."""
        if not self.done:
            return clock(math.inf)
        begun = sum(time.monotonic() - process.started for process in running)
        return clock(max(0.0, self.spent / self.done * (self.tasks - self.done) - begun) / self.jobs)

    def ended(self, process: _Process, failure: str | None, running: Sequence[_Process]) -> None:
        """One less to go, which failed or has its metrics now."""
        seconds = time.monotonic() - process.started
        self.done, self.spent = self.done + 1, self.spent + seconds
        if self.bar is not None:
            self.bar.update()
        if failure is not None:
            say(f"{process.task.name.ljust(self.width)}  {failure}")
            return
        run = RunFolder(process.task.folder)
        values = last_evaluation(run) | (read_json(run.path / "evaluation.json") or {})
        texts = (f"{v:.4g}" if isinstance(v := values.get(name), int | float) else "–" for name in self.metrics)
        self._say(process.task.name, [f"{seconds:.0f}", *texts, self.left(running)])

    def _say(self, name: str, entries: Sequence[str]) -> None:
        widths = [7, *(len(name) for name in self.metrics), 7]
        cells = (text.rjust(width) for text, width in zip(entries, widths, strict=True))
        say("  ".join([name.ljust(self.width), *cells]))
