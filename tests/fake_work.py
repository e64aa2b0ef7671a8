"""A bench's subprocess that trains nothing, `fake_work.py train|teach ...`, and a bench: `fake_work.py bench FOLDER`.

The environment variable FAKE says which cells fail or wait until they are interrupted: {"CELL": "fail" | "wait"}.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vardistill.bench import Bench, Budget, Cell, Results, grid, run_bench, running, work
from vardistill.domains.points.config import TeacherConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.runs.config import Config
from vardistill.training.config_files import read
from vardistill.training.folder import RunFolder

OBJECTIVES = {
    "good": Config(),
    "bad, <b>": Config(objective=VarDiUConfig(posterior="full")),
    "worse": Config(objective=VarDiUConfig(posterior="nsf")),
}
LOSS = {"prior": 1.0, "full": 2.0, "nsf": 3.0}
METRICS = ("log_mmd", "modes_found", "log_density_gap", "mmd_p_value")


def cells(seeds: int) -> list[Cell]:
    return grid(OBJECTIVES, seeds=seeds)


def taught_cells(seeds: int) -> list[Cell]:
    fitted = TeacherConfig(teacher="learned", teacher_samples=64)
    teachers = {"exact": {"teacher": TeacherConfig()}, "fitted": {"teacher": fitted}}
    two = {"good": Config(), "worse": Config(objective=VarDiUConfig(posterior="nsf"))}
    return grid(two, teachers=teachers, seeds=seeds)


BENCH = Bench("fake", "runs that & train nothing", cells, METRICS, curves=("log_mmd",), budget=Budget("steps", 30))
TAUGHT = Bench("taught", "with teachers", taught_cells, METRICS, budget=Budget("steps", 30))


def train(folder: Path) -> int:
    """Ten lines, then values of the objective and the seed; whatever a checkpoint has is not done again."""
    run, config = RunFolder(folder), read(Config, RunFolder(folder).config)
    assert config.training.steps == 30
    assert config.training.tracker == "none"
    if config.domain.teacher.teacher == "learned":
        assert (config.domain.teacher.teacher_run / "evaluation.json").is_file()
    run.environment.write_text(json.dumps({"processor": "abacus", "threads": os.environ["OMP_NUM_THREADS"]}))
    befalls = json.loads(os.environ.get("FAKE", "{}")).get(folder.name)
    if befalls == "fail":
        print("vardistill: too many\nvardistill: updates had <gradients> that are not finite\n", file=sys.stderr)
        return 1
    value = LOSS[config.objective.posterior] + 0.01 * config.training.seed
    try:
        for step in range(len(run.history()), 10):
            if befalls == "wait" and step == 5:
                (folder / "waiting").touch()
                time.sleep(100)
            costs = {"cpu_seconds": time.process_time(), "network_evaluations": 64.0 * step}
            run.log("eval", step, time.monotonic(), {"log_mmd": value + 1 / (step + 1), "gap": value, **costs})
    except KeyboardInterrupt:
        (folder / "interrupted").touch()
        return 130
    values = {"log_mmd": value, "modes_found": 40, "log_density_gap": -value, "mmd_p_value": 0.5}
    (folder / "evaluation.json").write_text(json.dumps(values))
    return 0


def teach(folder: Path, source: str) -> int:
    if "fail" in os.environ.get("FAKE", "") and folder.name.endswith("seed1"):
        print("RuntimeError: no such luck")
        return 1
    folder.mkdir()
    shutil.copy(source, folder / "config.yaml")
    (folder / "evaluation.json").write_text("{}")
    print("fitted")
    return 0


def measure(config: Config, run: RunFolder) -> dict[str, float]:
    """Instead of training: what the configuration's seed is, with a curve."""
    for step in (1, 2):
        run.log("eval", step, float(step), {"snr": config.training.seed + step})
    return {"snr": config.training.seed + 3.0, "undefined": float("nan")}


def figures(results: Results) -> dict[str, Any]:
    """A picture of what was measured."""
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([result.values["snr"] for result in results.finished])
    return {"Signal to noise": figure}


def fails(results: Results) -> dict[str, Any]:
    """Figures that cannot be drawn."""
    return {"nothing": 1 / 0}


def die_between_cells() -> None:
    """Have this bench killed when its second cell has ended, and before the third begins."""
    end, ended = running._end, itertools.count(1)

    def end_and_die(process: running._Process) -> str:
        how = end(process)
        if next(ended) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return how

    running._end = end_and_die


def command(task: running.Task) -> Sequence[str]:
    return [sys.executable, __file__, *task.words]


if __name__ == "__main__":
    if sys.argv[1] == "bench":
        running.command = command
        if "--foreground" in sys.argv:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if "--die-between-cells" in sys.argv:
            die_between_cells()
        run_bench(BENCH, Path(sys.argv[2]), jobs=1 if "--die-between-cells" in sys.argv else 2, seeds=2)
    else:
        work.ACTIONS |= {"train": train, "teach": teach}
        sys.exit(work.main(sys.argv[1:]))
