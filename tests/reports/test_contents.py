"""What is read of a run folder; that broken files are refused is shown where they are reported (`test_report`)."""

from __future__ import annotations

from pathlib import Path

from vardistill.reports.contents import SAMPLES, read, steps_per_second
from vardistill.training.folder import RunFolder


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    contents = read(RunFolder(tmp_path))
    assert (contents.steps, contents.seconds, contents.lines, contents.final) == (0, 0.0, [], {})
    assert contents.setting("training", "steps") is None


def test_the_configuration_names_the_target_and_the_size_of_its_floor(tmp_path: Path) -> None:
    def floor(samples: str) -> float:
        (tmp_path / "config.yaml").write_text(f"domain: {{problem: mog9}}\ntraining: {{eval_samples: {samples}}}\n")
        return read(RunFolder(tmp_path)).truth["log_mmd"].mean

    assert floor("1000") > floor("4000") > floor(str(SAMPLES)) == floor("nonsense")


def test_speed_is_the_median_between_lines() -> None:
    lines = [{"step": step, "seconds": seconds} for step, seconds in ((100, 1.0), (200, 2.0), (300, 3.0), (400, 90.0))]
    assert steps_per_second(lines) == 100.0
    assert steps_per_second(lines[:1]) is None
    assert steps_per_second([]) is None
