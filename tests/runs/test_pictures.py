"""Whole runs on pictures, small: every preset from its teacher to its report, and from where it was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import small_pictures
import vardistill as vd
from small_pictures import save_npz
from tiny_models import tiny_pipeline_folder, tiny_unet
from vardistill.denoisers import Adapted, DiffusersDenoiser, Guided, Mixed, from_diffusers
from vardistill.diffusion.samplers import sample
from vardistill.domains.pictures import config as pictures_config, parts
from vardistill.domains.pictures.config import NetworkStudentConfig
from vardistill.domains.pictures.evaluate import even_labels
from vardistill.domains.pictures.parts import Pictures
from vardistill.domains.pictures.sources import load_images
from vardistill.errors import UsageError
from vardistill.objectives import DiffInstruct, VarDiU
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.registry import SumConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.posteriors.pictures import ConvGaussian
from vardistill.reports.page import write_report
from vardistill.runs import experiment
from vardistill.runs.config import Config
from vardistill.runs.experiment import evaluate_run, load_run, run_experiment
from vardistill.runs.presets import PICTURES, PRESETS
from vardistill.students.network import NetworkStudent
from vardistill.training import config_files
from vardistill.training.config import TrainingConfig
from vardistill.training.defaults import default_objective
from vardistill.training.fitting import Fit
from vardistill.training.loop import Trainer

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
COSTS = {"evaluations", "seconds_per_image", "teacher_seconds_per_image", "teacher_evaluations", "speedup", "samples"}

NAMES = [f"images-{name}" for name in PICTURES]

every_preset = pytest.mark.parametrize("preset", NAMES)


class Killed(BaseException):
    """Stands for a kill: nothing is written after it."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_pictures.quick():
        yield


def small(objective: Any) -> Any:
    """The objective with small posteriors."""
    if isinstance(objective, SumConfig):
        terms = [replace(part, objective=small(part.objective)) for part in objective.parts]
        return SumConfig(tuple(terms))
    return replace(objective, posterior_width=8) if isinstance(objective, VarDiUConfig) else objective


def config_of(preset: str, teacher: Path | str, training: TrainingConfig = TRAINING, **changes: Any) -> Config:
    """The preset, small and short; changes are of the domain, or of the objective."""
    config = PRESETS[preset].config
    objective = changes.pop("objective", small(config.objective))
    domain: Any = replace(config.domain, teacher=str(teacher), **changes)
    return replace(config, domain=domain, objective=objective, training=training)


