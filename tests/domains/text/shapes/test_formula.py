"""Captioned pictures: what the labels say is read back from the pixels, and captions from labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vardistill.domains.text.shapes.formula import (
    COLOURS,
    OBJECTS,
    PLACES,
    RADII,
    RGB,
    SHAPES,
    SHIFT,
    SIDE,
    SIZES,
    TILT,
    WORDS,
    attributes,
    captions,
    captions_of,
    coverage,
    draw_pictures,
    labels_of,
    scenes,
)
from vardistill.errors import UsageError

HALF = SIDE // 2


def corner(pictures: Tensor, place: int) -> Tensor:
    top, left = HALF * (place // 2), HALF * (place % 2)
    return pictures[:, :, top : top + HALF, left : left + HALF]


def moments(covered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∫c, |⟨z³⟩|/⟨|z|²⟩^{3/2} and |⟨z⁴⟩|/⟨|z|²⟩² of coverage (n, H, W), z = x + iy from its centre.

    At any tilt and size the last two are 0 and 0 of a circle, 0 and 0.6 of a square, 0.8 and 0 of a triangle.
    """
    x = torch.arange(covered.shape[-1], dtype=torch.float64)
    z = torch.complex(*torch.meshgrid(x, x, indexing="xy"))
    c = covered.double()
    area = c.sum((1, 2))

    def mean(v: Tensor) -> Tensor:
        return (c * v).sum((1, 2)) / area

    z = z - mean(z)[:, None, None]
    square = mean(z.abs() ** 2).real
    return area, mean(z**3).abs() / square**1.5, mean(z**4).abs() / square**2


def test_labels_are_read_back_from_the_pixels(rng: torch.Generator) -> None:
    """Colour by the nearest paint, size by the area, shape by moments; a corner of nothing is grey."""
    found = scenes(1000, rng)
    size, colour, shape = attributes(found.labels)
    for place in range(len(PLACES)):
        pixels = (corner(found.pictures, place) + 1) / 2
        painted = pixels.amax(1) - pixels.amin(1)  # of the grey ground 0
        there = found.labels[:, place] > 0
        assert torch.equal(painted.amax((1, 2)) > 0.1, there)
        rows = there.nonzero()[:, 0]
        middle = painted[rows].flatten(1).argmax(1)
        paint = pixels[rows].flatten(2).take_along_dim(middle[:, None, None], 2)[:, :, 0]
        hues = torch.nn.functional.normalize(torch.tensor(RGB), dim=1)
        assert torch.equal((paint @ hues.T / paint.norm(dim=1, keepdim=True)).argmax(1), colour[rows, place])
        area, third, fourth = moments(painted[rows] / painted[rows].amax((1, 2), keepdim=True))
        radius = (area / math.pi).sqrt()
        low, high = torch.tensor(RADII, dtype=torch.float64)[size[rows, place]].unbind(1)
        assert bool(((radius > low - 0.15) & (radius < high + 0.15)).all())
        read = torch.where(third > 0.4, 2, torch.where(fourth > 0.3, 1, 0))
        assert torch.equal(read, shape[rows, place])


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_objects_have_their_area_and_leave_their_corner_by_a_pixel_at_most(shape: int) -> None:
    radius, tilt = torch.tensor([RADII[1][1]] * 9), torch.linspace(-TILT, TILT, 9)
    middle = torch.full((9,), HALF / 2 + SHIFT)  # the corner's, shifted as far as it goes
    covered = coverage(torch.full((9,), shape), radius, tilt, middle, middle)
    torch.testing.assert_close(covered.sum((1, 2)), math.pi * radius**2, rtol=0.03, atol=0.0)
    assert covered[:, HALF + 1 :].max() == covered[:, :, HALF + 1 :].max() == 0


def test_captions_say_what_labels_are(rng: torch.Generator) -> None:
    found = scenes(500, rng)
    assert torch.equal(labels_of(found.captions), found.labels)
    assert set(" ".join(found.captions).split()) == set(WORDS)
    number = (found.labels > 0).sum(1)
    assert set(number.tolist()) == {1, 2}
    assert [text.count(" and ") + 1 for text in found.captions] == number.tolist()


def test_every_object_has_a_label_of_its_own() -> None:
    labels = torch.zeros(len(OBJECTS), len(PLACES), dtype=torch.int64)
    labels[:, 1] = torch.arange(1, len(OBJECTS) + 1)
    size, colour, shape = attributes(labels[:, 1])
    named = zip(size.tolist(), colour.tolist(), shape.tolist(), strict=True)
    assert tuple(f"{SIZES[s]} {COLOURS[c]} {SHAPES[h]}" for s, c, h in named) == OBJECTS
    assert captions_of(labels)[0] == "a small red circle top right"


def test_a_seed_fixes_pictures_and_captions() -> None:
    one, other = (scenes(20, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one.pictures, other.pictures)
    assert one.captions == other.captions == captions(20, torch.Generator().manual_seed(5))
    assert one.captions != captions(20, torch.Generator().manual_seed(6))


def test_what_a_caption_does_not_say_varies(rng: torch.Generator) -> None:
    pictures = draw_pictures(labels_of(["a large blue square top left"]).expand(50, -1), rng)
    assert pictures.shape == (50, 3, SIDE, SIDE)
    assert -1 <= pictures.min() < pictures.max() <= 1
    assert pictures.std(0).amax() > 0.1
    assert float(pictures[:, 0, -1, -1].std()) > 0.05  # of the ground


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a small red circle top left and",
        "a small red circle top left and a large blue square top left",
        " and ".join(f"a small red circle {place}" for place in PLACES),
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no caption of shapes: give one or two objects in different places"):
        labels_of([text])


def test_no_fewer_than_none(rng: torch.Generator) -> None:
    assert scenes(0, rng).captions == ()
    with pytest.raises(UsageError, match="n must be 0 or positive"):
        scenes(-1, rng)
