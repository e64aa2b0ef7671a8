"""Pictures from every source: exact values, labels, splits, class-conditional draws, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vardistill.domains.pictures.data import (
    FolderImages,
    ImageData,
    StoredImages,
    Subset,
    image_samples,
    label_frequencies,
    load_images,
)
from vardistill.domains.points.problems import Digits
from vardistill.errors import UsageError
from vardistill.training.data import check_samples

MNIST = Path(__file__).parents[2].parent / "shared" / "data" / "mnist.npz"


def pixels(n: int, channels: int = 3, height: int = 4, width: int = 5, seed: int = 0) -> Tensor:
    """Random bytes; no two pictures are equal but for a chance of 256^−20 n²."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, height, width), generator=rng, dtype=torch.uint8)


def picture(x: Tensor) -> Image.Image:
    """(C, H, W) bytes as a picture."""
    return Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).numpy())


def save(x: Tensor, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(x).save(path)
    return path


def bytes_of(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).round().to(torch.uint8)


def everything(images: Any) -> Tensor:
    return images.take(torch.arange(len(images)))


def refused(match: str, source: Any, **options: Any) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        load_images(str(source), **options)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("P", 3), ("RGBA", 3), ("LA", 3)])
def test_modes_have_their_channels(tmp_path: Path, mode: str, channels: int) -> None:
    picture(torch.full((1, 4, 5), 255, dtype=torch.uint8)).convert(mode).save(tmp_path / "a.png")
    folder = FolderImages(tmp_path)
    assert folder.shape == (channels, 4, 5)
    assert torch.equal(everything(folder), torch.ones(1, channels, 4, 5))


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 5), 4000, dtype=np.uint16)).save(tmp_path / "deep.png")
    refused(r"deep\.png has more than 8 bits per value", tmp_path)


def test_mixed_sizes_are_named_with_both(tmp_path: Path) -> None:
    save(pixels(1)[0], tmp_path / "a.png")
    save(pixels(1, height=6, width=7)[0], tmp_path / "b.png")
    refused(r"b\.png is 7×6 and .*a\.png is 5×4: all pictures must have one size", tmp_path)


