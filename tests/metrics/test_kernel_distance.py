"""Kernel distance: the double sum, the closed form of its mean, and unbiasedness."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics import kernel_distance
from vardistill.metrics.kernel_distance import ROWS


def double_sum(x: Tensor, y: Tensor) -> float:
    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    def within(v: Tensor) -> float:
        pairs = [k(v[i], v[j]) for i in range(len(v)) for j in range(len(v)) if i != j]
        return sum(pairs) / len(pairs)

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize(("n", "m", "d"), [(2, 2, 1), (12, 7, 5), (7, 12, 64)])
def test_it_is_the_double_sum(n: int, m: int, d: int, rng: torch.Generator, float64: None) -> None:
    x, y = torch.randn(n, d, generator=rng), 2 * torch.randn(m, d, generator=rng) + 1
    assert kernel_distance(x, y) == pytest.approx(double_sum(x, y), rel=1e-10)


def test_blocks_make_no_difference(rng: torch.Generator, float64: None) -> None:
    x, y = torch.randn(ROWS + 5, 3, generator=rng), torch.randn(2 * ROWS + 1, 3, generator=rng)

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 3 + 1) ** 3

    n, m = len(x), len(y)
    xx, yy = ((k(v, v).sum() - k(v, v).trace()) / (len(v) * (len(v) - 1)) for v in (x, y))
    assert (n, m) == (ROWS + 5, 2 * ROWS + 1)
    assert kernel_distance(x, y) == pytest.approx(float(xx + yy - 2 * k(x, y).mean()), rel=1e-8)


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_it_is_unbiased(shift: float) -> None:
    """d = 1, N(0, 1) and N(s, 1). With moments 0, 1, 0 and s, 1 + s², s³ + 3s the kernel's expansion
    Σ_j C(3, j) (Δ_j)² gives MMD² = 3s² + 3s⁴ + (s³ + 3s)². 4.5 standard errors: failure rate 7e-6, seed 1."""
    rng, repeats = torch.Generator().manual_seed(1), 3000
    draws = torch.randn(repeats, 2, 12, 1, generator=rng, dtype=torch.float64)
    values = torch.tensor([kernel_distance(x, y + shift) for x, y in draws], dtype=torch.float64)
    exact = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    error = float(values.std()) / math.sqrt(repeats)
    assert abs(float(values.mean()) - exact) < 4.5 * error
    if shift == 0:
        assert float(values.min()) < 0


def test_rotation_order_and_exchange_change_nothing(rng: torch.Generator, float64: None) -> None:
    x, y = torch.randn(30, 4, generator=rng), torch.randn(20, 4, generator=rng) + 0.5
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=rng))
    value = kernel_distance(x, y)
    assert kernel_distance(y, x) == pytest.approx(value, rel=1e-10)
    assert kernel_distance(x.flip(0) @ rotation, y @ rotation) == pytest.approx(value, rel=1e-10)


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(10, 2)
    with pytest.raises(UsageError, match="n at least 2"):
        kernel_distance(x, x[:1])
    with pytest.raises(UsageError, match="same data shape"):
        kernel_distance(x, torch.zeros(10, 3))
    with pytest.raises(UsageError, match="y must be finite"):
        kernel_distance(x, torch.full((10, 2), math.nan))
