"""Whole runs on pictures, small: every preset from its teacher to its report, and from where it was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vardistill.domains.pictures.build import Setting
from vardistill.domains.pictures.experiment import evaluate_run, even_labels, load_image_run, run_images
from vardistill.domains.pictures.presets import IMAGE_PRESETS

import small_pictures
import vardistill as vd
from small_pictures import save_npz
from tiny_models import tiny_pipeline_folder, tiny_unet
from vardistill.denoisers import DiffusersDenoiser, Guided, Mixed, from_diffusers
from vardistill.diffusion.samplers import sample
from vardistill.domains.pictures import experiment
from vardistill.domains.pictures.config import (
    ImageDiffInstructConfig,
    ImagesConfig,
    ImageVarDiUConfig,
    ImageVarFlowConfig,
    OneStepConfig,
)
from vardistill.errors import UsageError
from vardistill.objectives import DiffInstruct, VarDiU
from vardistill.posteriors.pictures import ConvGaussian
from vardistill.reports.page import write_report
from vardistill.runs.config import TrainingConfig
from vardistill.students.network import NetworkStudent, has_adapters
from vardistill.training import config_files
from vardistill.training.loop import Trainer, default_objective

TRAINING = TrainingConfig(
    steps=4,
    batch=8,
    log_every=2,
    eval_every=2,
    checkpoint_every=2,
    eval_samples=12,
    device="cpu",
    tracker="none",
)

METRICS = {"fd", "kd", "precision", "recall", "density", "coverage", "memorisation", "label_accuracy"}
COSTS = {"seconds_per_image", "teacher_seconds_per_image", "teacher_evaluations", "speedup", "samples"}

every_preset = pytest.mark.parametrize("preset", IMAGE_PRESETS)


class Killed(BaseException):
    """Stands for a kill: nothing is written after it."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_pictures.quick():
        yield


def config_of(preset: str, teacher: Path, **changes: Any) -> ImagesConfig:
    """The preset, small and short."""
    config = IMAGE_PRESETS[preset].config
    o: Any = config.objective
    if hasattr(getattr(o, "first", None), "width"):
        o = replace(o, first=replace(o.first, width=8))
    elif isinstance(o, ImageVarDiUConfig):
        o = replace(o, width=8)
    return replace(config, teacher=str(teacher), **({"objective": o, "training": TRAINING} | changes))


@pytest.fixture(scope="module")
def finished(teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An unbroken run of a preset with its report, made once."""

    @cache
    def make(preset: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiment, "write_report", write_report)
            return run_images(config_of(preset, teacher_run), tmp_path_factory.mktemp("runs") / preset).path

    return make


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "generator" / "model.safetensors")


def run_killed_at(step: int, config: ImagesConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed after as many updates, and then gone on with."""
    advance = Trainer.advance

    def advance_or_stop(trainer: Trainer, progress: float, head_start: bool) -> None:
        if trainer.step == step:
            raise Killed
        advance(trainer, progress, head_start)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", advance_or_stop)
        with pytest.raises(Killed):
            run_images(config, out)
    assert not (out / "generator").exists()
    run_images(config, out, resume=True)


def refused(match: str, config: ImagesConfig, out: Path) -> None:
    """In one line, and without a folder."""
    with pytest.raises(UsageError, match=match) as caught:
        run_images(config, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


# What is left


@every_preset
def test_a_run_leaves_what_its_reader_looks_at(preset: str, finished: Callable[[str], Path]) -> None:
    run = finished(preset)
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "checkpoints", "generator", "environment.json", "samples.png"}
    assert "classifier" not in names  # the teacher brings one
    table = json.loads((run / "evaluation.json").read_text())
    assert table.keys() == METRICS | COSTS
    assert all(math.isfinite(v) for v in table.values())
    assert (table["samples"], table["teacher_evaluations"]) == (12, 3)
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2, 4]
    assert all(line.keys() >= METRICS - {"memorisation"} for line in lines if line["kind"] == "eval")


@every_preset
def test_the_pictures_are_the_generators_and_the_teachers_from_the_same_noise(
    preset: str, finished: Callable[[str], Path], teacher_run: Path
) -> None:
    _, config, student = load_image_run(finished(preset))
    arrays = np.load(finished(preset) / "samples.npz")
    assert arrays["samples"].shape == (100, 1, 8, 8)
    assert (student.classes, student.training) == (10, False)
    z = student.latents(100, torch.Generator().manual_seed(config.training.seed + 1))
    labels = torch.arange(100) % 10
    with torch.no_grad():
        torch.testing.assert_close(student(z, labels=labels), torch.from_numpy(arrays["samples"]), rtol=1e-5, atol=1e-5)
    teacher = from_diffusers(teacher_run / "pipeline")
    theirs = torch.from_numpy(arrays["teacher"])
    assert theirs.shape == (100, 1, 8, 8)
    torch.testing.assert_close(sample(teacher, z, 2, labels=labels), theirs, rtol=1e-3, atol=1e-2)


