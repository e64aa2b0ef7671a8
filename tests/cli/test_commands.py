"""The commands as a user types them: the way from training to the report, and every mistake in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vardistill import __version__
from vardistill.cli import main as cli
from vardistill.cli.train import run_folder
from vardistill.domains.points.config import PointsTeachConfig, teacher_fit
from vardistill.errors import UsageError
from vardistill.objectives.registry import OBJECTIVES
from vardistill.runs import experiment
from vardistill.runs.config import Config
from vardistill.runs.presets import PICTURES, POINTS, TEACHERS
from vardistill.training import checks
from vardistill.training.config_files import read
from vardistill.training.folder import RunFolder

QUICK = ["--steps", "20", "--batch", "64", "--width", "16", "--eval-samples", "500", "--tracker", "none"]

HUGE = "99999999999999999999"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    path = tmp_path_factory.mktemp("cli") / "run"
    assert cli.run(["train", "mog40-vardiu", *QUICK, "--out", str(path)]) == 0
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a mistake gets, after what was said of the run; with exit code 2 and nothing on stdout."""
    assert cli.run(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *said, line = captured.err.strip().splitlines()
    assert not any("vardistill:" in word for word in said)
    assert "Traceback" not in captured.err
    return line


def test_a_run_leaves_everything_that_its_reader_looks_at(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "generator",
        "environment.json",
        "evaluation.json",
        "bound.json",
        "samples.npz",
        "samples.png",
        "report.html",
    } <= names
    assert np.load(finished / "samples.npz")["samples"].shape == (500, 2)


def test_a_run_tells_what_it_does_and_ends_with_its_verdict(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "mog40-vardiu", *QUICK, "--out", str(finished.with_name("told"))]) == 0
    captured = capfd.readouterr()
    first, *lines = captured.err.splitlines()
    assert first == "distils  mog40 (teacher: true) into 1 network evaluation a sample"
    assert lines[:3] == ["by       VarDiU, seed 0", "for      20 steps", f"in       {finished.with_name('told')}"]
    assert [line.split(":")[0] for line in lines if line.endswith(" s")] == [
        "setting up",
        "measuring the result",
        "writing samples and the report",
    ]
    assert "100% 20/20 steps" in captured.err
    assert "verdict:   Far from the target. It finds" in captured.out


@pytest.mark.parametrize(
    ("typed", "found", "told"),
    [
        ("/there/bin/vardistill", "/there/bin/vardistill", "vardistill"),
        (".venv/bin/vardistill", None, ".venv/bin/vardistill"),
        (".venv/bin/vardistill", "/there/bin/vardistill", ".venv/bin/vardistill"),
        ("/a/vardistill/__main__.py", None, "PYTHON -m vardistill"),
        ("/usr/bin/pytest", None, "vardistill"),
    ],
)
def test_hints_name_the_executable_in_use(
    typed: str, found: str | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [typed])
    monkeypatch.setattr(sys, "executable", "PYTHON")
    monkeypatch.setattr(shutil, "which", lambda name: found)
    assert f"`{told} train --help` lists them" in refused(capsys, "train", "--seed", "1")
    assert refused(capsys, "report").endswith(f": {told} report RUN")


@pytest.mark.parametrize(
    "words", ["--help", "train --help", "teach --help", "bench --help", "bench smoke --help", "list"]
)
def test_help_fits_into_eighty_columns(words: str) -> None:
    environment = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    told = subprocess.run(
        [sys.executable, "-m", "vardistill", *words.split()],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    )
    assert max(map(len, told.stdout.splitlines())) <= 80


def test_evaluate_prints_one_json_object_with_the_promised_keys(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["evaluate", str(finished), "--json", "--num", "300"]) == 0
    table = json.loads(capfd.readouterr().out)
    assert {"log_density", "log_density_gap", "log_mmd", "modes_found", "mode_tv", "off_mode"} <= table.keys()
    assert table["samples"] == 300


