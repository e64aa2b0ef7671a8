r"""Pictures as data: every source becomes tensors x ∈ [−1, 1] of one shape (C, H, W).

Eight bits v ∈ {0, …, 255} become x = v/127.5 − 1. A set of pictures is an `Images`: it knows its shape, its length and
its labels, and turns indices into tensors. Sets in memory and sets that are decoded on demand differ in nothing else.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vardistill.domains.points.problems import digits
from vardistill.errors import UsageError, unknown
from vardistill.training.data import ByLabel

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
"""Decoders that may open a file."""

GREY = ("1", "L")
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow's modes of one bit or one byte, and of more than a byte, per value."""

MOST_HELD_OUT = 10_000
"""Pictures that are held out by default: a tenth, but no more than these."""

STD_IMAGES = 10_000
"""Pictures that the scale of the data is computed of, at most."""

BLOCK = 500
"""Pictures that are in memory at once while the scale is computed."""

MOST_LABELS = 100_000
"""Classes of an .npz file that has fewer pictures: each costs memory, also one without pictures."""

ARRAYS = "images[, labels] or train_images, test_images[, train_labels, test_labels]"


class Images(ABC):
    """A set of pictures of one shape.

    Attributes:
        shape: (C, H, W), with one channel or three.
        labels: the class of each picture, (n,) int64 on the CPU, or None.
        class_names: the name of each class; () without labels.
    """

    shape: tuple[int, int, int]
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()

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
            _check_classes(self.labels, self.class_names)
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
        self.shape, self.class_names = images.shape, images.class_names
        self.labels = None if images.labels is None else images.labels[index]

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Tensor) -> Tensor:
        """(len(index), C, H, W) in [−1, 1]."""
        return self.images.take(self.index[index])


class EncodedImages(Images):
    """Pictures that are decoded on demand; a subclass says where the n ≥ 1 of them are.

    One channel if all of them are grey, else RGB; transparency is dropped.
    """

    @abstractmethod
    def encoded(self, i: int) -> tuple[str, str | IO[bytes]]:
        """What picture i is called in messages, and the file that holds it."""

    def take(self, index: Tensor) -> Tensor:
        """(len(index), C, H, W) in [−1, 1]."""
        pixels = torch.empty(len(index), *self.shape, dtype=torch.uint8)
        for row, i in zip(pixels, index.tolist(), strict=True):
            row.copy_(self._decode(i))
        return scaled(pixels)

    def _decode(self, i: int) -> Tensor:
        channels, height, width = self.shape
        with opened(*self.encoded(i)) as picture:
            values = np.array(picture.convert("L" if channels == 1 else "RGB"))
            return torch.from_numpy(values).view(height, width, channels).permute(2, 0, 1)

    def _read_headers(self) -> tuple[int, int, int]:
        """The shape that all pictures have.

        Raises:
            UsageError: for pictures of several sizes, of more than 8 bits per value, or that cannot be read.
        """
        channels, first = 1, None
        for i in range(len(self)):
            name, file = self.encoded(i)
            with opened(name, file) as picture:
                size, mode = picture.size, picture.mode
            first = first or (name, size)
            if size != first[1]:
                both = f"{name} is {_size(size)} and {first[0]} is {_size(first[1])}"
                raise UsageError(f"{both}: all pictures must have one size")
            if mode in DEEP:
                raise UsageError(f"{name} has more than 8 bits per value: convert it to 8")
            channels = channels if mode in GREY else 3
        if first is None:
            raise UsageError("there must be at least one picture")
        return channels, first[1][1], first[1][0]


