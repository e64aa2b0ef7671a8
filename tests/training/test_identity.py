"""A resumed run is the same run, or says in a line what differs; a longer one says what its schedules did."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs
from vardistill.denoisers import GaussianMixture, Preconditioned, from_module
from vardistill.diffusion.levels import EDM
from vardistill.diffusion.noise import NoiseLevels
from vardistill.diffusion.schedules import VE
from vardistill.domains.points.problems import MoG40
from vardistill.errors import UsageError
from vardistill.metrics import evaluate
from vardistill.networks import LevelMLP
from vardistill.objectives import VarDiU, VarFlow
from vardistill.posteriors.few import Prior
from vardistill.runs import experiment
from vardistill.runs.distill import distill
from vardistill.students.perceptron import MLP
from vardistill.training.config import TrainingConfig
from vardistill.training.folder import RunFolder

STILL = NoiseLevels(VE(), EDM(), lambda alpha, sigma: sigma**2)
CONSTANT: dict[str, Any] = {"lr_schedule": "constant", "warmup": 0.0}


def vardiu(teacher: Any = None, **options: Any) -> VarDiU:
    return VarDiU(small_runs.teacher() if teacher is None else teacher, Prior(), candidates="batch", **options)


def wider() -> MLP:
    torch.manual_seed(0)
    return MLP(latent=2, data=2, depth=1, width=9, data_std=2.0).double()


def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return small_runs.teacher()(x_t, t)


def train(folder: Path, **options: Any) -> torch.Tensor:
    """Two steps in the folder, and the student's first weights."""
    training = small_runs.config(**{"steps": 2} | options.pop("training", {}))
    defaults = {"objective": vardiu(), "levels": STILL, "training": training, "out": folder}
    run = distill(options.pop("student", None) or small_runs.generator(), **defaults | options)
    return torch.cat([p.flatten() for p in run.generator.parameters()]).detach()


@pytest.fixture(scope="module", autouse=True)
def _without_report() -> Iterator[None]:
    """Its figures take far longer than the runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "write_report", lambda *_: None)
        patch.setattr(experiment, "save_samples", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "begun"
    train(folder)
    return folder


OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "objective": (
        lambda: {"objective": VarFlow(), "data": small_runs.data(), "levels": small_runs.levels("varflow")},
        "objective was VarDiU and is VarFlow",
    ),
    "parameter": (
        lambda: {"objective": vardiu(control_variate="zero")},
        "objective.control_variate was one and is zero",
    ),
    "teacher": (
        lambda: {"objective": vardiu(GaussianMixture(torch.eye(2).double(), std=0.5))},
        r"teacher\.means was",
    ),
    "function": (
        lambda: {"objective": vardiu(from_module(network, VE()))},
        "teacher was GaussianMixture and is FromModule",
    ),
    "student": (lambda: {"student": wider()}, "student.parameters was 42 and is 47"),
    "levels": (
        lambda: {"levels": NoiseLevels(VE(), EDM(mean=0.0), STILL.weight)},
        "mean was -1.2 and is 0",
    ),
    "weight": (lambda: {"levels": NoiseLevels(VE(), EDM())}, "levels.weight was"),
    "seed": (lambda: {"training": {"seed": 1}}, "training.seed was 0 and is 1"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_is_refused_by_what_differs(what: str, begun: Path) -> None:
    options, message = OTHERS[what]
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=f"is another one: .*{message}") as error:
        train(begun, resume=True, **options())
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def biased(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return network(x_t, t) + 0.2


def weights(seed: int) -> Preconditioned:
    torch.manual_seed(seed)
    return Preconditioned(LevelMLP(2, 2, depth=1, width=8), 2.0, VE()).double()


@pytest.mark.parametrize(
    ("teacher", "other", "message"),
    [
        (from_module(network, VE()), from_module(biased, VE()), "teacher.module was network and is biased"),
        (
            from_module(lambda x_t, t: 0.9 * x_t, VE()),
            from_module(lambda x_t, t: 0.5 * x_t, VE()),
            "teacher.answers was",
        ),
        (weights(0), weights(1), "teacher.digest was"),
    ],
)
def test_teachers_are_known_by_their_weights_and_answers(
    teacher: Any, other: Any, message: str, tmp_path: Path
) -> None:
    train(tmp_path, objective=vardiu(teacher))
    with pytest.raises(UsageError, match=message):
        train(tmp_path, objective=vardiu(other), resume=True)
    train(tmp_path, objective=vardiu(teacher), resume=True)


def test_stored_data_have_a_digest(tmp_path: Path) -> None:
    points = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options: dict[str, Any] = {"objective": VarFlow(), "levels": small_runs.levels("varflow")}
    train(tmp_path, data=points, **options)
    with pytest.raises(UsageError, match=r"data\.digest was"):
        train(tmp_path, data=points + 1e-3, resume=True, **options)
    train(tmp_path, data=points, resume=True, **options)


def test_settings_of_the_optimiser_may_change_and_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path)
    train(tmp_path, training={"lr": 1e-3, "log_every": 1}, resume=True)
    assert "the run goes on otherwise than it began: lr was 0.01 and is 0.001\n" in capsys.readouterr().err
    assert json.loads(RunFolder(tmp_path).identity.read_text())["training"]["lr"] == 1e-3


def test_a_longer_run_has_the_numbers_of_one_that_was_so_long_from_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "a", training=CONSTANT | {"steps": 12})
    longer = train(tmp_path / "a", training=CONSTANT | {"steps": 20}, resume=True)
    assert "otherwise than it began: steps was 12 and is 20" in (told := capsys.readouterr().err)
    assert "had another course" not in told
    assert torch.equal(longer, train(tmp_path / "b", training=CONSTANT | {"steps": 20}))


@pytest.mark.parametrize(
    ("training", "levels", "message"),
    [
        ({"lr_schedule": "cosine", "warmup": 0.0}, STILL, "another course of the learning rate: the numbers"),
        (CONSTANT | {"warmup": 0.5}, STILL, "another course of the learning rate: the numbers"),
        (CONSTANT, small_runs.levels(), "another course of the noise levels: the numbers"),
    ],
)
def test_schedules_that_had_another_course_are_told(
    training: dict[str, Any], levels: NoiseLevels, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, training=training | {"steps": 4}, levels=levels)
    train(tmp_path, training=training | {"steps": 6}, levels=levels, resume=True)
    assert f"the first 4 steps had {message}" in capsys.readouterr().err


def test_fewer_steps_than_there_are_are_refused(tmp_path: Path) -> None:
    train(tmp_path, training={"steps": 4})
    with pytest.raises(UsageError, match="has 4 steps already: give more, not 3"):
        train(tmp_path, training={"steps": 3}, resume=True)


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    train(tmp_path)
    RunFolder(tmp_path).identity.unlink()
    train(tmp_path, resume=True)
    kept = json.loads(RunFolder(tmp_path).identity.read_text())
    assert TrainingConfig(**kept["training"]).steps == 2


def test_settings_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training must be a vardistill.TrainingConfig, but is dict"):
        distill(small_runs.generator(), objective=vardiu(), training={})
    with pytest.raises(UsageError, match=r"rng must be a generator, torch\.Generator\(\)\.manual_seed\(0\), but is 0"):
        evaluate(torch.zeros(8, 2), MoG40(), 0)
