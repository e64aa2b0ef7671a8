"""Pictures from every source: exact values, labels, splits, what is left out, and what is refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from small_pictures import bytes_of, everything, picture, pixels, save
from vardistill.domains.pictures import sources
from vardistill.domains.pictures.data import ImageData, StoredImages, label_frequencies
from vardistill.domains.pictures.sources import FolderImages, HubImages, load_images
from vardistill.domains.points.problems import Digits
from vardistill.errors import UsageError

MNIST = Path(__file__).parents[3].parent / "shared" / "data" / "mnist.npz"


def refused(match: str, source: Any, **options: Any) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        load_images(str(source), **options)
    assert "\n" not in str(caught.value)


# Folders


@pytest.mark.parametrize(("channels", "suffix"), [(1, ".png"), (3, ".png"), (1, ".BMP"), (3, ".bmp")])
def test_streaming_equals_stored(tmp_path: Path, channels: int, suffix: str) -> None:
    v = pixels(7, channels)
    for i, x in enumerate(v):
        save(x, tmp_path / f"{i}{suffix}")
    folder = FolderImages(tmp_path)
    assert (len(folder), folder.shape, folder.labels, folder.class_names) == (7, (channels, 4, 5), None, ())
    index = torch.tensor([6, 2, 2, 0])
    assert torch.equal(folder.take(index), StoredImages(v).take(index))
    assert folder.take(index).is_contiguous()


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_formats_are_read(tmp_path: Path, suffix: str) -> None:
    save(torch.full((3, 8, 8), 200, dtype=torch.uint8), tmp_path / f"a{suffix}")
    assert (everything(FolderImages(tmp_path)) - (200 / 127.5 - 1)).abs().max() < 0.05


def test_subfolders_are_classes_by_name_at_any_depth(tmp_path: Path) -> None:
    v = pixels(4)
    files = ("dog/0.png", "ant/more/1.png", "dog/more/2.png", "cat/3.png")
    for x, name in zip(v, files, strict=True):
        save(x, tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("none")
    save(pixels(1, height=9)[0], tmp_path / "cat" / ".hidden.png")
    save(pixels(1, height=9)[0], tmp_path / ".cache" / "x.png")
    folder = FolderImages(tmp_path)
    assert folder.class_names == ("ant", "cat", "dog")
    assert folder.labels is not None
    assert folder.labels.dtype == torch.int64
    assert folder.labels.tolist() == [0, 1, 2, 2]
    assert torch.equal(bytes_of(everything(folder)), v[[1, 3, 0, 2]])


def test_grey_and_colour_together_become_colour(tmp_path: Path) -> None:
    grey, colour = pixels(1, 1)[0], pixels(1, 3)[0]
    for name, x in (("a", grey), ("b", colour), ("c", grey)):
        save(x, tmp_path / f"{name}.png")
    both = torch.stack([grey.expand(3, -1, -1), colour, grey.expand(3, -1, -1)])
    assert torch.equal(bytes_of(everything(FolderImages(tmp_path))), both)


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("P", 3), ("RGBA", 3), ("LA", 1), ("CMYK", 3)])
def test_modes_have_their_channels(tmp_path: Path, mode: str, channels: int) -> None:
    picture(torch.full((1, 4, 5), 255, dtype=torch.uint8)).convert(mode).save(tmp_path / "a.tif")
    folder = FolderImages(tmp_path)
    assert folder.shape == (channels, 4, 5)
    assert torch.equal(everything(folder), torch.ones(1, channels, 4, 5))


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    """v/65535 is as bright as (v/257)/255."""
    deep = np.array([[0, 257 * 100, 257 * 100 + 128, 257 * 100 + 129, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "b.tif")
    folder = FolderImages(tmp_path)
    assert bytes_of(everything(folder))[:, 0, 0].tolist() == [[0, 100, 100, 101, 255]] * 2
    assert folder.remarks == ("2 of 16 bits a value, taken as 8",)
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(UsageError, match=r"b\.tif cannot be read: its values have no known range"):
        everything(FolderImages(tmp_path))


def test_pictures_of_several_sizes_need_one(tmp_path: Path) -> None:
    save(pixels(1, height=40, width=30)[0], tmp_path / "a.png")
    save(pixels(1, height=36, width=50)[0], tmp_path / "b.png")
    refused(r"b\.png is 50×36 and .*a\.png is 30×40: add --size 16, say, to have all pictures resized", tmp_path)
    data = load_images(str(tmp_path), size=(36, 50))
    assert data.shape == (3, 36, 50)
    assert data.train.remarks == ("resized to 50×36 from 30×40",)
    given = load_images(str(tmp_path), default_size=(16, 16))
    assert given.shape == (3, 16, 16)
    assert given.train.remarks == ("resized to 16×16 from 30×40 to 50×36",)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".npy"])
def test_a_size_takes_the_middle_with_antialiasing(suffix: str, tmp_path: Path) -> None:
    """A picture 4 times as fine, whose outer parts are not seen."""
    rows, columns = torch.arange(64)[:, None], torch.arange(128)[None]
    x = (80 + rows + 60 * ((rows + columns) % 2)).to(torch.uint8).expand(3, -1, -1).clone()
    x[:, :, :28], x[:, :, -28:] = 255, 0
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, x[None].expand(2, -1, -1, -1).numpy())
    else:
        for name in "ab":
            picture(x).save(tmp_path / f"{name}{suffix}", quality=95)
        path = tmp_path
    found = bytes_of(everything(load_images(str(path), size=(16, 16)).train)).double()
    assert found.shape == (1, 3, 16, 16)
    expected = 110 + 1.5 + 4 * torch.arange(16, dtype=torch.float64)[:, None]
    assert (found - expected)[..., 1:-1, :].abs().max() < 3


TURNED = {
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.rot90(1, (1, 2)),
    7: lambda x: x.flip(1, 2).transpose(1, 2),
    8: lambda x: x.rot90(-1, (1, 2)),
}
"""How a picture is stored that is turned to be seen, by its EXIF orientation."""


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_pictures_are_turned_as_their_exif_data_say(tmp_path: Path, suffix: str) -> None:
    """As `datasets` does, and in the same way from both."""
    x, tag = pixels(1, height=8, width=6)[0], Image.Exif()
    for orientation, stored in TURNED.items():
        tag[0x0112] = orientation
        picture(stored(x).contiguous()).save(tmp_path / f"{orientation}{suffix}", exif=tag, lossless=True)
    folder = FolderImages(tmp_path)
    assert torch.equal(bytes_of(everything(folder)), x.expand(8, -1, -1, -1))
    small = FolderImages(tmp_path, (4, 4))
    assert len(bytes_of(everything(small)).unique(dim=0)) == 1
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    files = [{"bytes": Path(path).read_bytes(), "path": None} for path in folder.paths]
    rows = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
    assert torch.equal(everything(HubImages(rows, "x")), everything(folder))
    assert torch.equal(everything(HubImages(rows, "x", (4, 4))), everything(small))
    assert all(np.array_equal(np.array(row["image"].convert("RGB")), x.permute(1, 2, 0)) for row in rows)


@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\0\0"])
def test_damaged_exif_data_do_not_matter(tmp_path: Path, exif: bytes) -> None:
    x = pixels(1)[0]
    picture(x).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(bytes_of(everything(FolderImages(tmp_path)))[0], x)


def test_transparent_parts_show_white_and_animations_their_first_frame(tmp_path: Path) -> None:
    clear = np.zeros((4, 5, 4), np.uint8)
    clear[0] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "a.png")
    Image.fromarray(clear).convert("P").save(tmp_path / "b.png", transparency=0)
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:])
    folder = FolderImages(tmp_path)
    seen = bytes_of(everything(folder))
    assert (seen[0, :, 0, 0].tolist(), seen[0, :, 3, 0].tolist()) == ([10, 20, 30], [255, 255, 255])
    assert seen[1, :, 3, 0].tolist() == [255, 255, 255]
    assert seen[2, :, 0, 0].tolist() == [255, 0, 0]
    told = ("2 with transparency, laid on white", "1 with several frames, of which the first is taken")
    assert folder.remarks == told


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    """Whether its header tells or, as for c.png, its body alone; hidden files and systems' own without a word."""
    v = pixels(4, height=64, width=64)
    for x, name in zip(v, "acde", strict=True):
        save(x, tmp_path / "x" / f"{name}.png")
    (tmp_path / "x" / "b.png").write_bytes(b"not a picture")
    (tmp_path / "x" / "c.png").write_bytes((tmp_path / "x" / "c.png").read_bytes()[:1000])
    (tmp_path / "x" / "f.jpg").touch()
    (tmp_path / "x" / "g.png").symlink_to(tmp_path / "gone.png")
    for name in ("notes.txt", ".DS_Store", "Thumbs.db", "__MACOSX/a.png", "h.HEIC", "README"):
        (tmp_path / "x" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"-")
    os.mkfifo(tmp_path / "x" / "i.png")
    data = load_images(str(tmp_path / "x"), held_out=1)
    both = bytes_of(torch.cat([everything(data.train), everything(data.held_out)]))
    assert torch.equal(both.long().sum((1, 2, 3)).sort().values, v[[0, 2, 3]].long().sum((1, 2, 3)).sort().values)
    assert data.describe().split("; ")[1:] == [
        "left out: no suffix: 1 (README), broken links: 1 (g.png), .heic: 1 (h.HEIC), pipes and devices: 1 (i.png), "
        ".txt: 1 (notes.txt), unreadable: 3 (x/b.png is no picture of a format that is read, x/f.jpg is no picture of "
        "a format that is read, x/c.png cannot be read: image file is truncated)"
    ]