def test_a_file_that_is_no_picture_is_named_at_the_start(tmp_path: Path) -> None:
    save(pixels(1)[0], tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    refused(r"bad\.png cannot be read as a picture", tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_a_corrupt_body_is_named_when_it_is_decoded(tmp_path: Path, suffix: str) -> None:
    for name, x in zip("ab", pixels(2, height=64, width=64), strict=True):
        save(x, tmp_path / f"{name}{suffix}")
    bad = tmp_path / f"b{suffix}"
    bad.write_bytes(bad.read_bytes()[:1000])
    folder = FolderImages(tmp_path)
    assert folder.take(torch.tensor([0])).shape == (1, 3, 64, 64)
    with pytest.raises(UsageError, match=rf"b\{suffix} cannot be read as a picture"):
        folder.take(torch.tensor([0, 1]))


def test_a_picture_that_changed_its_size_is_named(tmp_path: Path) -> None:
    path = save(pixels(1)[0], tmp_path / "a.png")
    folder = FolderImages(tmp_path)
    save(pixels(1, height=9)[0], path)
    with pytest.raises(UsageError, match=r"a\.png cannot be read"):
        folder.take(torch.tensor([0]))


def test_other_formats_are_not_decoded_under_a_known_suffix(tmp_path: Path) -> None:
    picture(pixels(1)[0]).save(tmp_path / "a.png", format="GIF")
    refused(r"a\.png cannot be read", tmp_path)


def test_pictures_beside_class_folders_are_refused(tmp_path: Path) -> None:
    save(pixels(1)[0], tmp_path / "a.png")
    save(pixels(1)[0], tmp_path / "cat" / "b.png")
    refused("holds pictures and the class folder 'cat'", tmp_path)


def test_links_must_stay_inside(tmp_path: Path) -> None:
    outside = save(pixels(1)[0], tmp_path / "outside" / "a.png")
    root = tmp_path / "root"
    inside = save(pixels(1)[0], root / "a.png")
    (root / "same.png").symlink_to(inside)
    assert len(FolderImages(root)) == 2
    (root / "b.png").symlink_to(outside)
    refused(r"b\.png is a link out of", root)
    (root / "b.png").unlink()
    (root / "loop").symlink_to(root)
    refused("loop is a link to a folder", root)


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    refused(r"holds no pictures \(\.png", tmp_path)
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


def test_parts_that_differ_are_refused(tmp_path: Path) -> None:
    save(pixels(1)[0], tmp_path / "train" / "a" / "0.png")
    refused("holds train, but neither test nor val", tmp_path)
    save(pixels(1)[0], tmp_path / "test" / "b" / "0.png")
    refused(r"training pictures have the classes \('a',\), held-out ones \('b',\)", tmp_path)
    save(pixels(1, 1)[0], tmp_path / "val" / "0.png")
    with pytest.raises(UsageError, match=r"training pictures have shape \(3, 4, 5\), held-out ones \(1, 4, 5\)"):
        ImageData("x", FolderImages(tmp_path / "train"), FolderImages(tmp_path / "val"))


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
    line = "digits: 1,500 training + 297 held-out pictures, 1×8×8, range [-1, 1], 10 classes"
    assert data.describe() == line
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    labelled = {tuple(x): int(y) for x, y in zip(load_digits().data, load_digits().target, strict=True)}
    for images in (data.train, data.held_out):
        assert images.labels is not None
        assert [
            labelled[tuple(x)] for x in ((everything(images) + 1) * 8).flatten(1).tolist()
        ] == images.labels.tolist()


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


@pytest.mark.parametrize("layout", ["nhw", "nhwc", "nchw"])
@pytest.mark.parametrize("kind", ["uint8", "unit", "signed"])
def test_arrays_of_every_layout_and_range_are_the_same_pictures(tmp_path: Path, layout: str, kind: str) -> None:
    v = pixels(6, 1 if layout == "nhw" else 3)
    v[0].flatten()[:2] = torch.tensor([0, 255], dtype=torch.uint8)
    x = {"nhw": v[:, 0], "nhwc": v.permute(0, 2, 3, 1), "nchw": v}[layout].numpy()
    x = {"uint8": x, "unit": x / 255.0, "signed": x / 127.5 - 1}[kind]
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


V = pixels(3).numpy()


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": V, "y": V}, r"holds x, y, but must hold images\[, labels\] or train_images, test_images"),
        ({"train_images": V}, "holds train_images, but must hold"),
        ({"train_images": V, "test_images": V, "train_labels": [0, 1, 2]}, "labels for one of its two sets"),
        ({"images": V, "labels": [0, 1]}, r"3 pictures need labels of shape \(3,\), not \(2,\)"),
        ({"images": V, "labels": [0, -1, 1]}, "labels must be 0 to 1, but hold -1"),
        ({"images": V, "labels": [0, 3 * 10**9, 1]}, "or below the number of pictures, but hold 3000000000"),
        ({"images": V, "labels": [0.0, 1.0, 2.0]}, "labels must be integers, but are float64"),
        ({"images": V.astype(np.int32)}, "uint8 or floats, but are int32"),
        ({"images": V.astype(np.float32)}, r"floats must lie in \[0, 1\] or \[-1, 1\], but lie in \[\d"),
        ({"images": np.full((2, 3, 4, 5), np.nan)}, r"but lie in \[nan, nan\]"),
        ({"images": V[:0]}, "there are no pictures in it"),
        ({"images": V[:, :2]}, r"1 or 3 channels as \(n, H, W, C\) or \(n, C, H, W\), not \(3, 2, 4, 5\)"),
        ({"images": V[0, 0]}, r"not \(4, 5\)"),
        ({"images": np.array([{}, None])}, "cannot be read as .npz: Object arrays"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(tmp_path: Path, arrays: dict[str, Any], match: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    refused(rf"x\.npz.*{match}", tmp_path / "x.npz")


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
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
        ("no/where", "there is no .npz file or folder no/where"),
    ],
)
def test_sources_that_are_not_there_name_what_is(source: str, match: str) -> None:
    refused(match, source)


@pytest.mark.skipif(not MNIST.exists(), reason="needs shared/data/mnist.npz beside the repository")
def test_mnist() -> None:
    data = load_images(str(MNIST))
    assert data.describe() == "mnist: 60,000 training + 10,000 held-out pictures, 1×28×28, range [-1, 1], 10 classes"
    x = everything(data.held_out)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert (label_frequencies(data.train) - 0.1).abs().max() < 0.02
    # 0.1307 and 0.3081 are the mean and the deviation that the field scales MNIST with: of all values together
    x = everything(data.train)
    assert float((x.mean() + 1) / 2) == pytest.approx(0.1307, abs=1e-4)
    assert float(x.std() / 2) == pytest.approx(0.3081, abs=1e-4)
    assert data.std < float(x.std())


# Hugging Face


def hub_set(v: Tensor, labels: list[int]) -> Any:
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
    datasets.DatasetDict({"dev": hub_set(pixels(2), [0, 1])}).save_to_disk(tmp_path / "splits")
    refused("has no split train: its splits are dev", f"hf:{tmp_path / 'splits'}")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    refused("has no column of pictures: its columns are text", f"hf:{tmp_path / 'text'}")
    hub_set(pixels(2), [0, -1]).save_to_disk(tmp_path / "unlabelled")
    refused("labels must be 0 to 1, but hold -1", f"hf:{tmp_path / 'unlabelled'}")
    mixed = datasets.concatenate_datasets([hub_set(pixels(1), [0]), hub_set(pixels(1, height=9), [0])])
    mixed.save_to_disk(tmp_path / "mixed")
    refused("picture 1 of hf:.* is 5×9 and picture 0 of hf:.* is 5×4", f"hf:{tmp_path / 'mixed'}")


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"^hf:a/b needs datasets: pip install 'vardistill\[datasets\]'$", "hf:a/b")
    refused(r"vardistill\[datasets\]'; a local file can be given instead, as mnist\.npz$", "mnist")


def test_without_the_network_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(name: str) -> None:
        asked.append(name)
        raise ConnectionError("no\nroute")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    refused(r"^cannot load hf:a/b: no route$", "hf:a/b")
    refused(r"cannot load hf:ylecun/mnist: no route; a local file can be given instead, as mnist\.npz$", "mnist")
    assert asked == ["a/b", "ylecun/mnist"]


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