def test_evaluate_prints_a_table(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", str(finished), "--num", "300"]) == 0
    assert "log_mmd" in capfd.readouterr().out


def test_samples_are_those_of_the_seed(finished: Path, tmp_path: Path) -> None:
    for name, seed in (("a.npz", 0), ("b.npz", 0), ("c.npz", 1)):
        words = ["sample", str(finished), "--num", "50", "--seed", str(seed), "--out", str(tmp_path / name)]
        assert cli.run(words) == 0
    a, b, c = (np.load(tmp_path / f"{name}.npz")["samples"] for name in "abc")
    assert a.shape == (50, 2)
    assert (a == b).all()
    assert (a != c).any()


def test_samples_as_a_picture(finished: Path, tmp_path: Path) -> None:
    assert cli.run(["sample", str(finished), "--num", "50", "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_written_anew(finished: Path) -> None:
    (finished / "report.html").unlink()
    assert cli.run(["report", str(finished)]) == 0
    assert (finished / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_configuration_file_repeats_its_run(finished: Path, tmp_path: Path) -> None:
    assert cli.run(["train", "--config", str(finished / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    ours, theirs = (np.load(path / "samples.npz")["samples"] for path in (finished, tmp_path / "again"))
    assert (ours == theirs).all()


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = np.load(finished / "samples.npz")["samples"]
    assert cli.run(["train", "--resume", str(finished)]) == 0
    assert (np.load(finished / "samples.npz")["samples"] == before).all()


def test_a_finished_run_is_trained_for_longer(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert cli.run(["train", "--resume", str(run), "--steps", "12"]) == 2
    assert capsys.readouterr().err.endswith("20 steps already: give more, not 12\n")
    assert cli.run(["train", "--resume", str(run), "--steps", "24"]) == 0
    assert "another course of the learning rate and the noise levels" in capsys.readouterr().err
    assert read(Config, run / "config.yaml").training.steps == 24
    assert max(line["step"] for line in RunFolder(run).history()) == 24
    assert "unknown flag" in refused(capsys, "train", "--resume", str(run), "--lr", "1")


def test_a_run_killed_before_its_first_checkpoint_starts_anew(finished: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "killed")
    run.path.mkdir()
    run.config.write_bytes((finished / "config.yaml").read_bytes())
    run.log("train", 10, 0.1, {"loss": 1.0})
    assert cli.run(["train", "--resume", str(run.path)]) == 0
    ours, theirs = (np.load(path / "samples.npz")["samples"] for path in (finished, run.path))
    assert (ours == theirs).all()


def test_a_teacher_of_another_schedule_is_rescheduled(tmp_path: Path) -> None:
    fitted = tmp_path / "teacher"
    quick_fit = ["--steps", "5", "--samples", "200", "--width", "16", "--batch", "32", "--schedule", "vp"]
    assert cli.run(["teach", "mog40", *quick_fit, "--out", str(fitted)]) == 0
    words = ["--teacher", "learned", "--teacher-run", str(fitted), "--out", str(tmp_path / "run")]
    assert cli.run(["train", "mog40-vardiu", *QUICK, *words]) == 0


@pytest.mark.parametrize(("problem", "error"), [("mog40", "relative score error"), ("digits-points", "held out error")])
def test_a_teacher_of_points_ends_with_a_table_and_is_resumed_to_itself(
    problem: str, error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "teacher"
    assert cli.run(["teach", problem, "--steps", "3", "--samples", "50", "--batch", "8", "--out", str(out)]) == 0
    weights = (out / "denoiser.safetensors").read_bytes()
    assert cli.run(["teach", "--resume", str(out)]) == 0
    assert (out / "denoiser.safetensors").read_bytes() == weights
    assert capfd.readouterr().out.count(error) == 2


def test_a_teacher_has_the_levels_of_its_problem(tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    words = ["--problem", "moons", "--steps", "3", "--samples", "50", "--batch", "8", "--out", str(out)]
    assert cli.run(["teach", "mog40", *words]) == 0
    config = read(PointsTeachConfig, out / "config.yaml")
    assert (config.problem, config.distribution) == ("moons", teacher_fit("moons").distribution)


def test_a_teacher_of_points_that_diverges_ends_with_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--lr", "1e20", "--steps", "60", "--samples", "50", "--batch", "8", "--out", str(tmp_path / "teacher")]
    assert cli.run(["teach", "mog40", *words]) == 1
    captured = capfd.readouterr()
    assert captured.err.splitlines()[-1] == "vardistill: the teacher is not finite after step 60: try a smaller lr"
    assert captured.out == ""
    assert not (tmp_path / "teacher" / "evaluation.json").exists()


@pytest.mark.parametrize("teacher", ["empirical", "learned"])
def test_other_teachers(teacher: str, tmp_path: Path) -> None:
    fitted = tmp_path / "teacher"
    quick_fit = ["--steps", "20", "--samples", "200", "--width", "16", "--batch", "32"]
    assert cli.run(["teach", "mog40", *quick_fit, "--out", str(fitted)]) == 0
    assert json.loads((fitted / "evaluation.json").read_text())["relative_score_error"]
    words = ["--teacher", teacher, "--teacher-samples", "200"]
    words += ["--teacher-run", str(fitted)] if teacher == "learned" else []
    assert cli.run(["train", "mog40-vardiu", *QUICK, *words, "--out", str(tmp_path / "run")]) == 0


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of a second."""
    folder = tmp_path_factory.mktemp("fitted") / "teacher"
    quick_fit = ["--steps", "20", "--samples", "200", "--width", "16", "--batch", "32"]
    assert cli.run(["teach", "mog40", *quick_fit, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("preset", [f"mog40-{name}" for name in POINTS if name != "vardiu"])
def test_every_preset_trains(preset: str, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for drawn in ("write_report", "save_samples"):  # which takes longer than the run, and is the same for all
        monkeypatch.setattr(f"vardistill.runs.experiment.{drawn}", lambda *_: None)
    words = ["--steps", "2", "--eval-samples", "300", "--width", "16", "--batch", "32"]
    config = POINTS[preset.removeprefix("mog40-")].config
    words += ["--teacher-run", str(fitted)] if config.domain.teacher.teacher == "learned" else []
    for width in ("posterior_width", "critic_width"):
        if hasattr(config.objective, width):
            words += [f"--{width.replace('_', '-')}", "16"]
    assert cli.run(["train", preset, *words, "--tracker", "none", "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["list"], ["train", "--help"], ["teach", "--help"]])
def test_help_and_lists_answer(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) == 0
    assert capsys.readouterr().out


def test_a_presets_help_lists_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "mog40-vardiu", "--help"]) == 0
    assert "--max-minutes" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["list"], ["train", "mog40-vardiu", "--help"], ["export", "--help"]])
def test_help_does_not_import_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom vardistill.cli.main import run\n"
        f"try:\n    run({words!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_list_names_every_preset_and_bench(capsys: pytest.CaptureFixture[str]) -> None:
    from vardistill.bench.named import BENCHES

    cli.run(["list"])
    out = capsys.readouterr().out
    names = (*POINTS, *PICTURES, *TEACHERS, *BENCHES, *OBJECTIVES)
    assert all(name in out for name in (*names, "nsf", "learned", "cosine", "PowerLaw", "mode-loss"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "unknown command 'trian': did you mean train?"),
        (["train", "mog40-vardi"], "did you mean mog40-vardiu"),
        (["train", "--steps", "3"], "train needs a preset"),
        (["train", "mog40-vardiu", "--stepz", "3"], "unknown flag 'stepz': did you mean steps?"),
        (["train", "mog40-vardiu", "--wibble", "3"], "unknown flag '--wibble'"),
        (["train", "mog40-vardiu", "--steps", "many"], "--steps"),
        (["train", "mog40-vardiu", "--steps"], "--steps"),
        (["train", "mog40-vardiu", "--steps", "0"], "steps must be positive, but is 0"),
        (["train", "mog40-vardiu", "--lr", "-1"], "lr must be positive, but is -1.0"),
        (["train", "mog40-vardiu", "--max-minutes", "0"], "max_minutes must be positive"),
        (["train", "mog40-vardiu", "--teacher", "perfect"], "'perfect'"),
        (["train", "mog40-vardiu", "--sigma-min", "5", "--sigma-max", "2"], "sigma_min must be positive and below"),
        (["train", "mog40-vardiu", "--draws", "3", "--antithetic"], "antithetic pairs need an even number"),
        (["train", "mog40-vardiu", "--batch", "1"], "VarDiU needs a batch of at least 2"),
        (["train", "mog40-vardiu", "--posterior", "full"], "come from the prior"),
        (["train", "mog40-vardiu-gaussian", "--posterior", "mixture", "--candidates", "4"], "reparameterised"),
        (["train", "mog40-vardiu", "--device", "cuda:9"], "there is no device 'cuda:9' here"),
        (["train", "mog40-vardiu", "--device", "meta"], "there is no device 'meta' here"),
        (["train", "mog40-vardiu", "--seed", HUGE], f"seed must be a whole number of 64 bits, but is {HUGE}"),
        (["train", "mog40-vardiu", "--width", "10000000"], "there is not enough memory, take a smaller batch"),
        (["train", "mog40-vardiu", "--bandwidth", "3"], "teacher must be 'empirical' with a bandwidth, but is true"),
        (["train", "mog40-vardiu", "--tracker", "nosuchtracker"], "tracker"),
        (["train", "mog40-vardiu", "--teacher-samples", "0", "--teacher", "empirical"], "teacher_samples"),
        (["train", "mog40-vardiu", "--teacher-run", "somewhere"], "'learned' with a teacher_run"),
        (["train", "mog40-vardiu", "--eval-samples", "1"], "eval_samples must be at least 2"),
        (["train", "mog40-vardiu", "--depth", "0"], "depth must be at least 1"),
        (["train", "mog40-vardiu", "--steps", "1e3"], "vardistill: --steps must be a whole number, but is '1e3'"),
        (["train", "mog40-vardiu", "--lr", "fast"], "vardistill: --lr must be a number, but is 'fast'"),
        (["bench", "smoke", "--steps", "nan"], "vardistill: --steps must be a whole number, but is 'nan'"),
        (["train", "mog40-vardiu", "--max-minutes", "soon"], "--max-minutes must be a number, but is 'soon'"),
        (["train", "mog40-vardiu", "--weight-decay", "inf"], "weight_decay must be finite, but is inf"),
        (["train", "mog40-vardiu", "--networks", "student(weight_decay=inf)"], "student's weight_decay must be finite"),
        (["train", "mog40-vardiu", "--objective", "VARFLOW"], "unknown objective 'VARFLOW': did you mean varflow?"),
        (["train", "mog40-vardiu", "extra"], "extra"),
        (["train", "mog40-vardiu", "--steps-per-sample", "0"], "steps_per_sample must be from 1 to 64, but is 0"),
        (["train", "mog40-vardiu", "--objective"], "--objective needs a value"),
        (["train", "mog40-vardiu", "--objective", "varflw"], "unknown objective 'varflw': did you mean varflow"),
        (
            ["train", "mog40-vardiu", "--objective", "varflow(betta=1)"],
            "unknown option of varflow 'betta': did you mean",
        ),
        (["train", "mog40-vardiu", "--objective", "varflow(beta=5)"], "beta must be in (0, 2), but is 5"),
        (["train", "mog40-vardiu", "--objective", "vardiu +"], "cannot read 'vardiu +' as a sum of names"),
        (["train", "mog40-vardiu", "--objective=varflow(beta)"], "options are key=value, parted by commas"),
        (["train", "mog40-vardiu", "--objective", "low*varflow"], "a weight must be a number, but is 'low'"),
        (["train", "mog40-vardiu", "--networks", "critic(lr=1e-4)"], "unknown network 'critic': known: student"),
        (["train", "mog40-vardiu", "--networks", "student(rl=1)"], "unknown setting of student 'rl'"),
        (["train", "mog40-vardiu", "--networks", "student(lr=high)"], "the settings of student must be numbers"),
        (["train", "mog40-vardiu", "--networks", "student(lr=-1)"], "student's lr must be 0 or positive, but is -1"),
        (["train", "mog40-vardiu", "--networks", "2*student(lr=1)"], "as a name with options, like 'critic(lr=1e-4)'"),
        (["train", "mog40-vardiu", "--networks", "student(lr"], "cannot read 'student(lr' as a sum"),
        (["train", "mog40-vardiu-varflow", "--parts", "vardiu"], "the terms of a sum are said by --objective"),
        (["train", "mixture8-vardiu", "--problem", "mog9"], "--problem moves presets of mog40: give mog40-vardiu"),
        (
            ["train", "digits-points-vardiu", "--teacher", "true"],
            "digits has no exact teacher: choose an empirical or a learned one",
        ),
        (["train", "--config"], "--config needs a file"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "--resume"], "one run folder"),
        (["train", "mog40-vardiu", "--resume"], "--resume stands first, with no preset: vardistill train --resume RUN"),
        (["train", "mog40-vardiu", "--teacher", "runs/x"], "given as --teacher learned --teacher-run runs/x"),
        (["train", "images-vardiu", "--teacher", "/nope"], "vardistill: there is no folder /nope"),
        (["train", "images-vardiu", "--teacher", sys.executable], "is a file, but a folder is wanted"),
        (["teach", "/nope"], "vardistill: there is no file or folder /nope: "),
        (["evaluate", sys.executable], "is not a run folder: it is a file"),
        (["train", "--resume", "no-such-run"], "no-such-run is not a run folder"),
        (["teach", "mog4"], "unknown preset or data 'mog4': did you mean mog40"),
        (["teach", "mog40", "--max-minutes", "0"], "max_minutes must be positive"),
        (["teach", "mog40", "--samples", "0"], "samples must be positive"),
        (["sample", "no-such-run"], "no-such-run is not a run folder"),
        (["sample"], "sample needs a run folder"),
        (["evaluate"], "evaluate needs a run folder"),
        (["evaluate", "."], "is not a run folder"),
        (["report"], "report needs a run folder"),
        (["report", "no-such-run"], "no-such-run is not a run folder"),
        (["list", "--all"], "unknown flag"),
    ],
)
def test_mistakes_get_one_line(
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, *words)


def test_more_latents_than_dimensions_start_from_random_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", "mog40-vardiu", *QUICK, "--latent", "4", "--out", str(tmp_path / "run")]
    assert "at most 2 latents on mog40: set latent 2 or smaller, or linear false" in refused(capsys, *words)
    assert not (tmp_path / "run").exists()
    assert cli.run([*words, "--no-linear"]) == 0


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, arguments: list[str]) -> int:
        raise RuntimeError("of a programmer")

    monkeypatch.setattr(cli, "_run_command", broken)
    with pytest.raises(RuntimeError, match="of a programmer"):
        cli.run(["list"])


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(
    tracker: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "get_available_trackers", lambda: ["tensorboard"])
    words = ["train", "mog40-vardiu", *QUICK[:-1], tracker, "--out", str(tmp_path / "run")]
    told = f"the tracker {tracker} is not installed: pip install {tracker}, or choose another or none"
    assert told in refused(capsys, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("line", "told"), [(b"{}\n", "has no step"), (b"\xff\xfe\n", "cannot read")])
def test_a_run_with_damaged_metrics_is_not_resumed(
    line: bytes, told: str, finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    run.metrics.write_bytes(run.metrics.read_bytes() + line)
    assert told in refused(capsys, "train", "--resume", str(run.path))


@pytest.mark.parametrize("columns", ["1", "0", "-5", "x"])
def test_any_width_of_the_terminal_will_do(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.run(["list"]) == 0
    assert cli.run(["train", "mog40-vardiu", "--help"]) == 0
    assert "mog40" in capsys.readouterr().out


@pytest.mark.parametrize(("closed", "words", "code"), [(1, ["list"], 0), (2, ["list"], 0), (2, ["report"], 2)])
def test_closed_streams_will_do(closed: int, words: list[str], code: int) -> None:
    command = [sys.executable, "-m", "vardistill", *words]
    ended = subprocess.run(["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command], capture_output=True, text=True)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vardistill", "sample", "/nope"]
    words = ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(tmp_path), *command]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "vardistill: the folder that this is started in is gone: change to another\n"


def test_a_backend_of_matplotlib_that_is_not_there_does_not_matter() -> None:
    code = "from vardistill.cli.main import main\nimport sys\nsys.argv = ['vardistill', 'train', '--help']\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\nimport matplotlib.figure"
    environment = {**os.environ, "MPLBACKEND": "nonsense"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("words", [["list"], ["train", "mog40-vardiu", "--help"], ["bench", "--help"]])
def test_any_encoding_of_the_output_will_do(words: list[str], encoding: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "vardistill", *words],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        check=False,
    )
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert len(shown.stdout.decode(encoding).splitlines()) > 9


@pytest.mark.parametrize("words", [["--version"], ["list"], ["train", "mog40-vardiu", "--help"]])
def test_an_output_that_is_full_is_told_in_a_line(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "vardistill", *words]
        told = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert told.returncode == 2
    (line,) = told.stderr.splitlines()
    assert line.startswith("vardistill: cannot write")
    assert line.endswith("No space left on device")


def test_a_run_that_cannot_be_written_is_measured_all_the_same(
    finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise UsageError("cannot write x: Read-only file system")

    monkeypatch.setattr(experiment, "keep_evaluation", refuse)
    assert cli.run(["evaluate", str(finished), "--json", "--num", "200"]) == 0
    captured = capfd.readouterr()
    assert "log_mmd" in json.loads(captured.out)
    assert "cannot write x: Read-only file system: the numbers are told, but not kept" in captured.err


def test_the_package_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "vardistill", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"{__version__}\n"


def test_a_refused_run_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    refused(capsys, "train", "mog40-vardiu", "--batch", "1", "--out", str(out))
    assert not out.exists()
    monkeypatch.chdir(tmp_path)
    refused(capsys, "train", "mog40-vardiu", "--batch", "1")
    assert not any(tmp_path.iterdir())


def test_runs_that_start_together_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with run_folder(None, "x") as first, run_folder(None, "x") as second:
        assert [str(first), str(second)] == ["runs/x-001", "runs/x-002"]
        (second / "config.yaml").touch()
    with run_folder(None, "x") as third, run_folder(Path("mine"), "x") as given:
        assert (str(third), str(given)) == ("runs/x-001", "mine")
    assert [path.name for path in Path("runs").iterdir()] == ["x-002"]


def test_a_run_at_work_is_not_resumed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(finished).held():
        assert "another process is at work in" in refused(capsys, "train", "--resume", str(finished))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "--num", "0"], "num must be at least 1, but is 0"),
        (["evaluate", "--num", "-5"], "num must be at least 2, but is -5"),
        (["sample", "--out", "x.jpg"], ".npz, .png"),
        (["sample", "--num", "3", "--out", "nowhere/x.npz"], "cannot write"),
        (["evaluate", "--num", "1"], "vardistill: num must be at least 2, but is 1"),
        (["evaluate", "--num", "1000000000000"], "there is not enough memory"),
        (["sample", "--seed", HUGE], f"vardistill: seed must be a whole number of 64 bits, but is {HUGE}"),
        (["evaluate", "--seed", HUGE], f"vardistill: seed must be a whole number of 64 bits, but is {HUGE}"),
        (["sample", "--label", HUGE], f"vardistill: label must be a whole number of 64 bits, but is {HUGE}"),
        (["view"], "is a run on points: `vardistill view` shows pictures"),
    ],
)
def test_mistakes_with_a_finished_run(
    words: list[str],
    told: str,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, words[0], str(finished), *words[1:])


def test_a_folder_in_use_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not empty" in refused(capsys, "train", "mog40-vardiu", "--out", str(finished))


@pytest.mark.parametrize("damage", ["truncated", "pickle", "foreign", "config", "link"])
def test_a_damaged_generator_is_refused(
    damage: str, finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "copy")
    (run.path / "generator").mkdir(parents=True)
    run.config.write_bytes((finished / "config.yaml").read_bytes())
    for name in ("model.safetensors", "config.json"):
        (run.generator / name).write_bytes((finished / "generator" / name).read_bytes())
    weights = run.generator / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "pickle":
        weights.write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    elif damage == "foreign":
        save_file({"other": torch.zeros(2)}, weights)
    elif damage == "config":
        (run.generator / "config.json").write_text('{"latent": -3}')
    else:
        run.generator.rename(tmp_path / "elsewhere")
        run.generator.symlink_to(tmp_path / "elsewhere")
    told = refused(capsys, "sample", str(run.path), "--out", str(tmp_path / "x.npz"))
    assert "generator" in told or "latent" in told
    assert not (tmp_path / "x.npz").exists()


# Another objective, several steps, settings of single networks


def test_a_flag_replaces_the_objective(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    text = "diff-instruct(critic-steps=1, critic-width=16) + 6..1 * varflow(beta=0.5)"
    assert cli.run(["train", "mog40-vardiu", "--objective", text, *QUICK, "--out", str(out)]) == 0
    assert "log_mmd" in capfd.readouterr().out
    config = read(Config, out / "config.yaml")
    first, second = config.objective.parts
    assert (first.objective.name, first.objective.critic_width) == ("diff-instruct", 16)
    assert (second.objective.beta, second.weight, second.weight_end) == (0.5, 6.0, 1.0)
    (line,) = (line for line in RunFolder(out).history() if line["kind"] == "train")
    assert {"diff-instruct/loss", "varflow/loss", "varflow/weight", "critic_loss", "grad_norm_critic"} <= line.keys()
    assert "Diff-Instruct + λ·VarFlow" in (out / "report.html").read_text()
    assert "by Diff-Instruct + λ·VarFlow" in (out / "generator" / "README.md").read_text()


def test_single_networks_have_settings_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--critic-width", "16", "--networks", "critic(lr=1e-4, beta1=0)", "student(clip=1)"]
    assert cli.run(["train", "mog40-diff-instruct", *QUICK, *words, "--out", str(out)]) == 0
    training = read(Config, out / "config.yaml").training
    critic, student = (training.settings_of(name) for name in ("critic", "student"))
    assert (critic.lr, critic.beta1, student.clip, student.beta1) == (1e-4, 0.0, 1.0, 0.9)
    assert cli.run(["train", "--config", str(out / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    ours, theirs = (np.load(path / "samples.npz")["samples"] for path in (out, tmp_path / "again"))
    assert (ours == theirs).all()


def test_a_student_of_two_steps_from_training_to_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.run(["train", "mog40-vardiu", "--steps-per-sample", "2", *QUICK, "--out", str(run)]) == 0
    assert "student, 2 steps" in " ".join(capfd.readouterr().out.split())
    assert cli.run(["sample", str(run), "--num", "50", "--out", str(tmp_path / "x.npz")]) == 0
    assert np.load(tmp_path / "x.npz")["samples"].shape == (50, 2)
    capfd.readouterr()
    assert cli.run(["evaluate", str(run), "--json", "--num", "300"]) == 0
    assert json.loads(capfd.readouterr().out)["samples"] == 300
    (run / "report.html").unlink()
    assert cli.run(["report", str(run)]) == 0
    assert "steps per sample <b>2</b>" in (run / "report.html").read_text()
    assert cli.run(["train", "--resume", str(run)]) == 0


@pytest.mark.parametrize("command", ["train", "teach"])
def test_a_file_of_an_earlier_version_is_refused_with_the_way_out(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kind = "kind: Teach\n" if command == "teach" else ""
    (tmp_path / "config.yaml").write_text(f"{kind}problem: mog40\ngenerator: {{depth: 4}}\n")
    told = refused(capsys, command, "--resume", str(tmp_path))
    assert "of an earlier version: write it anew, from a preset (`vardistill list`)" in told


def test_help_answers_at_once() -> None:
    """In under half a second of processor time, but for a machine that is busy: the best of three."""
    code = "import time; from vardistill.cli.main import run; run(['--help']); print(time.process_time())"
    command = [sys.executable, "-c", code]
    outs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    times = [float(out.split()[-1]) for out in outs]
    assert min(times) < 0.5