def test_where_nothing_can_be_read_the_line_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    refused(r"holds no pictures \(PNG, .*; left out: \.heic: 1 \(a\.heic\)$", tmp_path)
    (tmp_path / "a.png").touch()
    refused(r"there is no picture that can be read; .*unreadable: 1 \(.*a\.png is no picture of a format", tmp_path)


def test_what_is_meant_to_fill_the_memory_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    refused(r"a\.png is too large to be a picture: Image size \(400000000 pixels\) exceeds limit", tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_a_corrupt_body_is_named_where_pictures_are_decoded_on_demand(tmp_path: Path, suffix: str) -> None:
    for name, x in zip("ab", pixels(2, height=64, width=64), strict=True):
        save(x, tmp_path / f"{name}{suffix}")
    bad = tmp_path / f"b{suffix}"
    bad.write_bytes(bad.read_bytes()[:1000])
    folder = FolderImages(tmp_path)
    assert folder.take(torch.tensor([0])).shape == (1, 3, 64, 64)
    with pytest.raises(UsageError, match=rf"b\{suffix} cannot be read: "):
        folder.take(torch.tensor([0, 1]))


def test_a_picture_that_changed_its_size_is_named(tmp_path: Path) -> None:
    path = save(pixels(1)[0], tmp_path / "a.png")
    folder = FolderImages(tmp_path)
    save(pixels(1, height=9)[0], path)
    with pytest.raises(UsageError, match=r"a\.png cannot be read: it is 5×9, and was 5×4"):
        folder.take(torch.tensor([0]))


def test_other_formats_are_not_decoded_under_a_known_suffix(tmp_path: Path) -> None:
    picture(pixels(1)[0]).save(tmp_path / "a.png", format="ICO")
    refused(r"a\.png is no picture of a format that is read", tmp_path)


def test_pictures_beside_class_folders_are_refused(tmp_path: Path) -> None:
    save(pixels(1)[0], tmp_path / "a.png")
    save(pixels(1)[0], tmp_path / "cat" / "b.png")
    refused("holds pictures and the class folder 'cat'", tmp_path)


def test_links_are_followed(tmp_path: Path) -> None:
    """As in a cache of the hub, whose files are links to others; not round in circles."""
    v, root = pixels(3), tmp_path / "root"
    blob = save(v[0], tmp_path / "blobs" / "0.png").rename(tmp_path / "blobs" / "0f")
    save(v[1], root / "b" / "b.png")
    save(v[2], tmp_path / "elsewhere" / "c.png")
    (root / "a").mkdir()
    (root / "a" / "a.png").symlink_to(blob)
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "loop").symlink_to(root)
    folder = FolderImages(root)
    assert folder.class_names == ("a", "b", "c")
    assert torch.equal(bytes_of(everything(folder)), v)
    assert folder.remarks == ("left out: links to a folder around them: 1 (b/loop)",)


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    refused(r"holds no pictures \(PNG", tmp_path)
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        FolderImages(tmp_path / "nowhere")


