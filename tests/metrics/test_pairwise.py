"""Blocked sums over pairs equal the dense ones, with bounded memory, and bad samples are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from operator_counter import OperatorCounter
from vardistill.errors import UsageError
from vardistill.metrics.pairwise import BLOCK, pool, quadratic_forms, sample_matrix


def kernel(distance2: Tensor) -> Tensor:
    return 1 / (1 + distance2)


class LargestTensor(TorchDispatchMode):
    """Records the entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.entries = max(self.entries, out.numel())
        return out


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_blocked_equals_dense(block: int, d: int, rng: torch.Generator) -> None:
    w = torch.randn(101, d, generator=rng, dtype=torch.float64)
    v = torch.randn(4, 101, generator=rng, dtype=torch.float64)
    dense = kernel((w[:, None] - w[None]).square().sum(-1))
    torch.testing.assert_close(quadratic_forms(w, v, kernel, block), ((v @ dense) * v).sum(1), rtol=1e-12, atol=1e-12)


def test_form_of_a_minus_b_holds_the_cross_mean(rng: torch.Generator) -> None:
    x, y = torch.randn(7, 2, generator=rng).double(), torch.randn(5, 2, generator=rng).double() + 100
    w, v = pool(x, y)
    xx, yy, form = quadratic_forms(w, v, kernel)
    cross = kernel(torch.cdist(x, y) ** 2).mean()
    torch.testing.assert_close(xx + yy - form, 2 * cross, rtol=1e-10, atol=1e-14)


def test_distance_of_a_point_to_itself_is_zero_in_single_precision() -> None:
    far = torch.tensor([[1e3, 1e3], [-1e3, 1e3 + 1 / 3]])
    sharp = quadratic_forms(far, torch.eye(2), lambda distance2: (distance2 == 0).to(distance2))
    assert sharp.tolist() == [1, 1]


def test_no_tensor_exceeds_a_block_or_the_samples(rng: torch.Generator) -> None:
    n, d, p = 2500, 3, 10
    with LargestTensor() as largest:
        w, v = pool(torch.randn(n, d, generator=rng), torch.randn(n, d, generator=rng))
        quadratic_forms(w, v.repeat(p, 1), kernel)
    assert largest.entries <= max(BLOCK**2, 2 * n * max(3 * p, d + 2))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(0, 2), r"n at least 2, but is \(0, 2\)"),
        (torch.zeros(1, 2), r"n at least 2, but is \(1, 2\)"),
        (torch.zeros(5), r"n at least 2, but is \(5,\)"),
        (torch.zeros(5, 0), r"n at least 2, but is \(5, 0\)"),
        (torch.zeros(5, 2, dtype=torch.int64), "floating point, but is torch.int64"),
        (torch.tensor([[0.0, 1], [torch.nan, 1], [1, torch.inf]]), "2 of 3 samples hold NaN or infinity"),
    ],
)
def test_bad_samples_are_refused_in_one_line(samples: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        sample_matrix(samples, "x")
    assert "\n" not in str(error.value)


def test_samples_of_different_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"same data shape, but are \(4, 2\) and \(4, 3\)"):
        pool(torch.zeros(4, 2), torch.zeros(4, 3))


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 3), ("meta", 1)])
def test_blocks_fill_the_device(device: str, blocks: int, rng: torch.Generator) -> None:
    """1000² pairs are three blocks of a processor's cache, and one of an accelerator (the meta device)."""
    w, v = torch.randn(1000, 2, generator=rng).to(device), torch.ones(1, 1000, device=device)
    with OperatorCounter("aten.exp_") as operators:
        quadratic_forms(w, v, lambda distance2: distance2.neg_().exp_())
    assert operators.count == blocks
