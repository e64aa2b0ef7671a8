r"""Captioned pictures from a formula: one or two objects, each in a corner of its own.

    caption  = object [" and " object]
    object   = "a" size colour shape place,   such as "a small red triangle top left"

A picture is 32×32. An object covers clip(½ − f, 0, 1) of a pixel by the signed distance f of its shape, in pixels, so
that edges are antialiased; objects are painted over a grey ground, and leave their corner by a pixel at most. What a
caption does not say is drawn: place and size within bounds, tilt, brightness of the colour and of the ground. That is
what two pictures of one caption differ by.

A picture's labels say what is in each corner: 0 for nothing, else 1 + (size · COLOURS + colour) · SHAPES + shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from vardistill.errors import UsageError, require

SIDE = 32
"""Pixels along a picture's side."""

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")

RADII = ((3.3, 3.6), (4.6, 4.9))
"""Of the circle of an object's area, in pixels, from and to, by size."""

RGB = ((0.9, 0.15, 0.15), (0.1, 0.75, 0.2), (0.15, 0.3, 0.95), (0.95, 0.85, 0.1))
"""Colours at full brightness, in [0, 1]."""

SHIFT, TILT, DIM, GROUND = 0.7, 0.15, 0.8, (0.05, 0.25)
"""Largest shift in pixels along an axis, largest tilt in radians, least brightness, and the ground's from and to."""

OBJECTS = tuple(" ".join(words) for words in product(SIZES, COLOURS, SHAPES))
"""What a corner's labels 1, 2, ... stand for."""

WORDS = tuple(dict.fromkeys(["a", "and", *" ".join([*OBJECTS, *PLACES]).split()]))
"""Of all captions."""


@dataclass(frozen=True)
class Scenes:
    """Pictures with what is in them.

    Attributes:
        pictures: (n, 3, 32, 32) in [−1, 1].
        labels: (n, 4) int64, what is in each of `PLACES`.
        captions: n.
    """

    pictures: Tensor
    labels: Tensor
    captions: tuple[str, ...]


def scenes(n: int, rng: torch.Generator) -> Scenes:
    """n captioned pictures; half of them of one object, on the average.

    Raises:
        UsageError: for a negative n.
    """
    labels, swapped = draw_labels(n, rng)
    return Scenes(draw_pictures(labels, rng), labels, captions_of(labels, swapped))


def captions(n: int, rng: torch.Generator) -> tuple[str, ...]:
    """n captions, without their pictures."""
    return captions_of(*draw_labels(n, rng))


def draw_labels(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """What is in each place, (n, 4) int64, and whether the caption names the later place first, (n,) bool."""
    require("n", n, n >= 0, "0 or positive")
    places = torch.rand(n, len(PLACES), generator=rng).argsort(1)[:, :2]
    objects = torch.randint(1, len(OBJECTS) + 1, (n, 2), generator=rng)
    alone, swapped = (torch.rand(2, n, generator=rng) < 0.5).unbind()
    objects[alone, 1] = 0
    labels = torch.zeros(n, len(PLACES), dtype=torch.int64).scatter_(1, places, objects)
    return labels, swapped & ~alone


def captions_of(labels: Tensor, swapped: Tensor | None = None) -> tuple[str, ...]:
    """The captions of labels (n, 4), which name places in the order of `PLACES` but where `swapped` (n,)."""
    found = []
    for row, other in zip(labels.tolist(), [False] * len(labels) if swapped is None else swapped.tolist(), strict=True):
        parts = [f"a {OBJECTS[of - 1]} {place}" for of, place in zip(row, PLACES, strict=True) if of]
        found.append(" and ".join(parts[::-1] if other else parts))
    return tuple(found)


OBJECT = re.compile(rf"a ({'|'.join(OBJECTS)}) ({'|'.join(PLACES)})")


def labels_of(texts: Sequence[str]) -> Tensor:
    """What captions say, (n, 4) int64.

    Raises:
        UsageError: for a text that is no caption.
    """
    labels = torch.zeros(len(texts), len(PLACES), dtype=torch.int64)
    for row, text in zip(labels, texts, strict=True):
        found = [OBJECT.fullmatch(part) for part in text.split(" and ")]
        places = [PLACES.index(match[2]) for match in found if match]
        if len(places) != len(found) or len(set(places)) != len(places) or len(places) > 2:
            raise UsageError(
                f"{text!r} is no caption of shapes: give one or two objects in different places, such as "
                "'a small red triangle top left and a large blue square bottom right'"
            )
        for place, match in zip(places, found, strict=True):
            assert match is not None
            row[place] = 1 + OBJECTS.index(match[1])
    return labels


def attributes(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Size, colour and shape of labels, int64 of their shape; of nothing −1 each."""
    of = (labels - 1).clamp_min(0)
    parts = of // (len(COLOURS) * len(SHAPES)), of // len(SHAPES) % len(COLOURS), of % len(SHAPES)
    size, colour, shape = (part.where(labels > 0, -1) for part in parts)
    return size, colour, shape


def draw_pictures(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures (n, 3, 32, 32) in [−1, 1] of labels (n, 4)."""
    n = len(labels)
    low, high = GROUND
    pictures = (low + (high - low) * torch.rand(n, 1, 1, 1, generator=rng)).repeat(1, 3, SIDE, SIDE)
    size, colour, shape = attributes(labels)
    for place in range(len(PLACES)):
        u = torch.rand(5, n, generator=rng)  # of every place, so that what is in one does not move the others
        (rows,) = (labels[:, place] > 0).nonzero(as_tuple=True)
        x, y, radius, tilt, bright = u[:, rows]
        bounds = torch.tensor(RADII)[size[rows, place]]
        radius = bounds[:, 0] + radius * (bounds[:, 1] - bounds[:, 0])
        middle = [SIDE * (1 + 2 * half) / 4 + SHIFT * (2 * v - 1) for half, v in ((place % 2, x), (place // 2, y))]
        covered = coverage(shape[rows, place], radius, TILT * (2 * tilt - 1), *middle).unsqueeze(1)
        paint = (DIM + (1 - DIM) * bright).unsqueeze(1) * torch.tensor(RGB)[colour[rows, place]]
        pictures[rows] += covered * (paint[:, :, None, None] - pictures[rows])
    return 2 * pictures - 1


def coverage(shape: Tensor, radius: Tensor, tilt: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How much of each pixel objects cover, (n, 32, 32) in [0, 1].

    Args:
        shape: of each, (n,) int64.
        radius: of the circle of the same area, in pixels (n,).
        tilt: in radians (n,).
        x: of the middle, in pixels from the left (n,).
        y: likewise from the top.
    """
    grid = torch.arange(SIDE) + 0.5
    across, down = grid - x[:, None, None], grid[:, None] - y[:, None, None]
    c, s = tilt.cos()[:, None, None], tilt.sin()[:, None, None]
    u, v, r = c * across + s * down, c * down - s * across, radius[:, None, None]
    circle = u.hypot(v) - r
    square = torch.maximum(u.abs(), v.abs()) - r * math.sqrt(math.pi) / 2
    inner = r * math.sqrt(math.pi / (3 * math.sqrt(3)))  # inner radius of the equilateral triangle of area π r²
    below = v - inner / 2  # of the middle of its height
    triangle = torch.maximum(below, math.sqrt(3) / 2 * u.abs() - below / 2) - inner
    distance = torch.stack([circle, square, triangle], 1)
    own = distance.take_along_dim(shape[:, None, None, None].expand(-1, 1, SIDE, SIDE), 1).squeeze(1)
    return (0.5 - own).clamp(0, 1)