# Splits


def test_a_seeded_split_is_disjoint_complete_and_repeatable(tmp_path: Path) -> None:
    v = pixels(40)
    for i, x in enumerate(v):
        save(x, tmp_path / "ab"[i % 2] / f"{i:02}.png")
    data = load_images(str(tmp_path), held_out=15, seed=3)
    assert (len(data.train), len(data.held_out), data.classes) == (25, 15, 2)
    rows = {tuple(x.flatten().tolist()): i % 2 for i, x in enumerate(v)}
    found = []
    for images in (data.train, data.held_out):
        keys = [tuple(x.flatten().tolist()) for x in bytes_of(everything(images))]
        assert images.labels is not None
        assert [rows[key] for key in keys] == images.labels.tolist()
        found += keys
    assert len(set(found)) == 40
    assert set(found) == set(rows)
    again, other = (load_images(str(tmp_path), held_out=15, seed=seed) for seed in (3, 4))
    assert torch.equal(everything(again.train), everything(data.train))
    assert not torch.equal(everything(other.train), everything(data.train))


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folders_can_bring_their_split(tmp_path: Path, held_out: str) -> None:
    v = pixels(4)
    for x, name in zip(
        v, ("train/a/0.png", "train/b/1.png", f"{held_out}/a/2.png", f"{held_out}/b/3.png"), strict=True
    ):
        save(x, tmp_path / name)
    data = load_images(str(tmp_path))
    assert torch.equal(bytes_of(everything(data.train)), v[:2])
    assert torch.equal(bytes_of(everything(data.held_out)), v[2:])
    assert (data.name, data.class_names) == (tmp_path.name, ("a", "b"))
    refused("brings its own held-out pictures: leave out held_out=3", tmp_path, held_out=3)


