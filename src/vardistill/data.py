"""Real samples for objectives that compare with them: a stored set, or a teacher's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vardistill.denoisers import Denoiser
from vardistill.errors import UsageError
from vardistill.samplers import sample

Samples = Callable[[int, torch.Generator], Tensor]
"""n and a generator of random numbers → (n, *data) samples, independent given the generator's state."""

BLOCK = 8192
"""Samples that a teacher draws at once."""


class StoredSamples:
    """Draws with replacement from a stored set.

    Args:
        data: (n, *data), finite.

    Raises:
        UsageError: for an empty set, or NaN or infinity in it.
    """

    def __init__(self, data: Tensor) -> None:
        if data.ndim < 2 or data.numel() == 0:
            raise UsageError(f"data must be (n, *data) with n at least 1, but has shape {tuple(data.shape)}")
        if not data.isfinite().all():
            bad = int((~data.flatten(1).isfinite().all(1)).sum())
            raise UsageError(f"data must be finite, but {bad} of {len(data)} samples hold NaN or infinity")
        self.data = data

    def __call__(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, *data)."""
        index = torch.randint(len(self.data), (n,), generator=rng, device=rng.device)
        return self.data[index.to(self.data.device)]


def teacher_samples(
    teacher: Denoiser, data_shape: tuple[int, ...], n: int, rng: torch.Generator, steps: int = 20
) -> StoredSamples:
    """A stored set of the teacher's own samples: objectives that need data then need none but the teacher.

    Args:
        teacher: the denoiser.
        data_shape: of one sample.
        n: size of the set.
        rng: draws the starting noise, on the teacher's device.
        steps: of Heun's method on Karras' grid, two evaluations each but for the last.
    """
    blocks = []
    for start in range(0, n, BLOCK):
        noise = torch.randn(min(BLOCK, n - start), *data_shape, generator=rng, device=rng.device)
        blocks.append(sample(teacher, noise, steps))
    return StoredSamples(torch.cat(blocks))


def check_samples(samples: Samples, data_shape: tuple[int, ...], device: torch.device) -> None:
    """Raise UsageError unless two samples come back in the generator's shape, finite."""
    two = samples(2, torch.Generator(device).manual_seed(0))
    if tuple(two.shape) != (2, *data_shape):
        raise UsageError(f"data and generator differ: data have shape {tuple(two.shape[1:])}, samples {data_shape}")
    if not two.isfinite().all():
        raise UsageError("the data hold NaN or infinity")
