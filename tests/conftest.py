"""What every test relies on: one thread, no network, no window, seeded randomness."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}

import pytest
import torch
from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")
torch.set_num_threads(1)


@pytest.fixture
def rng() -> torch.Generator:
    """A generator of random numbers in the same state for every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision by default, for the length of a test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a conditional teacher of the digits, fitted in a few steps; nothing may write to it."""
    import small_pictures
    from vardistill.domains.pictures.teach import teach_images

    path = tmp_path_factory.mktemp("pictures") / "teacher"
    with small_pictures.quick():
        teach_images(small_pictures.TEACH, path)
    return path
