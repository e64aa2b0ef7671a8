r"""What pictures of shapes are worth, by their judge and beside pictures of the formula.

    prompt_accuracy  share of pictures that are right in every attribute
    fd               Fréchet distance to the formula's pictures of the same captions, in the judge's features
    diversity        root mean squared difference of two pictures of one caption, over the formula's own

Prompts are asked for twice each, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vardistill.domains.pictures.features import ClassifierFeatures
from vardistill.domains.text.evaluate import spread, twice
from vardistill.domains.text.shapes.formula import captions, draw_pictures, labels_of
from vardistill.domains.text.shapes.judge import Judge
from vardistill.metrics.frechet import gaussian_distance, moments

REFERENCE = 10_000
"""Pictures of the formula that others are compared with."""

BLOCK = 1000
"""Pictures whose features are computed at once."""


def asked_twice(n: int, seed: int) -> tuple[str, ...]:
    """n captions, each of them twice but for the last where n is odd."""
    return twice(captions((n + 1) // 2, torch.Generator().manual_seed(seed)), n)


class Truth:
    """What pictures of these captions are compared with: the formula's own.

    Args:
        judge: that reads them.
        prompts: captions, each twice.
        seed: of the formula's pictures.

    Raises:
        UsageError: for a text that is no caption.
    """

    def __init__(self, judge: Judge, prompts: Sequence[str], seed: int) -> None:
        self.judge, self.prompts = judge, tuple(prompts)
        self.features = ClassifierFeatures(judge.classifier)
        labels, rng = labels_of(self.prompts), torch.Generator().manual_seed(seed)
        rows = torch.arange(max(REFERENCE, len(labels))) % len(labels)
        pictures = torch.cat([draw_pictures(labels[part], rng) for part in rows.split(BLOCK)])
        self.moments = moments(torch.cat([self.features(part) for part in pictures.split(BLOCK)]))
        self.spread = spread(pictures[: len(labels)])

    def table(self, pictures: Tensor) -> dict[str, float]:
        """The metrics of pictures (n, 3, 32, 32), one of each prompt; see this module.

        Raises:
            UsageError: for another number of pictures.
        """
        pictures = pictures.clamp(-1, 1)
        right = self.judge.accuracy(pictures, self.prompts)
        own = moments(torch.cat([self.features(part) for part in pictures.split(BLOCK)]))
        return {
            "prompt_accuracy": float(right.double().mean()),
            "fd": gaussian_distance(own, self.moments),
            "diversity": spread(pictures) / self.spread,
        }
