r"""Where pictures come from: folders, arrays, data sets of the hub.

All of them are read as eight bits v ∈ {0, …, 255} of one shape. What people's pictures have beside pixels is resolved
here, in the same way for every source: they are turned as their EXIF data say, sixteen bits become eight, transparent
parts show white, of an animation the first frame is taken, pictures of other sizes are resized with antialiasing and
cropped. What cannot be read is left out and told (`Images.remarks`).
"""

from __future__ import annotations

import io
import math
import re
import warnings
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from vardistill.domains.pictures.data import (
    BLOCK,
    ImageData,
    Images,
    StoredImages,
    Subset,
    WithMirrored,
    check_classes,
    scaled,
)
from vardistill.domains.points.problems import digits
from vardistill.errors import UsageError, unknown
from vardistill.hub import require_answer

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp"),
    *(".gif", ".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm"),
)
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
"""Decoders that may open a file."""

JUNK = ("__macosx", "@eadir", "thumbs.db", "desktop.ini")
"""What systems leave beside pictures; it is left out without a word, as hidden files are."""

DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow's modes of more than a byte per value."""

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation; 5 and above exchange the sides."""

MOST_HELD_OUT = 10_000
"""Pictures that are held out by default: a tenth, but no more than these."""

MOST_IN_MEMORY = 2**30
"""Bytes that decoded pictures may take; larger sets are decoded as they are drawn."""

TRAIN = ("train", "training", "trn")
HELD_OUT = ("test", "testing", "tst", "val", "valid", "validation", "dev", "eval", "evaluation", "holdout", "heldout")
"""Names of the two sets, the first that is there; case, digits, punctuation and a word for "set" do not matter."""

LABELS = ("label", "labels", "class", "classes", "cls", "category", "target", "y")
"""Columns of integers or texts that hold a hub data set's labels, where it declares none."""

SAVED = ("dataset_dict.json", "dataset_info.json")
"""What the library `datasets` writes into the folder of a data set."""

ARRAYS = (
    "images[, labels], train_images, test_images[, train_labels, test_labels] or x_train, x_test[, y_train, y_test]"
)

Size = tuple[int, int]
"""(H, W)."""


class Unreadable(UsageError):
    """A picture that cannot be read, and may be left out."""


