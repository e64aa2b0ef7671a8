"""Students of points with times: saved and loaded, and started as a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vardistill.denoisers import Preconditioned
from vardistill.diffusion.schedules import SCHEDULES, VP
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP
from vardistill.students import DenoisingMLP, default_times

SIZES = {"data": 3, "depth": 2, "width": 8, "activation": "tanh"}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_of_points_comes_back_from_disk_to_the_bit(schedule: str, steps: int, tmp_path: Path) -> None:
    times = default_times(SCHEDULES[schedule](), steps, data_std=2.0)
    student = DenoisingMLP(list(times), **SIZES, data_std=2.0, schedule=schedule)
    student.save_pretrained(tmp_path)
    loaded = DenoisingMLP.from_pretrained(tmp_path)
    assert (loaded.times, loaded.data_std, loaded.schedule) == (times, 2.0, SCHEDULES[schedule]())
    assert torch.equal(loaded.sample(5, seed=1), student.sample(5, seed=1))


def test_a_student_of_points_starts_as_a_teacher_of_its_sizes() -> None:
    teacher = Preconditioned(LevelMLP(3, 3, 2, 8, "tanh"), 2.0, VP())
    student = DenoisingMLP((0.9, 0.5), **SIZES, data_std=2.0, schedule="vp")
    student.denoiser.load_state_dict(teacher.state_dict())
    z, t = student.latents(5, torch.Generator().manual_seed(0)), torch.full((5,), 0.9)
    assert student.input_scale(1) == 1
    assert torch.equal(student(z), teacher(z, t))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"schedule": "pv"}, "unknown schedule 'pv'"),
        ({"activation": "sulu"}, "unknown activation 'sulu'"),
        ({"width": 0}, "width must be at least 1, but is 0"),
        ({"data_std": 0.0}, "sigma_data must be a number, positive"),
        ({"times": ()}, "must be in .* but are none"),
    ],
)
def test_mistakes_get_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line) as caught:
        DenoisingMLP(**({"times": (0.5,)} | changes))
    assert "\n" not in str(caught.value)
