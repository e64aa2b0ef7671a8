"""What an experiment refuses before it leaves anything, and what it leaves in which order."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vardistill.runs.build import build_generator, build_objective, build_problem

from vardistill.domains.points.teach import teach
from vardistill.errors import UsageError
from vardistill.reports.page import write_report
from vardistill.runs import experiment as experiments
from vardistill.runs.config import (
    Config,
    DiffInstructConfig,
    GeneratorConfig,
    TeachConfig,
    TeacherConfig,
    TrainingConfig,
    VarFlowConfig,
)
from vardistill.training.config_files import write
from vardistill.training.fitting import Fit
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Run

CONFIG = Config(generator=GeneratorConfig(width=8, depth=1), training=TrainingConfig(batch=16, eval_samples=100))


def refused(config: Config, out: Path, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        experiments.run_experiment(config, out)
    assert not out.exists()


@pytest.mark.parametrize("teacher", ["true", "empirical"])
def test_a_critic_that_cannot_start_from_its_teacher_is_refused_without_a_folder(teacher: str, tmp_path: Path) -> None:
    choice = TeacherConfig(teacher=teacher, teacher_samples=50)
    config = replace(CONFIG, teacher=choice, objective=DiffInstructConfig(critic_start="teacher"))
    refused(config, tmp_path / "run", "an exact teacher has no weights")


def test_a_teachers_run_that_does_not_fit_is_refused_without_a_folder(tmp_path: Path) -> None:
    config = replace(CONFIG, teacher=TeacherConfig("learned", teacher_run=tmp_path / "teacher"))
    refused(config, tmp_path / "run", "teacher is not a run folder: there is no such folder")
    (tmp_path / "teacher").mkdir()
    write(CONFIG, tmp_path / "teacher" / "config.yaml")
    refused(config, tmp_path / "run", "config.yaml")
    other = TeachConfig(problem="mixture8", samples=64, steps=1, width=8, depth=1, batch=16)
    teach(other, tmp_path / "other")
    config = replace(CONFIG, teacher=TeacherConfig("learned", teacher_run=tmp_path / "other"))
    refused(config, tmp_path / "run", "the teacher does not take the generator's samples")


def test_a_head_start_of_nothing_is_refused_without_a_folder(tmp_path: Path) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, head_start=0.3))
    refused(config, tmp_path / "run", "a head start is for the objective's own networks, but VarDiU has no steps")


def test_varflow_from_data_needs_no_teacher(tmp_path: Path) -> None:
    """The digits have no exact one, and MoG-40's is what the run is measured against."""
    training = replace(CONFIG.training, steps=2, batch=32)
    config = replace(
        CONFIG, objective=VarFlowConfig(real="data"), levels=replace(CONFIG.levels, shared=4), training=training
    )
    folder = experiments.run_experiment(config, tmp_path / "plane")
    assert math.isfinite(folder.history()[-1]["dikl"])
    digits = replace(config, problem="digits", generator=replace(CONFIG.generator, latent=8))
    experiments.run_experiment(digits, tmp_path / "digits")
    learned = replace(config, teacher=TeacherConfig(teacher="learned"))
    refused(learned, tmp_path / "learned", "takes no teacher, but teacher is 'learned': leave it out")


def test_a_critics_errors_are_told_with_a_learned_teacher_too(tmp_path: Path) -> None:
    """They need the teacher's score alone; the KL needs its density."""
    teach(TeachConfig(samples=64, steps=1, width=8, depth=1, batch=16), tmp_path / "teacher")
    teacher = TeacherConfig("learned", teacher_run=tmp_path / "teacher")
    training = replace(CONFIG.training, steps=1)
    config = replace(CONFIG, teacher=teacher, objective=DiffInstructConfig(critic_width=8), training=training)
    line = experiments.run_experiment(config, tmp_path / "run").history()[-1]
    assert line["critic_error"] > 0
    assert "dikl" not in line


def test_a_teachers_fit_that_was_killed_goes_on_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = TeachConfig(samples=64, steps=1010, width=8, depth=1, batch=8)  # a checkpoint every 1000 steps
    monkeypatch.setattr(experiments, "teacher_fit_of", lambda config: fit)
    training = replace(CONFIG.training, steps=1, tracker="none")
    config = replace(CONFIG, teacher=TeacherConfig("learned"), training=training)
    unbroken = experiments.run_experiment(config, tmp_path / "unbroken")

    advance, steps = Fit.advance, []

    def advance_or_die(self: Fit[Any], progress: float) -> Any:
        steps.append(self.step)
        if len(steps) == 1006:
            raise KeyboardInterrupt
        return advance(self, progress)

    monkeypatch.setattr(Fit, "advance", advance_or_die)
    with pytest.raises(KeyboardInterrupt):
        experiments.run_experiment(config, tmp_path / "killed")
    run = experiments.run_experiment(config, tmp_path / "killed", resume=True)
    assert steps[1006:] == list(range(1000, 1010))
    for name in ("denoiser.safetensors", "evaluation.json"):
        assert (run.teacher / name).read_bytes() == (unbroken.teacher / name).read_bytes()


def finish(folder: RunFolder) -> None:
    problem = build_problem(CONFIG.problem, CONFIG.levels.schedule)
    assert problem.denoiser is not None
    objective = build_objective(CONFIG, problem, problem.denoiser)
    experiments.finish(CONFIG, problem, folder, Run(build_generator(CONFIG, problem).eval(), objective))


def test_a_run_is_finished_only_once_it_has_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    write(CONFIG, folder.config)

    def stop(*ignored: object, **also: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "write_report", stop)
        with pytest.raises(KeyboardInterrupt):
            finish(folder)
    assert not (tmp_path / "evaluation.json").exists()
    finish(folder)
    assert json.loads((tmp_path / "evaluation.json").read_text())["samples"] == 100
    page = (tmp_path / "report.html").read_text()
    write_report(folder)
    assert (tmp_path / "report.html").read_text() == page


@pytest.mark.parametrize("main", [True, False])
def test_the_main_process_alone_rewinds_a_run(main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    write(CONFIG, folder.config)
    folder.log("train", 10, 0.1, {"loss": 1.0})
    monkeypatch.setattr(experiments, "PartialState", lambda: SimpleNamespace(is_main_process=main))
    experiments.prepare_folder(CONFIG, tmp_path, resume=True)
    assert len(folder.history()) == (0 if main else 1)
