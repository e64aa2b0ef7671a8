r"""Pictures as data: every source becomes tensors x ∈ [−1, 1] of one shape (C, H, W).

Eight bits v ∈ {0, …, 255} become x = v/127.5 − 1. A set of pictures is an `Images`: it knows its shape, its length and
its labels, and turns indices into tensors. Sets in memory and sets that are decoded on demand differ in nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.training.data import ByLabel

STD_IMAGES = 10_000
"""Pictures that the scale of the data is computed of, at most."""

BLOCK = 500
"""Pictures that are in memory at once while the scale is computed."""

MOST_TOLD = 12
"""Classes whose numbers of pictures are told one by one."""


class Images(ABC):
    """A set of pictures of one shape.

    Attributes:
        shape: (C, H, W), with one channel or three.
        labels: the class of each picture, (n,) int64 on the CPU, or None.
        class_names: the name of each class; () without labels.
        remarks: what reading did to the pictures and what it left out, in words.
    """

    shape: tuple[int, int, int]
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, index: Tensor) -> Tensor:
        """The pictures at `index` (n,), an int64 tensor on the CPU: float32 (n, C, H, W) in [−1, 1], on the CPU.

        Raises:
            UsageError: for a picture that cannot be decoded; it names it.
        """


class StoredImages(Images):
    """Pictures in one tensor, in memory or over a mapped file (`torch.from_numpy(np.load(path, mmap_mode="c"))`).

    Args:
        pixels: (n, C, H, W), uint8, or float32 in [−1, 1].
        labels: (n,) integers 0..classes − 1.
        class_names: of all classes; the numbers by default.

    Raises:
        UsageError: for an empty set, another type or range, or labels that do not fit.
    """

    def __init__(self, pixels: Tensor, labels: Tensor | None = None, class_names: tuple[str, ...] = ()) -> None:
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or pixels.numel() == 0:
            raise UsageError(f"pictures must be (n, 1 or 3, H, W) with n at least 1, but are {tuple(pixels.shape)}")
        if pixels.dtype not in (torch.uint8, torch.float32):
            raise UsageError(f"pictures must be uint8 or float32, but are {pixels.dtype}")
        if pixels.is_floating_point() and not bool((pixels.abs() <= 1).all()):
            raise UsageError("pictures of float32 must lie in [-1, 1], without NaN")
        self.pixels = pixels
        _, channels, height, width = pixels.shape
        self.shape = (channels, height, width)
        if labels is not None:
            self.labels = _checked_labels(labels, len(pixels))
            self.class_names = class_names or tuple(map(str, range(int(self.labels.max()) + 1)))
            check_classes(self.labels, self.class_names)
        elif class_names:
            raise UsageError("class_names need labels")

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: Tensor) -> Tensor:
        """(len(index), C, H, W) in [−1, 1]."""
        return scaled(self.pixels[index])


class Subset(Images):
    """The pictures of `images` at `index` (n,), in its order, without a copy."""

    def __init__(self, images: Images, index: Tensor) -> None:
        self.images, self.index = images, index
        self.shape, self.class_names, self.remarks = images.shape, images.class_names, images.remarks
        self.labels = None if images.labels is None else images.labels[index]

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Tensor) -> Tensor:
        """(len(index), C, H, W) in [−1, 1]."""
        return self.images.take(self.index[index])


class WithMirrored(Images):
    """Pictures 0..n − 1 of `images`, then their mirror images, left and right exchanged, in the same order."""

    def __init__(self, images: Images) -> None:
        self.images, self.shape, self.class_names = images, images.shape, images.class_names
        self.labels = None if images.labels is None else images.labels.repeat(2)
        self.remarks = (*images.remarks, "half of the training pictures are mirror images")

    def __len__(self) -> int:
        return 2 * len(self.images)

    def take(self, index: Tensor) -> Tensor:
        """(len(index), C, H, W) in [−1, 1]."""
        n = len(self.images)
        x = self.images.take(index % n)
        return torch.where((index >= n)[:, None, None, None], x.flip(3), x)


@dataclass(frozen=True)
class ImageData:
    """Pictures to train with, and pictures to compare with that no training has seen.

    Args:
        name: for tables.
        train: the training set.
        held_out: of the same shape and classes.
        remarks: what reading left out beside what the sets themselves remark.

    Raises:
        UsageError: if shapes or classes differ.
    """

    name: str
    train: Images
    held_out: Images
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind, one, other in (
            ("have shape", self.train.shape, self.held_out.shape),
            ("have the classes", self.train.class_names, self.held_out.class_names),
        ):
            if one != other:
                raise UsageError(f"{self.name}: training pictures {kind} {one}, held-out ones {other}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.train.shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class; () without labels."""
        return self.train.class_names

    @property
    def classes(self) -> int:
        """How many classes there are; 0 without labels."""
        return len(self.class_names)

    @property
    def std(self) -> float:
        """√ of the mean over (C, H, W) of a value's variance, from at most 10,000 evenly spaced training pictures.

        Raises:
            UsageError: where it is 0.
        """
        if self._moments[0] == 0:
            raise UsageError(f"{self.name}: all training pictures are the same: there is nothing to learn from them")
        return self._moments[0]

    @cached_property
    def _moments(self) -> tuple[float, float, float]:
        """`std`, and the least and the greatest value of the same pictures."""
        m = min(len(self.train), STD_IMAGES)
        index = torch.arange(m) * len(self.train) // m
        total, squares = torch.zeros(2, *self.shape, dtype=torch.float64)
        low, high = math.inf, -math.inf
        for part in index.split(BLOCK):
            x = self.train.take(part).double()
            total, squares = total + x.sum(0), squares + x.square().sum(0)
            low, high = min(low, float(x.min())), max(high, float(x.max()))
        return math.sqrt((squares / m - (total / m).square()).mean().clamp_min(0)), low, high

    def renumbered(self, numbers: Sequence[int], names: tuple[str, ...]) -> ImageData:
        """The same pictures with other labels: `numbers` of the classes, which are places in `names`."""

        def of(images: Images) -> Images:
            other = copy(images)
            assert images.labels is not None
            other.labels, other.class_names = torch.tensor(numbers)[images.labels], names
            return other

        return replace(self, train=of(self.train), held_out=of(self.held_out))

    def describe(self) -> str:
        """One line: the name, the sets' sizes, shape, range, classes with their pictures, and all remarks."""
        sizes = f"{len(self.train):,} training + {len(self.held_out):,} held-out pictures"
        shape, (_, low, high) = "×".join(map(str, self.shape)), self._moments
        line = f"{self.name}: {sizes}, {shape}, range [{low:.3g}, {high:.3g}], {self._classes()}"
        return "; ".join(dict.fromkeys((line, *self.train.remarks, *self.held_out.remarks, *self.remarks)))

    def _classes(self) -> str:
        """How many classes there are, and how many pictures each has."""
        sets = [images.labels for images in (self.train, self.held_out) if images.labels is not None]
        if not sets:
            return "no classes"
        counts = torch.cat(sets).bincount(minlength=self.classes).tolist()
        kind = "class" if self.classes == 1 else "classes"
        if self.classes > MOST_TOLD:
            names = ", ".join((*self.class_names[:3], "…", self.class_names[-1]))
            return f"{self.classes:,} {kind} of {min(counts):,} to {max(counts):,} pictures ({names})"
        told = ", ".join(f"{name}: {n:,}" for name, n in zip(self.class_names, counts, strict=True))
        return f"{self.classes} {kind} ({told})"


