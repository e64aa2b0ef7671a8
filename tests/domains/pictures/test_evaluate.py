"""The table of pictures: what it says of the data themselves, of copies, and of labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vardistill.domains.pictures.classifier import Classifier
from vardistill.domains.pictures.data import ImageData, StoredImages
from vardistill.domains.pictures.evaluate import Reference, evaluate_images, labels_like
from vardistill.domains.pictures.features import ClassifierFeatures, Features
from vardistill.errors import UsageError
from vardistill.metrics import density_coverage, frechet_distance, precision_recall


class Pixels(Features):
    """φ(x) = x."""

    def __init__(self) -> None:
        self.network, self.name = nn.Linear(1, 1), "pixels"
        self.seen = 0

    def _features(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x.flatten(1)


def noise(n: int, seed: int) -> StoredImages:
    pixels = 2 * torch.rand(n, 1, 2, 3, generator=torch.Generator().manual_seed(seed)) - 1
    return StoredImages(pixels, torch.arange(n) % 2)


@pytest.fixture
def reference(rng: torch.Generator) -> Reference:
    return Reference(ImageData("noise", noise(300, 0), noise(60, 1)), Pixels(), rng)


def everything(images: StoredImages) -> Tensor:
    return images.take(torch.arange(len(images)))


def test_the_floor_is_the_held_out_set_s_distance(reference: Reference) -> None:
    train, held_out = everything(noise(300, 0)), everything(noise(60, 1))
    assert reference.fd_held_out == pytest.approx(frechet_distance(held_out, train), rel=1e-9)


def test_features_are_computed_when_they_are_asked_for_and_once(reference: Reference, rng: torch.Generator) -> None:
    """So that of several processes those that do not evaluate compute none."""
    features = reference.features
    assert isinstance(features, Pixels)
    assert features.seen == 0
    for expected in (360 + 40, 360 + 80):
        evaluate_images(everything(noise(40, 2)), reference, rng)
        assert features.seen == expected
    assert (reference.train_features.shape, reference.held_out_features.shape) == ((300, 6), (60, 6))
    assert features.seen == 360 + 80


def test_the_held_out_set_as_samples(reference: Reference, rng: torch.Generator) -> None:
    """All of it is its own: precision, recall and coverage are 1, and none is of training."""
    table = evaluate_images(everything(noise(60, 1)), reference, rng)
    assert table["fd"] == pytest.approx(reference.fd_held_out, rel=1e-9)
    assert [table[name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert table["memorisation"] == pytest.approx(1 - 360 / 60)
    assert "label_accuracy" not in table


def test_the_training_set_as_samples(reference: Reference, rng: torch.Generator) -> None:
    table = evaluate_images(everything(noise(300, 0)), reference, rng)
    assert table["fd"] == pytest.approx(0, abs=1e-9)
    assert table["memorisation"] == 1


def test_metrics_are_of_equal_sizes_and_of_clipped_pictures(reference: Reference, rng: torch.Generator) -> None:
    held_out = everything(noise(60, 1))
    samples = 1.5 * everything(noise(40, 2))
    table, clipped = evaluate_images(samples, reference, rng), samples.clamp(-1, 1)
    truth = held_out[reference.held_out[:40]]
    assert (table["precision"], table["recall"]) == pytest.approx(precision_recall(clipped, truth))
    assert (table["density"], table["coverage"]) == pytest.approx(density_coverage(clipped, truth))
    assert table["fd"] == pytest.approx(frechet_distance(clipped, everything(noise(300, 0))), rel=1e-9)


def test_noise_does_not_depend_on_the_rest(reference: Reference) -> None:
    tables = [evaluate_images(everything(noise(90, 2)), reference, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]
    assert tables[0]["fd"] == tables[2]["fd"]


def test_labels_are_compared_with_what_the_classifier_sees(rng: torch.Generator) -> None:
    data = ImageData("noise", noise(50, 0), noise(20, 1))
    classifier = Classifier(data.shape, data.class_names, width=4).initialise(rng)
    nn.init.normal_(classifier.logits.weight, generator=rng)
    reference, samples = Reference(data, ClassifierFeatures(classifier), rng), everything(noise(30, 2))
    seen = classifier.predict(samples)
    wrong = torch.cat([1 - seen[:6], seen[6:]])
    assert evaluate_images(samples, reference, rng, labels=seen)["label_accuracy"] == 1
    assert evaluate_images(samples, reference, rng, labels=wrong)["label_accuracy"] == pytest.approx(0.8)
    with pytest.raises(UsageError, match="one label for each of 30 samples"):
        evaluate_images(samples, reference, rng, labels=seen[:4])


def test_bad_samples_are_refused(reference: Reference, rng: torch.Generator) -> None:
    for shape in ((5, 1, 2, 3), (50, 3, 2, 3)):
        with pytest.raises(UsageError, match=r"must be \(n, 1, 2, 3\) with n at least 6"):
            evaluate_images(torch.zeros(shape), reference, rng)
    for value in (torch.nan, torch.inf, -torch.inf):  # which clipping would make a number
        with pytest.raises(UsageError, match="samples must be finite"):
            evaluate_images(torch.full((9, 1, 2, 3), value), reference, rng)


def test_labels_have_the_frequencies_of_the_data() -> None:
    labels = torch.tensor([2, 0, 1, 0, 0, 1, 0, 0, 1, 0])  # 6, 3 and 1 of each
    images = StoredImages(torch.zeros(10, 1, 2, 3), labels, ("a", "b", "c"))
    data = ImageData("uneven", images, images)
    for n in (10, 20, 1000):
        drawn = labels_like(data, n, 3)
        assert drawn is not None
        assert torch.equal(drawn.bincount(), torch.tensor([6, 3, 1]) * n // 10)
    bare = StoredImages(torch.zeros(10, 1, 2, 3))
    for others in (None, ImageData("bare", bare, bare), data):  # without labels, and of other classes
        even = labels_like(others, 6, 4)
        assert even is not None
        assert even.tolist() == [0, 1, 2, 3, 0, 1]
        assert labels_like(others, 6, 0) is None