def folders(root: Path, *names: str, channels: int = 3, size: int = 4) -> None:
    """A picture in each."""
    for x, name in zip(pixels(len(names), channels, size, size), names, strict=True):
        save(x, root / name / "0.png")


@pytest.mark.parametrize(
    ("names", "used", "left_out"),
    [
        (("Training", "Validation"), ("Training", "Validation"), ()),
        (("TRAIN", "valid", "TEST", "extra"), ("TRAIN", "TEST"), ("extra", "valid")),
        (("train2017", "val2017"), ("train2017", "val2017"), ()),
        (("training_set", "dev-set", "unlabeled"), ("training_set", "dev-set"), ("unlabeled",)),
    ],
)
def test_sets_are_told_by_their_names_in_folders_and_on_the_hub(
    names: tuple[str, ...], used: tuple[str, str], left_out: tuple[str, ...], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    splits = {}
    for x, name in zip(pixels(2 * len(names)).view(len(names), 2, 3, 4, 5), names, strict=True):
        for i in range(2):
            save(x[i], tmp_path / "folder" / name / f"class {i}" / "x.png")
        splits[name] = hub_set(x, [0, 1])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "hub")
    told = (f"left out: sets: {len(left_out)} ({', '.join(left_out)})",) if left_out else ()
    for source, classes in ((tmp_path / "folder", ("class 0", "class 1")), (f"hf:{tmp_path / 'hub'}", ("ant", "bee"))):
        data = load_images(str(source))
        assert (len(data.train), len(data.held_out), data.class_names, data.remarks) == (2, 2, classes, told)
        for name, images in zip(used, (data.train, data.held_out), strict=True):
            expected = FolderImages(tmp_path / "folder" / name)
            assert torch.equal(everything(images), everything(expected))
            assert images.labels is not None
            assert images.labels.tolist() == [0, 1]


def test_sets_whose_names_tell_nothing_are_refused_or_classes(tmp_path: Path) -> None:
    folders(tmp_path / "a", "test", "val")
    refused(r"a holds no training set \(test, val\): call one train, and one test", tmp_path / "a")
    folders(tmp_path / "b", "train_1", "train_2", "test")
    refused(r"b holds several training sets \(train_1, train_2\): call one train", tmp_path / "b")
    folders(tmp_path / "c", "train", "plane", "car")
    assert load_images(str(tmp_path / "c")).class_names == ("car", "plane", "train")


