"""A bench of a small real run whose processes are killed: `killed_bench.py bench FOLDER`, and its subprocess.

The environment variable KILL says where, at a place in the subprocess that `kill_at` knows, and what: that
subprocess's group (`run`), the bench that started it (`bench`), or both.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vardistill.bench import Bench, Budget, Cell, grid, run_bench, running, work
from vardistill.bench.named import SMOKE
from vardistill.domains.points import config as scales
from vardistill.domains.points.config import PointsTeachConfig, TeacherConfig

TEACHERS = {"fitted": {"teacher": TeacherConfig(teacher="learned", teacher_samples=64)}}


def cells(seeds: int) -> list[Cell]:
    config = SMOKE["diagonal"]
    training = replace(config.training, batch=32, eval_samples=100, device="cpu")
    return grid({"diagonal": replace(config, training=training)}, TEACHERS, seeds=seeds)


BENCH = Bench("killed", "a small run", cells, ("log_mmd",), seeds=1, budget=Budget("steps", 20))
"""With a checkpoint after every second and every fifth step."""


def fit(problem: str) -> PointsTeachConfig:
    """Instead of `teacher_fit`: five small steps."""
    return PointsTeachConfig(steps=5, batch=16, width=8, depth=1)


def command(task: running.Task) -> Sequence[str]:
    return [sys.executable, __file__, *task.words]


stopped = threading.Event()
"""Set when the bench is gone, and this subprocess has been told to stop."""


def stop_with_parent(told: Any = work.stop_with_parent) -> None:
    told()
    stopped.set()


def kill(*ignored: Any, **options: Any) -> None:
    victims = os.environ["KILL"].split()[1]
    if victims in ("bench", "both"):
        os.kill(os.getppid(), signal.SIGKILL)
    if victims in ("run", "both"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    assert stopped.wait(60)


def cut_and_kill(tensors: Any, path: Path, *ignored: Any, **options: Any) -> None:
    os.truncate(path, path.stat().st_size // 2)
    kill()


def kill_at(place: str) -> None:
    """In the third step of a shared teacher's fit, the second save, the eighth step, or when training is done."""
    from small_runs import after, before
    from vardistill.domains.points import teach
    from vardistill.runs import experiment
    from vardistill.training import checkpoints
    from vardistill.training.loop import Trainer

    if place == "fit":
        teach.dsm_loss = before(3, kill, teach.dsm_loss)
    elif place == "save":
        checkpoints.save_file = after(2, cut_and_kill, checkpoints.save_file)
    elif place == "step":
        Trainer.advance = before(8, kill, Trainer.advance)
    elif place == "evaluation":
        experiment.keep_evaluation = before(1, kill, experiment.keep_evaluation)


def leave_out_the_report() -> None:
    from vardistill.runs import experiment

    experiment.write_report = lambda *ignored, **options: None


if __name__ == "__main__":
    if sys.argv[1] == "bench":
        running.command, scales.teacher_fit = command, fit
        run_bench(BENCH, Path(sys.argv[2]))
    else:
        work.stop_with_parent = stop_with_parent
        leave_out_the_report()
        if "KILL" in os.environ:
            kill_at(os.environ["KILL"].split()[0])
        sys.exit(work.main(sys.argv[1:]))