class EncodedImages(Images):
    """Pictures that are decoded on demand; a subclass says where they are.

    One channel if all of them are grey, else RGB. All headers are read at the start.

    Args:
        places: of the pictures, in the subclass's counting.
        size: that all pictures get: the shorter side is resized to fit, the longer one cropped; default their own.
        default_size: the same, where they have several sizes.
        left_out: what the subclass did not take, by kind.

    Raises:
        UsageError: for pictures of several sizes without a size, and where none can be read.
    """

    def __init__(
        self, places: Sequence[int], size: Size | None, default_size: Size | None, left_out: Mapping[str, list[str]]
    ) -> None:
        self.left_out = defaultdict(list, left_out)
        self.places: list[int] = []
        sizes: dict[tuple[int, int], str] = {}
        facts: Counter[str] = Counter()
        for place in places:
            name, file = self.encoded(place)
            try:
                with opened(name, file) as picture:
                    own = picture.size if size is not None else _upright_size(picture)
                    found = _facts(picture)
            except Unreadable as error:
                self.left_out["unreadable"].append(str(error))
            else:
                sizes.setdefault(own, name)
                facts.update(found)
                self.places.append(place)
        if not sizes:
            raise UsageError(f"there is no picture that can be read; {'; '.join(told(self.left_out))}")
        width, height = self._size(sizes, size, default_size)
        self.shape = (3 if facts.pop(COLOUR, 0) else 1, height, width)
        others = sorted((other for other in sizes if other != (width, height)), key=math.prod)
        self.resized = size is not None or bool(others)
        resized = " to ".join(dict.fromkeys(f"{w}×{h}" for w, h in (*others[:1], *others[-1:])))
        self.done = (
            *([f"resized to {width}×{height} from {resized}"] if others else []),
            *(f"{n:,} {fact}" for fact, n in facts.items()),
        )
        self.remarks = (*self.done, *told(self.left_out))

    @staticmethod
    def _size(sizes: dict[tuple[int, int], str], size: Size | None, default_size: Size | None) -> tuple[int, int]:
        """(W, H) of all pictures."""
        asked = size or (default_size if len(sizes) > 1 else None)
        if asked is not None:
            return asked[1], asked[0]
        (first, name), *others = sizes.items()
        if others:
            (w, h), other = others[0]
            side = min(64, 2 ** int(math.log2(min(map(min, sizes)))))
            raise UsageError(
                f"{other} is {w}×{h} and {name} is {first[0]}×{first[1]}: add --size {side}, say, to have all pictures "
                "resized and cropped to one size"
            )
        return first

    def __len__(self) -> int:
        return len(self.places)

    @abstractmethod
    def encoded(self, place: int) -> tuple[str, str | IO[bytes]]:
        """What a picture is called in messages, and the file that holds it."""

    def take(self, index: Tensor) -> Tensor:
        """(len(index), C, H, W) in [−1, 1]."""
        pixels = torch.empty(len(index), *self.shape, dtype=torch.uint8)
        for row, i in zip(pixels, index.tolist(), strict=True):
            row.copy_(self._decode(i))
        return scaled(pixels)

    def _decode(self, i: int) -> Tensor:
        with opened(*self.encoded(self.places[i])) as picture:
            return _pixels(picture, *self.shape, self.resized)

    def in_memory(self) -> Images:
        """The pictures decoded, without those that cannot be; these pictures themselves where they take too much."""
        if len(self) * math.prod(self.shape) > MOST_IN_MEMORY:
            return self
        pixels, kept = torch.empty(len(self), *self.shape, dtype=torch.uint8), list[int]()
        for i in range(len(self)):
            try:
                pixels[len(kept)] = self._decode(i)
                kept.append(i)
            except Unreadable as error:
                self.left_out["unreadable"].append(str(error))
        if not kept:
            raise UsageError(f"there is no picture that can be read; {'; '.join(told(self.left_out))}")
        stored = StoredImages(pixels[: len(kept)], None if self.labels is None else self.labels[kept], self.class_names)
        stored.remarks = (*self.done, *told(self.left_out))
        return stored