@pytest.fixture(scope="module")
def finished(teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An unbroken run of a preset with its report, made once."""

    @cache
    def make(preset: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiment, "write_report", write_report)
            return run_experiment(config_of(preset, teacher_run), tmp_path_factory.mktemp("runs") / preset).path

    return make


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "generator" / "model.safetensors")


def run_killed_at(step: int, config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed after as many updates, and then gone on with."""
    advance = Trainer.advance

    def advance_or_stop(trainer: Trainer, progress: float, head_start: bool = False) -> None:
        if trainer.step == step:
            raise Killed
        advance(trainer, progress, head_start)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", advance_or_stop)
        with pytest.raises(Killed):
            run_experiment(config, out)
    assert not (out / "generator").exists()
    run_experiment(config, out, resume=True)


def refused(match: str, config: Config, out: Path) -> None:
    """In one line, and without a folder."""
    with pytest.raises(UsageError, match=match) as caught:
        run_experiment(config, out)
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
    _, config, student = load_run(finished(preset))
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


@pytest.mark.parametrize(("step", "preset"), [(1, "images-varflow"), *((3, preset) for preset in NAMES)])
def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(
    step: int, preset: str, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the first checkpoint."""
    run_killed_at(step, config_files.read(Config, finished(preset) / "config.yaml"), tmp_path, monkeypatch)
    ours, theirs = weights(tmp_path), weights(finished(preset))
    assert all(torch.equal(v, theirs[name]) for name, v in ours.items())


def test_a_run_is_finished_only_once_it_has_its_page(
    finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*ignored: object, **also: object) -> None:
        raise Killed

    config = config_files.read(Config, finished("images-varflow") / "config.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "write_report", stop)
        with pytest.raises(Killed):
            run_experiment(config, tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    run_experiment(config, tmp_path, resume=True)
    ours, theirs = (json.loads((run / "evaluation.json").read_text()) for run in (tmp_path, finished("images-varflow")))
    assert {name: ours[name] for name in METRICS} == {name: theirs[name] for name in METRICS}


def test_an_unfinished_run_has_no_generator_yet(finished: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((finished("images-varflow") / "config.yaml").read_bytes())
    with pytest.raises(UsageError, match="has no finished generator yet"):
        load_run(tmp_path)


# Measured anew


def test_a_run_is_measured_anew(finished: Callable[[str], Path]) -> None:
    run = finished("images-diff-instruct")
    table, domain = evaluate_run(run, 20, seed=5)
    assert table.keys() == METRICS | COSTS
    assert table["samples"] == 20
    assert json.loads((run / "evaluation.json").read_text()) == table
    assert domain.beside().keys() == {"teacher, 2 steps", "teacher, 3 steps", "held-out data"}
    again, _ = evaluate_run(run, 20, seed=5)
    other, _ = evaluate_run(run, 20, seed=6)
    assert again["fd"] == table["fd"] != other["fd"]


def test_pictures_are_measured_with_the_classes_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the run goes, at its end, and anew; pictures to look at have all classes in turn."""
    labels: list[list[int]] = []

    def spy(pictures: Tensor, reference: Any, own: Tensor, **options: Any) -> dict[str, float]:
        labels.append(own.tolist())
        return {}

    monkeypatch.setattr(parts, "measured", spy)
    teacher = tiny_pipeline_folder(tmp_path / "pipeline", tiny_unet(classes=3))
    pixels = np.random.default_rng(0).integers(256, size=(96, 8, 8), dtype=np.uint8)
    sets = {"train_images": pixels, "test_images": pixels}
    sets |= {"train_labels": np.arange(96) % 12 // 6 * (1 + np.arange(96) % 2), "test_labels": np.arange(96) % 3}
    np.savez(tmp_path / "x.npz", **sets)
    run = run_experiment(
        config_of("images-diff-instruct", teacher, data=str(tmp_path / "x.npz")), tmp_path / "run"
    ).path
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
    """A run of a student and a critic with adapters on one teacher."""
    objective = DiffInstructConfig(critic_steps=2, critic_start="teacher", critic_rank=2)
    student = NetworkStudentConfig(lora_rank=2)
    config = config_of("images-diff-instruct", teacher_run, objective=objective, student=student)
    return run_experiment(config, tmp_path_factory.mktemp("adapted") / "run").path


def test_adapters_through_the_trainer(adapted: Path, teacher_run: Path) -> None:
    """What is trained is B A; what is saved is W + B A, and norms stay the teacher's."""
    _, _, student = load_run(adapted)
    assert not isinstance(student.denoiser, Adapted)
    theirs = from_diffusers(teacher_run / "pipeline").state_dict()
    own = student.denoiser.state_dict()
    moved = {name for name, v in own.items() if not torch.allclose(v, theirs[name], atol=1e-7)}
    assert "network.conv_in.weight" in moved
    assert not any("norm" in name or name.endswith("bias") or "class_embedding" in name for name in moved)
    difference = own["network.mid_block.resnets.0.conv1.weight"] - theirs["network.mid_block.resnets.0.conv1.weight"]
    assert int(torch.linalg.matrix_rank(difference.flatten(1), rtol=1e-3)) <= 2


def test_a_checkpoint_of_adapters_holds_them_alone(adapted: Path) -> None:
    *_, last = sorted((adapted / "checkpoints").iterdir())
    names = {name.partition("/")[::2] for name in load_file(last / "state.safetensors")}
    prefixes = {"network.student": "denoiser.adapters.", "network.critic": "adapters.", "average": "denoiser.adapters."}
    for section, prefix in prefixes.items():
        own = [name for part, name in names if part == section]
        assert own
        assert all(name.startswith(prefix) and ".lora_" in name for name in own)


def test_an_adapted_run_resumes_to_the_same_bits(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_killed_at(3, config_files.read(Config, adapted / "config.yaml"), tmp_path, monkeypatch)
    ours, theirs = weights(tmp_path), weights(adapted)
    assert all(torch.equal(v, theirs[name]) for name, v in ours.items())


def test_a_guided_teacher_gives_another_student(
    finished: Callable[[str], Path], teacher_run: Path, tmp_path: Path
) -> None:
    run_experiment(config_of("images-vardiu", teacher_run, guidance=3.0), tmp_path)
    ours, theirs = weights(tmp_path), weights(finished("images-vardiu"))
    assert not torch.equal(ours["denoiser.network.conv_in.weight"], theirs["denoiser.network.conv_in.weight"])


@pytest.mark.parametrize("space", ["classifier", "teacher"])
def test_varflow_in_other_spaces_and_from_the_teachers_own_pictures(
    space: Any, teacher_run: Path, tmp_path: Path
) -> None:
    o = VarFlowConfig(space=space, real="teacher", real_samples=200, real_steps=2)
    run_experiment(config_of("images-varflow", teacher_run, objective=o), tmp_path)
    assert weights(tmp_path)


def test_pictures_for_a_pipeline_bring_a_classifier_of_the_runs_own(tmp_path: Path) -> None:
    teacher = tiny_pipeline_folder(tmp_path / "pipeline", tiny_unet(classes=3))
    data = save_npz(tmp_path / "x.npz", classes=3)
    run_experiment(config_of("images-vardiu", teacher, data=str(data)), tmp_path / "run")
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
    run = run_experiment(config_of(preset, foreign), tmp_path / "run").path
    assert json.loads((run / "evaluation.json").read_text()).keys() == COSTS
    _, _, student = load_run(run)
    assert (student.classes, student.data_shape) == (0, (3, 8, 8))
    assert student.sample(3).shape == (3, 3, 8, 8)
    with pytest.raises(UsageError, match="nothing to measure the run's pictures against: the run has no pictures"):
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

    def stop(*_: object) -> Any:
        monkeypatch.setattr(Pictures, "real", lambda domain, *_: kill(domain))
        return load_images("digits").train.take

    def kill(domain: Pictures) -> None:
        raise Killed(next(domain.source.denoiser.parameters()).device.type)

    monkeypatch.setattr(parts, "find_device", lambda *_: torch.device("meta"))
    monkeypatch.setattr(experiment, "check_samples", lambda *_: None)
    monkeypatch.setattr(Pictures, "real", stop)
    with pytest.raises(Killed, match="meta"):
        run_experiment(config_of("images-varflow", teacher_run), tmp_path)


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
    whole = parts.teachers_pictures(student, watched, 7, seed=0)
    monkeypatch.setattr(parts, "BLOCK", 3)
    seen.clear()
    torch.testing.assert_close(parts.teachers_pictures(student, watched, 7, seed=0), whole)
    assert set(seen) == {3, 1}


def test_few_pictures_are_trained_with_and_nothing_is_measured(
    teacher_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(save_npz(tmp_path / "few.npz", 30, classes=3))
    run = run_experiment(config_of("images-varflow", teacher_run, data=data), tmp_path / "run").path
    assert json.loads((run / "evaluation.json").read_text()).keys() == COSTS
    told = "3 classes (0: 10, 1: 10, 2: 10); nothing is measured: metrics need at least 6 held-out pictures, and there"
    assert told in capsys.readouterr().err
    with pytest.raises(UsageError, match="pictures against: metrics need at least 6 held-out pictures"):
        evaluate_run(run, 12, seed=0)


# Refused before anything is left


def test_what_cannot_be_trained_leaves_no_folder(teacher_run: Path, foreign: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    own, without = partial(config_of, "images-vardiu", teacher_run), partial(config_of, "images-varflow", foreign)
    other = save_npz(tmp_path / "rgb.npz", classes=3, channels=3)
    unlabelled = save_npz(tmp_path / "unlabelled.npz")
    refused("real samples are pictures: give --data", without(), out)
    refused("the classifier's space needs a classifier", without(objective=VarFlowConfig(space="classifier")), out)
    refused("guidance needs a conditional teacher", without(guidance=2.0), out)
    few = own(data=str(save_npz(tmp_path / "f.npz", 30)), features=str(teacher_run / "classifier"))
    refused("metrics need at least 6 held-out pictures, and there are 3: leave out --features", few, out)
    refused("eval_samples must be at least 6", own(replace(TRAINING, eval_samples=5)), out)
    refused("there is no device 'cuda:99'", own(replace(TRAINING, device="cuda:99")), out)
    refused("divisible by 2", config_of("images-varflow", teacher_run, replace(TRAINING, batch=9)), out)
    refused("there is no folder .*nowhere", own(features=str(tmp_path / "nowhere")), out)
    wrong = without(data=str(other), features=str(teacher_run / "classifier"))
    refused(r"reads pictures of shape \(1, 8, 8\)", wrong, out)
    asked = config_of("images-varflow", teacher_run, data=str(unlabelled))
    refused("labels were asked for, but the pictures have none", asked, out)
    refused("accumulate", own(replace(TRAINING, accumulate=3)), out)
    refused("a head start is for", without(replace(TRAINING, head_start=0.3), data=str(other)), out)
    refused("batch have other conditions", own(objective=VarDiUConfig(candidates="batch")), out)
    refused("unknown posterior of pictures 'nsf'", own(objective=VarDiUConfig(posterior="nsf")), out)
    several = NetworkStudentConfig(steps_per_sample=2)
    candidates = VarDiUConfig(posterior="diagonal", posterior_width=8, candidates=2)
    refused("candidates drawn from a posterior, and chains, need", own(student=several, objective=candidates), out)


def test_a_folder_in_use_is_refused(teacher_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match="is not empty"):
        run_experiment(config_of("images-vardiu", teacher_run), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_is_none_is_not_resumed(teacher_run: Path, tmp_path: Path) -> None:
    config = config_of("images-diff-instruct", teacher_run)
    with pytest.raises(UsageError, match="is not a run folder"):
        run_experiment(config, tmp_path / "nowhere", resume=True)


# Students of several steps


@pytest.mark.slow
def test_a_student_of_several_steps_is_trained_measured_and_resumed(
    teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = NetworkStudentConfig(steps_per_sample=2)
    config = config_of("images-vardiu-varflow", teacher_run, student=student)
    unbroken = run_experiment(config, tmp_path / "unbroken").path
    table = json.loads((unbroken / "evaluation.json").read_text())
    assert table["evaluations"] == 2
    (tmp_path / "run").mkdir()
    run_killed_at(3, config, tmp_path / "run", monkeypatch)
    ours, theirs = weights(tmp_path / "run"), weights(unbroken)
    assert all(torch.equal(v, theirs[name]) for name, v in ours.items())
    _, _, loaded = load_run(unbroken)
    arrays = np.load(unbroken / "samples.npz")
    own = loaded.sample(100, seed=TRAINING.seed + 1, labels=torch.arange(100) % 10, block=parts.BLOCK)
    torch.testing.assert_close(own, torch.from_numpy(arrays["samples"]), rtol=1e-5, atol=1e-5)


# Without a teacher: one is fitted first


@pytest.fixture
def short_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit of a teacher to data in four steps, with a checkpoint after the second."""
    monkeypatch.setattr(pictures_config, "fit_of", lambda data: replace(small_pictures.TEACH, data=data))


@pytest.mark.slow
def test_a_run_without_a_teacher_fits_one_first(short_fit: None, teacher_run: Path, tmp_path: Path) -> None:
    """That of `vardistill teach`, to the bit; and the student is that of a run with this teacher."""
    run = run_experiment(config_of("digits-diff-instruct", ""), tmp_path / "run").path
    given = run_experiment(config_of("images-diff-instruct", teacher_run), tmp_path / "given").path
    ours, theirs = weights(run), weights(given)
    assert all(torch.equal(v, theirs[name]) for name, v in ours.items())
    name = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (run / "teacher" / name).read_bytes() == (teacher_run / name).read_bytes()
    assert (run / "teacher" / "evaluation.json").is_file()
    table = json.loads((run / "evaluation.json").read_text())
    assert table.keys() == METRICS | COSTS
    _, domain = evaluate_run(run, 20, seed=5)
    assert domain.beside().keys() == {"teacher, 2 steps", "teacher, 3 steps", "held-out data"}
    page = write_report(experiment.RunFolder(run)).read_text()
    assert "teacher <b>digits</b>" in page


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_a_teachers_fit_that_is_killed_goes_on_with_the_run(
    step: int, short_fit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the fit's first checkpoint; nothing is fitted twice."""
    config = config_of("digits-varflow", "")
    unbroken, advance, steps = run_experiment(config, tmp_path / "unbroken").path, Fit.advance, []

    def advance_or_die(fit: Fit[Any], progress: float) -> Any:
        steps.append(fit.step)
        if len(steps) == step + 1:
            raise Killed
        return advance(fit, progress)

    monkeypatch.setattr(Fit, "advance", advance_or_die)
    with pytest.raises(Killed):
        run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run" / "generator").exists()
    run = run_experiment(config, tmp_path / "run", resume=True).path
    assert steps[step + 1 :] == list(range(step // 2 * 2, 4))
    ours, theirs = weights(run), weights(unbroken)
    assert all(torch.equal(v, theirs[name]) for name, v in ours.items())
    steps.clear()
    run_experiment(config, run, resume=True)
    assert not steps


def test_a_fit_that_was_killed_before_it_began_starts_anew(short_fit: None, tmp_path: Path) -> None:
    """Its folder is there, and nothing in it but the trace of a kill."""
    config = config_of("digits-varflow", "")
    (tmp_path / "run" / "teacher").mkdir(parents=True)
    (tmp_path / "run" / "teacher" / "environment.json").write_text("{}")
    config_files.write(config, tmp_path / "run" / "config.yaml")
    run = run_experiment(config, tmp_path / "run", resume=True).path
    assert (run / "teacher" / "evaluation.json").is_file()


def test_what_cannot_be_fitted_leaves_no_folder(tmp_path: Path) -> None:
    refused("unknown image source 'digit'", config_of("digits-varflow", "", data="digit"), tmp_path / "run")
    odd = save_npz(tmp_path / "odd.npz", classes=2, size=6)
    refused("do not halve 2 times", config_of("digits-varflow", "", data=str(odd)), tmp_path / "run")
