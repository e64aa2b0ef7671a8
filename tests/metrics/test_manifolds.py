"""Four metrics of one set of distances: the same as apart, computed once, and exact at ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vardistill.metrics import density_coverage, manifold_metrics, manifolds, precision_recall
from vardistill.metrics.manifolds import ROWS, squared_distances


@pytest.mark.parametrize(("m", "n"), [(40, 60), (60, 40), (ROWS + 5, 30)])
def test_all_four_are_the_two_pairs(m: int, n: int, rng: torch.Generator) -> None:
    samples, truth = 0.9 * torch.randn(m, 7, generator=rng) + 0.8, torch.randn(n, 7, generator=rng)
    together = manifold_metrics(samples, truth)
    assert together == (*precision_recall(samples, truth), *density_coverage(samples, truth))
    assert 0 < together.precision < 1
    assert 0 < together.recall < 1


def test_each_distance_is_computed_once(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the samples, within the truth, and between the two."""
    seen = []

    def watched(x: Tensor, y: Tensor, *share: float) -> object:
        seen.append((len(x), len(y)))
        return squared_distances(x, y, *share)

    monkeypatch.setattr(manifolds, "squared_distances", watched)
    manifold_metrics(torch.randn(40, 3, generator=rng), torch.randn(50, 3, generator=rng))
    assert sorted(seen) == [(40, 40), (40, 50), (50, 50)]


@pytest.mark.parametrize("d", [1, 3, 64])
def test_ties_count_as_within(d: int, rng: torch.Generator) -> None:
    """Samples of a grid are at exactly the radii of the truth on it, wherever the grid is.

    Whole numbers about the origin have exact distances by differences, which decide here.
    """
    x, y = (torch.randint(4, (60, d), generator=rng).double() for _ in range(2))
    radius = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square().round().sort(1).values[:, 5]
    own = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square().round().sort(1).values[:, 5]
    across = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist").square().round()
    within, without = across <= radius, (across <= own[:, None])
    expected = [within.any(1), without.any(0), within / 5 * len(x), within.any(0)]
    for shift in (0.0, 0.1, 1000.3):
        values = manifold_metrics((y + shift) / 7, (x + shift) / 7)
        assert values == pytest.approx([float(v.double().mean()) for v in expected])
