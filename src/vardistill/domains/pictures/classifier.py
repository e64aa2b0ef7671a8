r"""A small convolutional classifier of a labelled set of pictures, whose penultimate layer gives features for metrics.

    x (C, H, W) → 3×3 convolutions, at least two, halving until no side exceeds 4 → φ(x) ∈ R⁶⁴ → logits

There is no normalisation over the batch: a picture's features do not depend on its company. Training is cross-entropy
with AdamW, a cosine learning rate and, for pictures of 16 pixels or more, shifts by a pixel. Afterwards φ is divided by
a constant and the last layer multiplied by it, so that the features' variances over held-out pictures have a mean of 1
and distances have the same scale for every classifier.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vardistill.domains.pictures.data import Images
from vardistill.errors import UsageError, first_line
from vardistill.progress import bar
from vardistill.students.hub import SafeHubMixin
from vardistill.training.optimisers import cosine

FEATURES = 64
"""Size of the penultimate layer."""

BLOCK = 1024
"""Pictures that a network sees at once where there are no gradients."""


MOST_SCALING = 10_000
"""Pictures, evenly spaced, that the features' scale is computed of, at most."""


class Classifier(nn.Module, SafeHubMixin, library_name="vardistill", tags=["image-classification"]):
    """Logits of K classes for pictures in [−1, 1].

    Args:
        shape: (C, H, W) of a picture.
        class_names: of the K classes, in the order of the labels.
        width: channels of the first convolution; the others have twice as many.
        accuracy: on pictures that training did not see, in [0, 1]; NaN before it has been measured.

    Raises:
        UsageError: for fewer than two classes, or a shape or width that is not positive.
    """

    def __init__(
        self, shape: Sequence[int], class_names: Sequence[str], width: int = 32, accuracy: float = math.nan
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(*shape, width) < 1:
            raise UsageError(f"shape must be (C, H, W) and width positive, but they are {tuple(shape)} and {width}")
        if len(class_names) < 2:
            raise UsageError(f"a classifier needs at least 2 classes, but has {len(class_names)}")
        channels, *sides = shape
        self.shape, self.class_names, self.accuracy = (channels, *sides), tuple(class_names), accuracy
        halvings = max(1, math.ceil(math.log2(max(sides) / 4)))
        strides = [1] * (2 - halvings) + [2] * halvings
        widths = [channels, width, *[2 * width] * (len(strides) - 1)]
        layers: list[nn.Module] = []
        for stride, (size_in, size_out) in zip(strides, pairwise(widths), strict=True):
            layers += [nn.Conv2d(size_in, size_out, 3, stride, padding=1), nn.ReLU()]
        left = math.prod(math.ceil(side / 2**halvings) for side in sides)
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Linear(2 * width * left, FEATURES)
        self.logits = nn.Linear(FEATURES, len(class_names))

    def initialise(self, rng: torch.Generator) -> Classifier:
        """He's initialisation (arXiv 1502.01852); returns the classifier."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=rng)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.logits.weight)
        return self

    def features(self, x: Tensor) -> Tensor:
        """φ(x) (B, 64), not negative, of x (B, C, H, W).

        Raises:
            UsageError: for pictures of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise UsageError(f"the classifier reads pictures of shape {self.shape}, but these are {tuple(x.shape[1:])}")
        return F.relu(self.hidden(self.convolutions(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of x (B, C, H, W)."""
        logits: Tensor = self.logits(self.features(x))
        return logits

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The likeliest class of x (B, C, H, W), (B,) int64."""
        return torch.cat([self(part).argmax(1) for part in x.split(BLOCK)])


def fit_classifier(
    train: Images,
    held_out: Images,
    rng: torch.Generator,
    steps: int = 3000,
    batch: int = 64,
    lr: float = 2e-3,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Fit a classifier to labelled pictures, and measure it on others.

    Args:
        train: labelled pictures.
        held_out: others, of the same classes, for the accuracy.
        rng: on the CPU; draws weights, batches and shifts.
        steps: of training.
        batch: pictures of a step.
        lr: largest learning rate of AdamW.
        device: where to train.

    Returns:
        The classifier on `device`, in evaluation mode, its accuracy on `held_out` kept.

    Raises:
        UsageError: for pictures without labels, or of different shapes or classes.
    """
    labels, _ = _labels(train), _labels(held_out)
    if (train.shape, tuple(train.class_names)) != (held_out.shape, tuple(held_out.class_names)):
        raise UsageError("training and held-out pictures must have the same shape and classes")
    classifier = Classifier(train.shape, train.class_names).initialise(rng).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01, fused=True)
    for step in bar(range(steps), name="classifier, to measure with", unit="steps"):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * cosine(step / steps)
        index = torch.randint(len(train), (batch,), generator=rng)
        x = shifted(train.take(index), rng).to(device)
        F.cross_entropy(classifier(x), labels[index].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    scale_features(classifier, held_out)
    measured = Classifier(train.shape, train.class_names, accuracy=accuracy(classifier, held_out))
    measured.load_state_dict(classifier.state_dict())
    return measured.to(device).eval()


def accuracy(classifier: Classifier, images: Images) -> float:
    """The share of labelled pictures that the classifier gets right."""
    labels, device = _labels(images), next(classifier.parameters()).device
    right = sum(
        int((classifier.predict(images.take(index).to(device)).cpu() == labels[index]).sum())
        for index in torch.arange(len(images)).split(BLOCK)
    )
    return right / len(images)


@torch.no_grad()
def scale_features(classifier: Classifier, images: Images) -> None:
    """Bring the features' variances over the pictures to a mean of 1; logits stay as they are.

    φ = relu(Wh + b) is homogeneous in W and b, and the logits are linear in φ.
    """
    device = next(classifier.parameters()).device
    n = min(len(images), MOST_SCALING)
    index = torch.arange(n) * len(images) // n
    features = torch.cat([classifier.features(images.take(part).to(device)) for part in index.split(BLOCK)])
    scale = features.var(0).mean().sqrt()
    for parameter in classifier.hidden.parameters():
        parameter.div_(scale)
    classifier.logits.weight.mul_(scale)


def shifted(x: Tensor, rng: torch.Generator) -> Tensor:
    """x (B, C, H, W), each picture of at least 16 pixels moved by −1, 0 or 1 along both sides, its edge repeated."""
    sides = x.shape[2:]
    if min(sides) < 16:
        return x
    by = torch.randint(3, (2, len(x), 1), generator=rng)
    rows, columns = (torch.arange(side) + start for side, start in zip(sides, by, strict=True))
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate").movedim(1, -1)
    return padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def load_classifier(path: Path) -> Classifier:
    """The classifier saved in the folder `path`, in evaluation mode; raises UsageError where there is none."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the hub's mixin prints, and stdout may be JSON
            classifier: Classifier = Classifier.from_pretrained(path)
    except UsageError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise UsageError(f"the classifier in {path} is truncated or not one of vardistill's: {reason}") from error
    return classifier.eval()


def _labels(images: Images) -> Tensor:
    if images.labels is None or not images.class_names:
        raise UsageError("a classifier needs labelled pictures, but these have no labels")
    return images.labels