class FolderImages(EncodedImages):
    """Pictures below a folder, decoded on demand: only their paths are in memory.

    A folder of pictures has no labels. A folder of folders has one class for each that holds pictures, at any depth;
    classes are numbered in the order of their names. Files are .png, .jpg, .jpeg, .bmp and .webp; hidden ones are
    left out. All headers are read at the start.

    Args:
        root: the folder.

    Raises:
        UsageError: for a folder without pictures, or with pictures both beside and in subfolders; for pictures of
            several sizes or that cannot be read; for a link to a folder or out of `root`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UsageError(f"{root} is not a folder")
        files = list(_files(self.root, self.root.resolve()))
        if not files:
            raise UsageError(f"{root} holds no pictures ({', '.join(SUFFIXES)})")
        self.paths = [str(path) for path in files]
        tops = [path.relative_to(self.root).parts[:-1][:1] for path in files]
        names = sorted({name for top in tops for name in top})
        if names and () in tops:
            raise UsageError(
                f"{root} holds pictures and the class folder '{names[0]}': give pictures alone, or class folders alone"
            )
        if names:
            number = {name: i for i, name in enumerate(names)}
            self.class_names, self.labels = tuple(names), torch.tensor([number[top[0]] for top in tops])
        self.shape = self._read_headers()

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, i: int) -> tuple[str, str]:
        """The path, twice."""
        return self.paths[i], self.paths[i]


class HubImages(EncodedImages):
    """A split of a data set of Hugging Face's `datasets`, decoded on demand.

    Its pictures are the first column of the type Image, its labels the first of the type ClassLabel, if there is one.

    Args:
        dataset: a `datasets.Dataset`.
        name: for messages.

    Raises:
        UsageError: without a column of pictures or with labels outside the classes; for pictures of several sizes or
            that cannot be read.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        datasets = import_module("datasets")
        image = _column(dataset.features, datasets.Image)
        label = _column(dataset.features, datasets.ClassLabel)
        if image is None:
            raise UsageError(f"{name} has no column of pictures: its columns are {', '.join(dataset.features)}")
        self.name = name
        self.rows = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False)).with_format(None)
        self.image = image
        if label is not None:
            self.labels = torch.from_numpy(dataset.with_format("numpy")[label][:]).long()
            self.class_names = tuple(dataset.features[label].names)
            _check_classes(self.labels, self.class_names)
        self.shape = self._read_headers()

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, i: int) -> tuple[str, str | IO[bytes]]:
        """The row's name, and its bytes or its path."""
        value = self.rows[i][self.image] or {"bytes": b""}
        return f"picture {i} of {self.name}", value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])


@dataclass(frozen=True)
class ImageData:
    """Pictures to train with, and pictures to compare with that no training has seen.

    Args:
        name: for tables.
        train: the training set.
        held_out: of the same shape and classes.

    Raises:
        UsageError: if shapes or classes differ.
    """

    name: str
    train: Images
    held_out: Images

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

    @cached_property
    def std(self) -> float:
        """√ of the mean over (C, H, W) of a value's variance, from at most 10,000 evenly spaced training pictures."""
        m = min(len(self.train), STD_IMAGES)
        index = torch.arange(m) * len(self.train) // m
        total, squares = torch.zeros(2, *self.shape, dtype=torch.float64)
        for part in index.split(BLOCK):
            x = self.train.take(part).double()
            total, squares = total + x.sum(0), squares + x.square().sum(0)
        return math.sqrt((squares / m - (total / m).square()).mean().clamp_min(0))

    def describe(self) -> str:
        """One line: the name, the sets' sizes, shape, range and classes."""
        sizes = f"{len(self.train):,} training + {len(self.held_out):,} held-out pictures"
        classes = f"{self.classes or 'no'} class{'' if self.classes == 1 else 'es'}"
        return f"{self.name}: {sizes}, {'×'.join(map(str, self.shape))}, range [-1, 1], {classes}"


def load_images(source: str, held_out: int | None = None, seed: int = 0) -> ImageData:
    """Read a data set.

    Args:
        source: one of

            - `digits`: scikit-learn's 8×8 digits, split as `vardistill.domains.points.problems.Digits` does;
            - `FILE.npz`: arrays `train_images`, `test_images` and, both or none, `train_labels`, `test_labels` (MNIST's
              layout), or `images` and perhaps `labels`. Pictures are (n, H, W), (n, H, W, C) or (n, C, H, W), of
              uint8, or of floats that all lie in [0, 1] or else in [−1, 1];
            - `FOLDER`: see `FolderImages`. Subfolders `train` and `test` (or `val`) are the two sets;
            - `hf:NAME`: a data set of the Hugging Face hub, or a folder that `save_to_disk` wrote, read with
              `datasets`; its splits `train` and `test` (or `validation`) are the two sets;
            - `mnist`: `hf:ylecun/mnist`.

        held_out: pictures to split off where the source brings one set; a tenth, but at most 10,000, by default.
        seed: of the permutation that splits.

    Raises:
        UsageError: for a source that is not there or cannot be read, and for `held_out` where it cannot be followed.
    """
    name, sets = _read(source)
    if len(sets) == 1:
        return _split(name, sets[0], held_out, seed)
    if held_out is not None:
        raise UsageError(f"{source} brings its own held-out pictures: leave out held_out={held_out}")
    return ImageData(name, *sets)


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