def test_a_folder_in_which_there_is_but_one_other_is_that_one(tmp_path: Path) -> None:
    folders(tmp_path, "train/photos/b", "train/photos/a", "test/a")
    (tmp_path / "train" / "__MACOSX").mkdir()
    data = load_images(str(tmp_path))
    assert (data.class_names, len(data.train), len(data.held_out)) == (("a", "b"), 2, 1)
    assert load_images(str(tmp_path / "train")).class_names == ("a", "b")
    save(pixels(1)[0], tmp_path / "train" / "photos" / "a" / "1.png")
    (tmp_path / "train" / "photos" / "b" / "0.png").unlink()
    assert load_images(str(tmp_path / "train"), size=(4, 4)).class_names == ()


def test_a_held_out_set_is_of_the_kind_of_the_training_set(tmp_path: Path) -> None:
    """Of its classes, its channels and its size, or it is not used."""
    folders(tmp_path, "train/a", "train/b", "train/c")
    folders(tmp_path, "val/c", "val/b", channels=1, size=8)
    save(pixels(1)[0], tmp_path / "test" / "x.png")
    save(pixels(1)[0], tmp_path / "sample.png")
    data = load_images(str(tmp_path))
    assert (len(data.train), len(data.held_out)) == (3, 2)
    assert data.shape == data.held_out.shape == (3, 4, 4)
    assert data.held_out.labels is not None
    assert data.held_out.labels.tolist() == [1, 2]
    beside = "left out: pictures beside the sets: 1 (sample.png)"
    assert data.remarks == ("left out: sets: 1 (test, which has no labels)", beside)
    assert data.held_out.remarks == ("resized to 4×4 from 8×8",)
    folders(tmp_path, "val/d")
    refused("held-out pictures have the class 'd', training pictures do not", tmp_path)
    with pytest.raises(UsageError, match=r"training pictures have shape \(3, 4, 4\), held-out ones \(1, 8, 8\)"):
        ImageData("x", FolderImages(tmp_path / "train"), FolderImages(tmp_path / "val" / "c"))


def test_classes_are_numbered_as_people_count(tmp_path: Path) -> None:
    folders(tmp_path, *(str(i) for i in range(12)))
    folder = FolderImages(tmp_path)
    assert folder.class_names == tuple(map(str, range(12)))
    assert folder.labels is not None
    assert [Path(folder.paths[i]).parent.name for i in folder.labels.argsort()] == list(folder.class_names)


@pytest.mark.parametrize("held_out", [0, 3, 4])
def test_all_or_none_cannot_be_held_out(tmp_path: Path, held_out: int) -> None:
    np.savez(tmp_path / "x.npz", images=pixels(3).numpy())
    refused(f"x has 3 pictures: {held_out} of them cannot be held out", tmp_path / "x.npz", held_out=held_out)


# Data sets


def test_the_digits_are_those_of_the_problem() -> None:
    data, problem = load_images("digits"), Digits()
    assert torch.equal(everything(data.train).flatten(1), problem.data)
    assert torch.equal(everything(data.held_out).flatten(1), problem.held_out)
    assert data.std == pytest.approx(problem.data_std, rel=1e-6)
    line = "digits: 1,500 training + 297 held-out pictures, 1×8×8, range [-1, 1], 10 classes (0: 178, 1: 182, "
    assert data.describe().startswith(line)
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    labelled = {tuple(x): int(y) for x, y in zip(load_digits().data, load_digits().target, strict=True)}
    for images in (data.train, data.held_out):
        assert images.labels is not None
        assert [
            labelled[tuple(x)] for x in ((everything(images) + 1) * 8).flatten(1).tolist()
        ] == images.labels.tolist()