class FolderImages(EncodedImages):
    """Pictures below a folder, decoded on demand: only their paths are in memory.

    A folder of pictures has no labels. A folder of folders has one class for each that holds pictures, at any depth;
    classes are numbered in the order of their names, 2 before 10. A folder in which there is but one other is that one.
    Files are those of `SUFFIXES`; links are followed.

    Args:
        root: the folder.
        size: see `EncodedImages`.
        default_size: see `EncodedImages`.
        classes: that another set has: with them a folder in which there is but one may be a class.

    Raises:
        UsageError: for a folder without pictures, or with pictures both beside and in subfolders; see `EncodedImages`.
    """

    def __init__(
        self,
        root: str | Path,
        size: Size | None = None,
        default_size: Size | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise UsageError(f"{shown(root)} is not a folder")
        left_out: defaultdict[str, list[str]] = defaultdict(list)
        try:
            files = list(_files(root, left_out, root))
        except OSError as error:
            raise UsageError(f"cannot read {shown(root)}: {error.strerror} ({shown(error.filename)})") from error
        if not files:
            found = "".join(f"; {part}" for part in told(left_out))
            raise UsageError(f"{shown(root)} holds no pictures ({', '.join(FORMATS)}){found}")
        tops = [path.relative_to(root).parts for path in files]
        while len(tops[0]) > 1 and {parts[0] for parts in tops} == {tops[0][0]} and tops[0][0] not in classes:
            tops = [parts[1:] for parts in tops]
        names = [shown(parts[0]) for parts in tops if len(parts) > 1]
        if names and len(names) < len(tops):
            raise UsageError(
                f"{shown(root)} holds pictures and the class folder '{names[0]}': give pictures alone, or class "
                "folders alone"
            )
        self.root, self.paths = root, [str(path) for path in files]
        super().__init__(range(len(files)), size, default_size, left_out)
        if names:
            self.labels, self.class_names = numbered([names[place] for place in self.places])

    def encoded(self, place: int) -> tuple[str, str]:
        """The path from the folder's name on, and whole."""
        path = self.paths[place]
        return shown(Path(self.root.name, Path(path).relative_to(self.root))), path


class HubImages(EncodedImages):
    """A split of a data set of Hugging Face's `datasets`, decoded on demand.

    Its pictures are the first column of the type Image. Its labels are the first of the type ClassLabel, else a column
    of integers or texts that is called as one of `LABELS` and has every value twice on average. Pictures without a
    label are left out where others have one.

    Args:
        dataset: a `datasets.Dataset`.
        name: for messages.
        size: see `EncodedImages`.
        default_size: see `EncodedImages`.

    Raises:
        UsageError: without a column of pictures or with labels outside the classes; see `EncodedImages`.
    """

    def __init__(self, dataset: Any, name: str, size: Size | None = None, default_size: Size | None = None) -> None:
        datasets = import_module("datasets")
        features = dataset.features
        image = next((c for c, feature in features.items() if isinstance(feature, datasets.Image)), None)
        if image is None:
            raise UsageError(f"{name} has no column of pictures: its columns are {', '.join(features) or 'none'}")
        if not len(dataset):
            raise UsageError(f"{name} is empty: it has no pictures")
        declared = next((c for c, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None)
        named = (c for c in features if c.lower() in LABELS and re.match(r"u?int|bool|.*string", _dtype(features[c])))
        label = declared or next(named, None)
        values = [None] * len(dataset) if label is None else list(dataset.with_format(None)[label][:])
        if declared is not None:
            values = [None if value == -1 else value for value in values]
        elif 2 * len({*values} - {None}) > len(values) - values.count(None):
            label, values = None, [None] * len(dataset)
        left_out = {"columns": [c for c in features if c not in (image, label)]}
        places = [i for i, value in enumerate(values) if value is not None] or range(len(values))
        kept = set(places)
        left_out["no label"] = [f"picture {i}" for i in range(len(values)) if i not in kept]
        self.name = name
        self.rows = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False)).with_format(None)
        self.image = image
        super().__init__(places, size, default_size, left_out)
        values = [values[place] for place in self.places]
        if values[0] is None:
            return
        if declared is None:
            self.labels, self.class_names = numbered([str(value) for value in values])
        else:
            names = tuple(features[declared].names)
            self.labels, self.class_names = torch.tensor(values), names
            check_classes(self.labels, names)

    def encoded(self, place: int) -> tuple[str, str | IO[bytes]]:
        """The row's name, and its bytes or its path."""
        value = self.rows[place][self.image] or {"bytes": b""}
        return f"picture {place} of {self.name}", value["path"] if value["bytes"] is None else io.BytesIO(
            value["bytes"]
        )


def load_images(
    source: str,
    held_out: int | None = None,
    seed: int = 0,
    size: Size | None = None,
    default_size: Size | None = None,
    mirrored: bool = False,
) -> ImageData:
    """Read a data set.

    Args:
        source: one of

            - `digits`: scikit-learn's 8×8 digits, split as `vardistill.domains.points.problems.Digits` does;
            - `FILE.npz`: arrays `train_images`, `test_images` and, both or none, `train_labels`, `test_labels`, or
              Keras' `x_train`, `x_test`, `y_train`, `y_test`, or `images` and perhaps `labels`, or one array of any
              name. Pictures are (n, H, W), (n, H, W, C) or (n, C, H, W), of uint8, or of floats that all lie in [0, 1]
              or else in [−1, 1]; labels are integers or texts, of which those that occur are the classes;
            - `FILE.npy`: one such array of pictures;
            - `FOLDER`: see `FolderImages`. Subfolders that are called as in `TRAIN` and `HELD_OUT` are the two sets;
            - `hf:NAME`: a data set of the Hugging Face hub, or a folder that `save_to_disk` wrote, read with
              `datasets`; see `HubImages`. Its splits of such names are the two sets;
            - `mnist`: `hf:ylecun/mnist`.

        held_out: pictures to split off where the source brings one set; a tenth, but at most 10,000, by default.
        seed: of the permutation that splits.
        size: (H, W) that all pictures get: the shorter side is resized to fit, the longer one cropped; default their
            own.
        default_size: the same, where files have several sizes.
        mirrored: whether the mirror images of training pictures are training pictures, too.

    Raises:
        UsageError: for a source that is not there or cannot be read, and for `held_out` where it cannot be followed.
    """
    name, sets, remarks = _read(source, size, default_size)
    if len(sets) == 1:
        data = _split(name, sets[0], held_out, seed)
    elif held_out is not None:
        raise UsageError(f"{source} brings its own held-out pictures: leave out held_out={held_out}")
    else:
        data = ImageData(name, sets[0], sets[1])
    train = WithMirrored(data.train) if mirrored else data.train
    return ImageData(name, train, data.held_out, remarks)


