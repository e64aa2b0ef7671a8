"""What an experiment refuses before it leaves anything, and what it leaves in which order."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vardistill.diffusion.config import LevelsConfig
from vardistill.domains.points.config import PerceptronConfig, PointsConfig, PointsTeachConfig, TeacherConfig
from vardistill.domains.points.teach import teach
from vardistill.errors import UsageError
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.registry import PartConfig, SumConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.reports.page import write_report
from vardistill.runs import experiment as experiments
from vardistill.runs.config import Config
from vardistill.training.config import NetworkConfig, TrainingConfig
from vardistill.training.config_files import write
from vardistill.training.fitting import Fit
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Run

CONFIG = Config(
    PointsConfig(student=PerceptronConfig(width=8, depth=1)),
    training=TrainingConfig(batch=128, eval_samples=100, tracker="none", device="cpu"),
)


def with_domain(**changes: Any) -> Config:
    return replace(CONFIG, domain=replace(CONFIG.domain, **changes))


def refused(config: Config, out: Path, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        experiments.run_experiment(config, out)
    assert not out.exists()


@pytest.mark.parametrize("teacher", ["true", "empirical"])
def test_a_critic_that_cannot_start_from_its_teacher_is_refused_without_a_folder(teacher: str, tmp_path: Path) -> None:
    choice: Any = TeacherConfig(teacher=teacher, teacher_samples=50)
    config = replace(with_domain(teacher=choice), objective=DiffInstructConfig(critic_start="teacher"))
    refused(config, tmp_path / "run", "an exact teacher has no weights")


def test_a_teachers_run_that_does_not_fit_is_refused_without_a_folder(tmp_path: Path) -> None:
    config = with_domain(teacher=TeacherConfig("learned", teacher_run=tmp_path / "teacher"))
    refused(config, tmp_path / "run", "teacher is not a run folder: there is no such folder")
    (tmp_path / "teacher").mkdir()
    write(CONFIG, tmp_path / "teacher" / "config.yaml")
    refused(config, tmp_path / "run", "config.yaml")
    other = PointsTeachConfig(problem="mixture8", samples=64, steps=1, width=8, depth=1, batch=16)
    teach(other, tmp_path / "other")
    config = with_domain(teacher=TeacherConfig("learned", teacher_run=tmp_path / "other"))
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
    student = replace(CONFIG.domain.student, latent=8)
    digits = replace(config, domain=replace(config.domain, problem="digits", student=student))
    experiments.run_experiment(digits, tmp_path / "digits")
    learned = replace(config, domain=replace(config.domain, teacher=TeacherConfig(teacher="learned")))
    refused(learned, tmp_path / "learned", "takes no teacher, but teacher is 'learned': leave it out")


def test_a_critics_errors_are_told_with_a_learned_teacher_too(tmp_path: Path) -> None:
    """They need the teacher's score alone; the KL needs its density."""
    teach(PointsTeachConfig(samples=64, steps=1, width=8, depth=1, batch=16), tmp_path / "teacher")
    teacher = TeacherConfig("learned", teacher_run=tmp_path / "teacher")
    training = replace(CONFIG.training, steps=1)
    config = replace(with_domain(teacher=teacher), objective=DiffInstructConfig(critic_width=8), training=training)
    line = experiments.run_experiment(config, tmp_path / "run").history()[-1]
    assert line["critic_error"] > 0
    assert "dikl" not in line


def test_a_teachers_fit_that_was_killed_goes_on_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = PointsTeachConfig(samples=64, steps=1010, width=8, depth=1, batch=8)  # a checkpoint every 1000 steps
    monkeypatch.setattr(PointsConfig, "learns_from", lambda config, training: fit)
    training = replace(CONFIG.training, steps=1)
    config = replace(with_domain(teacher=TeacherConfig("learned")), training=training)
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
    domain = experiments.build_domain(CONFIG)
    domain.load(None)
    objective = CONFIG.objective.build(domain)
    domain.student.save_pretrained(folder.generator)
    experiments.finish(domain, folder, Run(domain.student.eval(), objective), objective)


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


def test_a_run_killed_before_its_first_checkpoint_is_rewound(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write(CONFIG, folder.config)
    folder.log("train", 10, 0.1, {"loss": 1.0})
    domain = experiments.build_domain(CONFIG)
    domain.load(None)
    with ExitStack() as held:
        experiments.prepare(CONFIG, domain, folder, True, held)
    assert folder.history() == []
    folder.log("train", 10, 0.1, {"loss": 1.0})
    (folder.checkpoints / "step-00000010").mkdir(parents=True)
    with ExitStack() as held:
        experiments.prepare(CONFIG, domain, folder, True, held)
    assert len(folder.history()) == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": VarDiUConfig(posterior="full", candidates="batch")}, "come from the prior"),
        ({"objective": VarDiUConfig(posterior="low-rank")}, "unknown posterior of points 'low-rank'"),
        ({"objective": VarFlowConfig()}, "VarFlow compares groups of one level: share the levels"),
        ({"objective": VarFlowConfig(space="classifier")}, "points have no features"),
        ({"objective": SumConfig((PartConfig(VarFlowConfig()), PartConfig(DiffInstructConfig())))}, "share the levels"),
        ({"levels": LevelsConfig(shared=3)}, "batch must be divisible by 3"),
        ({"levels": LevelsConfig(shared=128)}, "groups need at least 2 latents each"),
        ({"training": replace(CONFIG.training, networks=(NetworkConfig("critc"),))}, "unknown network 'critc'"),
        ({"training": replace(CONFIG.training, accumulate=3)}, "batch must be divisible by 3, accumulate times"),
    ],
)
def test_parts_that_do_not_fit_are_refused_without_a_folder(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    refused(replace(CONFIG, **changes), tmp_path / "run", told)


def test_candidates_of_a_posterior_are_refused_with_several_steps(tmp_path: Path) -> None:
    several = with_domain(student=replace(CONFIG.domain.student, steps_per_sample=2))
    objective = VarDiUConfig(posterior="diagonal", posterior_width=8, candidates=2)
    refused(
        replace(several, objective=objective), tmp_path / "run", "candidates drawn from a posterior, and chains, need"
    )


def test_a_student_of_several_steps_leaves_what_its_reader_looks_at(tmp_path: Path) -> None:
    """Without the curves of the divergence, whose quadrature knows one step alone; and it is loaded as it was."""
    config = with_domain(student=replace(CONFIG.domain.student, steps_per_sample=3))
    folder = experiments.run_experiment(replace(config, training=replace(config.training, steps=2)), tmp_path / "run")
    line = folder.history()[-1]
    assert math.isfinite(line["log_mmd"])
    assert "dikl" not in line
    assert not (folder.path / "bound.json").exists()
    assert "steps per sample <b>3</b>" in (folder.path / "report.html").read_text()
    _, _, student = experiments.load_run(folder.path)
    assert student.steps == 3
    samples = np.load(folder.path / "samples.npz")["samples"]
    assert np.array_equal(student.sample(100, seed=1).numpy(), samples)
    table, _ = experiments.evaluate_run(folder.path, 50, seed=2)
    assert table["samples"] == 50


def test_a_student_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A student of several steps is none of latents; how many steps it has it tells itself."""
    config = with_domain(student=replace(CONFIG.domain.student, steps_per_sample=2))
    folder = experiments.run_experiment(replace(config, training=replace(config.training, steps=1)), tmp_path / "run")
    folder.config.write_text("domain: {student: {depth: 2}}")
    with pytest.raises(UsageError, match="generator"):
        experiments.load_run(folder.path)
