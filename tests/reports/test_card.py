"""Model cards say what the run's files say, and no path of the machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml

from tiny_models import tiny_unet
from vardistill.denoisers import DiffusersDenoiser
from vardistill.domains.pictures.config import PicturesConfig
from vardistill.domains.points.config import PointsConfig
from vardistill.errors import UsageError
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.registry import PartConfig, SumConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.reports.card import last_part, model_card, objective_name, write_card
from vardistill.runs.config import Config
from vardistill.students.network import NetworkStudent
from vardistill.students.perceptron import MLP
from vardistill.training.config import TrainingConfig
from vardistill.training.config_files import to_dict, write
from vardistill.training.folder import RunFolder

BOTH = SumConfig((PartConfig(VarDiUConfig()), PartConfig(VarFlowConfig())))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run on pictures whose teacher has been measured."""
    teacher, folder = tmp_path / "secret" / "unet-teacher", RunFolder(tmp_path / "my-run")
    teacher.mkdir(parents=True)
    rows = {"18 steps": {"recall": 0.75, "fd": 1.25}, "held-out data": {"recall": 0.8, "fd": None}}
    (teacher / "evaluation.json").write_text(json.dumps(rows))
    denoiser = DiffusersDenoiser(tiny_unet(classes=3), diffusers.EDMEulerScheduler())
    NetworkStudent.from_teacher(denoiser).save_pretrained(folder.generator)
    config = Config(PicturesConfig(str(teacher), guidance=1.5), BOTH, training=TrainingConfig(seed=17))
    write(config, folder.config)
    folder.log("train", 1200, 75.0, {"loss": 1.0})
    folder.environment.write_text(json.dumps({"processor": "A processor", "torch": "2.9", "accelerator": None}))
    (folder.path / "evaluation.json").write_text(json.dumps({"recall": 0.5, "fd": 2.5, "text": "none"}))
    return folder


def test_the_card_of_a_run_on_pictures(run: RunFolder) -> None:
    card = model_card(run)
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head) == {
        "library_name": "vardistill",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["one-step-generation", "diffusion-distillation"],
    }
    assert "distilled from the diffusion model `unet-teacher` with guidance 1.5, by VarDiU + λ·VarFlow." in body
    assert "|  | this generator, 1 step | teacher, 18 steps | held-out data | meaning |" in body
    assert "| Recall | 50.0 % | 75.0 % | 80.0 % | Held-out data, or the teacher" in body
    (distance,) = (line for line in body.splitlines() if "| 2.500 | 1.250 |  |" in line)
    for row in ("| seed | 17 |", "| steps | 1,200 |", "| time | 1 min 15 s |", "| hardware | A processor |"):
        assert row in body
    assert 'NetworkStudent.from_pretrained("FOLDER").sample(16, labels=torch.arange(16) % 3)' in body
    assert 'DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)' in body
    assert "secret" not in card
    assert "text" not in distance


def test_the_card_of_an_export_is_for_diffusers(run: RunFolder) -> None:
    card = model_card(run, "diffusers")
    assert "library_name: diffusers" in card
    assert card.index("DiffusionPipeline") < card.index("NetworkStudent")


def test_the_card_lies_beside_the_weights(run: RunFolder) -> None:
    write_card(run)
    assert (run.generator / "README.md").read_text() == model_card(run)


def test_the_card_of_a_problems_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "points")
    MLP(depth=1, width=8).save_pretrained(folder.generator)
    write(Config(PointsConfig("mog9"), VarFlowConfig()), folder.config)
    card = model_card(folder)
    assert "It was distilled from the true denoiser of `mog9`, by VarFlow." in card
    assert 'MLP.from_pretrained("FOLDER")' in card
    assert "pipeline_tag" not in card
    assert "## Measured" not in card


def test_a_damaged_file_gets_one_line(run: RunFolder) -> None:
    (run.path / "evaluation.json").write_text('{"recall": 0.')
    with pytest.raises(UsageError, match=r"cannot read .*evaluation\.json"):
        model_card(run)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("google/ddpm-cifar10-32", "ddpm-cifar10-32"),
        ("/data/runs/teacher/pipeline/", "teacher"),
        ("C:\\runs\\teacher", "teacher"),
        ("./teacher", "teacher"),
        ("", "unknown"),
    ],
)
def test_of_a_path_the_last_part_is_named(path: str, name: str) -> None:
    assert last_part(path) == name


@pytest.mark.parametrize(
    ("objective", "name"),
    [(VarDiUConfig(), "VarDiU"), (DiffInstructConfig(), "Diff-Instruct"), (BOTH, "VarDiU + λ·VarFlow")],
)
def test_objectives_have_names(objective: Any, name: str) -> None:
    assert objective_name(to_dict(Config(objective=objective))["objective"]) == name


def test_further_names_of_objectives() -> None:
    assert objective_name({"kind": "somebody-elses"}) == "somebody-elses"
    assert objective_name(None) == "an objective of its own"


def test_the_card_of_a_generator_of_several_steps(run: RunFolder) -> None:
    shutil.rmtree(run.generator)
    denoiser = DiffusersDenoiser(tiny_unet(), diffusers.DDPMScheduler())
    NetworkStudent.from_teacher(denoiser, steps=4).save_pretrained(run.generator)
    card = model_card(run)
    assert "- few-step-generation" in card
    assert "A generator of 4 steps, each one evaluation of its network. It makes a picture in 4 steps. It was" in card
    assert "|  | this generator, 4 steps | teacher, 18 steps |" in card
    assert 'DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)' in card
