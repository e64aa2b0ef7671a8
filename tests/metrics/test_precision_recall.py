"""Improved precision and recall: known cases, invariances, and the definition itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics import precision_recall
from vardistill.metrics.manifolds import ROWS


def by_definition(x: Tensor, y: Tensor, k: int) -> tuple[float, float]:
    """Loops over points, as the paper's algorithm 1."""

    def share(points: Tensor, manifold: Tensor) -> float:
        radii = [sorted((m - other).norm().item() for other in manifold)[k] for m in manifold]
        inside = [any((p - m).norm().item() <= r for m, r in zip(manifold, radii, strict=True)) for p in points]
        return sum(inside) / len(points)

    return share(x, y), share(y, x)


@pytest.mark.parametrize(("n", "m", "d", "k"), [(30, 30, 2, 5), (25, 40, 5, 3), (40, 25, 64, 1), (7, 6, 1, 5)])
def test_it_is_the_definition(n: int, m: int, d: int, k: int, rng: torch.Generator, float64: None) -> None:
    x, y = torch.randn(n, d, generator=rng), 0.7 * torch.randn(m, d, generator=rng) + 0.5
    assert precision_recall(x, y, k) == pytest.approx(by_definition(x, y, k))


@pytest.mark.parametrize("d", [1, 2, 64])
def test_identical_sets_are_covered(d: int, rng: torch.Generator) -> None:
    x = 100 + torch.randn(50, d, generator=rng)
    assert precision_recall(x, x.clone()) == (1, 1)


def test_copies_are_covered_by_their_own_balls_of_no_radius() -> None:
    x = torch.arange(3.0)[:, None].repeat_interleave(6, 0) / 3
    assert precision_recall(x, x) == (1, 1)


def test_sets_far_apart_share_nothing(rng: torch.Generator) -> None:
    x = torch.randn(50, 3, generator=rng)
    assert precision_recall(x, x + 1000) == (0, 0)


def test_points_on_a_line() -> None:
    """k = 1: balls of radius 1 around 0..9. Of 0.5, 1.5, 20.5 and 21.5 two are within; those reach to 0, 1, 2."""
    truth, samples = torch.arange(10.0)[:, None], torch.tensor([[0.5], [1.5], [20.5], [21.5]])
    assert precision_recall(samples, truth, k=1) == (0.5, pytest.approx(0.3))


def test_a_part_of_the_truth_is_precise_and_recalls_a_part(rng: torch.Generator) -> None:
    """Two far clusters, of which the samples have one."""
    cluster = torch.randn(60, 4, generator=rng)
    truth = torch.cat([cluster[:30], cluster[:30] + 1000])
    assert precision_recall(cluster[:30], truth) == (1, 0.5)
    assert precision_recall(truth, cluster[:30]) == (0.5, 1)


def test_exchange_of_the_sets_exchanges_the_two(rng: torch.Generator) -> None:
    x, y = torch.randn(40, 6, generator=rng), 0.8 * torch.randn(50, 6, generator=rng)
    precision, recall = precision_recall(x, y)
    assert precision_recall(y, x) == (recall, precision)
    assert precision != recall


def test_order_rotation_shift_and_scale_change_nothing(rng: torch.Generator, float64: None) -> None:
    x, y = torch.randn(40, 6, generator=rng), 0.8 * torch.randn(50, 6, generator=rng)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=rng))
    moved = [7 * v[torch.randperm(len(v), generator=rng)] @ rotation + 3 for v in (x, y)]
    assert precision_recall(*moved) == precision_recall(x, y)


def test_data_of_any_shape_are_vectors(rng: torch.Generator) -> None:
    x, y = torch.randn(20, 2, 3, generator=rng), torch.randn(20, 2, 3, generator=rng)
    assert precision_recall(x, y) == precision_recall(x.flatten(1), y.flatten(1))


def test_more_neighbours_cover_more(rng: torch.Generator) -> None:
    x, y = torch.randn(80, 8, generator=rng), torch.randn(80, 8, generator=rng) * 1.2
    values = [precision_recall(x, y, k) for k in (1, 3, 5, 20)]
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_blocks_make_no_difference(rng: torch.Generator) -> None:
    x, y = torch.randn(ROWS + 7, 1, generator=rng), torch.randn(ROWS + 3, 1, generator=rng) + 2

    def share(points: Tensor, manifold: Tensor) -> float:
        radius = (manifold - manifold.T).abs().sort(1).values[:, 5]
        return float(((points - manifold.T).abs() <= radius).any(1).double().mean())

    assert precision_recall(x, y) == (share(x, y), share(y, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_single(dtype: torch.dtype, rng: torch.Generator) -> None:
    x, y = (torch.randn(50, 2, generator=rng).to(dtype) for _ in range(2))
    assert precision_recall(x, y) == precision_recall(x.float(), y.float())


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(10, 2)
    for k in (0, 5):
        with pytest.raises(UsageError, match=rf"less than both sets' sizes, 10 and 5, but is {k}"):
            precision_recall(x, torch.zeros(5, 2), k)
    with pytest.raises(UsageError, match="same data shape"):
        precision_recall(x, torch.zeros(10, 3))
    with pytest.raises(UsageError, match="truth must be finite"):
        precision_recall(x, torch.full((10, 2), math.nan))