@pytest.mark.parametrize("layout", ["nhw", "nhwc", "nchw"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "unit", "signed"])
def test_arrays_of_every_layout_and_range_are_the_same_pictures(tmp_path: Path, layout: str, kind: str) -> None:
    v = pixels(6, 1 if layout == "nhw" else 3)
    v[0].flatten()[:2] = torch.tensor([0, 255], dtype=torch.uint8)
    x = {"nhw": v[:, 0], "nhwc": v.permute(0, 2, 3, 1), "nchw": v}[layout].numpy()
    x = {"uint8": x, "uint16": x * np.uint16(257), "unit": x / 255.0, "signed": x / 127.5 - 1}[kind]
    np.savez(tmp_path / "x.npz", train_images=x[:4], test_images=x[4:], train_labels=[0, 1, 2, 1], test_labels=[1, 0])
    data = load_images(str(tmp_path / "x.npz"))
    torch.testing.assert_close(everything(data.train), StoredImages(v[:4]).take(torch.arange(4)), atol=1e-6, rtol=0)
    assert torch.equal(bytes_of(everything(data.held_out)), v[4:])
    assert data.class_names == ("0", "1", "2")
    assert data.held_out.class_names == ("0", "1", "2")
    assert everything(data.train).is_contiguous()


def test_both_parts_decide_on_the_range_of_floats(tmp_path: Path) -> None:
    """A held-out part without a negative value is no sign of [0, 1]."""
    train, test = np.linspace(-1, 1, 8).reshape(2, 2, 2), np.full((1, 2, 2), 0.5)
    np.savez(tmp_path / "x.npz", train_images=train, test_images=test)
    assert torch.equal(everything(load_images(str(tmp_path / "x.npz")).held_out), torch.full((1, 1, 2, 2), 0.5))


def test_one_array_is_split_a_tenth_held_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=pixels(50).numpy(), labels=np.arange(50) % 7)
    data = load_images(str(tmp_path / "x.npz"))
    assert (len(data.train), len(data.held_out), data.classes, data.name) == (45, 5, 7, "x")


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (("x_train", "y_train", "x_test", "y_test"), ()),
        (("X_train", "y_train", "X_test", "y_test", "mean"), ("left out: arrays: 1 (mean)",)),
        (("train_images", "train_labels", "val_images", "val_labels"), ()),
    ],
)
def test_arrays_may_have_the_names_that_others_give_them(
    names: tuple[str, ...], left_out: tuple[str, ...], tmp_path: Path
) -> None:
    """As in Keras' mnist.npz, or with labels (n, 1), as in its CIFAR-10."""
    v = pixels(6)
    arrays = dict(zip(names, (v[:4], np.array([[1], [2], [2], [7]]), v[4:], np.array([7, 1]), 0), strict=False))
    np.savez(tmp_path / "x.npz", **{name: np.asarray(a) for name, a in arrays.items()})
    path = (tmp_path / "x.npz").rename(tmp_path / "x.NPZ")
    data = load_images(str(path))
    assert torch.equal(bytes_of(everything(data.train)), v[:4])
    assert torch.equal(bytes_of(everything(data.held_out)), v[4:])
    assert data.class_names == ("1", "2", "7")  # no class 0, of which there are no pictures
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [0, 1, 1, 2]
    assert data.remarks == left_out


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_array_alone_is_one_of_pictures(suffix: str, tmp_path: Path) -> None:
    v = pixels(6)
    if suffix == ".npy":
        np.save(tmp_path / "x.npy", v.numpy())
    else:
        np.savez(tmp_path / "x.npz", v.numpy())
    data = load_images(str(tmp_path / f"x{suffix}"), held_out=2)
    assert (len(data.train), len(data.held_out), data.shape, data.classes) == (4, 2, (3, 4, 5), 0)