COLOUR = "of colour"


def _facts(picture: Image.Image) -> list[str]:
    """What is to be told of a picture, in words that follow a number; with `COLOUR`, it is not grey."""
    bands = picture.getbands()
    facts = [COLOUR] if bands[0] not in ("1", "L", "I", "F") else []
    if picture.mode in DEEP[:-1]:
        facts.append("of 16 bits a value, taken as 8")
    if bands[-1] in "Aa" or "transparency" in picture.info:
        facts.append("with transparency, laid on white")
    if getattr(picture, "is_animated", False):
        facts.append("with several frames, of which the first is taken")
    return facts


def _orientation(picture: Image.Image) -> int:
    try:
        if picture.format == "TIFF":  # is turned when it is decoded, and its size before, depending on Pillow's version
            picture.load()
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data, of a picture that may be whole
        return 1


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    """(W, H) of a picture as it is to be seen."""
    turned = picture.width != picture.height and _orientation(picture) >= 5
    return picture.size[::-1] if turned else picture.size


def _pixels(picture: Image.Image, channels: int, height: int, width: int, resized: bool) -> Tensor:
    """The first frame, upright and, if it may be, resized and cropped, (C, H, W) of uint8."""
    own = _upright_size(picture)
    if own != (width, height):
        if not resized:
            raise ValueError(f"it is {own[0]}×{own[1]}, and was {width}×{height}")
        picture.draft(None, (2 * max(height, width),) * 2)  # a JPEG file's decoder may leave out what is not seen
    turn = TURNS.get(_orientation(picture))
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode in DEEP:
        picture = _eight_bits(picture)
    if picture.getbands()[-1] in "Aa" or "transparency" in picture.info:
        colours = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if own != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).view(height, width, channels).permute(2, 0, 1)


def _eight_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its values have no known range: convert it to 8 bits")
    return Image.fromarray(_of_sixteen_bits(values))


def _of_sixteen_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """v/65535 is as bright as (v/257)/255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


@contextmanager
def opened(name: str, file: str | IO[bytes]) -> Iterator[Image.Image]:
    """The picture in a file, whose header only is read, until it is used.

    Raises:
        UsageError: for a picture of so many pixels that it must be meant to fill the memory.
        Unreadable: for whatever else fails inside; it names the picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: on large pictures, damaged EXIF data, palettes
            with Image.open(file, formats=FORMATS) as picture:
                yield picture
    except Image.DecompressionBombError as error:
        raise UsageError(f"{name} is too large to be a picture: {_one_line(error)}") from error
    except UnidentifiedImageError as error:
        raise Unreadable(f"{name} is no picture of a format that is read") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more
        raise Unreadable(f"{name} cannot be read: {_one_line(error)}") from error


