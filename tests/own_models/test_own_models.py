"""Models of somebody's own, distilled by the README's lines in short runs (figures: `benchmarks/own_models.py`)."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import digits
import edm
import moons
import rings
import somebody

POINTS = {"moons": moons, "rings": rings, "edm": edm}


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTS)
def test_points_are_near_their_teachers_samples(name: str) -> None:
    """After a few seconds, of a teacher that was trained for a few."""
    figures = somebody.distil(POINTS[name].build(500), steps=100, seed=0)
    assert figures.distance < 0.02


@pytest.mark.slow
def test_the_lines_run_on_a_pipeline_of_others(tmp_path: Path) -> None:
    """A teacher of so few steps says nothing about distances, but that there are some."""
    figures = digits.distil(digits.build(5, tmp_path / "theirs"), 3, seed=0, compared=200, sampler_steps=3)
    assert 0 < figures.student < math.inf
    assert 0 < figures.teacher < math.inf
