"""Nearest members by the definition, and the memorised share's mean with and without memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics import memorised_share, nearest
from vardistill.metrics.memorisation import Nearest


@pytest.mark.parametrize(("block", "k"), [(1, 1), (3, 5), (7, 2), (100, 1), (100, 20)])
def test_nearest_is_the_definition(block: int, k: int, rng: torch.Generator, float64: None) -> None:
    samples, data = torch.randn(9, 2, 3, generator=rng), torch.randn(20, 2, 3, generator=rng)
    distances, indices = (samples[:, None] - data).flatten(2).norm(dim=2).sort(1)
    found = nearest(samples, data.split(block), k)
    assert torch.equal(found.indices, indices[:, :k])
    torch.testing.assert_close(found.distances, distances[:, :k])
    assert found.size == 20


def test_a_copy_is_at_distance_0_in_single_precision(rng: torch.Generator) -> None:
    """Far from the origin the products of matrices alone would leave a distance of some 0.1."""
    data = 1000 + torch.randn(50, 64, generator=rng)
    found = nearest(data[[7, 31]], data.split(8), k=2)
    assert found.indices[:, 0].tolist() == [7, 31]
    assert found.distances[:, 0].tolist() == [0, 0]
    assert (found.distances[:, 1] > 1).all()


def share(samples: Tensor, train: Tensor, held_out: Tensor) -> float:
    return memorised_share(nearest(samples, [train]), nearest(samples, [held_out]))


def test_copies_are_found_and_others_count_against_them() -> None:
    """N = M = 2: of four samples two are nearest to training pictures, three, all, and none."""
    train, held_out = torch.tensor([[0.0], [10.0]]), torch.tensor([[5.0], [15.0]])
    for points, expected in ([0, 10, 5, 15], 0), ([0, 10, 11, 15], 0.5), ([0, 10, 1, 9], 1), ([5, 15, 5, 15], -1):
        assert share(torch.tensor(points, dtype=torch.float32)[:, None], train, held_out) == pytest.approx(expected)


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("copies", [0.0, 0.4])
def test_its_mean_is_the_share_of_copies(spread: float, copies: float) -> None:
    """However good the other samples are. N = 30, M = 10, 600 splits; 4.5 standard errors: 7e-6 a case, seed 2."""
    rng, values = torch.Generator().manual_seed(2), []
    for _ in range(600):
        data = torch.randn(40, 2, generator=rng, dtype=torch.float64)
        samples = spread * torch.randn(20, 2, generator=rng, dtype=torch.float64)
        samples[: int(20 * copies)] = data[: int(20 * copies)]
        values.append(share(samples, data[:30], data[30:]))
    error = torch.tensor(values).std().item() / 600**0.5
    assert abs(sum(values) / 600 - copies) < 4.5 * error
    assert error < 0.03


def test_pictures_in_both_sets_count_half(rng: torch.Generator) -> None:
    data = torch.randn(10, 3, generator=rng)
    assert share(data, data, data) == 0


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(4, 2)
    for k in (0, 5):
        with pytest.raises(UsageError, match=rf"at most the data's size, 4, but is {k}"):
            nearest(x, [x], k)
    with pytest.raises(UsageError, match="same data shape"):
        nearest(x, [torch.zeros(4, 3)])
    with pytest.raises(UsageError, match="data must be finite"):
        nearest(x, [torch.full((4, 2), math.inf)])
    with pytest.raises(UsageError, match="of 4 and 3"):
        memorised_share(nearest(x, [x]), Nearest(torch.zeros(3, 1), torch.zeros(3, 1), 4))
