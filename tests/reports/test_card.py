"""Model cards say what the run's files say, and no path of the machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml

from tiny_models import tiny_unet
from vardistill.denoisers import DiffusersDenoiser
from vardistill.domains.pictures.config import NetworkStudentConfig, PicturesConfig
from vardistill.domains.points.config import PointsConfig
from vardistill.domains.text.config import TextConfig
from vardistill.errors import UsageError
from vardistill.export import lora, whole_pipelines
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


def text_run(folder: RunFolder, teacher: str, scheduler: Any, rank: int = 0) -> RunFolder:
    """What of a run on text to image its card is made of."""
    network = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    NetworkStudent.from_teacher(DiffusersDenoiser(network, scheduler), steps=2).save_pretrained(folder.generator)
    student = NetworkStudentConfig(lora_rank=rank, steps_per_sample=2)
    domain = TextConfig(teacher, prompts="prompts.txt", guidance=3.0, student=student)
    write(Config(domain, DiffInstructConfig(critic_start="teacher")), folder.config)
    (folder.path / "prompts.txt").write_text("a red dog\na blue cat\n")
    return folder


def test_the_card_of_a_run_on_text(tmp_path: Path) -> None:
    """Of what, on how many prompts, and the very lines that `export` prints."""
    run = text_run(RunFolder(tmp_path / "dogs"), "owner/sd", diffusers.DDIMScheduler(), rank=4)
    student = NetworkStudent.from_pretrained(run.generator).configuration()
    cards = {name: model_card(run, name) for name in ("vardistill", "diffusers", "lora")}
    said = (
        "A generator of 2 steps, each one evaluation of its network, as adapters of rank 4 on its teacher. It makes a "
        "picture in 2 steps. It was distilled from the diffusion model `sd` with guidance 3 on 2 prompts, by "
        "Diff-Instruct."
    )
    assert all(said in card for card in cards.values())
    heads = {name: yaml.safe_load(card.split("---\n")[1]) for name, card in cards.items()}
    assert all(head["pipeline_tag"] == "text-to-image" for head in heads.values())
    assert all(head["base_model"] == "owner/sd" for head in heads.values())
    assert [heads[name]["library_name"] for name in cards] == ["vardistill", "diffusers", "diffusers"]
    assert "lora" in heads["lora"]["tags"]
    whole, adapters = whole_pipelines.usage(student), lora.usage(student)
    assert adapters.splitlines()[1:3] == [
        'pipeline.load_lora_weights("FOLDER")',
        'pipeline.scheduler = LCMScheduler.from_pretrained("FOLDER", subfolder="scheduler")',
    ]
    assert [whole in cards[name] for name in cards] == [True, True, False]
    assert [adapters in cards[name] for name in cards] == [True, False, True]
    assert "vardistill sample RUN --prompt" in cards["vardistill"]
    for name in cards:
        for block in re.findall("```python\n(.*?)```", cards[name], re.DOTALL):
            compile(block, name, "exec")


def test_the_card_of_a_run_on_text_without_adapters_or_scheduler(tmp_path: Path) -> None:
    card = model_card(text_run(RunFolder(tmp_path / "a"), str(tmp_path / "secret" / "sd"), diffusers.DDIMScheduler()))
    assert "DiffusionPipeline" in card
    assert "load_lora_weights" not in card
    assert "base_model" not in card
    assert "secret" not in card
    edm = model_card(text_run(RunFolder(tmp_path / "b"), "owner/sd", diffusers.EDMEulerScheduler()))
    assert "vardistill sample RUN --prompt" in edm
    assert "DiffusionPipeline" not in edm


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
