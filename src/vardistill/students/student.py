r"""One-step generators x = g(z), z ~ N(0, I)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vardistill.errors import UsageError


class Student(nn.Module):
    """x = g(z) with z ~ N(0, I), or g(z, c) under a condition c.

    Attributes:
        latent_shape: shape of one z.
        data_shape: shape of one x.
        data_std: σ_d, standard deviation of the data, that default noise levels are in units of.
        classes: K, where it takes labels 0..K−1 as the condition `labels`; 0 for an unconditional one.
    """

    latent_shape: tuple[int, ...]
    data_shape: tuple[int, ...]
    data_std: float
    classes: int = 0

    @property
    def initial_ratio(self) -> float:
        """The noise-to-signal ratio above which it is right from the start, as a teacher's own step; else infinite."""
        return math.inf

    def latents(self, n: int, rng: torch.Generator) -> Tensor:
        """z ~ N(0, I), (n, *latent), in the generator's dtype, on the device of `rng`."""
        dtype = next(self.parameters()).dtype
        return torch.randn(n, *self.latent_shape, generator=rng, device=rng.device, dtype=dtype)

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0, block: int = 65_536, labels: Tensor | None = None) -> Tensor:
        """(n, *data) samples; `block` at a time, the same for every block size.

        Args:
            n: their number, at least 1.
            seed: fixes the latents.
            block: latents that go through the network at once.
            labels: (n,) integers in [0, K), for a conditional generator.

        Raises:
            UsageError: unless n is at least 1, and there are n labels for a conditional generator and none for another.
        """
        if n < 1:
            raise UsageError(f"the number of samples must be at least 1, but is {n}")
        parameter = next(self.parameters())
        z = self.latents(n, torch.Generator(parameter.device).manual_seed(seed))
        if labels is None and not self.classes:
            return torch.cat([self(part) for part in z.split(block)])
        labels = self._checked(labels, n).to(parameter.device)
        pairs = zip(z.split(block), labels.split(block), strict=True)
        return torch.cat([self(part, labels=of_part) for part, of_part in pairs])

    def _checked(self, labels: Tensor | None, n: int) -> Tensor:
        if not self.classes:
            raise UsageError("the generator is unconditional: it takes no labels")
        if labels is None or labels.shape != (n,) or labels.is_floating_point():
            raise UsageError(f"the generator is conditional: give {n} integer labels below {self.classes}")
        if not (int(labels.min()) >= 0 and int(labels.max()) < self.classes):
            raise UsageError(f"labels must be in [0, {self.classes}), but are {labels.min()} to {labels.max()}")
        return labels