@contextmanager
def opened(name: str, file: str | IO[bytes]) -> Iterator[Image.Image]:
    """The picture in a file, whose header only is read, until it is used.

    Raises:
        UsageError: for whatever fails inside; it names the picture.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            yield picture
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more
        raise UsageError(f"{name} cannot be read as a picture: {_one_line(error)}") from error


def _files(folder: Path, root: Path) -> Iterator[Path]:
    """Pictures below a folder, sorted; links must stay below `root`."""
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        is_folder = path.is_dir()
        if not is_folder and path.suffix.lower() not in SUFFIXES:
            continue
        if path.is_symlink() and (is_folder or not path.resolve().is_relative_to(root)):
            raise UsageError(f"{path} is a link {'to a folder' if is_folder else f'out of {root}'}: copy what it names")
        if is_folder:
            yield from _files(path, root)
        else:
            yield path


def _read(source: str) -> tuple[str, tuple[Images, ...]]:
    """A source's name and its sets: one, or training and held-out."""
    path = Path(source)
    if source == "digits":
        return source, _digits()
    if source == "mnist":
        return source, _hub("ylecun/mnist", "; a local file can be given instead, as mnist.npz")
    if source.startswith("hf:"):
        return source, _hub(source.removeprefix("hf:"))
    if path.is_file() and path.suffix == ".npz":
        return path.stem, _npz(path)
    if path.is_dir():
        return path.resolve().name, _folder(path)
    if path.suffix == ".npz" or len(path.parts) > 1:
        raise UsageError(f"there is no {'file' if path.suffix == '.npz' else '.npz file or folder'} {source}")
    raise unknown("image source", source, ("digits", "mnist", "FILE.npz", "FOLDER", "hf:NAME"))


