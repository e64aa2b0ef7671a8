"""Sets of pictures: exact values, scales, class-conditional draws, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from small_pictures import bytes_of, everything, pixels
from vardistill.domains.pictures.data import (
    ImageData,
    StoredImages,
    Subset,
    WithMirrored,
    image_samples,
    label_frequencies,
)
from vardistill.errors import UsageError
from vardistill.training.data import check_samples

# In memory


def test_every_byte_comes_back_from_its_scaled_value() -> None:
    v = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = everything(StoredImages(v))
    assert x.dtype == torch.float32
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert torch.equal(bytes_of(x), v)
    torch.testing.assert_close(x.flatten(), torch.linspace(-1, 1, 256))


def test_a_mapped_file_is_read_like_memory(tmp_path: Path) -> None:
    v = pixels(6)
    np.save(tmp_path / "x.npy", v.numpy())
    mapped = StoredImages(torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c")))
    index = torch.tensor([4, 0, 4])
    assert torch.equal(mapped.take(index), StoredImages(v).take(index))


def test_scaled_floats_pass_unchanged() -> None:
    x = torch.rand(3, 1, 2, 2) * 2 - 1
    assert torch.equal(everything(StoredImages(x)), x)


@pytest.mark.parametrize(
    ("v", "options", "match"),
    [
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), {}, r"n at least 1, but are \(0, 1, 2, 2\)"),
        (torch.zeros(3, 2, 2, 2, dtype=torch.uint8), {}, r"1 or 3, H, W"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.int64), {}, "uint8 or float32, but are torch.int64"),
        (torch.full((1, 1, 2, 2), 1.01), {}, r"must lie in \[-1, 1\]"),
        (torch.full((1, 1, 2, 2), torch.nan), {}, "without NaN"),
        (pixels(3), {"labels": torch.tensor([0, 1])}, r"3 pictures need labels of shape \(3,\), not \(2,\)"),
        (pixels(3), {"labels": torch.tensor([0.0, 1.0, 2.0])}, "integers, but are torch.float32"),
        (pixels(3), {"labels": torch.tensor([0, -1, 2])}, "labels must be 0 to 2, but hold -1"),
        (pixels(3), {"labels": torch.tensor([0, 1, 2]), "class_names": ("a", "b")}, "0 to 1, but hold 2"),
        (pixels(3), {"class_names": ("a",)}, "class_names need labels"),
    ],
)
def test_tensors_that_are_no_pictures_are_refused(v: Tensor, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        StoredImages(v, **options)


def test_mirror_images_come_after_the_pictures_themselves() -> None:
    v, labels = pixels(3), torch.tensor([1, 0, 1])
    both = WithMirrored(StoredImages(v, labels, ("a", "b")))
    assert (len(both), both.class_names) == (6, ("a", "b"))
    assert both.labels is not None
    assert both.labels.tolist() == [1, 0, 1, 1, 0, 1]
    assert torch.equal(bytes_of(everything(both)), torch.cat([v, v.flip(3)]))


def test_a_line_tells_what_was_read() -> None:
    few = StoredImages(torch.tensor([0, 100, 200, 204], dtype=torch.uint8).view(4, 1, 1, 1), torch.tensor([0, 2, 2, 0]))
    few.remarks = ("one", "two")
    line = "x: 3 training + 1 held-out pictures, 1×1×1, range [-1, 0.569], 3 classes (0: 2, 1: 0, 2: 2); one; two; more"
    split = Subset(few, torch.arange(3)), Subset(few, torch.tensor([3]))
    assert ImageData("x", *split, remarks=("two", "more")).describe() == line
    many = StoredImages(torch.zeros(40, 1, 1, 1), torch.arange(40) * 3 // 4)
    with pytest.raises(UsageError, match="x: all training pictures are the same"):
        _ = ImageData("x", many, many).std
    assert "30 classes of 2 to 4 pictures (0, 1, 2, …, 29)" in ImageData("x", many, many).describe()


def test_std_is_the_root_of_the_mean_variance_over_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(23, 1, 3, 3, dtype=torch.float32) * 2 - 1
    x[:, :, 0] += 3 * x[:, :, 0].mean()
    images = StoredImages(x.clamp(-1, 1))
    exact = images.pixels.double().var(0, correction=0).mean().sqrt()
    monkeypatch.setattr("vardistill.domains.pictures.data.BLOCK", 5)
    assert ImageData("x", images, images).std == pytest.approx(float(exact), rel=1e-12)
    monkeypatch.setattr("vardistill.domains.pictures.data.STD_IMAGES", 4)
    some = images.pixels[[0, 5, 11, 17]].double().var(0, correction=0).mean().sqrt()
    assert ImageData("x", images, images).std == pytest.approx(float(some), rel=1e-12)


# Draws


def labelled() -> StoredImages:
    """60 pictures whose single value is their number, of 4 classes of 30, 0, 18 and 12 pictures in mixed order."""
    labels = torch.tensor([0] * 30 + [2] * 18 + [3] * 12)[
        torch.randperm(60, generator=torch.Generator().manual_seed(1))
    ]
    return StoredImages(torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1), labels, ("a", "b", "c", "d"))


def test_conditional_draws_have_their_labels_and_are_uniform_within_a_class(rng: torch.Generator) -> None:
    """Three χ² tests of 17, 11 and 59 degrees of freedom, each within 6 deviations of its mean, seed 0.

    P(χ²_k > k + 6√(2k)) is 5e-5 (k = 11), 2e-5 (k = 17) and 2e-6 (k = 59): failure rate 8e-5.
    """
    images, draw = labelled(), image_samples(labelled())
    assert images.labels is not None
    asked = torch.tensor([2, 3, 0, 4]).repeat(20_000)
    drawn = bytes_of(draw(len(asked), rng, labels=asked)).flatten().long()
    classed = asked < 4
    assert torch.equal(images.labels[drawn[classed]], asked[classed])
    for label, members in ((2, images.labels == 2), (3, images.labels == 3), (4, images.labels >= 0)):
        counts = drawn[asked == label].bincount(minlength=60)[members].double()
        expected, k = 20_000 / len(counts), len(counts) - 1
        assert float((counts - expected).square().sum() / expected) < k + 6 * (2 * k) ** 0.5


def test_draws_depend_on_the_generator_alone(rng: torch.Generator) -> None:
    draw, labels = image_samples(labelled()), torch.tensor([0, 2, 3] * 10)
    first, other = draw(30, rng, labels=labels), draw(30, rng, labels=labels)
    assert torch.equal(first, draw(30, torch.Generator().manual_seed(0), labels=labels))
    assert not torch.equal(first, other)
    check_samples(draw, (1, 1, 1), torch.device("cpu"))


def test_draws_are_those_of_runs_before(rng: torch.Generator) -> None:
    """The remainder of 62 random bits picks one of a class's pictures, in their order: runs go on with these draws."""
    images, labels = labelled(), torch.tensor([0, 2, 3, 4] * 10)
    assert images.labels is not None
    bits = torch.randint(2**62, (40,), generator=torch.Generator().manual_seed(0))
    members = [
        (images.labels == y).nonzero().flatten() if y < 4 else images.labels.argsort(stable=True) for y in range(5)
    ]
    expected = [members[y][u % len(members[y])] for y, u in zip(labels.tolist(), bits.tolist(), strict=True)]
    assert bytes_of(image_samples(images)(40, rng, labels=labels)).flatten().tolist() == torch.stack(expected).tolist()