def _files(
    folder: Path, left_out: defaultdict[str, list[str]], root: Path, above: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """Pictures below a folder, sorted, links followed; others are named by kind."""
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        name = shown(path.relative_to(root))
        if path.name.startswith(".") or path.name.lower() in JUNK:
            continue
        if path.is_symlink() and not path.exists():
            left_out["broken links"].append(name)
        elif path.is_dir():
            if path.resolve() in above:
                left_out["links to a folder around them"].append(name)
            else:
                yield from _files(path, left_out, root, above)
        elif path.suffix.lower() not in SUFFIXES:
            left_out[shown(path.suffix.lower()) or "no suffix"].append(name)
        elif not path.is_file():  # a pipe or a device, which would be waited for
            left_out["pipes and devices"].append(name)
        else:
            yield path


def told(left_out: Mapping[str, list[str]]) -> list[str]:
    """What was left out in words, if anything was."""
    parts = [
        f"{kind}: {len(names):,} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in left_out.items()
        if names
    ]
    return [f"left out: {', '.join(parts)}"] if parts else []


def shown(path: object) -> str:
    """A name as it can be printed in a line and written to UTF-8 files, whatever bytes a file system has for it."""
    return "".join(c if c.isprintable() else "�" for c in str(path))


def numbered(values: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels (n,) of the values that occur, and these in their order, 2 before 10."""
    names = sorted(set(values), key=lambda name: ([*_parts(name)], name))
    places = {name: i for i, name in enumerate(names)}
    return torch.tensor([places[value] for value in values]), tuple(names)


def _parts(name: str) -> Iterator[str | int]:
    """Texts and numbers in turn."""
    for i, part in enumerate(re.split(r"([0-9]+)", name)):
        yield int(part) if i % 2 else part


def _read(source: str, size: Size | None, default_size: Size | None) -> tuple[str, tuple[Images, ...], tuple[str, ...]]:
    """A source's name, its sets (one, or training and held-out) and what is to be remarked beside them."""
    path = Path(source)
    if source == "digits":
        return source, _digits(size), ()
    if source == "mnist":
        return source, *_hub("ylecun/mnist", size, default_size, "; a local file can be given instead, as mnist.npz")
    if source.startswith("hf:"):
        return source, *_hub(source.removeprefix("hf:"), size, default_size)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in (".npz", ".npy"):
        return path.stem, *_arrays_file(path, size)
    if path.is_dir():
        return path.resolve().name, *_folder(path, size, default_size)
    if path.is_file():
        raise UsageError(f"{source} is a file: pictures are read from folders (unpack archives), .npz and .npy files")
    if suffix in (".npz", ".npy") or len(path.parts) > 1:
        raise UsageError(f"there is no {'file' if suffix in ('.npz', '.npy') else 'file or folder'} {source}")
    raise unknown("image source", source, ("digits", "mnist", "FILE.npz", "FOLDER", "hf:NAME"))


def _split(name: str, images: Images, held_out: int | None, seed: int) -> ImageData:
    """Split by a seeded permutation; both parts keep the source's order."""
    n = len(images)
    m = max(1, min(n // 10, MOST_HELD_OUT)) if held_out is None else held_out
    if not 0 < m < n:
        pictures = "1 picture" if n == 1 else f"{n} pictures"
        raise UsageError(f"{name} has {pictures}: {m} of them cannot be held out")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return ImageData(name, Subset(images, order[m:].sort().values), Subset(images, order[:m].sort().values))


def _digits(size: Size | None) -> tuple[Images, Images]:
    names = tuple(map(str, range(10)))
    images = _stored(digits.pictures().view(-1, 1, 8, 8), digits.labels(), names, size)
    training, held_out = digits.split()
    return Subset(images, training), Subset(images, held_out)


def _stored(pixels: Tensor, labels: Tensor | None, names: tuple[str, ...], size: Size | None) -> StoredImages:
    """Pictures of an array, of the size that is asked for: as those of files, resized with antialiasing and cropped."""
    height, width = pixels.shape[2:]
    if size in (None, (height, width)):
        return StoredImages(pixels, labels, names)
    scale = max(size[0] / height, size[1] / width)
    inner = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    rows, columns = (slice((a - b) // 2, (a - b) // 2 + b) for a, b in zip(inner, size, strict=True))
    parts = []
    for part in pixels.split(BLOCK):
        x = F.interpolate(scaled(part), inner, mode="bicubic", antialias=True)[..., rows, columns].clamp(-1, 1)
        parts.append(x if part.is_floating_point() else ((x + 1) * 127.5).round().to(torch.uint8))
    images = StoredImages(torch.cat(parts), labels, names)
    images.remarks = (f"resized to {size[1]}×{size[0]} from {width}×{height}",)
    return images


def _arrays_file(path: Path, size: Size | None) -> tuple[tuple[Images, ...], tuple[str, ...]]:
    arrays = _arrays(path)
    keys = {key.lower(): key for key in arrays}
    layouts = (
        [("train_images", "train_labels"), ("test_images", "test_labels")],
        [("x_train", "y_train"), ("x_test", "y_test")],
        [("train_images", "train_labels"), ("val_images", "val_labels")],
        [("images", "labels")],
        [("arr_0", "arr_1")],
        [("x", "y")],
        [(name, "") for name in keys][:1] if len(keys) == 1 else [],
    )
    layout = next((sets for sets in layouts if sets and all(x in keys for x, _ in sets)), None)
    if layout is None:
        raise UsageError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, but must hold {ARRAYS}")
    pictures = [arrays[keys[x]] for x, _ in layout]
    labels = [arrays[keys[y]] for _, y in layout if y in keys]
    if len(labels) not in (0, len(pictures)):
        raise UsageError(f"{path} has labels for one of its two sets: give both or none")
    used = {name for names in layout for name in names}
    left_out = {"arrays": [key for name, key in keys.items() if name not in used]}
    try:
        pixels = [_channels_first(x) for x in _eight_bits_or_floats(pictures)]
        if not labels:
            return tuple(_stored(x, None, (), size) for x in pixels), tuple(told(left_out))
        values = [_values(y, len(x)) for x, y in zip(pixels, labels, strict=True)]
        numbers, names = numbered([value for part in values for value in part])
        y = numbers.split([len(part) for part in values])
        return tuple(_stored(*part, names, size) for part in zip(pixels, y, strict=True)), tuple(told(left_out))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _arrays(path: Path) -> Mapping[str, np.ndarray[Any, Any]]:
    """All arrays of an .npz or .npy file that need no pickle."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return {"images": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:  # of the zip archive, its compression or the arrays' headers
        reason = "it is no such file, or holds pickled objects" if "pickle" in str(error) else _one_line(error)
        raise UsageError(f"{path} cannot be read as {path.suffix.lower()}: {reason}") from error


def _values(labels: np.ndarray[Any, Any], n: int) -> list[str]:
    """The label of each of n pictures, as a text."""
    if labels.shape == (n, 1):
        labels = labels[:, 0]
    if labels.shape != (n,):
        raise UsageError(f"{n} pictures need labels of shape ({n},), not {labels.shape}")
    if labels.dtype.kind not in "iubU":
        raise UsageError(f"labels must be integers or texts, but are {labels.dtype}")
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise UsageError(f"labels must not be negative, but hold {labels.min()}")
    return [shown(value) for value in labels.tolist()]


def _eight_bits_or_floats(arrays: list[np.ndarray[Any, Any]]) -> list[Tensor]:
    """Pixels of 1, 8 or 16 bits as uint8, others as float32 in [−1, 1]; all arrays together decide on floats' range."""
    if any(x.size == 0 for x in arrays):
        raise UsageError("there are no pictures in it")
    arrays = [_of_sixteen_bits(x) if x.dtype == np.uint16 else x for x in arrays]
    arrays = [255 * x.astype(np.uint8) if x.dtype == bool else x for x in arrays]
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


def roles(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which of these names are of training sets, and which of held-out ones, the best first."""
    words = {name: re.sub(r"(set|data|split|images)$", "", re.sub(r"[^a-z]", "", name.lower())) for name in names}
    held_out = sorted((name for name in names if words[name] in HELD_OUT), key=lambda name: HELD_OUT.index(words[name]))
    return [name for name in names if words[name] in TRAIN], held_out


def _pair(
    source: str, names: Sequence[str], read: Callable[[str, Images | None], Images]
) -> tuple[tuple[Images, ...], tuple[str, ...]]:
    """The sets of these names: the training set and the first held-out one that fits it, or the only one.

    Args:
        source: for messages.
        names: of all sets.
        read: a set of this name, of the kind of another one.
    """
    training, others = roles(names)
    training = training or (list(names) if len(names) == 1 else [])
    if len(training) != 1:
        kind, found = ("several training sets", training) if training else ("no training set", names)
        raise UsageError(f"{source} holds {kind} ({', '.join(found)}): call one train, and one test")
    train, left_out = read(training[0], None), {"sets": [name for name in names if name not in (*training, *others)]}
    sets: tuple[Images, ...] = (train,)
    for name in others:
        images = read(name, train) if len(sets) == 1 else None
        if images is None:
            left_out["sets"].append(name)
        elif train.labels is not None and images.labels is None:
            left_out["sets"].append(f"{name}, which has no labels")
        else:
            sets = (train, images)
    if len(sets) == 2:
        sets = _alike(source, *sets)
    return tuple(_kept(images) for images in sets), tuple(told(left_out))


def _alike(source: str, train: Images, held_out: Images) -> tuple[Images, Images]:
    """Both sets with the channels of either and the classes of the first."""
    for one, other in ((train, held_out), (held_out, train)):
        one.shape = (max(one.shape[0], other.shape[0]), *one.shape[1:])
    if train.labels is None or held_out.labels is None:
        held_out.labels, held_out.class_names = None, ()
        return train, held_out
    unknown_ones = [name for name in held_out.class_names if name not in train.class_names]
    if unknown_ones:
        raise UsageError(f"{source}: held-out pictures have the class '{unknown_ones[0]}', training pictures do not")
    places = torch.tensor([train.class_names.index(name) for name in held_out.class_names])
    held_out.labels, held_out.class_names = places[held_out.labels], train.class_names
    return train, held_out


def _kept(images: Images) -> Images:
    return images.in_memory() if isinstance(images, EncodedImages) else images


def _folder(path: Path, size: Size | None, default_size: Size | None) -> tuple[tuple[Images, ...], tuple[str, ...]]:
    if any((path / file).is_file() for file in SAVED):
        raise UsageError(f"{shown(path)} is a data set of `datasets`: give hf:{shown(path)}")
    try:
        entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    except OSError as error:
        raise UsageError(f"cannot read {shown(path)}: {error.strerror}") from error
    parts = [entry.name for entry in entries if entry.is_dir() and entry.name.lower() not in JUNK]
    training, held_out = roles(parts)

    def read(name: str, like: Images | None) -> Images:
        if like is None:
            return FolderImages(path / name, size, default_size)
        return FolderImages(path / name, like.shape[1:], None, like.class_names)

    if held_out and (training or len(held_out) == len(parts) > 1):
        beside = [shown(e.name) for e in entries if e.is_file() and e.suffix.lower() in SUFFIXES]
        sets, remarks = _pair(shown(path), parts, read)
        return sets, (*remarks, *told({"pictures beside the sets": beside}))
    return (_kept(FolderImages(path, size, default_size)),), ()


def _hub(
    name: str, size: Size | None, default_size: Size | None, instead: str = ""
) -> tuple[tuple[Images, ...], tuple[str, ...]]:
    data = load_hub(name, instead)
    if not isinstance(data, Mapping):
        return (_kept(HubImages(data, f"hf:{name}", size, default_size)),), ()

    def read(split: str, like: Images | None) -> Images:
        sizes = (size, default_size) if like is None else (like.shape[1:], None)
        return HubImages(data[split], f"hf:{name}, split {split}", *sizes)

    return _pair(f"hf:{name}", list(data), read)


def load_hub(name: str, instead: str = "") -> Any:
    """A data set of the Hugging Face hub, or a folder that `save_to_disk` wrote: its splits by name, or one of them.

    Args:
        name: its id or folder.
        instead: what a message adds.

    Raises:
        UsageError: without `datasets`, or where it cannot be loaded.
    """
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise UsageError(f"hf:{name} needs datasets: pip install 'vardistill[datasets]'{instead}") from error
    if not name:
        raise UsageError("hf: needs the name of a data set, as in hf:ylecun/mnist")
    is_folder = Path(name).is_dir()
    if is_folder and not any((Path(name) / file).is_file() for file in SAVED):
        raise UsageError(f"{name} is no data set of `datasets`: a folder of pictures is given without hf:")
    try:
        if not is_folder:
            require_answer(name, "dataset")
        return datasets.load_from_disk(name) if is_folder else datasets.load_dataset(name)
    except Exception as error:  # of the network, the hub or the data set's files
        reason = "it is empty" if isinstance(error, IndexError) else _one_line(error)
        raise UsageError(f"cannot load hf:{name}: {reason}{instead}") from error


def _dtype(feature: Any) -> str:
    """Of a column of values; empty for others."""
    return str(getattr(feature, "dtype", ""))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