V = pixels(3).numpy()


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"z": V, "y": V}, r"holds y, z, but must hold images\[, labels\], train_images, test_images"),
        ({"train_images": V, "labels": V}, "holds labels, train_images, but must hold"),
        ({"train_images": V, "test_images": V, "train_labels": [0, 1, 2]}, "labels for one of its two sets"),
        ({"images": V, "labels": [0, 1]}, r"3 pictures need labels of shape \(3,\), not \(2,\)"),
        ({"images": V, "labels": [0, -1, 1]}, "labels must not be negative, but hold -1"),
        ({"images": V, "labels": [0.0, 1.0, 2.0]}, "labels must be integers or texts, but are float64"),
        ({"images": V, "labels": np.eye(3, dtype=np.int64)}, r"labels of shape \(3,\), not \(3, 3\)"),
        ({"images": V.astype(np.int32)}, "uint8 or floats, but are int32"),
        ({"images": V.astype(np.float32)}, r"floats must lie in \[0, 1\] or \[-1, 1\], but lie in \[\d"),
        ({"images": np.full((2, 3, 4, 5), np.nan)}, r"but lie in \[nan, nan\]"),
        ({"images": V[:0]}, "there are no pictures in it"),
        ({"images": V[:, :2]}, r"1 or 3 channels as \(n, H, W, C\) or \(n, C, H, W\), not \(3, 2, 4, 5\)"),
        ({"images": V[0, 0]}, r"not \(4, 5\)"),
        ({"images": np.array([{}, None])}, "cannot be read as .npz: it is no such file, or holds pickled objects"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(tmp_path: Path, arrays: dict[str, Any], match: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    refused(rf"x\.npz.*{match}", tmp_path / "x.npz")


def test_a_single_picture_cannot_be_split(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels(1).numpy())
    refused("x has 1 picture: 1 of them cannot be held out", tmp_path / "x.npy")


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"no array")
    refused(r"x\.npy cannot be read as \.npy: it is no such file, or holds pickled objects", tmp_path / "x.npy")
    (tmp_path / "x.npz").write_bytes(b"no archive")
    refused(r"x\.npz cannot be read as \.npz", tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "y.npz", images=pixels(50).numpy())
    (tmp_path / "y.npz").write_bytes((tmp_path / "y.npz").read_bytes()[:500])
    refused(r"y\.npz cannot be read as \.npz", tmp_path / "y.npz")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("digit", "unknown image source 'digit': did you mean digits?"),
        ("zzz", "known: FILE.npz, FOLDER, digits, hf:NAME, mnist"),
        ("nowhere.npz", "there is no file nowhere.npz"),
        ("no/where", "there is no file or folder no/where"),
    ],
)
def test_sources_that_are_not_there_name_what_is(source: str, match: str) -> None:
    refused(match, source)


@pytest.mark.skipif(not MNIST.exists(), reason="needs shared/data/mnist.npz beside the repository")
def test_mnist() -> None:
    data = load_images(str(MNIST))
    line = "mnist: 60,000 training + 10,000 held-out pictures, 1×28×28, range [-1, 1], 10 classes (0: 6,903, 1: 7,877, "
    assert data.describe().startswith(line)
    x = everything(data.held_out)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert (label_frequencies(data.train) - 0.1).abs().max() < 0.02
    # 0.1307 and 0.3081 are the mean and the deviation that the field scales MNIST with: of all values together
    x = everything(data.train)
    assert float((x.mean() + 1) / 2) == pytest.approx(0.1307, abs=1e-4)
    assert float(x.std() / 2) == pytest.approx(0.3081, abs=1e-4)
    assert data.std < float(x.std())


# Hugging Face


