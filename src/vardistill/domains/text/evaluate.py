r"""What pictures of prompts are worth, where nobody knows the truth.

    clip_score   how well they fit their prompts (`domains.text.clip`), with a CLIP model that is named
    fd, kd       Fréchet and kernel distance to captioned pictures, with features that are named
    diversity    root mean squared difference of two pictures of one prompt, over all pixels, in [0, 2]

Prompts are asked for twice each, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from vardistill.domains.pictures.data import Images
from vardistill.domains.pictures.evaluate import blocks
from vardistill.domains.pictures.features import Features
from vardistill.domains.text.clip import ClipScore
from vardistill.errors import UsageError
from vardistill.metrics.frechet import gaussian_distance, moments
from vardistill.metrics.kernel_distance import kernel_distance

MOST = 10_000
"""Captioned pictures that others are compared with, at most."""

BLOCK = 250
"""Pictures whose features are computed at once."""


class Measured(Protocol):
    """What pictures of some prompts are measured with."""

    @property
    def prompts(self) -> Sequence[str]:
        """One of each picture."""

    def table(self, pictures: Tensor) -> dict[str, float]:
        """Metrics of pictures (n, 3, H, W) in [−1, 1], one of each prompt."""


class ByModels:
    """Metrics of networks that a user names; see this module.

    Args:
        prompts: each of them twice but perhaps the last.
        clip: for the CLIP score, or None.
        features: for distances to `images`, or None.
        images: captioned pictures, or None.
    """

    def __init__(
        self, prompts: Sequence[str], clip: ClipScore | None, features: Features | None, images: Images | None
    ) -> None:
        self.prompts, self.clip, self.features, self.images = tuple(prompts), clip, features, images

    @cached_property
    def _reference(self) -> Tensor | None:
        if self.features is None or self.images is None:
            return None
        rows = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))[:MOST]
        return torch.cat([self.features(part) for part in blocks(self.images, rows)])

    def table(self, pictures: Tensor) -> dict[str, float]:
        """The metrics that there are networks for, and the diversity."""
        table = {}
        if self.clip is not None:
            table["clip_score"] = float(self.clip(pictures, self.prompts).mean())
        if self._reference is not None and self.features is not None:
            own = torch.cat([self.features(part) for part in pictures.split(BLOCK)])
            paired = min(len(own), len(self._reference))
            table["fd"] = gaussian_distance(moments(own), moments(self._reference))
            table["kd"] = kernel_distance(own[:paired], self._reference[:paired])
        return table | {"diversity": spread(pictures)}


def twice(prompts: Sequence[str], n: int) -> tuple[str, ...]:
    """n prompts, in turn, each of them twice but for the last where n is odd."""
    return tuple(prompts[i // 2 % len(prompts)] for i in range(n))


def spread(pictures: Tensor) -> float:
    """Root mean squared difference of neighbours 2i and 2i + 1 among pictures (n, C, H, W).

    Raises:
        UsageError: for fewer than two.
    """
    pairs = len(pictures) // 2
    if not pairs:
        raise UsageError("diversity needs at least two pictures of a prompt")
    return float((pictures[: 2 * pairs : 2] - pictures[1 : 2 * pairs : 2]).square().mean().sqrt())
