r"""Quadratic forms of a kernel over all pairs of a sample, without the N × N matrix.

    form(v) = vᵀ K v = Σ_ij v_i v_j k(‖w_i − w_j‖²)

With w = (x_1..x_n, y_1..y_m) the pooled sample, a = 1_x/n and b = 1_y/m,

    form(a) = mean of k over the pairs (x, x′), the n pairs i = j included,
    form(b) = the same of y,
    form(a − b) = form(a) + form(b) − 2 mean of k over the pairs (x, y).

K is symmetric: only the blocks on and above its diagonal are computed, one at a time, so memory is that of
w and v. Blocks are computed in the samples' precision, about the pooled mean, and added in float64; ‖w_i −
w_i‖² is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vardistill.errors import UsageError

BLOCK = 512
"""Rows and columns of a block: 1 MiB in float32, which stays in a core's cache."""

DEVICE_BLOCK = 4096
"""The same on accelerators, where a block has to keep all cores busy."""

Kernel = Callable[[Tensor], Tensor]
"""k from squared distances, shape of its argument, which it may overwrite."""


def sample_matrix(samples: Tensor, name: str) -> Tensor:
    """`samples` (n, *data) as a matrix (n, d).

    Raises:
        UsageError: for fewer than 2 samples, for samples without a data axis or entries, for integers, NaN,
            infinity.
    """
    if samples.ndim < 2 or samples[:1].numel() == 0 or len(samples) < 2:
        raise UsageError(f"{name} must be (n, *data) with n at least 2, but is {tuple(samples.shape)}")
    if not samples.is_floating_point():
        raise UsageError(f"{name} must be floating point, but is {samples.dtype}")
    if not samples.isfinite().all():
        bad = int((~samples.isfinite().flatten(1).all(1)).sum())
        raise UsageError(f"{name} must be finite, but {bad} of {len(samples)} samples hold NaN or infinity")
    return samples.flatten(1)


def pool(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The pooled sample w (n + m, d), centred, and the rows a, b, a − b, (3, n + m).

    Raises:
        UsageError: for samples that `sample_matrix` refuses, or of different dimension.
    """
    if x.shape[1:] != y.shape[1:]:
        raise UsageError(f"x and y must have the same data shape, but are {tuple(x.shape)} and {tuple(y.shape)}")
    w = torch.cat([sample_matrix(x, "x"), sample_matrix(y, "y")])
    is_x = torch.arange(len(w), device=w.device) < len(x)
    a, b = is_x.to(w) / len(x), (~is_x).to(w) / len(y)
    return w - w.mean(0), torch.stack([a, b, a - b])


@torch.no_grad()
def quadratic_forms(w: Tensor, v: Tensor, kernel: Kernel, block: int | None = None) -> Tensor:
    """v_pᵀ K v_p for every row of v.

    Args:
        w: (N, d) points, centred for precision.
        v: (P, N) coefficients.
        kernel: k, of squared distances.
        block: rows and columns of a block; default by the device.

    Returns:
        (P,) in float64. Time is O(N² (d + P)), memory O(N (d + P) + block²).
    """
    block = block or (BLOCK if w.device.type == "cpu" else DEVICE_BLOCK)
    square, one = (w**2).sum(1, keepdim=True), torch.ones_like(w[:, :1])
    left, right = torch.cat([-2 * w, square, one], 1), torch.cat([w, one, square], 1)
    total = torch.zeros(len(v), dtype=torch.float64, device=w.device)
    for i in range(0, len(w), block):
        rows = slice(i, i + block)
        for j in range(i, len(w), block):
            columns = slice(j, j + block)
            distance2 = (left[rows] @ right[columns].T).clamp_(min=0)
            if i == j:
                distance2.fill_diagonal_(0)
            form = ((v[:, rows] @ kernel(distance2)) * v[:, columns]).sum(1, dtype=torch.float64)
            total += form if i == j else 2 * form
    return total
