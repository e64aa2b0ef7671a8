"""A run in Python is a run: its folder says what it is, and the commands work on it or say what loads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import small_runs
import vardistill as vd
from vardistill.cli import main as cli
from vardistill.networks import LevelMLP
from vardistill.reports.page import compared, verdict
from vardistill.training.folder import RunFolder

TRAINING = vd.TrainingConfig(steps=20, batch=32, eval_samples=400, tracker="none", seed=7)


def network(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """ε of N(0, 1) under `VP`, exactly."""
    return vd.schedules.VP()(time[:, None] / 999)[1] * x_t


TEACHER = vd.denoisers.from_module(network, vd.schedules.VP(), predicts="epsilon", time=lambda t: 999 * t)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that starts as its teacher's law, and hardly moves."""
    out = tmp_path_factory.mktemp("python") / "mine"
    points = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    student = vd.students.MLP.from_data(points, width=16, depth=1)
    vd.distill(student, teacher=TEACHER, training=TRAINING, out=out)
    return out


def told(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a refusal."""
    assert cli.run(list(words)) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    return line


def test_the_folder_says_what_the_run_is(run: Path) -> None:
    said = json.loads((run / "identity.json").read_text())
    assert said["objective"] == {
        "kind": "VarDiU", "candidates": "batch", "control_variate": "one", "sigma_data": 1.0, "posterior_steps": 1,
        "pool": 0, "chain_length": 8, "chain_rate": 0.3,
    }  # fmt: skip
    assert (said["teacher"]["module"], said["teacher"]["predicts"]) == ("network", "epsilon")
    assert said["teacher"]["schedule"] == {"kind": "VP", "beta_min": 0.1, "beta_max": 20.0}
    assert said["training"]["seed"] == 7
    assert said["student"]["data_shape"] == [2]
    assert json.loads((run / "environment.json").read_text())["vardistill"] == vd.__version__


def test_the_student_is_measured_beside_the_teachers_sampler(run: Path) -> None:
    """Both are N(0, 1) but for 20 small steps: 6 standard deviations of one evaluation."""
    table, arrays = json.loads((run / "evaluation.json").read_text()), np.load(run / "samples.npz")
    assert arrays["samples"].shape == arrays["teacher_samples"].shape == (400, 2)
    assert abs(table["energy_distance_teacher"]) < 6 * table["energy_distance_std"]
    assert arrays["teacher_samples"].std() == pytest.approx(1, abs=0.15)
    (line,) = (line for line in RunFolder(run).history() if line["kind"] == "eval")
    assert {"energy_distance_teacher", "precision", "recall"} <= line.keys()


def test_report_and_card_name_objective_teacher_and_seed(run: Path) -> None:
    assert cli.run(["report", str(run)]) == 0
    page, card = (run / "report.html").read_text(), (run / "generator" / "README.md").read_text()
    for name in ("VarDiU", "network (FromModule, epsilon, VP)", "seed <b>7</b>", "Energy distance to the teacher"):
        assert name in page
    assert "distilled from network (FromModule, epsilon, VP), by VarDiU." in card
    assert "MLP.from_pretrained" in card
    heading, summary = verdict(compared(RunFolder(run)))
    assert heading.split()[0] in ("Matches", "Close")
    assert "from those of its teacher's own sampler" in summary


def test_the_commands_work_on_it(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", str(run), "--json", "--num", "300"]) == 0
    assert json.loads(capfd.readouterr().out)["samples"] == 300
    for name in ("x.npz", "x.png"):
        assert cli.run(["sample", str(run), "--num", "50", "--out", str(tmp_path / name)]) == 0
    assert np.load(tmp_path / "x.npz")["samples"].shape == (50, 2)
    capfd.readouterr()
    assert "made in Python" in told(capfd, "train", "--resume", str(run))
    assert "shows pictures" in told(capfd, "view", str(run))
    assert "no network of diffusers" in told(capfd, "export", str(run), "--out", str(tmp_path / "x"))


def test_a_student_of_ones_own_code_is_loaded_by_the_line_that_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    teacher = vd.denoisers.Preconditioned(LevelMLP(2, 2, depth=1, width=8), 1.0)
    student = vd.students.from_teacher(teacher, data_shape=(2,), data_std=1.0)
    vd.distill(student, teacher=teacher, training=TRAINING, out=tmp_path / "own")
    capfd.readouterr()
    for command in ("sample", "evaluate"):
        line = told(capfd, command, str(tmp_path / "own"))
        assert "weights of a DenoisingStudent" in line
        assert (
            f"safetensors.torch.load_model(student, '{tmp_path / 'own' / 'generator' / 'model.safetensors'}')" in line
        )
    assert "safetensors.torch.load_model" in (tmp_path / "own" / "generator" / "README.md").read_text()
    assert cli.run(["report", str(tmp_path / "own")]) == 0


def test_without_a_teacher_it_is_measured_beside_the_data(tmp_path: Path) -> None:
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(1))
    student = vd.students.MLP.from_data(points, width=16, depth=1)
    vd.distill(student, objective=vd.objectives.VarFlow(), data=points, training=TRAINING, out=tmp_path)
    assert "energy_distance_data" in json.loads((tmp_path / "evaluation.json").read_text())
    assert "trained on data alone" in (tmp_path / "generator" / "README.md").read_text()
    assert "the data set" in verdict(compared(RunFolder(tmp_path)))[0]


def test_a_sampler_that_fails_costs_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A teacher whose samples overflow."""

    def explodes(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.where(t[:, None] > 0.99, torch.full_like(x_t, torch.inf), small_runs.teacher()(x_t, t).to(x_t))

    teacher = vd.denoisers.from_module(explodes, vd.schedules.VE())
    objective = vd.objectives.VarFlow(teacher=teacher)
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    student = vd.students.MLP.from_data(points, width=16, depth=1)
    vd.distill(student, objective=objective, data=points, training=TRAINING, out=tmp_path)
    assert "there are no samples to compare with: data must be finite" in capfd.readouterr().err
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"samples": 400}