class ImageSamples:
    """Draws pictures with replacement, of given classes where labels are given.

    See `image_samples`.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        self.by_label = None if images.labels is None else ByLabel(images.labels, images.class_names)

    def __call__(self, n: int, rng: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """(n, C, H, W) in [−1, 1], on the device of `rng`.

        Args:
            n: how many.
            rng: draws them.
            labels: (n,) int64, the class of each; `classes`, one past the last, for any class.

        Raises:
            UsageError: for labels where the pictures have none, or that are not (n,) classes with pictures.
        """
        if labels is None:
            index = torch.randint(len(self.images), (n,), generator=rng, device=rng.device).cpu()
        elif self.by_label is None:
            raise UsageError("labels were asked for, but the pictures have none")
        else:
            index = self.by_label.draw(n, rng, labels)
        return self.images.take(index).to(rng.device)


def image_samples(images: Images) -> ImageSamples:
    """A callable (n, rng, labels=None) → (n, C, H, W), as `vardistill.training.data.Samples` with a condition."""
    return ImageSamples(images)


def label_frequencies(images: Images) -> Tensor:
    """The share of each class among the pictures, (classes,) float32 that sum to 1.

    Raises:
        UsageError: for pictures without labels.
    """
    if images.labels is None:
        raise UsageError("the pictures have no labels")
    return images.labels.bincount(minlength=len(images.class_names)) / len(images)


def scaled(pixels: Tensor) -> Tensor:
    """v/127.5 − 1 of uint8 pixels, contiguous float32; float32 pixels are scaled already."""
    x = pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1
    return x.contiguous()


def _checked_labels(labels: Tensor, n: int) -> Tensor:
    if tuple(labels.shape) != (n,):
        raise UsageError(f"{n} pictures need labels of shape ({n},), not {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise UsageError(f"labels must be integers, but are {labels.dtype}")
    return labels.long().cpu()


def check_classes(labels: Tensor, class_names: tuple[str, ...]) -> None:
    """Raise UsageError for labels that are none of the classes."""
    outside = labels[(labels < 0) | (labels >= len(class_names))]
    if len(outside):
        raise UsageError(f"labels must be 0 to {len(class_names) - 1}, but hold {int(outside[0])}")