def _split(name: str, images: Images, held_out: int | None, seed: int) -> ImageData:
    """Split by a seeded permutation; both parts keep the source's order."""
    n = len(images)
    m = max(1, min(n // 10, MOST_HELD_OUT)) if held_out is None else held_out
    if not 0 < m < n:
        raise UsageError(f"{name} has {n} pictures: {m} of them cannot be held out")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return ImageData(name, Subset(images, order[m:].sort().values), Subset(images, order[:m].sort().values))


def _digits() -> tuple[Images, Images]:
    names = tuple(map(str, range(10)))
    images = StoredImages(digits.pictures().view(-1, 1, 8, 8), digits.labels(), names)
    training, held_out = digits.split()
    return Subset(images, training), Subset(images, held_out)


def _npz(path: Path) -> tuple[Images, ...]:
    arrays = _arrays(path)
    if "images" in arrays:
        pictures, labels = [arrays["images"]], [arrays.get("labels")]
    elif "train_images" in arrays and "test_images" in arrays:
        pictures = [arrays["train_images"], arrays["test_images"]]
        labels = [arrays.get("train_labels"), arrays.get("test_labels")]
    else:
        raise UsageError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, but must hold {ARRAYS}")
    if len({y is None for y in labels}) == 2:
        raise UsageError(f"{path} has labels for one of its two sets: give both or none")
    try:
        pixels = [_channels_first(x) for x in _eight_bits_or_floats(pictures)]
        y = [None if part is None else _integers(part) for part in labels]
        last = max((int(part.max()) for part in y if part is not None and len(part)), default=-1)
        if last >= max(MOST_LABELS, sum(map(len, pixels))):
            raise UsageError(f"labels must be 0 to {MOST_LABELS - 1}, or below the number of pictures, but hold {last}")
        names = tuple(map(str, range(last + 1)))
        return tuple(StoredImages(*part, names) for part in zip(pixels, y, strict=True))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _arrays(path: Path) -> Mapping[str, np.ndarray[Any, Any]]:
    """All arrays of an .npz file that need no pickle."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # of the zip archive, its compression or the arrays' headers
        raise UsageError(f"{path} cannot be read as .npz: {_one_line(error)}") from error


def _eight_bits_or_floats(arrays: list[np.ndarray[Any, Any]]) -> list[Tensor]:
    """Pixels as uint8, or as float32 in [−1, 1]; all arrays together decide on the range that floats have."""
    if any(x.size == 0 for x in arrays):
        raise UsageError("there are no pictures in it")
    if all(x.dtype == np.uint8 for x in arrays):
        return [torch.from_numpy(x) for x in arrays]
    if not all(x.dtype.kind == "f" for x in arrays):
        raise UsageError(f"pictures must be uint8 or floats, but are {' and '.join(str(x.dtype) for x in arrays)}")
    low, high = float(np.min([x.min() for x in arrays])), float(np.max([x.max() for x in arrays]))
    if not (low >= -1 and high <= 1):  # nor for NaN
        raise UsageError(f"pictures of floats must lie in [0, 1] or [-1, 1], but lie in [{low:g}, {high:g}]")
    pixels = [torch.from_numpy(x.astype(np.float32)) for x in arrays]
    return [2 * x - 1 for x in pixels] if low >= 0 else pixels


def _channels_first(pixels: Tensor) -> Tensor:
    """(n, H, W), (n, H, W, C) or (n, C, H, W) → (n, C, H, W), with C of 1 or 3."""
    if pixels.ndim == 3:
        return pixels.unsqueeze(1)
    if pixels.ndim == 4 and pixels.shape[3] in (1, 3):
        return pixels.permute(0, 3, 1, 2)
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
        return pixels
    shape = tuple(pixels.shape)
    raise UsageError(
        f"pictures must be (n, H, W), or have 1 or 3 channels as (n, H, W, C) or (n, C, H, W), not {shape}"
    )


def _integers(labels: np.ndarray[Any, Any]) -> Tensor:
    if labels.dtype.kind not in "iu":
        raise UsageError(f"labels must be integers, but are {labels.dtype}")
    return torch.from_numpy(labels.astype(np.int64))


def _checked_labels(labels: Tensor, n: int) -> Tensor:
    if tuple(labels.shape) != (n,):
        raise UsageError(f"{n} pictures need labels of shape ({n},), not {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise UsageError(f"labels must be integers, but are {labels.dtype}")
    return labels.long().cpu()


def _check_classes(labels: Tensor, class_names: tuple[str, ...]) -> None:
    outside = labels[(labels < 0) | (labels >= len(class_names))]
    if len(outside):
        raise UsageError(f"labels must be 0 to {len(class_names) - 1}, but hold {int(outside[0])}")


def _folder(path: Path) -> tuple[Images, ...]:
    parts = [part for part in path.iterdir() if part.is_dir() and not part.name.startswith(".")]
    if [part.name for part in parts] == ["train"]:
        raise UsageError(f"{path} holds train, but neither test nor val: give {path / 'train'} to have it split")
    held_out = next((path / name for name in ("test", "val") if path / name in parts), None)
    if held_out is None or path / "train" not in parts:
        return (FolderImages(path),)
    for part in (path / "train", held_out):
        if part.is_symlink():
            raise UsageError(f"{part} is a link to a folder: copy what it names")
    return FolderImages(path / "train"), FolderImages(held_out)


def _hub(name: str, instead: str = "") -> tuple[Images, ...]:
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise UsageError(f"hf:{name} needs datasets: pip install 'vardistill[datasets]'{instead}") from error
    try:
        data = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except Exception as error:  # of the network, the hub or the data set's files
        raise UsageError(f"cannot load hf:{name}: {_one_line(error)}{instead}") from error
    if not isinstance(data, Mapping):
        return (HubImages(data, f"hf:{name}"),)
    if "train" not in data:
        raise UsageError(f"hf:{name} has no split train: its splits are {', '.join(data)}")
    held_out = [key for key in ("test", "validation", "val", "valid") if key in data][:1]
    return tuple(HubImages(data[key], f"hf:{name}, split {key}") for key in ["train", *held_out])


def _column(features: Mapping[str, Any], kind: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
