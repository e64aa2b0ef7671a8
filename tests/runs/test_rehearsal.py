"""A dry run says what the run itself would take, in every domain, and leaves nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

import at_size
import tiny_pipelines
from vardistill.cli import main as cli
from vardistill.denoisers import Adapted, DiffusersDenoiser
from vardistill.runs.presets import AT_SIZE, PRESETS
from vardistill.runs.presets.text import RANK
from vardistill.runs.rehearsal import rehearse
from vardistill.training.memory import predicted_memory

DOCUMENTED = Path(__file__).parents[2] / "docs" / "text.md"

QUICK = ["--dry-run", "--device", "cpu", "--batch", "64"]


@pytest.mark.parametrize(
    "words",
    [
        ["mog40-vardiu", "--max-minutes", "0.5", "--steps", "100000000"],
        ["mog40-varflow", "--real", "teacher"],
        ["digits-diff-instruct", "--steps", "100"],
    ],
    ids=lambda words: words[0],
)
def test_it_says_what_a_run_takes_and_leaves_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a folder, nor a teacher that is fitted for minutes."""
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", *words, *QUICK]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == {"parameters", "memory", "pace", "time"}
    assert not list(tmp_path.iterdir())
    if "vardiu" in words[0]:
        assert " 30 s for up to" in lines["time"]
    if "digits" in words[0]:
        student = critic = 652_449  # a U-Net of (32, 64) channels
        assert (
            f"{student + critic:,} trained (student {student:,}, critic {critic:,}); {3 * student:,} in"
            in (lines["parameters"])
        )


def test_its_figures_fit_each_other() -> None:
    config = PRESETS["mog40-diff-instruct"].config
    training = replace(config.training, steps=1000, max_minutes=None, batch=32, device="cpu", tracker="none")
    found = rehearse(replace(config, training=training))
    assert found.samples == pytest.approx(32 / found.seconds)
    assert found.left == pytest.approx(1000 * found.seconds)
    trained = sum(found.trained.values())
    assert found.trained.keys() == {"student", "critic"}
    assert found.memory["optimiser"] == 2 * 4 * trained
    assert found.memory["parameters"] >= 4 * trained
    assert found.peak is None


def test_mistakes_get_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "text-varflow", "--dry-run"]) == 2
    assert "no teacher: give --teacher" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_SIZE)
def test_recipes_at_size_run_on_tiny_models_of_their_class(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of the command but the model: adapters on a base in half precision, checkpointed, under guidance."""
    maker = {"sd15": "sd", "sdxl": "sdxl", "sd35": "sd3"}[name.partition("-")[0]]
    teacher, prompts = tiny_pipelines.MAKERS[maker](tmp_path), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a dog {i}" for i in range(20)))
    before = sorted(tmp_path.rglob("*"))
    assert (
        cli.run(["train", name, "--teacher", str(teacher), "--prompts", str(prompts), "--dry-run", "--device", "cpu"])
        == 0
    )
    assert "samples per second" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", at_size.OPTIONS)
def test_documented_memory_is_what_is_predicted(name: str) -> None:
    """Of the networks at their size: adapters on a base in half precision, without a critic and with one."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler = flow if name == "sd35" else diffusers.DDIMScheduler(beta_schedule="scaled_linear")
    base = DiffusersDenoiser(at_size.network(name), scheduler, latents=True)
    with torch.device("meta"):
        student, critic = Adapted(base, RANK), Adapted(base, RANK)
    trained = sum(p.numel() for p in student.parameters())
    sizes = [
        sum(predicted_memory({"student": student} | others, [base]).values()) / 2**30
        for others in ({}, {"critic": critic})
    ]
    (row,) = (line for line in DOCUMENTED.read_text().splitlines() if line.startswith(f"| `{name}-varflow`"))
    assert f"| {trained / 1e6:.1f} M | {sizes[0]:.2f} GiB, with a critic {sizes[1]:.2f} GiB |" in row
