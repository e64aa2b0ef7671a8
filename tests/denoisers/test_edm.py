"""EDM-style modules as teachers, against exact denoisers of mixtures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vardistill.denoisers import GaussianMixture, from_edm, reschedule
from vardistill.diffusion import Denoiser
from vardistill.diffusion.schedules import VE, VP
from vardistill.errors import UsageError

MEANS = torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.0, 3.0]], dtype=torch.float64)


class MixtureNet(nn.Module):
    """The exact D(x, σ, one-hot) of a mixture whose components are the classes, in NVIDIA's convention."""

    def __init__(self, label_dim: int) -> None:
        super().__init__()
        self.label_dim = label_dim
        self.mixture = GaussianMixture(MEANS, std=0.5, schedule=VE(0.01, 50.0))
        self.img_channels, self.img_resolution = 3, 16

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        exact: Tensor = self.mixture(x, self.mixture.schedule.time(sigma))
        if class_labels is None:
            return exact
        assert class_labels.shape == (len(x), self.label_dim)
        assert class_labels.dtype == x.dtype
        gain = (0.25 / (0.25 + sigma**2))[:, None]
        means = class_labels @ MEANS
        given = means + gain * (x - means)
        return torch.where(class_labels.sum(1, keepdim=True) > 0, given, exact)


def points(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(6, 2, generator=rng, dtype=torch.float64), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)


def test_is_the_exact_denoiser(rng: torch.Generator) -> None:
    """Also under another schedule."""
    teacher = from_edm(MixtureNet(0))
    assert isinstance(teacher, Denoiser)
    assert teacher.schedule == VE(0.002, 80.0)
    x_t, t = points(rng)
    torch.testing.assert_close(teacher(x_t, t), GaussianMixture(MEANS, std=0.5, schedule=VE(0.002, 80.0))(x_t, t))
    exact = GaussianMixture(MEANS, std=0.5, schedule=VP())
    torch.testing.assert_close(reschedule(teacher, VP())(x_t, t), exact(x_t, t))


def test_labels_become_one_hot_and_the_last_is_no_class(rng: torch.Generator) -> None:
    teacher = from_edm(MixtureNet(3), 0.01, 50.0)
    x_t, t = points(rng)
    labels = torch.tensor([0, 1, 2, 3, 1, 3])
    x = teacher(x_t, t, labels=labels)
    for row, label in enumerate(labels.tolist()):
        means = MEANS if label == 3 else MEANS[label : label + 1]
        exact = GaussianMixture(means, std=0.5, schedule=VE(0.01, 50.0))
        torch.testing.assert_close(x[row], exact(x_t, t)[row])
    torch.testing.assert_close(teacher(x_t, t), teacher(x_t, t, labels=torch.full((6,), 3)))


def test_shape_classes_and_range() -> None:
    teacher = from_edm(MixtureNet(3))
    assert (teacher.data_shape, teacher.classes) == ((3, 16, 16), 3)
    bare = from_edm(lambda x, sigma, labels: x)
    assert (bare.data_shape, bare.classes) == (None, 0)
    with pytest.raises(UsageError, match="sigma_min must be positive"):
        from_edm(MixtureNet(0), 1.0, 0.5)
