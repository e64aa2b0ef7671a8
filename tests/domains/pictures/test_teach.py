"""Teachers of pictures: what the folder holds, killed fits that end as unbroken ones, labels left out, budgets."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import small_pictures
from small_pictures import TEACH, save_npz
from vardistill.denoisers import from_diffusers
from vardistill.diffusion.schedules import VE
from vardistill.domains.pictures import teach
from vardistill.domains.pictures.classifier import load_classifier
from vardistill.domains.pictures.config import PicturesTeachConfig
from vardistill.domains.pictures.data import ImageData
from vardistill.domains.pictures.evaluate import Reference, Table, even_labels
from vardistill.domains.pictures.sources import load_images
from vardistill.domains.pictures.teach import build_fit, drawn, evaluate_teacher, teach_images
from vardistill.errors import UsageError
from vardistill.training import checkpoints, fitting
from vardistill.training.config import TrainingConfig
from vardistill.training.fitting import Fit
from vardistill.training.folder import RunFolder, create
from vardistill.training.loop import Diverged, Interrupted


class Killed(BaseException):
    """Stands for a kill: nothing is written after it."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_pictures.quick():
        yield


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images("digits")


def weights(run: Path) -> dict[str, Tensor]:
    """Of the finished teacher."""
    (file,) = (run / "pipeline" / "unet").glob("*.safetensors")
    return load_file(file)


def assert_same(a: Path, b: Path) -> None:
    """The same teachers and the same last checkpoints, to the bit."""
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[name]) for name, v in ours.items())
    states = [checkpoints.load(checkpoints.latest(run / "checkpoints")) for run in (a, b)]
    assert states[0].step == states[1].step
    for section, tensors in states[0].tensors.items():
        assert all(torch.equal(v, states[1].tensors[section][name]) for name, v in tensors.items()), section