def hub_set(v: Tensor, labels: Sequence[int | None]) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    columns = {"digit": labels, "picture": [picture(x) for x in v], "note": ["-"] * len(v)}
    classes = datasets.ClassLabel(names=["ant", "bee"])
    features = datasets.Features(note=datasets.Value("string"), picture=datasets.Image(), digit=classes)
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_data_set_comes_back_exactly(tmp_path: Path, channels: int) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    v = pixels(5, channels)
    parts = {"train": hub_set(v[:3], [1, 0, 1]), "test": hub_set(v[3:], [0, 0])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    data = load_images(f"hf:{tmp_path}")
    assert torch.equal(bytes_of(everything(data.train)), v[:3])
    assert torch.equal(bytes_of(everything(data.held_out)), v[3:])
    assert (data.shape, data.class_names) == ((channels, 4, 5), ("ant", "bee"))
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [1, 0, 1]
    assert data.train.labels.dtype == torch.int64


def test_a_single_split_is_split(tmp_path: Path) -> None:
    v = pixels(20)
    hub_set(v, [0, 1] * 10).save_to_disk(tmp_path)
    data = load_images(f"hf:{tmp_path}", held_out=4)
    assert (len(data.train), len(data.held_out)) == (16, 4)
    both = torch.cat([everything(data.train), everything(data.held_out)])
    assert torch.equal(bytes_of(both).unique(dim=0), v.unique(dim=0))


def test_data_sets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    datasets.DatasetDict(dev=hub_set(pixels(2), [0, 1]), test=hub_set(pixels(2), [0, 1])).save_to_disk(tmp_path / "x")
    refused(r"holds no training set \(dev, test\): call one train", f"hf:{tmp_path / 'x'}")
    refused("hf: needs the name of a data set", "hf:")
    refused(r"is no data set of `datasets`: a folder of pictures is given without hf:", f"hf:{tmp_path}")
    refused(rf"x is a data set of `datasets`: give hf:{tmp_path / 'x'}", tmp_path / "x")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    refused("has no column of pictures: its columns are text", f"hf:{tmp_path / 'text'}")
    hub_set(pixels(2), [0, 1]).select([]).save_to_disk(tmp_path / "empty")
    refused("cannot load hf:.*empty: it is empty", f"hf:{tmp_path / 'empty'}")
    with pytest.raises(UsageError, match="split test is empty: it has no pictures"):
        HubImages(hub_set(pixels(2), [0, 1]).select([]), "split test")
    mixed = datasets.concatenate_datasets([hub_set(pixels(1), [0]), hub_set(pixels(1, height=9), [0])])
    mixed.save_to_disk(tmp_path / "mixed")
    refused("picture 1 of hf:.* is 5×9 and picture 0 of hf:.* is 5×4: add --size 4", f"hf:{tmp_path / 'mixed'}")


@pytest.mark.parametrize(
    ("column", "values", "classes", "labels"),
    [
        ("label", [7, 12, 7, 12, 12], ("7", "12"), [0, 1, 0, 1, 1]),
        ("Category", ["dog", "cat", "dog", "cat", "cat"], ("cat", "dog"), [1, 0, 1, 0, 0]),
        ("label", [7, 12, 7, 12, None], ("7", "12"), [0, 1, 0, 1]),
        ("label", [None] * 5, (), None),
        ("label", ["a", "b", "c", "d", "e"], (), None),
        ("caption", ["a", "b", "a", "b", "a"], (), None),
        ("label", [0.5, 0.5, 0.1, 0.1, 0.1], (), None),
    ],
)
def test_labels_that_a_data_set_does_not_declare(
    column: str, values: list[Any], classes: tuple[str, ...], labels: list[int] | None
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    columns = {"image": [picture(x) for x in pixels(5)], column: values}
    images = HubImages(datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()), "x")
    assert images.class_names == classes
    assert (None if images.labels is None else images.labels.tolist()) == labels
    if labels is None:
        assert images.remarks == (f"left out: columns: 1 ({column})",)
    elif len(labels) < 5:
        assert images.remarks == ("left out: no label: 1 (picture 4)",)


@pytest.mark.parametrize("missing", [-1, None])
def test_pictures_without_a_label_are_left_out_where_others_have_one(missing: int | None) -> None:
    pytest.importorskip("datasets", reason="needs datasets")
    images = HubImages(hub_set(pixels(3), [0, missing, 1]), "x")
    assert torch.equal(bytes_of(everything(images)), pixels(3)[[0, 2]])
    assert (images.labels.tolist(), images.class_names) == ([0, 1], ("ant", "bee"))  # type: ignore[union-attr]
    assert images.remarks == ("left out: columns: 1 (note), no label: 1 (picture 1)",)
    assert HubImages(hub_set(pixels(3), [missing] * 3), "x").labels is None


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"^hf:a/b needs datasets: pip install 'vardistill\[datasets\]'$", "hf:a/b")
    refused(r"vardistill\[datasets\]'; a local file can be given instead, as mnist\.npz$", "mnist")


def test_without_the_network_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(name: str) -> None:
        asked.append(name)
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(sources, "require_answer", lambda *_: None)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    refused(r"^cannot load hf:a/b: no route$", "hf:a/b")
    refused(r"cannot load hf:ylecun/mnist: no route; a local file can be given instead, as mnist\.npz$", "mnist")
    assert asked == ["a/b", "ylecun/mnist"]