@every_preset
def test_every_student_has_moved_away_from_its_teacher(
    preset: str, finished: Callable[[str], Path], teacher_run: Path
) -> None:
    (file,) = (teacher_run / "pipeline" / "unet").glob("*.safetensors")
    theirs = load_file(file)
    moved = {name for name, v in weights(finished(preset)).items() if not torch.equal(v, theirs[name.split(".", 2)[2]])}
    assert {name.removeprefix("denoiser.network.").split(".")[0] for name in moved} >= {
        "conv_in",
        "mid_block",
        "conv_out",
    }


# Killed and gone on


@pytest.mark.parametrize(("step", "preset"), [(1, "images-varflow"), *((3, preset) for preset in IMAGE_PRESETS)])
def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(
    step: int, preset: str, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the first checkpoint."""
    run_killed_at(step, config_files.read(ImagesConfig, finished(preset) / "config.yaml"), tmp_path, monkeypatch)
    ours, theirs = weights(tmp_path), weights(finished(preset))
    assert all(torch.equal(v, theirs[name]) for name, v in ours.items())


def test_a_run_is_finished_only_once_it_has_its_page(
    finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*ignored: object, **also: object) -> None:
        raise Killed

    config = config_files.read(ImagesConfig, finished("images-varflow") / "config.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "write_report", stop)
        with pytest.raises(Killed):
            run_images(config, tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    run_images(config, tmp_path, resume=True)
    ours, theirs = (json.loads((run / "evaluation.json").read_text()) for run in (tmp_path, finished("images-varflow")))
    assert {name: ours[name] for name in METRICS} == {name: theirs[name] for name in METRICS}


def test_an_unfinished_run_has_no_generator_yet(finished: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((finished("images-varflow") / "config.yaml").read_bytes())
    with pytest.raises(UsageError, match="has no finished generator yet"):
        load_image_run(tmp_path)


# Measured anew


def test_a_run_is_measured_anew(finished: Callable[[str], Path]) -> None:
    run = finished("images-diff-instruct")
    table, config = evaluate_run(run, 20, seed=5)
    assert table.keys() == METRICS | COSTS
    assert table["samples"] == 20
    assert json.loads((run / "evaluation.json").read_text()) == table
    assert config.teacher
    again, _ = evaluate_run(run, 20, seed=5)
    other, _ = evaluate_run(run, 20, seed=6)
    assert again["fd"] == table["fd"] != other["fd"]


def test_pictures_are_measured_with_the_classes_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the run goes, at its end, and anew; pictures to look at have all classes in turn."""
    labels: list[list[int]] = []

    def spy(pictures: Tensor, reference: Any, own: Tensor, **options: Any) -> dict[str, float]:
        labels.append(own.tolist())
        return {}

    monkeypatch.setattr(experiment, "measured", spy)
    teacher = tiny_pipeline_folder(tmp_path / "pipeline", tiny_unet(classes=3))
    pixels = np.random.default_rng(0).integers(256, size=(96, 8, 8), dtype=np.uint8)
    sets = {"train_images": pixels, "test_images": pixels}
    sets |= {"train_labels": np.arange(96) % 12 // 6 * (1 + np.arange(96) % 2), "test_labels": np.arange(96) % 3}
    np.savez(tmp_path / "x.npz", **sets)
    run = run_images(config_of("images-diff-instruct", teacher, data=str(tmp_path / "x.npz")), tmp_path / "run").path
    evaluate_run(run, 24, seed=0)
    assert labels == [[0] * 6 + [1] * 3 + [2] * 3] * 3 + [[0] * 12 + [1] * 6 + [2] * 6]


def test_labels_in_turn() -> None:
    labels = even_labels(5, 3)
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert even_labels(5, 0) is None


# Other students, teachers and data


@pytest.fixture(scope="module")
def adapted(teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a student with adapters."""
    config = config_of("images-varflow", teacher_run, generator=OneStepConfig(lora_rank=2))
    return run_images(config, tmp_path_factory.mktemp("adapted") / "run").path


def test_adapters_through_the_trainer(adapted: Path, teacher_run: Path) -> None:
    """What is trained is B A; what is saved is W + B A, and norms stay the teacher's."""
    _, _, student = load_image_run(adapted)
    assert not has_adapters(student)
    theirs = from_diffusers(teacher_run / "pipeline").state_dict()
    own = student.denoiser.state_dict()
    moved = {name for name, v in own.items() if not torch.allclose(v, theirs[name], atol=1e-7)}
    assert "network.conv_in.weight" in moved
    assert not any("norm" in name or name.endswith("bias") or "class_embedding" in name for name in moved)
    difference = own["network.mid_block.resnets.0.conv1.weight"] - theirs["network.mid_block.resnets.0.conv1.weight"]
    assert int(torch.linalg.matrix_rank(difference.flatten(1), rtol=1e-3)) <= 2


def test_an_adapted_run_resumes_to_the_same_bits(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_killed_at(3, config_files.read(ImagesConfig, adapted / "config.yaml"), tmp_path, monkeypatch)
    ours, theirs = weights(tmp_path), weights(adapted)
    assert all(torch.equal(v, theirs[name]) for name, v in ours.items())


def test_a_guided_teacher_gives_another_student(
    finished: Callable[[str], Path], teacher_run: Path, tmp_path: Path
) -> None:
    run_images(config_of("images-vardiu", teacher_run, guidance=3.0), tmp_path)
    ours, theirs = weights(tmp_path), weights(finished("images-vardiu"))
    assert not torch.equal(ours["denoiser.network.conv_in.weight"], theirs["denoiser.network.conv_in.weight"])


@pytest.mark.parametrize("space", ["classifier", "teacher"])
def test_varflow_in_other_spaces_and_from_the_teachers_own_pictures(
    space: Any, teacher_run: Path, tmp_path: Path
) -> None:
    o = ImageVarFlowConfig(space=space, real="teacher", real_samples=100, real_steps=2)
    run_images(config_of("images-varflow", teacher_run, objective=o), tmp_path)
    assert weights(tmp_path)


def test_pictures_for_a_pipeline_bring_a_classifier_of_the_runs_own(tmp_path: Path) -> None:
    teacher = tiny_pipeline_folder(tmp_path / "pipeline", tiny_unet(classes=3))
    data = save_npz(tmp_path / "x.npz", classes=3)
    run_images(config_of("images-vardiu", teacher, data=str(data)), tmp_path / "run")
    assert (tmp_path / "run" / "classifier" / "config.json").is_file()
    table = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert table.keys() == METRICS | COSTS


def train_with_diffusers(folder: Path) -> Path:
    """A DDPM as diffusers' own tutorial trains one, in four steps on noise: nothing here is vardistill's."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(4):
        clean = torch.rand(8, 3, 8, 8) * 2 - 1
        noise = torch.randn_like(clean)
        steps = torch.randint(0, 1000, (8,))
        prediction = network(scheduler.add_noise(clean, noise, steps), steps).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    diffusers.DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_with_diffusers(tmp_path_factory.mktemp("diffusers") / "ddpm")


@pytest.mark.parametrize("preset", ["images-diff-instruct", "images-vardiu"])
def test_a_pipeline_of_diffusers_is_distilled_without_data(preset: str, foreign: Path, tmp_path: Path) -> None:
    run = run_images(config_of(preset, foreign), tmp_path / "run").path
    assert json.loads((run / "evaluation.json").read_text()).keys() == COSTS
    _, _, student = load_image_run(run)
    assert (student.classes, student.data_shape) == (0, (3, 8, 8))
    assert student.sample(3).shape == (3, 3, 8, 8)
    with pytest.raises(UsageError, match="there is nothing to measure its own against"):
        evaluate_run(run, 12, seed=0)


def test_a_pipeline_of_diffusers_is_distilled_in_a_few_lines(foreign: Path, tmp_path: Path) -> None:
    teacher = from_diffusers(foreign)
    student = NetworkStudent.from_teacher(teacher)
    posterior = ConvGaussian(student.data_shape, student.latent_shape, student.data_std, width=8)
    objective = VarDiU(teacher, posterior, sigma_data=student.data_std)
    before = {name: v.clone() for name, v in student.state_dict().items()}
    run = vd.distill(student, objective=objective, training=TRAINING, out=tmp_path)
    assert [line["step"] for line in run.history if line["kind"] == "train"] == [2, 4]
    assert all(math.isfinite(line["loss"]) for line in run.history if line["kind"] == "train")
    assert any(not torch.equal(v, before[name]) for name, v in run.generator.state_dict().items())
    loaded = NetworkStudent.from_pretrained(tmp_path / "generator")
    assert torch.equal(loaded.sample(3), run.generator.sample(3))


def test_the_default_objective_takes_a_pipeline_too(foreign: Path) -> None:
    teacher = from_diffusers(foreign)
    run = vd.distill(NetworkStudent.from_teacher(teacher), teacher=teacher, training=replace(TRAINING, steps=2))
    assert run.generator.sample(2).isfinite().all()


def test_a_guided_teachers_critic_is_a_copy_of_what_is_guided(foreign: Path) -> None:
    teacher = Guided(from_diffusers(foreign), 2.0, {"labels": 3})
    student = NetworkStudent.from_teacher(from_diffusers(foreign))
    objective = default_objective(teacher, student)
    assert isinstance(objective, DiffInstruct)
    assert objective.teacher is teacher
    assert isinstance(objective.critic, DiffusersDenoiser)
    theirs = dict(teacher.denoiser.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in objective.critic.named_parameters())
    mixed = default_objective(Mixed(teacher), student)
    assert isinstance(mixed, DiffInstruct)
    assert isinstance(mixed.critic, Mixed)
    assert isinstance(mixed.critic.denoiser, DiffusersDenoiser)


def test_the_teacher_is_where_the_run_is_before_it_draws(
    teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device of tensors without data stands for an accelerator."""

    def stop(setting: Setting, *_: object) -> None:
        raise Killed(next(setting.teacher.denoiser.parameters()).device.type)

    monkeypatch.setattr(experiment, "find_device", lambda *_: torch.device("meta"))
    monkeypatch.setattr(experiment, "build_real_samples", stop)
    with pytest.raises(Killed, match="meta"):
        run_images(config_of("images-varflow", teacher_run), tmp_path)


def test_the_teachers_pictures_are_the_same_in_every_block(teacher_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision, where a block's size moves nothing but the last digits."""
    teacher = from_diffusers(teacher_run / "pipeline", dtype=torch.float64)
    student, seen = NetworkStudent.from_teacher(teacher), []

    class Watched(Guided):
        """Keeps how many rows it is given."""

        def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
            seen.append(len(x_t))
            return super().forward(x_t, t, **condition)

    watched = Watched(teacher, 1.0, {"labels": 10})
    whole = experiment.teachers_pictures(student, watched, 7, seed=0)
    monkeypatch.setattr(experiment, "BLOCK", 3)
    seen.clear()
    torch.testing.assert_close(experiment.teachers_pictures(student, watched, 7, seed=0), whole)
    assert set(seen) == {3, 1}


# Refused before anything is left


def test_what_cannot_be_trained_leaves_no_folder(teacher_run: Path, foreign: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    own = config_of("images-vardiu", teacher_run)
    varflow = config_of("images-varflow", foreign)
    other = save_npz(tmp_path / "rgb.npz", classes=3, channels=3)
    few = save_npz(tmp_path / "few.npz", 30, classes=3)
    unlabelled = save_npz(tmp_path / "unlabelled.npz")
    refused("VarFlow learns from pictures: give --data", varflow, out)
    in_classes = replace(varflow, objective=ImageVarFlowConfig(space="classifier"))
    refused("the classifier's space needs a classifier", in_classes, out)
    refused("guidance needs a conditional teacher", replace(varflow, guidance=2.0), out)
    refused("metrics need at least 6", replace(own, data=str(few)), out)
    refused("metrics need at least 6", replace(own, data=str(save_npz(tmp_path / "f.npz", 30))), out)
    refused("metrics need at least 6", replace(own, training=replace(TRAINING, eval_samples=5)), out)
    refused("there is no device 'cuda:99'", replace(own, training=replace(TRAINING, device="cuda:99")), out)
    refused("divisible by 2", config_of("images-varflow", teacher_run, training=replace(TRAINING, batch=9)), out)
    refused("nowhere' is neither a saved classifier", replace(own, features=str(tmp_path / "nowhere")), out)
    wrong = replace(varflow, data=str(other), features=str(teacher_run / "classifier"))
    refused(r"reads pictures of shape \(1, 8, 8\)", wrong, out)
    asked = config_of("images-varflow", teacher_run, data=str(unlabelled))
    refused("labels were asked for, but the pictures have none", asked, out)
    refused("accumulate", replace(own, training=replace(TRAINING, accumulate=3)), out)
    refused("a head start is for", replace(varflow, training=replace(TRAINING, head_start=0.3)), out)


def test_a_folder_in_use_is_refused(teacher_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match="is not empty"):
        run_images(config_of("images-vardiu", teacher_run), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_is_none_is_not_resumed(teacher_run: Path, tmp_path: Path) -> None:
    config = config_of("images-diff-instruct", teacher_run, objective=ImageDiffInstructConfig())
    with pytest.raises(UsageError, match="is not a run folder"):
        run_images(config, tmp_path / "nowhere", resume=True)