def test_draws_without_labels_are_of_all_pictures(rng: torch.Generator) -> None:
    """One of 60 pictures is missing from 2,000 draws with probability 60 (59/60)^2000 = 1.5e-13."""
    drawn = bytes_of(image_samples(labelled())(2000, rng)).flatten()
    assert drawn.unique().tolist() == list(range(60))


def test_frequencies_are_the_shares_of_the_classes() -> None:
    torch.testing.assert_close(label_frequencies(labelled()), torch.tensor([0.5, 0.0, 0.3, 0.2]))
    images = labelled()
    assert images.labels is not None
    part = Subset(images, (images.labels == 3).nonzero().flatten())
    assert label_frequencies(part).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([0, 5], "labels must be 0 to 4, but hold 5"),
        ([-1, 0], "but hold -1"),
        ([0], r"labels must be \(2,\), but are \(1,\)"),
        ([0, 1], "label 'b' has no samples"),
    ],
)
def test_labels_that_cannot_be_drawn_are_refused(labels: list[int], match: str, rng: torch.Generator) -> None:
    with pytest.raises(UsageError, match=match):
        image_samples(labelled())(2, rng, labels=torch.tensor(labels))


def test_pictures_without_labels_have_none_to_give(rng: torch.Generator) -> None:
    images = StoredImages(pixels(3))
    with pytest.raises(UsageError, match="labels were asked for, but the pictures have none"):
        image_samples(images)(1, rng, labels=torch.tensor([0]))
    with pytest.raises(UsageError, match="the pictures have no labels"):
        label_frequencies(images)
