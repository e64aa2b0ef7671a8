"""Pictures of any number of channels side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vardistill.domains.pictures.figures import grid


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])])
def test_the_first_channels_are_shown(channels: int, shown: list[int], rng: torch.Generator) -> None:
    pixels = torch.randint(256, (2, channels, 3, 4), generator=rng, dtype=torch.uint8)
    canvas = grid(pixels / 127.5 - 1, columns=2)
    assert canvas.shape == (3, 9, 3)
    for i, picture in enumerate(pixels.numpy()):
        assert np.array_equal(canvas[:, 5 * i : 5 * i + 4], picture[shown].transpose(1, 2, 0))
