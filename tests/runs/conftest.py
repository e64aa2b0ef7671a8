"""A teacher of the digits that the tests of runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

import small_pictures
from vardistill.domains.pictures.teach import teach_images


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a conditional teacher of the digits, fitted in a few steps; nothing may write to it."""
    path = tmp_path_factory.mktemp("pictures") / "teacher"
    with small_pictures.quick():
        teach_images(small_pictures.TEACH, path)
    return path