def at_step(step: int, event: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen at the beginning of the update after `step` updates."""
    advance = Fit.advance

    def advance_or(fit: Fit[Any], progress: float) -> Tensor:
        if fit.step == step:
            event()
        return advance(fit, progress)

    monkeypatch.setattr(Fit, "advance", advance_or)


def killed() -> None:
    raise Killed


# What is left


def test_a_teacher_leaves_everything_that_its_students_need(teacher_run: Path) -> None:
    names = {path.name for path in teacher_run.iterdir()}
    assert names >= {"config.yaml", "checkpoints", "pipeline", "classifier", "evaluation.json", "samples.png"}
    assert json.loads((teacher_run / "environment.json").read_text())["torch"] == torch.__version__
    assert (teacher_run / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert load_classifier(teacher_run / "classifier").shape == (1, 8, 8)
    table = json.loads((teacher_run / "evaluation.json").read_text())
    assert table.keys() == {"2 steps", "3 steps", "held-out data"}
    assert {"fd", "kd", "precision", "recall", "memorisation", "label_accuracy"} <= table["2 steps"].keys()
    assert [table[f"{n} steps"]["evaluations"] for n in (2, 3)] == [3, 5]
    assert table["3 steps"]["samples"] == TEACH.eval_samples
    assert table["held-out data"].keys() == {"fd", "kd"}
    assert all(math.isfinite(v) for column in table.values() for v in column.values())


def test_the_pipeline_is_the_moving_average(teacher_run: Path) -> None:
    teacher = from_diffusers(teacher_run / "pipeline")
    state = checkpoints.load(checkpoints.latest(teacher_run / "checkpoints"))
    assert state.step == TEACH.steps
    own, average = teacher.state_dict(), state.tensors["average"]
    assert own.keys() == average.keys()
    assert all(torch.equal(v, average[name]) for name, v in own.items())
    assert any(not torch.equal(v, state.tensors["denoiser"][name]) for name, v in own.items())
    assert (teacher.data_shape, teacher.classes, teacher.null_label) == ((1, 8, 8), 10, 10)
    assert teacher.schedule == VE(TEACH.sigma_min, TEACH.sigma_max)
    assert teacher.scheduler.config.sigma_data == load_images("digits").std


def test_the_average_is_no_part_of_a_graph(digits: ImageData) -> None:
    """A graph through all its updates would grow with every step."""
    fit = build_fit(TEACH, digits)
    before = {name: v.clone() for name, v in fit.average.state_dict().items()}
    fit.advance(0.0)
    assert not any(p.requires_grad for p in fit.average.parameters())
    for name, v in fit.average.state_dict().items():  # a tenth of the way back: d = 1/10
        torch.testing.assert_close(v, torch.lerp(before[name], fit.denoiser.state_dict()[name], 0.9))


# Stopped and gone on


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_killed_fit_resumes_to_the_bits_of_an_unbroken_one(
    step: int, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, at and after the first checkpoint."""
    with monkeypatch.context() as patch:
        at_step(step, killed, patch)
        with pytest.raises(Killed):
            teach_images(TEACH, tmp_path / "run")
    assert not (tmp_path / "run" / "pipeline").exists()
    teach_images(TEACH, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", teacher_run)


def test_ctrl_c_keeps_the_step_reached(teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        with pytest.raises(Interrupted, match="stopped at step 3"):
            teach_images(TEACH, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoints.latest(tmp_path / "run" / "checkpoints").name == "step-00000003"
    teach_images(TEACH, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", teacher_run)


def test_resuming_a_finished_fit_changes_nothing(
    teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its evaluation: the pipeline is there, the table is not.

    More steps stand for a budget that is not spent yet by the clock of the last checkpoint.
    """
    with monkeypatch.context() as patch:
        patch.setattr(teach, "evaluate_teacher", lambda *ignored: killed())
        with pytest.raises(Killed):
            teach_images(TEACH, tmp_path / "run")
    at_step(TEACH.steps, killed, monkeypatch)
    teach_images(replace(TEACH, steps=8), tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", teacher_run)
    ours, theirs = (json.loads((run / "evaluation.json").read_text()) for run in (tmp_path / "run", teacher_run))
    assert ours["2 steps"]["fd"] == theirs["2 steps"]["fd"]


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path, digits: ImageData) -> None:
    saved = checkpoints.save(tmp_path, build_fit(TEACH, digits).state(), keep=1)
    other = build_fit(replace(TEACH, conditional=False), digits)
    with pytest.raises(UsageError, match="the checkpoint is of another model"):
        other.restore(saved)


def test_a_pipeline_whose_checkpoints_are_gone_is_left_alone(tmp_path: Path) -> None:
    config = replace(TEACH, data=str(save_npz(tmp_path / "x.npz", 20, size=4)))
    run = teach_images(config, tmp_path / "run")
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UsageError, match="nothing to resume"):
        teach_images(config, run.path, resume=True)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match="is not empty"):
        teach_images(TEACH, tmp_path)


# Steps that are not finite


def infinite_gradient(loss: Tensor) -> Tensor:
    """A finite loss whose gradient is not: √ at 0."""
    return loss + (loss - loss).sqrt()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda loss: loss * math.nan, id="NaN"),
        pytest.param(lambda loss: loss + math.nan, id="NaN with a finite gradient"),
        pytest.param(lambda loss: loss * math.inf, id="infinite"),
        pytest.param(infinite_gradient, id="infinite gradient"),
    ],
)
def test_a_step_that_is_not_finite_leaves_all_alone(
    spoil: Callable[[Tensor], Tensor], digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the average, which goes on towards the weights: d = 2/11."""
    fit, original = build_fit(TEACH, digits), teach.dsm_loss
    fit.advance(0.0)
    before = fit.state().tensors
    before = {section: {name: v.clone() for name, v in tensors.items()} for section, tensors in before.items()}
    with monkeypatch.context() as patch:
        patch.setattr(teach, "dsm_loss", lambda *inputs, **condition: spoil(original(*inputs, **condition)))
        fit.advance(0.5)
    after = fit.state().tensors
    for section in ("denoiser", "optimizer"):
        assert all(torch.equal(v, after[section][name]) for name, v in before[section].items()), section
    for name, v in after["average"].items():
        torch.testing.assert_close(v, torch.lerp(before["average"][name], after["denoiser"][name], 9 / 11))
    fit.advance(0.5)
    assert any(not torch.equal(v, before["denoiser"][name]) for name, v in fit.denoiser.state_dict().items())
    assert float(fit.skipped) == 1


def test_too_many_end_the_fit_with_a_state_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TEACH, data=str(save_npz(tmp_path / "x.npz", 20, size=4)), max_skipped=1)
    original, run = teach.dsm_loss, RunFolder(tmp_path / "run")
    monkeypatch.setattr(teach, "TrainingConfig", partial(TrainingConfig, log_every=2))
    with monkeypatch.context() as patch:
        patch.setattr(teach, "dsm_loss", lambda *inputs, **condition: original(*inputs, **condition) * math.nan)
        with pytest.raises(Diverged, match="2 updates up to step 2 had gradients that are not finite"):
            teach_images(config, run.path)
    assert not (run.path / "pipeline").exists()
    teach_images(config, run.path, resume=True)
    assert [(line["step"], line["skipped"]) for line in run.history()] == [(2, 2), (4, 2)]
    assert all(v.isfinite().all() for v in weights(run.path).values())


# Labels


def labels_seen(config: PicturesTeachConfig, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> Tensor | None:
    """What the network is told in one update."""
    seen: list[Tensor | None] = []
    original = teach.dsm_loss

    def loss(*inputs: Any, **condition: Tensor) -> Tensor:
        seen.append(condition.get("labels"))
        return original(*inputs, **condition)

    monkeypatch.setattr(teach, "dsm_loss", loss)
    build_fit(config, data).advance(0.0)
    return seen[0]


def test_labels_are_left_out_at_their_rate(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 fair coins, 4.5 standard deviations: failure rate 1e-5, seed 0."""
    labels = labels_seen(replace(TEACH, batch=512, label_dropout=0.5), digits, monkeypatch)
    assert labels is not None
    left_out = int((labels == 10).sum())
    assert abs(left_out - 256) < 4.5 * math.sqrt(512 / 4)
    assert set(labels.tolist()) == set(range(11))


@pytest.mark.parametrize(("changes", "rows"), [({"label_dropout": 0.0}, 10), ({"conditional": False}, 0)])
def test_without_dropout_there_is_no_further_label(
    changes: dict[str, Any], rows: int, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TEACH, batch=64, **changes)
    assert build_fit(config, digits).denoiser.classes == rows
    labels = labels_seen(config, digits, monkeypatch)
    assert (labels is None) == (rows == 0)
    assert labels is None or int(labels.max()) < 10


def test_pictures_without_labels_need_no_classifier(tmp_path: Path) -> None:
    config = replace(TEACH, data=str(save_npz(tmp_path / "x.npz", 20, size=4, channels=3)), eval_samples=3)
    run = teach_images(config, tmp_path / "run").path
    assert not (run / "classifier").exists()
    table = json.loads((run / "evaluation.json").read_text())
    assert table["2 steps"].keys() == {"evaluations", "seconds_per_image", "samples"}
    teacher = from_diffusers(run / "pipeline")
    assert (teacher.classes, teacher.data_shape) == (0, (3, 4, 4))


def test_a_teacher_is_measured_with_the_classes_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets that are sorted by class, 6, 3 and 1 of ten in each; pictures to look at have all classes in turn."""
    labels = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([60, 30, 10]))
    pixels = (80 * labels).to(torch.uint8)[:, None, None].expand(-1, 4, 4)
    sets = {f"{name}_{kind}": v for name in ("train", "test") for kind, v in (("images", pixels), ("labels", labels))}
    np.savez(tmp_path / "x.npz", **{name: v.numpy() for name, v in sets.items()})
    config = replace(TEACH, data=str(tmp_path / "x.npz"), eval_samples=20)
    seen: list[tuple[Tensor, Tensor | None]] = []
    shown: dict[str, Tensor] = {}

    def measured(pictures: Tensor, reference: Reference, own: Tensor | None = None, copies: bool = True) -> Table:
        seen.append((pictures, own))
        if own is None:
            assert torch.equal(pictures, reference.data.held_out.take(reference.held_out[:20]))
            assert len(pictures.unique()) > 1  # all are of the first class by 3e-6; seed 0
        return {"fd": 0.0, "kd": 0.0}

    monkeypatch.setattr(teach, "measured", measured)
    monkeypatch.setattr(teach, "save_grids", lambda grids, path: shown.update(grids))
    pictures_of = load_images(config.data)
    fit = build_fit(config, pictures_of)
    evaluate_teacher(fit.average, config, pictures_of, create(tmp_path / "run"))
    asked = [own.tolist() for _, own in seen if own is not None]
    assert asked == [[0] * 12 + [1] * 6 + [2] * 2] * 2
    assert len(seen) == 3
    pictures, _ = drawn(fit.average, 20, even_labels(20, 3), 2, config.seed + 1)
    assert torch.equal(shown["Teacher, 2 steps"], pictures)


def test_pictures_of_one_class_need_no_classifier(tmp_path: Path) -> None:
    config = replace(TEACH, data=str(save_npz(tmp_path / "x.npz", 20, classes=1, size=4)))
    run = teach_images(config, tmp_path / "run").path
    assert not (run / "classifier").exists()
    teacher = from_diffusers(run / "pipeline")
    assert (teacher.classes, teacher.null_label) == (1, 1)


def test_too_few_samples_to_measure_are_refused_at_the_start(tmp_path: Path) -> None:
    config = replace(TEACH, data=str(save_npz(tmp_path / "x.npz", 80, classes=2)), eval_samples=5)
    with pytest.raises(UsageError, match="eval_samples must be at least 6, for metrics need as many, but is 5"):
        teach_images(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_few_pictures_are_learned_and_the_line_says_that_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(TEACH, data=str(save_npz(tmp_path / "x.npz", 24, classes=2, size=6)), size=4, mirrored=True)
    run = teach_images(config, tmp_path / "run").path
    assert not (run / "classifier").exists()
    teacher = from_diffusers(run / "pipeline")
    assert (teacher.classes, teacher.data_shape) == (2, (1, 4, 4))
    told = capsys.readouterr().err.splitlines()[0]
    assert told.startswith("x: 44 training + 2 held-out pictures, 1×4×4, range [")
    assert "2 classes (0: " in told
    assert told.endswith(
        "; resized to 4×4 from 6×6; half of the training pictures are mirror images; nothing is measured: metrics need "
        "at least 6 held-out pictures, and there are 2"
    )


# Budgets and devices


def test_auto_is_the_best_device(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for an accelerator."""
    fitted: list[Any] = []
    monkeypatch.setattr(teach, "find_device", lambda name: torch.device({"auto": "meta"}.get(name, name)))
    monkeypatch.setattr(teach, "Fit", lambda *arguments: fitted.append(arguments[0]))
    build_fit(replace(TEACH, device="auto"), digits)
    build_fit(TEACH, digits)
    assert [next(denoiser.parameters()).device.type for denoiser in fitted] == ["meta", "cpu"]


class Clock:
    """Stands in the place of the module `time`: every update takes 20 seconds of one of its clocks."""

    def __init__(self, name: str) -> None:
        self.rates: list[float] = []
        self.module = SimpleNamespace(monotonic=lambda: 0.0, process_time=lambda: 0.0, perf_counter=lambda: 0.0)
        setattr(self.module, name, lambda: 20.0 * len(self.rates))


@pytest.mark.parametrize(("clock", "name"), [("wall", "monotonic"), ("cpu", "process_time")])
def test_a_budget_ends_the_fit_and_moves_the_learning_rate(
    clock: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three updates of 20 seconds in a minute, with the half cosine's rates of thirds; then it is over for good."""
    time, advance = Clock(name), Fit.advance

    def timed(fit: Fit[Any], progress: float) -> Tensor:
        loss = advance(fit, progress)
        time.rates.append(fit.optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(fitting, "time", time.module)
    monkeypatch.setattr(Fit, "advance", timed)
    config = replace(TEACH, steps=1000, max_minutes=1.0, clock=clock, checkpoint_every=100)
    config = replace(config, data=str(save_npz(tmp_path / "x.npz", 20, size=4)))
    run = teach_images(config, tmp_path / "run").path
    assert time.rates == pytest.approx([config.lr * 0.5 * (1 + math.cos(math.pi * i / 3)) for i in range(3)])
    last = checkpoints.load(checkpoints.latest(run / "checkpoints"))
    assert (last.step, last.seconds) == (3, 60.0)
    teach_images(config, run, resume=True)
    assert len(time.rates) == 3


def test_losses_are_logged_and_rewound(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    data = str(save_npz(tmp_path / "x.npz", 20, size=4))
    teach_images(replace(TEACH, data=data, steps=100, batch=2, checkpoint_every=1000), run.path)
    (line,) = run.history()
    assert (line["kind"], line["step"]) == ("train", 100)
    assert math.isfinite(line["loss"])
    run.log("train", 200, 1.0, {"loss": 1.0})
    teach_images(replace(TEACH, data=data, steps=100, batch=2), run.path, resume=True)
    assert [line["step"] for line in run.history()] == [100]
