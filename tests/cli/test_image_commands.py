"""The commands for pictures as a user types them: from a teacher to pictures, and every mistake in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import small_pictures
from small_pictures import QUICK, save_npz
from vardistill.cli import main as cli
from vardistill.cli.tables import print_evaluation
from vardistill.domains.pictures import config, teach
from vardistill.domains.pictures.parts import teachers_columns
from vardistill.runs.presets import PICTURES, TEACHERS

TEACH = ["--channels", "8", "16", "--steps", "4", "--batch", "8", "--eval-samples", "12", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_pictures.quick():
        yield


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of a few steps, of the digits."""
    path = tmp_path_factory.mktemp("teach") / "teacher"
    assert cli.run(["teach", "digits", *TEACH, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def finished(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of a few steps."""
    path = tmp_path_factory.mktemp("train") / "run"
    assert cli.run(["train", "images-diff-instruct", "--teacher", str(taught), *QUICK, "--out", str(path)]) == 0
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


# Teachers


def test_teaching_ends_with_a_table_and_a_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "teacher", save_npz(tmp_path / "mine.npz", classes=2)
    assert cli.run(["teach", str(data), *TEACH, "--out", str(out)]) == 0
    told = capfd.readouterr().out
    assert all(name in told for name in ("fd", "label_accuracy", "2 steps", "3 steps", "held-out data", "evaluations"))
    assert f"pipeline: {out / 'pipeline'}" in told
    assert f"data: {data}" in (out / "config.yaml").read_text()


def test_teaching_without_labels_ends_with_a_table_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = save_npz(tmp_path / "mine.npz", 20)
    assert cli.run(["teach", str(data), *TEACH, "--out", str(tmp_path / "teacher")]) == 0
    told = capfd.readouterr().out
    assert "seconds_per_image" in told
    assert "fd" not in told


def test_a_teacher_that_diverges_ends_with_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = save_npz(tmp_path / "mine.npz", 20), tmp_path / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teach, "dsm_loss", lambda denoiser, x, noise: denoiser(x, noise.t).flatten(1).sum(1) * np.nan)
        assert cli.run(["teach", str(data), *TEACH, "--max-skipped", "3", "--out", str(out)]) == 1
    captured = capfd.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("vardistill: 4 updates up to step 4 had gradients that are not finite (limit 3)")
    assert captured.out == ""
    assert not (out / "pipeline").exists()


def test_a_finished_teacher_is_resumed_to_itself(taught: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = next((taught / "pipeline" / "unet").glob("*.safetensors"))
    before = weights.read_bytes()
    assert cli.run(["teach", "--resume", str(taught)]) == 0
    assert weights.read_bytes() == before
    assert "held-out data" in capfd.readouterr().out


# Students


def test_a_students_table_stands_beside_its_teachers(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", str(finished), "--num", "12"]) == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "fd" in told
    assert "speedup" in told
    assert "teacher, 2" in told


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("[1", {}),
        ("[1]", {}),
        ('{"18 steps": 3, "data": [1]}', {}),
        ('{"18 steps": {"fd": "x", "kd": 0.5, "precision": NaN}}', {"teacher, 18 steps": {"kd": 0.5}}),
    ],
)
def test_a_foreign_evaluation_of_a_teacher_is_no_traceback(
    text: str, columns: dict[str, dict[str, float]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    beside = partial(teachers_columns, tmp_path / "evaluation.json")
    domain: Any = SimpleNamespace(beside=beside, problem=None, student=SimpleNamespace(steps=1))
    print_evaluation({"fd": 1.5, "kd": 0.25}, domain)
    told = capfd.readouterr().out
    assert teachers_columns(tmp_path / "evaluation.json") == columns
    assert "1.5" in told
    assert ("0.5" in told) == bool(columns)


def test_evaluate_prints_one_json_object(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", str(finished), "--json", "--num", "20"]) == 0
    table = json.loads(capfd.readouterr().out)
    assert {"fd", "kd", "precision", "recall", "memorisation", "label_accuracy", "speedup"} <= table.keys()
    assert table["samples"] == 20


def test_samples_are_those_of_the_seed_with_labels_in_turn(finished: Path, tmp_path: Path) -> None:
    for name, seed in (("a.npz", 0), ("b.npz", 0), ("c.npz", 1)):
        words = ["sample", str(finished), "--num", "12", "--seed", str(seed), "--out", str(tmp_path / name)]
        assert cli.run(words) == 0
    a, b, c = (np.load(tmp_path / f"{name}.npz") for name in "abc")
    assert a["samples"].shape == (12, 1, 8, 8)
    assert a["labels"].tolist() == [*range(10), 0, 1]
    assert (a["samples"] == b["samples"]).all()
    assert (a["samples"] != c["samples"]).any()


def test_samples_of_one_class(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "threes.npz"
    assert cli.run(["sample", str(finished), "--num", "4", "--label", "3", "--out", str(out)]) == 0
    assert np.load(out)["labels"].tolist() == [3] * 4
    assert cli.run(["sample", str(finished), "--num", "4", "--out", str(tmp_path / "all.npz")]) == 0
    threes, turns = (np.load(tmp_path / name)["samples"] for name in ("threes.npz", "all.npz"))
    np.testing.assert_allclose(threes[3], turns[3], rtol=1e-4, atol=1e-4)
    assert (threes[2] != turns[2]).any()


def test_samples_as_a_picture(finished: Path, tmp_path: Path) -> None:
    """Three by three pictures of 8 pixels, a pixel apart, each four times as large."""
    assert cli.run(["sample", str(finished), "--num", "9", "--out", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (4 * 26, 4 * 26)


def test_samples_as_a_folder_of_pictures_by_class(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    assert cli.run(["sample", str(finished), "--num", "12", "--out", str(out)]) == 0
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert files == sorted(f"{i % 10}/{i:05d}.png" for i in range(12))
    with Image.open(out / "0" / "00000.png") as picture:
        assert picture.size == (8, 8)
    data = save_npz(tmp_path / "x.npz")
    assert np.load(data)["images"].shape[1:3] == (8, 8)


def test_a_finished_student_is_resumed_to_itself(finished: Path) -> None:
    before = (finished / "generator" / "model.safetensors").read_bytes()
    assert cli.run(["train", "--resume", str(finished)]) == 0
    assert (finished / "generator" / "model.safetensors").read_bytes() == before


def test_a_configuration_file_repeats_its_run(finished: Path, tmp_path: Path) -> None:
    assert cli.run(["train", "--config", str(finished / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    ours, theirs = (np.load(path / "samples.npz")["samples"] for path in (finished, tmp_path / "again"))
    assert (ours == theirs).all()


def test_flags_choose_another_student(taught: Path, tmp_path: Path) -> None:
    words = ["--lora-rank", "2", "--real", "teacher", "--real-samples", "200", "--real-steps", "2", "--ratio", "1.5"]
    out = tmp_path / "run"
    assert cli.run(["train", "images-varflow", "--teacher", str(taught), *words, *QUICK, "--out", str(out)]) == 0
    config = (out / "config.yaml").read_text()
    assert all(line in config for line in ("lora_rank: 2", "real: teacher", "ratio: 1.5", "real_samples: 200"))


def test_the_report_is_written_anew(finished: Path) -> None:
    assert cli.run(["report", str(finished)]) == 0
    assert (finished / "report.html").read_text().startswith("<!DOCTYPE html>")


# Help


@pytest.mark.parametrize(
    "words",
    [
        ["teach", "digits", "--help"],
        ["teach", "mnist", "--help"],
        ["train", "images-vardiu", "--help"],
        ["train", "images-vardiu-varflow", "--help"],
        ["train", "digits-varflow", "--objective", "diff-instruct + 2*varflow", "--help"],
        *([name, "--help"] for name in ("demo", "train", "sample", "evaluate", "export", "view", "report")),
        ["teach", "--help"],
        ["sample", "x", "--help"],
    ],
)
def test_help_does_not_import_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom vardistill.cli.main import run\n"
        f"try:\n    run({words!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("preset", [f"images-{name}" for name in PICTURES])
def test_a_presets_help_lists_its_flags(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", preset, "--help"]) == 0
    told = capsys.readouterr().out
    assert all(flag in told for flag in ("--teacher", "--data", "--guidance", "--lora-rank", "--max-minutes"))
    assert ("--label-distance" in told) == (preset == "images-varflow")
    assert ("--parts" in told) == (preset in ("images-vardiu-varflow", "images-diff-instruct-varflow"))


def test_the_usage_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "--help"]) == 0
    assert cli.run(["teach", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in (*PICTURES, *TEACHERS, "images", "mnist", "digits-points"))


# Mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["teach", "digit"], "unknown preset or data 'digit': did you mean digits"),
        (["teach", "mnits"], "did you mean mnist"),
        (["teach", "digits", "--stepz", "3"], "unknown flag 'stepz': did you mean steps"),
        (["teach", "digits", "--lr", "inf"], "lr must be positive and finite, but is inf"),
        (["teach", "digits", "--channels", "12"], "channels must be multiples of 8"),
        (["teach", "digits", "--channels", "8", "8", "8", "8", "8"], "pictures of 8×8 do not halve 4 times"),
        (["teach", "digits", "--label-dropout", "1"], "label_dropout must be in [0, 1)"),
        (["teach", "digits", "--sigma-min", "100"], "sigma_min must be positive and below sigma_max"),
        (["teach", "digits", "--eval-samples", "5"], "eval_samples must be at least 6"),
        (["teach", "digits", "--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (["teach", "digits", "--data", "nowhere.npz"], "there is no file nowhere.npz"),
        (["teach", "--steps", "3"], "teach needs a preset or data"),
        (["teach", "--resume"], "one run folder"),
        (["teach", "--resume", "nowhere"], "nowhere is not a run folder"),
        (["train", "images-vardiu"], "no teacher: give --teacher FOLDER"),
        (["train", "images-varflow", "--lora-rank", "-1"], "lora_rank must be 0 or positive"),
        (
            ["train", "images-varflow", "--lora-rank", "2", "--start", "fresh"],
            "start must be 'teacher' with",
        ),
        (["train", "images-varflow", "--beta", "2"], "beta must be in (0, 2)"),
        (["train", "image-vardiu"], "did you mean images-vardiu"),
        (["train", "digit-varflow"], "did you mean digits-varflow"),
        (["train", "digits-varflow", "--data", "digit"], "unknown image source 'digit'"),
        (["train", "digits-vardiu", "--posterior", "nsf"], "unknown posterior of pictures 'nsf'"),
        (["train", "digits-vardiu", "--objective", "varflow(space=pixels)"], "varflow.space must be"),
        (["train", "digits-vardiu", "--steps-per-sample", "0"], "steps_per_sample must be from 1 to 64"),
        (["train", "images-vardiu", "--teacher", "nowhere/at/all"], "nowhere/at/all"),
        (["train", "images-vardiu", "--teacher", "."], "cannot read model_index.json"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_leaves_no_folder(
    taught: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["--teacher", str(taught), *QUICK, "--out", str(out)]
    assert "divisible by 2" in refused(capsys, "train", "images-varflow", *words, "--batch", "9")
    assert "there is no folder" in refused(capsys, "train", "images-varflow", *words, "--features", "nowhere")
    assert "unknown image source 'digit'" in refused(capsys, "train", "images-varflow", *words, "--data", "digit")
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "--num", "0"], "num must be at least 1, but is 0"),
        (["sample", "--num", "-5"], "num must be at least 1, but is -5"),
        (["evaluate", "--num", "-5"], "num must be at least 2, but is -5"),
        (["sample", "--out", "x.jpg"], ".npz, .png or, of pictures, a folder"),
        (["sample", "--num", "3", "--out", "nowhere/x.npz"], "cannot write"),
        (["sample", "--num", "3", "--label", "10"], "labels must be in [0, 10), but are 10 to 10"),
        (["sample", "--num", "3", "--label", "-1"], "labels must be in [0, 10)"),
        (["sample", "--num", "3", "--out", "full"], "full is there and not an empty folder"),
        (["evaluate", "--num", "5"], "n at least 6"),
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
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert told in refused(capsys, words[0], str(finished), *words[1:])


def test_folders_in_use_are_refused(taught: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not empty" in refused(capsys, "teach", "digits", *TEACH, "--out", str(taught))
    train = ["train", "images-diff-instruct", "--teacher", str(taught), *QUICK]
    assert "is not empty" in refused(capsys, *train, "--out", str(finished))


def test_a_teachers_run_and_a_students_are_told_apart(
    taught: Path, finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "config.yaml" in refused(capsys, "train", "--resume", str(taught))
    assert "config.yaml" in refused(capsys, "teach", "--resume", str(finished))
    assert "config.yaml" in refused(capsys, "sample", str(taught), "--out", str(tmp_path / "x.npz"))
    assert "config.yaml" in refused(capsys, "train", "images-vardiu", "--teacher", str(finished))


def test_a_damaged_student_is_refused(finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "generator").mkdir(parents=True)
    (copy / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    (copy / "generator" / "config.json").write_bytes((finished / "generator" / "config.json").read_bytes())
    weights = (finished / "generator" / "model.safetensors").read_bytes()
    (copy / "generator" / "model.safetensors").write_bytes(weights[:1000])
    assert "is truncated or not one of vardistill's" in refused(
        capsys, "sample", str(copy), "--out", str(tmp_path / "x.npz")
    )
    assert not (tmp_path / "x.npz").exists()


# Several steps, and no teacher


@pytest.mark.slow
def test_a_student_of_two_steps_from_training_to_diffusers(
    taught: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--teacher", str(taught), "--objective", "diff-instruct + 6..1*varflow", "--steps-per-sample", "2", *QUICK]
    assert cli.run(["train", "images-vardiu", *words, "--out", str(run)]) == 0
    assert "student, 2" in capfd.readouterr().out
    assert cli.run(["sample", str(run), "--num", "12", "--out", str(tmp_path / "x.npz")]) == 0
    assert np.load(tmp_path / "x.npz")["samples"].shape == (12, 1, 8, 8)
    capfd.readouterr()
    assert cli.run(["evaluate", str(run), "--json", "--num", "12"]) == 0
    assert json.loads(capfd.readouterr().out)["evaluations"] == 2
    assert cli.run(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "steps per sample <b>2</b>" in page
    assert "Diff-Instruct + λ·VarFlow" in page
    assert cli.run(["export", str(run), "--to", "diffusers", "--out", str(tmp_path / "pipeline")]) == 0
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True)
    assert pipeline is not None


@pytest.mark.slow
def test_a_run_without_a_teacher_fits_one_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "fit_of", lambda data: small_pictures.TEACH)
        assert cli.run(["train", "digits-varflow", *QUICK, "--out", str(run)]) == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "teacher, 2" in told
    assert (run / "teacher" / "pipeline").is_dir()
    assert cli.run(["teach", "--resume", str(run / "teacher")]) == 0
