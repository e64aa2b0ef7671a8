"""The judge: what it reads of logits, which pictures are right, its loss, a fit, and folders."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vardistill.domains.pictures.classifier import Classifier
from vardistill.domains.pictures.features import load_features
from vardistill.domains.text.shapes import judge as module
from vardistill.domains.text.shapes.formula import COLOURS, SHAPES, SIDE, attributes, labels_of, scenes
from vardistill.domains.text.shapes.judge import READINGS, Judge, by_place, fit_judge, kept_judge, reading_loss
from vardistill.errors import UsageError


def certain(labels: Tensor) -> Tensor:
    """Logits that read these labels."""
    logits = torch.full((len(labels), len(READINGS)), -20.0)
    for part, of in zip(by_place(logits), attributes(labels), strict=True):
        first = 1 if part.shape[-1] == 3 and part.data_ptr() == logits.data_ptr() else 0
        part.scatter_(2, (of + first).clamp_min(0)[..., None], 20.0)
    return logits


class Oracle(Classifier):
    """Returns given logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__((3, SIDE, SIDE), READINGS)
        self.given = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.given


def test_what_is_read_is_what_the_logits_say(rng: torch.Generator) -> None:
    found = scenes(50, rng)
    judge = Judge(Oracle(certain(found.labels)))
    assert torch.equal(judge.read(found.pictures), found.labels)
    assert bool(judge.accuracy(found.pictures, found.captions).all())


@pytest.mark.parametrize(
    "caption",
    [
        "a large red circle top left",
        "a small blue circle top left",
        "a small red square top left",
        "a small red circle bottom left",
        "a small red circle top left and a small red circle bottom left",
    ],
)
def test_one_wrong_attribute_is_wrong(caption: str) -> None:
    judge = Judge(Oracle(certain(labels_of(["a small red circle top left"]))))
    assert judge.accuracy(torch.zeros(1, 3, SIDE, SIDE), [caption]).tolist() == [False]


def test_the_loss_is_the_sum_of_cross_entropies(rng: torch.Generator, float64: None) -> None:
    """Of colour and shape where there is something alone."""
    labels = labels_of(
        ["a small green square top left", "a large red circle top right and a small red circle top left"]
    )
    logits = torch.randn(2, len(READINGS), generator=rng)
    size, colour, shape = by_place(logits)
    sizes = cross_entropy(size.reshape(8, 3), torch.tensor([1, 0, 0, 0, 1, 2, 0, 0]))
    there = (labels > 0).flatten()
    colours = cross_entropy(colour.reshape(8, len(COLOURS))[there], torch.tensor([1, 0, 0]))
    shapes = cross_entropy(shape.reshape(8, len(SHAPES))[there], torch.tensor([1, 0, 0]))
    torch.testing.assert_close(reading_loss(logits, labels), sizes + colours + shapes, rtol=1e-12, atol=0.0)
    assert float(reading_loss(certain(labels), labels)) < 1e-12


def test_a_short_fit_learns_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls from that of guesses, ln 3 + ln 4 + ln 3; features' variances have mean 1; a folder comes back."""
    monkeypatch.setattr(module, "HELD_OUT", 200)
    monkeypatch.setattr(module, "fit_judge", lambda rng: fit_judge(rng, steps=60, batch=32))
    judge = kept_judge(tmp_path / "judge", seed=0)
    others = scenes(200, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert float(reading_loss(judge.classifier(others.pictures), others.labels)) < 3.4 < math.log(36)
    features = load_features(tmp_path / "judge")(others.pictures)
    assert 0.5 < float(features.var(0).mean()) < 2
    monkeypatch.setattr(module, "fit_judge", None)  # what is there is not fitted again
    again = kept_judge(tmp_path / "judge", seed=0)
    assert torch.equal(again.read(others.pictures), judge.read(others.pictures))
    assert 0 <= again.classifier.accuracy < 1


def test_misfits_are_refused() -> None:
    with pytest.raises(UsageError, match="the classifier is no judge of shapes"):
        Judge(Classifier((3, SIDE, SIDE), ("cat", "dog")))
    with pytest.raises(UsageError, match="there are 2 pictures, but 1 captions"):
        Judge(Classifier((3, SIDE, SIDE), READINGS)).accuracy(torch.zeros(2, 3, SIDE, SIDE), ["a"])
