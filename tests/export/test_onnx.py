"""Exports: ONNX files compute the same x, pipelines hold merged adapters, mistakes get one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tiny_models import tiny_unet
from vardistill.cli import main as cli
from vardistill.denoisers import DiffusersDenoiser, Preconditioned, from_diffusers
from vardistill.domains.pictures.config import PicturesConfig
from vardistill.errors import UsageError
from vardistill.export import onnx as export
from vardistill.export.onnx import export_diffusers, export_onnx, onnx_error, traceable
from vardistill.networks import LevelMLP
from vardistill.runs.config import Config
from vardistill.students import MLP, DenoisingStudent, NetworkStudent, from_teacher
from vardistill.training.config_files import write


def mlp() -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP(latent=3, data=2, depth=1, width=8, data_std=2.0, fourier=4)


def student(
    classes: int | None = 3,
    scheduler: diffusers.SchedulerMixin | None = None,
    steps: int = 1,
    rank: int = 0,
    **options: Any,
) -> NetworkStudent:
    teacher = DiffusersDenoiser(tiny_unet(classes, **options), scheduler or diffusers.EDMEulerScheduler())
    return NetworkStudent.from_teacher(teacher, steps=steps, rank=rank).eval()


def adapted(steps: int = 1) -> NetworkStudent:
    """A student whose adapters matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        s = student(steps=steps, rank=2)
        for name, parameter in s.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return s


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run on pictures, as far as exports look at it."""
    folder = tmp_path / "run"
    student().save_pretrained(folder / "generator")
    write(Config(PicturesConfig("elsewhere/runs/unet-teacher")), folder / "config.yaml")
    return folder


def test_a_perceptrons_onnx_file_computes_its_x(tmp_path: Path) -> None:
    error = export_onnx(mlp(), tmp_path / "generator.onnx")
    assert error <= 1e-5
    assert onnx_error(mlp(), tmp_path / "generator.onnx") == error
    other = mlp()
    other.data_mean = 1.0
    assert onnx_error(other, tmp_path / "generator.onnx") == pytest.approx(1, abs=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["generator.onnx"]


def of_points() -> DenoisingStudent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return from_teacher(Preconditioned(LevelMLP(2, 2, depth=1, width=8), 0.5), steps=2, data_shape=(2,))


STUDENTS = {
    "ddpm": lambda: student(None, diffusers.DDPMScheduler()),
    "adapted-2": lambda: adapted(steps=2),
    "flow-2": lambda: student(None, diffusers.FlowMatchEulerDiscreteScheduler(), steps=2),
    "variance-labels-4": lambda: student(3, diffusers.DDPMScheduler(), steps=4, channels=3, out_channels=6),
    "latents-v": lambda: student(None, diffusers.DDIMScheduler(prediction_type="v_prediction"), channels=4),
    "points-2": of_points,
}


@pytest.mark.slow
@pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS)
def test_a_students_onnx_file_computes_its_x(make: Callable[[], DenoisingStudent], tmp_path: Path) -> None:
    """And the printed lines draw samples by it."""
    s, path, names = make(), tmp_path / "generator.onnx", dict[str, Any]()
    assert export_onnx(s, path) <= 2e-5
    exec(export.onnx_usage(s, path), names)
    given = {name: torch.from_numpy(names[name]) for name in ("z", "renoise", "labels") if name in names}
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(names["x"]), s(**given), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("scheduler", [diffusers.EDMEulerScheduler, diffusers.DDPMScheduler])
@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_traced_is_the_student(scheduler: type[diffusers.SchedulerMixin], steps: int) -> None:
    s = student(scheduler=scheduler(), steps=steps)
    given = export.inputs(s, 3)
    assert list(given) == (["z", "labels"] if steps == 1 else ["z", "renoise", "labels"])
    with torch.no_grad():
        torch.testing.assert_close(traceable(s)(**given), s(**given), rtol=1e-5, atol=1e-5)


def test_a_file_that_differs_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "write_onnx", lambda function, example, path: path.write_bytes(b""))
    monkeypatch.setattr(export, "onnx_error", lambda generator, path: float("nan"))
    with pytest.raises(RuntimeError, match="differs by nan from the generator's, more than 0.0001"):
        export_onnx(mlp(), tmp_path / "generator.onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(UsageError, match=r"need onnxruntime: pip install 'vardistill\[onnx\]'"):
        export_onnx(mlp(), tmp_path / "generator.onnx")


def test_weights_beyond_the_format_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST_ONNX", 100)
    with pytest.raises(UsageError, match="2 GiB"):
        export_onnx(mlp(), tmp_path / "generator.onnx")


def test_conditions_but_labels_are_refused(tmp_path: Path) -> None:
    class OfText(MLP):
        condition_names = ("labels", "encoder_hidden_states")

    with pytest.raises(UsageError, match="take labels as a condition, but no encoder_hidden_states"):
        export_onnx(OfText(depth=1, width=4), tmp_path / "generator.onnx")


def test_adapters_are_merged_into_the_pipeline(tmp_path: Path) -> None:
    s = adapted()
    lines = export_diffusers(s, tmp_path / "student", "a card")
    assert str(tmp_path / "student") in lines
    assert (tmp_path / "student" / "README.md").read_text() == "a card"
    back, z, labels = from_diffusers(tmp_path / "student"), s.latents(3, torch.Generator()), torch.tensor([0, 2, 1])
    with torch.no_grad():
        found = back(s.input_scale(1) * z, torch.ones(3), labels=labels)
        torch.testing.assert_close(found, s(z, labels=labels), rtol=1e-5, atol=1e-5)
        assert (found - student()(z, labels=labels)).abs().max() > 1e-3


def test_a_perceptron_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="MLP is no network of diffusers: export it to onnx"):
        export_diffusers(mlp(), tmp_path / "student")


def test_the_command_writes_a_pipeline_and_tells_how_to_load_it(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", str(run), "--to", "diffusers", "--out", str(run.parent / "out")]) == 0
    printed = capfd.readouterr().out
    assert f'DiffusionPipeline.from_pretrained("{run.parent / "out"}", trust_remote_code=True)' in printed
    card = (run.parent / "out" / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "`unet-teacher`" in card
    assert "elsewhere" not in card
    assert json.loads((run.parent / "out" / "model_index.json").read_text())["steps"] == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "export needs a run folder"),
        (["nowhere"], "no such folder"),
        (["RUN", "--to", "gguf"], "gguf"),
        (["RUN", "--out", "RUN"], "not an empty folder"),
    ],
)
def test_mistakes_get_one_line(words: list[str], line: str, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", *(str(run) if word == "RUN" else word for word in words)]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert line in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_the_command_writes_an_onnx_file(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(export, "export_onnx", lambda generator, path: given.append((generator.classes, path)) or 3e-7)
    assert cli.run(["export", str(run), "--to", "onnx"]) == 0
    assert given == [(3, run / "generator.onnx")]
    printed = capfd.readouterr().out
    assert "at most 3e-07" in printed
    assert '{"z": z, "labels": labels}' in printed
    compile(printed.split("\n\n", 1)[1], "printed", "exec")
