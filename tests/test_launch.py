"""What the environment tells of processes, and what of it is believed."""

from __future__ import annotations

import os

import pytest

import small_runs
from vardistill.errors import UsageError
from vardistill.launch import is_first, launched
from vardistill.processes import shielded


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in small_runs.launched(1):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_processes_know_their_number_and_the_first(environment: pytest.MonkeyPatch) -> None:
    assert (launched(), is_first()) == (1, True)
    for rank in (0, 1, 2):
        for name, value in small_runs.launched(3, rank).items():
            environment.setenv(name, value)
        assert (launched(), is_first()) == (3, rank == 0)


@pytest.mark.parametrize("left", [{"RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "1"}])
def test_one_process_is_the_first_whatever_is_left_over(left: dict[str, str], environment: pytest.MonkeyPatch) -> None:
    for name, value in left.items():
        environment.setenv(name, value)
    assert (launched(), is_first()) == (1, True)
    with shielded():
        assert not left.keys() & os.environ.keys()
    assert left.items() <= os.environ.items()


@pytest.mark.parametrize(
    ("left", "lacks"),
    [
        ({"WORLD_SIZE": "4"}, "no RANK"),
        ({"WORLD_SIZE": "4", "RANK": "1"}, "no MASTER_ADDR"),
        (small_runs.launched(4, 4), "with RANK=4"),
        ({"WORLD_SIZE": "many"}, "no RANK"),
    ],
)
def test_half_a_launch_is_refused(left: dict[str, str], lacks: str, environment: pytest.MonkeyPatch) -> None:
    for name, value in left.items():
        environment.setenv(name, value)
    with pytest.raises(UsageError, match=f"is in the environment, but {lacks}: unset it for one process") as caught:
        launched()
    assert "\n" not in str(caught.value)


def test_settings_of_a_launcher_have_no_effect(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8", "ACCELERATE_MIXED_PRECISION": "no"}
    for name, value in settings.items():
        environment.setenv(name, value)
    with shielded():
        assert not any(name.startswith("ACCELERATE_") for name in os.environ)
    assert settings.items() <= os.environ.items()
    told = capsys.readouterr().err
    assert told.strip().endswith("as a run has settings of its own: ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8")
