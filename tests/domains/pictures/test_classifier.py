"""The classifier: shapes, shifts, scale, seeds, a fit, and folders that come back as they went."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vardistill.domains.pictures import classifier as module
from vardistill.domains.pictures.classifier import (
    Classifier,
    accuracy,
    fit_classifier,
    load_classifier,
    scale_features,
    shifted,
)
from vardistill.domains.pictures.data import StoredImages
from vardistill.domains.pictures.sources import load_images
from vardistill.errors import UsageError


def small(seed: int = 0, shape: tuple[int, int, int] = (1, 8, 8)) -> Classifier:
    classifier = Classifier(shape, ("cat", "dog", "eel"), width=4)
    classifier.initialise(torch.Generator().manual_seed(seed))
    torch.nn.init.normal_(classifier.logits.weight, generator=torch.Generator().manual_seed(seed))
    return classifier.eval()


def bars(n: int, seed: int) -> StoredImages:
    """Noisy pictures whose upper or lower half is bright: classes 1 and 0."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=rng)
    pixels = torch.randint(156, (n, 1, 8, 8), generator=rng)
    pixels[:, :, :4] += 100 * labels[:, None, None, None]
    pixels[:, :, 4:] += 100 * (1 - labels)[:, None, None, None]
    return StoredImages(pixels.to(torch.uint8), labels, ("below", "above"))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 5, 40), (1, 1, 1)])
def test_shapes(shape: tuple[int, int, int], rng: torch.Generator) -> None:
    x = torch.rand(7, *shape, generator=rng)
    classifier = small(shape=shape)
    assert classifier.features(x).shape == (7, 64)
    assert classifier(x).shape == (7, 3)
    assert torch.equal(classifier.predict(x), classifier(x).argmax(1))


def test_features_do_not_depend_on_their_company(rng: torch.Generator, float64: None) -> None:
    classifier, x = small(), torch.rand(6, 1, 8, 8, generator=rng)
    alone = torch.cat([classifier.train().features(row[None]) for row in x])
    torch.testing.assert_close(classifier.features(x), alone, rtol=1e-12, atol=1e-12)


def test_pictures_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"reads pictures of shape \(1, 8, 8\), but these are \(3, 8, 8\)"):
        small()(torch.zeros(2, 3, 8, 8))


def test_bad_classifiers_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 2 classes, but has 1"):
        Classifier((1, 8, 8), ("cat",))
    with pytest.raises(UsageError, match=r"must be \(C, H, W\)"):
        Classifier((8, 8), ("cat", "dog"))


def test_shifts_are_those_of_the_plane(rng: torch.Generator) -> None:
    """A single bright pixel moves to all nine places about as often: χ² with 8 degrees of freedom exceeds 38 by 8e-6,
    seed 0; edges repeat, and small pictures stay."""
    x = torch.zeros(900, 1, 16, 20)
    x[:, :, 5, 9] = 1
    moved = shifted(x, rng)
    assert moved.shape == x.shape
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(900))
    counts = moved.sum((0, 1))[4:7, 8:11]
    assert float(((counts - 100) ** 2 / 100).sum()) < 38
    edge = torch.zeros(50, 1, 16, 16)
    edge[:, :, :2] = 1
    assert set(shifted(edge, rng).mean((1, 2, 3)).tolist()) == {1 / 16, 2 / 16, 3 / 16}
    assert shifted(x[..., :15], rng) is not x
    assert torch.equal(shifted(x[..., :15], rng), x[..., :15])


def test_scaling_keeps_the_logits_and_brings_the_variance_to_one() -> None:
    classifier, images = small(), bars(200, 0)
    x = images.take(torch.arange(200))
    before = classifier(x).detach()
    scale_features(classifier, images)
    torch.testing.assert_close(classifier(x).detach(), before, rtol=1e-4, atol=1e-4)
    assert float(classifier.features(x).detach().var(0).mean()) == pytest.approx(1, rel=1e-4)


def test_the_scale_is_that_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth of pictures that are sorted by class, not the first class alone."""
    monkeypatch.setattr(module, "MOST_SCALING", 50)
    images = bars(200, 0)
    assert images.labels is not None
    by_class = StoredImages(images.pixels[images.labels.argsort()], images.labels.sort().values, images.class_names)
    classifier = small()
    scale_features(classifier, by_class)
    features = classifier.features(by_class.take(torch.arange(0, 200, 4))).detach()
    assert float(features.var(0).mean()) == pytest.approx(1, rel=1e-4)


def test_a_fit_has_a_seed_learns_and_keeps_its_accuracy(tmp_path: Path) -> None:
    train, held_out = bars(200, 0), bars(100, 1)
    fits = [fit_classifier(train, held_out, torch.Generator().manual_seed(s), steps=40, batch=32) for s in (0, 0, 1)]
    first, again, other = (fit.logits.weight for fit in fits)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert fits[0].accuracy == accuracy(fits[0], held_out) >= 0.95
    assert not fits[0].training
    fits[0].save_pretrained(tmp_path / "kept")
    kept = load_classifier(tmp_path / "kept")
    assert (kept.accuracy, kept.class_names, kept.shape) == (fits[0].accuracy, ("below", "above"), (1, 8, 8))
    x = held_out.take(torch.arange(9))
    assert torch.equal(kept(x), fits[0](x))
    assert not kept.training


def test_it_reads_digits() -> None:
    data = load_images("digits")
    classifier = fit_classifier(data.train, data.held_out, torch.Generator().manual_seed(0), steps=300)
    assert classifier.accuracy >= 0.95


def test_pictures_without_labels_or_of_other_classes_are_refused(rng: torch.Generator) -> None:
    labelled, bare = bars(20, 0), StoredImages(torch.zeros(20, 1, 8, 8))
    with pytest.raises(UsageError, match="have no labels"):
        fit_classifier(bare, bare, rng)
    with pytest.raises(UsageError, match="same shape and classes"):
        fit_classifier(labelled, StoredImages(torch.zeros(20, 1, 8, 8), labelled.labels), rng)


@pytest.mark.parametrize("harm", ["truncated", "foreign", "other weights", "missing"])
def test_bad_folders_are_refused(harm: str, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    small().save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif harm == "foreign":
        config.write_text("[]")
    elif harm == "other weights":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"width": 5}))
    else:
        weights.unlink()
    with pytest.raises(UsageError, match="truncated or not one of vardistill's"):
        load_classifier(folder)
