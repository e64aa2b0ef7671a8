r"""The judge of shapes: what is in each corner of a picture, as a network reads it that the formula taught.

A `Classifier` with logits for each place of the size (or nothing), the colour and the shape of what is there:

    loss = Σ_places CE(size or nothing) + [something] (CE(colour) + CE(shape))

A picture is right for a caption if the likeliest reading of every corner is the caption's. Distances between sets of
pictures are taken in the judge's penultimate layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vardistill.domains.pictures.classifier import BLOCK, Classifier, load_classifier, scale_features
from vardistill.domains.pictures.data import StoredImages
from vardistill.domains.text.shapes.formula import COLOURS, PLACES, SHAPES, SIDE, SIZES, attributes, labels_of, scenes
from vardistill.errors import UsageError
from vardistill.files import whole
from vardistill.progress import bar
from vardistill.training.optimisers import cosine

SIZES_OR_NOTHING = ("nothing", *SIZES)
READINGS = tuple(f"{place}: {word}" for place in PLACES for word in (*SIZES_OR_NOTHING, *COLOURS, *SHAPES))
"""What the logits are of."""

HELD_OUT = 4000
"""Pictures that the judge's accuracy is measured on; none of them was trained on."""


class Judge:
    """Reads pictures, and says whether they are what captions say.

    Args:
        classifier: with logits of `READINGS`.

    Attributes:
        classifier: as given.

    Raises:
        UsageError: for a classifier of other classes.
    """

    def __init__(self, classifier: Classifier) -> None:
        if classifier.class_names != READINGS:
            raise UsageError("the classifier is no judge of shapes: its classes are others")
        self.classifier = classifier

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """The likeliest labels (n, 4) of pictures (n, 3, 32, 32), on their device."""
        parameter = next(self.classifier.parameters())
        logits = torch.cat([self.classifier(part.to(parameter)) for part in pictures.split(BLOCK)])
        size, colour, shape = (part.argmax(-1) for part in by_place(logits))
        labels = 1 + ((size - 1) * len(COLOURS) + colour) * len(SHAPES) + shape
        return labels.where(size > 0, 0).to(pictures.device)

    def accuracy(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Prompt accuracy: whether every attribute is right, (n,) bool.

        Args:
            pictures: (n, 3, 32, 32) in [−1, 1].
            captions: one of each picture.

        Raises:
            UsageError: for a text that is no caption, or of other numbers.
        """
        if len(pictures) != len(captions):
            raise UsageError(f"there are {len(pictures)} pictures, but {len(captions)} captions")
        return (self.read(pictures) == labels_of(captions).to(pictures.device)).all(1)


def by_place(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, K) as those of size or nothing (n, 4, 3), colour (n, 4, 4) and shape (n, 4, 3)."""
    parts = len(SIZES_OR_NOTHING), len(COLOURS), len(SHAPES)
    size, colour, shape = logits.unflatten(1, (len(PLACES), sum(parts))).split(parts, -1)
    return size, colour, shape


def reading_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross-entropies, a mean over pictures and places, of logits (n, K) under labels (n, 4)."""
    size, colour, shape = attributes(labels)
    losses = [
        F.cross_entropy(part.flatten(0, 1), of.flatten(), ignore_index=-1)
        for part, of in zip(by_place(logits), (size + 1, colour, shape), strict=True)
    ]
    return torch.stack(losses).sum()


def fit_judge(rng: torch.Generator, steps: int = 1200, batch: int = 64, lr: float = 2e-3) -> Classifier:
    """Fit the judge's network to fresh pictures, and measure it on others.

    Args:
        rng: on the CPU; draws weights and pictures.
        steps: of training.
        batch: pictures of a step.
        lr: largest learning rate of AdamW.

    Returns:
        The network in evaluation mode; its accuracy is the share of pictures that it reads right in every corner.
    """
    classifier = Classifier((3, SIDE, SIDE), READINGS).initialise(rng)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01, fused=True)
    for step in bar(range(steps), name="judge", unit="steps"):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * cosine(step / steps)
        seen = scenes(batch, rng)
        reading_loss(classifier(seen.pictures), seen.labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    others = scenes(HELD_OUT, rng)
    scale_features(classifier, StoredImages(others.pictures))
    accuracy = float((Judge(classifier).read(others.pictures) == others.labels).all(1).double().mean())
    measured = Classifier((3, SIDE, SIDE), READINGS, accuracy=accuracy)
    measured.load_state_dict(classifier.state_dict())
    return measured.eval()


def kept_judge(path: Path, seed: int) -> Judge:
    """The judge in the folder `path`, fitted where there is none yet."""
    if not (path / "config.json").is_file():
        fitted = fit_judge(torch.Generator().manual_seed(seed))
        with whole(path, folder=True) as partial:
            fitted.save_pretrained(partial)
    return load_judge(path)


def load_judge(path: Path) -> Judge:
    """The judge in the folder `path`; raises UsageError where there is none."""
    return Judge(load_classifier(path))
