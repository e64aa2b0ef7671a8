r"""Means of ‖x_i − y_j‖^β over all pairs, and their gradients, without the matrix of the pairs.

They make the energy distance (Székely & Rizzo 2013, J. Stat. Plan. Inference 143, 1249–1272)

    E_β(p, q) = 2 E‖x − y‖^β − E‖x − x′‖^β − E‖y − y′‖^β,   β ∈ (0, 2).

With d_ij = ‖x_i − y_j‖ and W_ij = d_ij^(β−2), for any g,

    s_i = Σ_j d_ij^β,   ∂/∂x_i Σ g_i s_i = β g_i Σ_j W_ij (x_i − y_j),   ∂/∂y_j Σ g_i s_i = −β Σ_i g_i W_ij (x_i − y_j).

At β ≤ 1 coincident points have no gradient; they get 0, as they have above. Pairs are visited in blocks that stay in a
processor's cache. The gradients for g = 1 are taken along with the values: they give all of x's, and all of y's where g
is the same in every row of a group, as for a mean; for another g, y's pairs are visited again. Memory is linear in K.

Few pairs in few dimensions are left to `torch.cdist`. Up to eight dimensions differences are taken directly. Above,
‖x − y‖² is expanded into a matrix product about the mean of a group's points; a block with pairs near enough to cancel
in single precision is computed in double.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vardistill.errors import UsageError

BLOCK = 512
"""Rows and columns of a block: 1 MiB in float32, which stays in a core's cache."""

DEVICE_BLOCK = 4096
"""The same on accelerators, where a block has to keep all cores busy."""

DIRECT = 8
"""The largest dimension in which differences are taken directly: as fast as products there, and exact."""

NEAR = 2.0**-6
"""‖x − y‖² over ‖x‖² + ‖y‖² below which the expansion is wrong by more than about 1e-5 in single precision."""

COINCIDENT = 2.0**-46
"""The same, below which it is nothing but rounding errors in double precision."""


def mean_distances(x: Tensor, points: Tensor, beta: float = 1.0, own: int | None = None) -> Tensor:
    """Each row's mean of ‖x_i − y_j‖^β over the points y_j, (..., K), differentiable once in both.

    With `own`, the x are among the points: x_i is y_{own+i}. These K pairs are left out, and the mean is over M − 1.
    The pairs within a sample are `mean_distances(x, x, beta, own=0)`, and those of its slice x[k:l] with all of it
    `mean_distances(x[k:l], x, beta, own=k)`.

    Above eight dimensions, points nearer to each other than 1e-7 of their distance from the points' mean count as
    coincident.

    Args:
        x: (..., K, d) samples; leading axes are groups that do not meet.
        points: (..., M, d) samples, in the same groups.
        beta: β, in (0, 2).
        own: the index of the first row's own point, in [0, M − K]; None where x and the points are different samples.

    Returns:
        In the inputs' precision, but at least single precision.

    Raises:
        UsageError: for β outside (0, 2), shapes that do not match, no points (with `own`, fewer than 2), or an `own`
            that leaves rows without their point.
    """
    check_beta(beta)
    _check_points(x, points, own)
    if not torch.is_grad_enabled():
        x, points = x.detach(), points.detach()
    dtype = torch.promote_types(torch.promote_types(x.dtype, points.dtype), torch.float32)
    a, b = (v.to(dtype).reshape(-1, *v.shape[-2:]) for v in (x, points))
    if a.shape[2] <= DIRECT and a.shape[:2].numel() * b.shape[1] <= BLOCK**2:
        sums = _small_sums(a, b, beta)
    else:
        sums = _Sums.apply(a, b, beta, own, own == 0 and _same(x, points))  # type: ignore[no-untyped-call]
    return sums.reshape(x.shape[:-1]) / (points.shape[-2] - (own is not None))


