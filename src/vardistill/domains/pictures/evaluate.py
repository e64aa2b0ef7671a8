r"""The table of metrics of a set of pictures, in a network's features φ.

Against the training set, which is what a generator imitates: the Fréchet distance and the kernel distance. Against the
held-out set, at equal sizes: precision, recall, density and coverage. Against both, `memorisation` (see
`metrics.memorisation`), of the pictures themselves: a network that was fitted to the training set sees it with other
eyes than held-out pictures, a pixel does not.

Pictures of a conditional generator are drawn with the data's own class frequencies (`labels_like`): other ones would be
measured as a distance.

All pictures are clipped to [−1, 1] first, as saving them would.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from vardistill.domains.pictures.classifier import BLOCK
from vardistill.domains.pictures.data import ImageData, Images
from vardistill.domains.pictures.features import ClassifierFeatures, Features
from vardistill.errors import UsageError
from vardistill.metrics.frechet import Moments, gaussian_distance, moments
from vardistill.metrics.kernel_distance import kernel_distance
from vardistill.metrics.manifolds import manifold_metrics
from vardistill.metrics.memorisation import memorised_share, nearest
from vardistill.metrics.pairwise import sample_matrix

MOST_TRAINING = 50_000
"""Training pictures whose features samples are compared with, at most."""

MOST_PAIRED = 5000
"""Pictures of each of two sets where all pairs are compared, at most."""

MOST_COPIES = 1000
"""Samples that are searched for in the data, at most."""

NEIGHBOURS = 5
"""k of precision, recall, density and coverage."""

Table = dict[str, float]
"""Metrics by name."""


class Reference:
    """What samples are compared with: features of the data, on the features' device.

    Each is computed when it is first asked for, and once: a process that does not evaluate computes none.

    Args:
        data: training and held-out pictures.
        features: φ.
        rng: on the CPU; draws the pictures where there are more than are used, and their order.

    Attributes:
        train: indices of the training pictures that are used, at most 50,000.
        held_out: indices of the held-out ones, at most 50,000.
    """

    def __init__(self, data: ImageData, features: Features, rng: torch.Generator) -> None:
        self.data, self.features = data, features
        self.train, self.held_out = (
            torch.randperm(len(images), generator=rng)[:MOST_TRAINING] for images in (data.train, data.held_out)
        )

    @cached_property
    def train_features(self) -> Tensor:
        """φ of the training pictures that are used, (N, f)."""
        return _features(self.features, blocks(self.data.train, self.train))

    @cached_property
    def held_out_features(self) -> Tensor:
        """φ of the held-out pictures that are used, (M, f)."""
        return _features(self.features, blocks(self.data.held_out, self.held_out))

    @cached_property
    def moments(self) -> Moments:
        """Of `train_features`."""
        return moments(self.train_features)

    @cached_property
    def fd_held_out(self) -> float:
        """Fréchet distance of the held-out pictures to the training set.

        It is what a perfect generator has with as many samples, but for what a classifier fitted to the training set
        makes of the difference.
        """
        return gaussian_distance(moments(self.held_out_features), self.moments)


def labels_like(data: ImageData | None, n: int, classes: int) -> Tensor | None:
    """Labels (n,) for pictures that are measured, sorted: of the training pictures' frequencies, without randomness.

    They are those of n evenly spaced pictures of the training set, sorted by class. Without data of as many classes
    they are `even_labels`.
    """
    if data is None or data.train.labels is None or data.classes != classes:
        return even_labels(n, classes)
    return data.train.labels.sort().values[torch.arange(n) * len(data.train) // n]


def even_labels(n: int, classes: int) -> Tensor | None:
    """0, 1, ..., classes − 1, 0, 1, ... (n,), or None without classes."""
    return torch.arange(n) % classes if classes else None


def build_reference(data: ImageData, features: Features) -> Reference:
    """What the commands compare with: the same pictures every time."""
    return Reference(data, features, torch.Generator().manual_seed(0))


def measured(samples: Tensor, reference: Reference, labels: Tensor | None = None, copies: bool = True) -> Table:
    """`evaluate_images` as the commands call it: with the same subsets every time."""
    return evaluate_images(samples, reference, torch.Generator().manual_seed(0), labels, copies)


@torch.no_grad()
def evaluate_images(
    samples: Tensor,
    reference: Reference,
    rng: torch.Generator,
    labels: Tensor | None = None,
    copies: bool = True,
) -> Table:
    """Compare samples with the data.

    Args:
        samples: (n, C, H, W), independent draws; on the CPU as well as elsewhere.
        reference: the data and their features.
        rng: on the CPU; draws subsets of the samples, for the metrics of pairs.
        labels: (n,) the classes that the samples were asked for.
        copies: whether to look for copies of training pictures, the longer half of the work.

    Returns:
        Metrics by name:

        - fd: Fréchet distance of all samples to the training set, in units of features squared. It falls with n
          towards its limit: compare values of equal n, and with `Reference.fd_held_out`.
        - kd: kernel distance, at most 5000 samples to as many training pictures. Unbiased.
        - precision, recall, density, coverage: in [0, 1] but for density; k = 5, min(n, M, 5000) samples and as many
          held-out pictures.
        - memorisation: share of at most 1000 samples that copy training pictures, if asked for; about 0 without
          memory.
        - label_accuracy: share of samples that the classifier sees as what `labels` say, with labels and where the
          features are a classifier's.

    Raises:
        UsageError: for fewer than 6 samples or held-out pictures, samples that are not finite or of another shape than
            the data, or labels that do not fit.
    """
    data, features = reference.data, reference.features
    if tuple(samples.shape[1:]) != data.shape or len(samples) <= NEIGHBOURS:
        needed = f"(n, {', '.join(map(str, data.shape))}) with n at least {NEIGHBOURS + 1}"
        raise UsageError(f"samples must be {needed}, but are {tuple(samples.shape)}")
    sample_matrix(samples, "samples")  # for clipping makes infinity a number
    samples = samples.clamp(-1, 1)
    order = torch.randperm(len(samples), generator=rng)
    own = _features(features, samples.split(BLOCK))
    paired = min(len(samples), MOST_PAIRED)
    table = {
        "fd": gaussian_distance(moments(own), reference.moments),
        "kd": kernel_distance(own[order[:paired]], reference.train_features[:paired]),
    }
    n = min(paired, len(reference.held_out))
    mine, truth = own[order[:n]], reference.held_out_features[:n]
    table |= manifold_metrics(mine, truth, NEIGHBOURS)._asdict()
    if copies:
        table["memorisation"] = memorisation(samples[order[:MOST_COPIES]].to(features.device), data)
    if labels is not None and isinstance(features, ClassifierFeatures):
        table["label_accuracy"] = label_accuracy(features, samples, labels)
    return table


def memorisation(samples: Tensor, data: ImageData) -> float:
    """The share of samples (n, C, H, W) that copy training pictures, all of which are read.

    See `metrics.memorisation`.
    """
    train, held_out = (
        nearest(samples, blocks(images, torch.arange(len(images)))) for images in (data.train, data.held_out)
    )
    return memorised_share(train, held_out)


@torch.no_grad()
def label_accuracy(features: ClassifierFeatures, samples: Tensor, labels: Tensor) -> float:
    """The share of samples (n, C, H, W) that the classifier sees as their labels (n,).

    Raises:
        UsageError: for labels of another number than the samples.
    """
    if labels.shape != samples.shape[:1]:
        raise UsageError(f"there must be one label for each of {len(samples)} samples, not {tuple(labels.shape)}")
    seen = torch.cat([features.predict(part).cpu() for part in samples.split(BLOCK)])
    return float((seen == labels.cpu()).double().mean())


def blocks(images: Images, index: Tensor) -> Iterator[Tensor]:
    """The pictures at `index`, some at a time."""
    return (images.take(part) for part in index.split(BLOCK))


def _features(features: Features, parts: Iterator[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([features(part) for part in parts])