def paired_distances(x: Tensor, y: Tensor, beta: float = 1.0) -> Tensor:
    """‖x_i − y_i‖^β for x and y (..., K, d), (..., K); the gradient of coincident points is 0.

    Raises:
        UsageError: for β outside (0, 2), or different shapes.
    """
    check_beta(beta)
    if x.shape != y.shape:
        raise UsageError(f"pairs need samples of the same shape, but these are {_shapes(x, y)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    distance2 = ((x.to(dtype) - y.to(dtype)) ** 2).sum(-1)
    coincident = distance2 <= torch.finfo(dtype).tiny
    return distance2.masked_fill(coincident, 1).pow(beta / 2).masked_fill(coincident, 0)


def check_beta(beta: float) -> None:
    """Raise UsageError for a power β outside (0, 2), where the energy distance may be 0 between different laws."""
    if not isinstance(beta, Real):
        raise UsageError(f"beta must be a number in (0, 2), but is of type {type(beta).__name__}")
    if not 0 < beta < 2:
        raise UsageError(f"beta must be in (0, 2), but is {beta:g}")


def _check_points(x: Tensor, points: Tensor, own: int | None) -> None:
    if x.ndim < 2 or x.shape[:-2] != points.shape[:-2] or x.shape[-1] != points.shape[-1]:
        raise UsageError(f"x and points must be (..., K, d) and (..., M, d), but are {_shapes(x, points)}")
    if 0 in (*x.shape, *points.shape):
        raise UsageError(f"x and points must not be empty, but are {_shapes(x, points)}")
    if own is None:
        return
    if points.shape[-2] < 2:
        raise UsageError("the distances within a sample need at least 2 points, but there is 1")
    if not 0 <= own <= points.shape[-2] - x.shape[-2]:
        raise UsageError(
            f"own must be in [0, {points.shape[-2] - x.shape[-2]}] for {x.shape[-2]} rows among {points.shape[-2]} "
            f"points, but is {own}"
        )


def _shapes(x: Tensor, y: Tensor) -> str:
    return f"{tuple(x.shape)} and {tuple(y.shape)}"


def _small_sums(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """s (G, K) by `torch.cdist`; coincident points, own ones among them, add neither value nor gradient."""
    with torch.autocast(x.device.type, enabled=False):
        distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    if beta == 1:
        return distance.sum(2)
    tiny = torch.finfo(distance.dtype).tiny
    return distance.clamp_min(tiny).pow(beta).where(distance != 0, 0).sum(2)


def _same(x: Tensor, points: Tensor) -> bool:
    """Whether both are views of the same numbers."""
    return x.data_ptr() == points.data_ptr() and (x.shape, x.stride()) == (points.shape, points.stride())


class _Sums(torch.autograd.Function):
    """s (G, K) of x (G, K, d) and y (G, M, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, beta: float, own: int | None, symmetric: bool) -> Tensor:
        wants_x, wants_y = ctx.needs_input_grad[:2]
        pairs = Pairs(x, y, beta, own)
        if symmetric:
            sums, grad_x = pairs.symmetric_sums(wants_x or wants_y)
            grad_y = grad_x
        else:
            sums, grad_x, grad_y = pairs.sums(wants_x, wants_y)
        ctx.beta, ctx.own = beta, own
        ctx.save_for_backward(*((x, y) if wants_y else (None, None)), grad_x, grad_y)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, grad_x, grad_y = ctx.saved_tensors
        wants_x, wants_y = ctx.needs_input_grad[:2]
        of_x = g[..., None] * grad_x if wants_x else None
        if not wants_y:
            return of_x, None, None, None, None
        if bool((g == g[:, :1]).all()):
            return of_x, g[:, :1, None] * grad_y, None, None, None
        return of_x, Pairs(x, y, ctx.beta, ctx.own).sums(False, True, g)[2], None, None, None


class Block(NamedTuple):
    """A range of groups, of x and of y."""

    groups: slice
    rows: slice
    columns: slice


class Pairs:
    """The pairs of x (G, K, d) and y (G, M, d), in blocks."""

    def __init__(self, x: Tensor, y: Tensor, beta: float, own: int | None) -> None:
        self.x, self.y, self.beta, self.own = x, y, beta, own
        self.space = Differences(x, y) if x.shape[2] <= DIRECT else Products(x, y)

    def blocks(self) -> Iterator[Block]:
        """All blocks, row by row: of several groups where these are small."""
        (G, K, _), M = self.x.shape, self.y.shape[1]
        size = BLOCK if self.x.device.type == "cpu" else DEVICE_BLOCK
        columns = min(M, size)
        rows = min(K, size if K == M else size**2 // columns)
        groups = max(1, size**2 // (rows * columns))
        for g in range(0, G, groups):
            for i in range(0, K, rows):
                for j in range(0, M, columns):
                    yield Block(slice(g, g + groups), slice(i, i + rows), slice(j, j + columns))

    def sums(
        self, wants_x: bool, wants_y: bool, g: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """s, β Σ_j W_ij (x_i − y_j), and −β Σ_i g_i W_ij (x_i − y_j) with g = 1 by default."""
        sums = self.x.new_zeros(self.x.shape[:2])
        grad_x = torch.zeros_like(self.x) if wants_x else None
        grad_y = torch.zeros_like(self.y) if wants_y else None
        for block in self.blocks():
            groups, rows, columns = block
            powers, distance2 = self.powers(block)
            sums[groups, rows] += powers.sum(2)
            if grad_x is None and grad_y is None:
                continue
            W = self.weights(powers, distance2)
            if g is not None:
                W *= g[groups, rows, None]
            of_rows, of_columns = self.space.moments(W, block, wants_x, wants_y)
            if grad_x is not None:
                grad_x[groups, rows] += self.beta * of_rows
            if grad_y is not None:
                grad_y[groups, columns] += self.beta * of_columns
        return sums, grad_x, grad_y

    def symmetric_sums(self, wants: bool) -> tuple[Tensor, Tensor | None]:
        """Of the pairs within x: s, and β Σ_j W_ij (x_i − x_j). Blocks below the diagonal are those above it."""
        sums = self.x.new_zeros(self.x.shape[:2])
        grad = torch.zeros_like(self.x) if wants else None
        for block in self.blocks():
            groups, rows, columns = block
            if columns.start < rows.start:
                continue
            above = columns.start > rows.start
            powers, distance2 = self.powers(block)
            sums[groups, rows] += powers.sum(2)
            if above:
                sums[groups, columns] += powers.sum(1)
            if grad is not None:
                of_rows, of_columns = self.space.moments(self.weights(powers, distance2), block, True, above)
                grad[groups, rows] += self.beta * of_rows
                if above:
                    grad[groups, columns] += self.beta * of_columns
        return sums, grad

    def powers(self, block: Block) -> tuple[Tensor, Tensor]:
        """d^β and d² of a block, 0 for own pairs, which so have no part in any sum."""
        own = None if self.own is None else self.own + block.rows.start - block.columns.start
        distance2 = self.space.squared(block, own)
        if own is not None:
            distance2.diagonal(own, 1, 2).zero_()
        return distance2.pow(self.beta / 2), distance2

    def weights(self, powers: Tensor, distance2: Tensor) -> Tensor:
        """W = d^(β−2), 0 for coincident points; overwrites both arguments."""
        return powers.div_(distance2.clamp_min_(torch.finfo(powers.dtype).tiny))


class Differences:
    """x_i − y_j, one coordinate at a time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = (v.movedim(2, 0).contiguous() for v in (x, y))

    def coordinates(self, block: Block) -> Iterator[Tensor]:
        """The d coordinates of a block's differences."""
        groups, rows, columns = block
        for x, y in zip(self.x[:, groups, rows, None], self.y[:, groups, None, columns], strict=True):
            yield x - y

    def squared(self, block: Block, own: int | None) -> Tensor:
        """‖x_i − y_j‖²."""
        coordinates = self.coordinates(block)
        distance2 = next(coordinates).square_()
        for difference in coordinates:
            distance2.addcmul_(difference, difference)
        return distance2

    def moments(self, W: Tensor, block: Block, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
        """Σ_j W_ij (x_i − y_j) and −Σ_i W_ij (x_i − y_j), those wanted; else 0."""
        of_rows, of_columns = [], []
        for difference in self.coordinates(block):
            difference *= W
            of_rows.append(difference.sum(2) if rows else _NOTHING)
            of_columns.append(-difference.sum(1) if columns else _NOTHING)
        return torch.stack(of_rows, -1), torch.stack(of_columns, -1)


class Products:
    """‖x_i − y_j‖² = (−2x_i, ‖x_i‖², 1) · (y_j, 1, ‖y_j‖²), about the mean of a group's points."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.original, self.centre = (x, y), y.mean(1, keepdim=True)
        self.left, self.right = _factors(x - self.centre, y - self.centre)

    def factors(self, block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A block's two factors; in double precision they are of the points as they were given."""
        groups, rows, columns = block
        if dtype == self.left.dtype:
            return self.left[groups, rows], self.right[groups, columns]
        x, y = self.original
        centre = self.centre[groups].to(dtype)
        return _factors(x[groups, rows].to(dtype) - centre, y[groups, columns].to(dtype) - centre)

    def squared(self, block: Block, own: int | None) -> Tensor:
        """‖x_i − y_j‖², in double precision where the block needs it; 0 for coincident points."""
        if self.left.dtype == torch.float32:
            left, right = self.factors(block, torch.float32)
            distance2 = _product(left, right.mT)
            if own is not None:
                distance2.diagonal(own, 1, 2).fill_(torch.inf)
            largest = left[..., -2].max() + right[..., -1].max()  # spares most blocks the matrix of the squares
            if bool(distance2.min() >= NEAR * largest) or not bool((distance2 < _squares(left, right, NEAR)).any()):
                return distance2
        left, right = self.factors(block, torch.float64)
        distance2 = _product(left, right.mT)
        return distance2.masked_fill_(distance2 < _squares(left, right, COINCIDENT), 0)

    def moments(self, W: Tensor, block: Block, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
        """Σ_j W_ij (x_i − y_j) and −Σ_i W_ij (x_i − y_j), those wanted; else 0."""
        left, right = self.factors(block, W.dtype)
        d = left.shape[2] - 2
        of_rows = of_columns = _NOTHING
        if rows:
            sums = _product(W, right)  # Σ W y, Σ W, Σ W ‖y‖²
            of_rows = -0.5 * sums[..., d : d + 1] * left[..., :d] - sums[..., :d]
        if columns:
            sums = _product(W.mT, left)  # −2 Σ W x, Σ W ‖x‖², Σ W
            of_columns = sums[..., d + 1 :] * right[..., :d] + 0.5 * sums[..., :d]
        return of_rows, of_columns


_NOTHING = torch.zeros(())


def _factors(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x2, y2 = ((v**2).sum(2, keepdim=True) for v in (x, y))
    return torch.cat([-2 * x, x2, torch.ones_like(x2)], 2), torch.cat([y, torch.ones_like(y2), y2], 2)


def _squares(left: Tensor, right: Tensor, share: float) -> Tensor:
    """A share of ‖x_i‖² + ‖y_j‖², of two factors."""
    return (left[..., -2:-1] + right[..., -1:].mT).mul_(share)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A product in its factors' own precision, within autocast, too."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)
