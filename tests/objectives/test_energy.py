"""Sums over pairs against the plain expression, closed forms, and double precision."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vardistill.errors import UsageError
from vardistill.objectives import energy
from vardistill.objectives.energy import mean_distances, paired_distances
from vardistill.processes import gather_with_gradient, rank

SIGMAS = 4.5
"""Of a normal estimate: a failure rate of 7e-6 a comparison."""

DIMENSIONS = [1, 2, 3, 5, 9, 64]
BETAS = [0.3, 1.0, 1.7]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7, into which the tests' samples do not divide."""
    monkeypatch.setattr(energy, "BLOCK", 7)


def plain(x: Tensor, y: Tensor, beta: float = 1.0, own: int | None = None) -> Tensor:
    """The mean over the dense matrix, in double precision; coincident points have distance and gradient 0."""
    distance2 = ((x[..., :, None, :].double() - y[..., None, :, :].double()) ** 2).sum(-1)
    counts = distance2 > 0
    if own is not None:
        counts.diagonal(own, -2, -1).fill_(False)
    powers = distance2.where(counts, 1).pow(beta / 2).where(counts, 0)
    return powers.sum(-1) / (y.shape[-2] - (own is not None))


def leaf(v: Tensor) -> Tensor:
    return v.detach().clone().requires_grad_()


def assert_near(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Relative to the norm of the whole."""
    a, b = a.detach().double(), b.detach().double()
    assert a.isfinite().all()
    assert float((a - b).norm()) <= tolerance * float(b.norm())


def assert_same_sums(
    x: Tensor, y: Tensor, beta: float, own: int | None, tolerance: float, g: Tensor | None = None
) -> None:
    """Values and gradients are the plain expression's; x and y may be one tensor."""
    g = torch.ones_like(x[..., 0]) if g is None else g
    leaves = [x] if x is y else [x, y]
    value, exact = mean_distances(x, y, beta, own), plain(x, y, beta, own)
    assert_near(value, exact, tolerance)
    gradients = torch.autograd.grad((value * g).sum(), leaves)
    for a, b in zip(gradients, torch.autograd.grad((exact * g).sum(), leaves), strict=True):
        assert_near(a, b, tolerance)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("groups", [(), (3,), (2, 3)])
def test_blocks_are_the_plain_expression(d: int, beta: float, groups: tuple[int, ...], rng: torch.Generator) -> None:
    points = leaf(torch.randn(*groups, 20, d, generator=rng, dtype=torch.float64))
    x = leaf(torch.randn(*groups, 17, d, generator=rng, dtype=torch.float64))
    own = leaf(points[..., 2:19, :])
    weights = torch.rand(*groups, 20, generator=rng, dtype=torch.float64)
    for g in (torch.ones_like(weights), weights):
        assert_same_sums(x, points, beta, None, 1e-12, g[..., :17])
        assert_same_sums(own, points, beta, 2, 1e-12, g[..., :17])
        assert_same_sums(points, points, beta, 0, 1e-12, g)


@pytest.mark.parametrize("d", [2, 16])
def test_many_small_groups_are_the_groups_one_by_one(d: int, rng: torch.Generator) -> None:
    """600 groups fill more than one block; their scales differ by orders."""
    scale = torch.logspace(-3, 3, 600)[:, None, None]
    x = leaf(scale * torch.randn(600, 30, d, generator=rng))
    value = mean_distances(x, x, own=0)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    for k in (0, 299, 599):
        one = leaf(x[k])
        alone = mean_distances(one, one, own=0)
        assert_near(value[k], alone, 1e-6)
        assert_near(gradient[k], torch.autograd.grad(alone.sum(), one)[0], 1e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("own", [None, 2])
@pytest.mark.parametrize("d", [2, 9])
def test_gradcheck(d: int, own: int | None, rng: torch.Generator) -> None:
    x, y = (leaf(torch.randn(2, n, d, generator=rng, dtype=torch.float64)) for n in (8, 10))
    assert torch.autograd.gradcheck(lambda x, y: mean_distances(x, y, 0.8, own), (x, y))
    assert torch.autograd.gradcheck(lambda x: mean_distances(x, x, 0.8, 0), (x,))
    assert torch.autograd.gradcheck(lambda x, y: paired_distances(x, y, 0.8), (x, y[:, :8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.01, 1.0, 1.99])
@pytest.mark.parametrize("d", [1, 5, 9, 64])
def test_coincident_points_add_nothing(d: int, beta: float, dtype: torch.dtype, rng: torch.Generator) -> None:
    distinct = torch.randn(40, d, generator=rng, dtype=dtype) + 3
    x, y = leaf(distinct[torch.arange(60) % 20]), leaf(distinct)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert_same_sums(x, y, beta, None, tolerance)
    assert_same_sums(x, x, beta, 0, tolerance)
    value = paired_distances(x, x.detach(), beta)
    assert torch.equal(value, torch.zeros(60, dtype=dtype))
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("d", [2, 9, 64])
def test_a_collapsed_sample_has_no_distances_and_no_gradient(d: int) -> None:
    x = leaf(torch.full((50, d), 0.3))
    value = mean_distances(x, x, 0.5, own=0)
    assert not value.any()
    assert not torch.autograd.grad(value.sum(), x)[0].any()


def clusters(d: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two of spread 0.01, 20 apart: half of all pairs are near."""
    which = torch.arange(150)[:, None] % 2 * 20.0
    return tuple(which + 0.01 * torch.randn(150, d, generator=rng) for _ in range(2))


def offset(d: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return tuple(1000 + torch.randn(150, d, generator=rng) for _ in range(2))


def near_pairs(d: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each x has a y at about 1e-4, amid a spread of 1."""
    x = torch.randn(150, d, generator=rng)
    return x, x + 1e-4 / math.sqrt(d) * torch.randn(150, d, generator=rng)


@pytest.mark.parametrize("beta", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("samples", [clusters, offset, near_pairs])
def test_single_precision_agrees_with_double(
    samples: Callable[[int, torch.Generator], tuple[Tensor, Tensor]], d: int, beta: float, rng: torch.Generator
) -> None:
    """In relative norm. The plain expression is of the same single-precision samples, in double."""
    x, y = map(leaf, samples(d, rng))
    assert_same_sums(x, y, beta, None, 1e-5)
    assert_same_sums(x, x, beta, 0, 1e-5)


@pytest.mark.parametrize("d", [2, 64])
def test_half_precision_is_computed_in_single_and_autocast_changes_nothing(d: int, rng: torch.Generator) -> None:
    x, y = (leaf(torch.randn(40, d, generator=rng)) for _ in range(2))
    value, half = mean_distances(x, y), mean_distances(x.bfloat16(), y.bfloat16())
    assert half.dtype == paired_distances(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    assert torch.equal(half, mean_distances(x.bfloat16().float(), y.bfloat16().float()))
    g = torch.rand(40, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mean_distances(x, y)
        gradients = torch.autograd.grad((inside * g).sum(), [x, y])
    assert torch.equal(inside, value)
    for a, b in zip(gradients, torch.autograd.grad((value * g).sum(), [x, y]), strict=True):
        assert torch.equal(a, b)


def test_detached_points_get_no_gradient_and_without_gradients_none_is_taken(rng: torch.Generator) -> None:
    x, y = leaf(torch.randn(20, 2, generator=rng)), torch.randn(30, 2, generator=rng)
    mean_distances(x, y).sum().backward()
    assert x.grad is not None
    assert_near(x.grad, torch.autograd.grad(plain(x, y).sum(), x)[0], 1e-6)
    with torch.no_grad():
        assert not mean_distances(x, y).requires_grad
    of_x, of_both = leaf(x), leaf(x)
    mean_distances(of_x, of_x.detach(), own=0).sum().backward()
    mean_distances(of_both, of_both, own=0).sum().backward()
    assert of_x.grad is not None
    assert of_both.grad is not None
    assert_near(2 * of_x.grad, of_both.grad, 1e-6)


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [v.numel() for v in tree_leaves(out) if isinstance(v, Tensor)]
        self.entries = max(self.entries, *made, 0)
        return out


@pytest.mark.parametrize(("K", "d"), [(100, 2), (500, 2), (500, 20)])
@pytest.mark.parametrize("constant", [True, False])
def test_no_tensor_is_larger_than_a_block_or_a_sample(
    K: int, d: int, constant: bool, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    monkeypatch.setattr(energy, "BLOCK", 32)
    x, y = (leaf(torch.randn(K, d, generator=rng)) for _ in range(2))
    g = torch.ones(K) if constant else torch.rand(K, generator=rng)
    with Largest() as largest:
        ((mean_distances(x, y) + mean_distances(x, x, own=0)) * g).sum().backward()
    assert 32**2 <= largest.entries <= max(32**2, K * (d + 2))


def mean_norm(tau: float, d: int, beta: float) -> float:
    """E‖v‖^β for v ~ N(0, τ² I_d)."""
    return (math.sqrt(2) * tau) ** beta * math.gamma((d + beta) / 2) / math.gamma(d / 2)


def mean_absolute(delta: float, tau: float) -> float:
    """E|v| for v ~ N(Δ, τ²)."""
    gauss = tau * math.sqrt(2 / math.pi) * math.exp(-(delta**2) / (2 * tau**2))
    return gauss + delta * math.erf(delta / (tau * math.sqrt(2)))


def assert_mean(estimate: Callable[[], Tensor], exact: float, repeats: int = 400) -> None:
    v = torch.stack([estimate() for _ in range(repeats)])
    error = float(v.std()) / math.sqrt(repeats)
    assert abs(float(v.mean()) - exact) < SIGMAS * error
    assert error < 0.02 * abs(exact)


def test_energy_distance_of_gaussians_in_one_dimension() -> None:
    """N(0.8, 1) and N(0, 0.5²). Seed 5; fails with probability 7e-6 under any other."""
    rng = torch.Generator().manual_seed(5)

    def estimate() -> Tensor:
        x = 0.8 + torch.randn(40, 1, generator=rng, dtype=torch.float64)
        y = 0.5 * torch.randn(30, 1, generator=rng, dtype=torch.float64)
        return 2 * mean_distances(x, y).mean() - mean_distances(x, x, own=0).mean() - mean_distances(y, y, own=0).mean()

    within = mean_norm(math.sqrt(2), 1, 1.0) + mean_norm(math.sqrt(0.5), 1, 1.0)
    assert_mean(estimate, 2 * mean_absolute(0.8, math.sqrt(1.25)) - within, repeats=4000)


@pytest.mark.parametrize("d", [2, 16])
@pytest.mark.parametrize("beta", BETAS)
def test_distances_of_gaussians(d: int, beta: float) -> None:
    """x ~ N(0, I), y ~ N(0, 1.5² I). Seed 6; three comparisons, each fails with probability 7e-6 under any other."""
    rng = torch.Generator().manual_seed(6)

    def x(n: int = 30) -> Tensor:
        return torch.randn(n, d, generator=rng, dtype=torch.float64)

    assert_mean(lambda: mean_distances(x(), 1.5 * x(20), beta).mean(), mean_norm(math.sqrt(3.25), d, beta))
    assert_mean(lambda: paired_distances(x(), 1.5 * x(), beta).mean(), mean_norm(math.sqrt(3.25), d, beta))
    assert_mean(lambda: mean_distances(v := x(), v, beta, 0).mean(), mean_norm(math.sqrt(2), d, beta))


@given(
    seed=st.integers(0, 1000),
    d=st.sampled_from([1, 3, 12]),
    beta=st.floats(0.1, 1.9),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
)
def test_invariant_under_rigid_motions_and_of_degree_beta(
    seed: int, d: int, beta: float, scale: float, shift: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=rng, dtype=torch.float64) for n in (9, 6))
    rotation = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64)).Q

    def moved(v: Tensor) -> Tensor:
        return scale * (v @ rotation + shift)

    expected = scale**beta * mean_distances(x, y, beta)
    torch.testing.assert_close(mean_distances(moved(x), moved(y), beta), expected, rtol=1e-8, atol=0)
    expected = scale**beta * mean_distances(x, x, beta, own=0)
    torch.testing.assert_close(mean_distances(moved(x), moved(x), beta, own=0), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("beta", [0.0, 2.0, -1.0, math.nan])
def test_beta_is_bounded(beta: float) -> None:
    x = torch.zeros(3, 2)
    for distances in (mean_distances, paired_distances):
        with pytest.raises(UsageError, match=rf"beta must be in \(0, 2\), but is {beta:g}"):
            distances(x, x, beta)


@pytest.mark.parametrize(
    ("x", "y", "own", "message"),
    [
        ((3,), (3,), None, r"must be \(\.\.\., K, d\)"),
        ((3, 2), (3, 1), None, r"but are \(3, 2\) and \(3, 1\)"),
        ((2, 3, 2), (3, 3, 2), None, r"but are \(2, 3, 2\) and \(3, 3, 2\)"),
        ((3, 2), (0, 2), None, "must not be empty"),
        ((1, 2), (1, 2), 0, "at least 2 points, but there is 1"),
        ((3, 2), (5, 2), 3, r"own must be in \[0, 2\] for 3 rows among 5 points, but is 3"),
        ((3, 2), (5, 2), -1, "but is -1"),
    ],
)
def test_shapes_that_do_not_match_are_refused(
    x: tuple[int, ...], y: tuple[int, ...], own: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        mean_distances(torch.zeros(x), torch.zeros(y), own=own)


def test_pairs_of_different_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"same shape, but these are \(3, 2\) and \(2, 2\)"):
        paired_distances(torch.zeros(3, 2), torch.zeros(2, 2))


def shared_sample() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(7)
    return torch.randn(12, 2, generator=rng).double(), torch.randn(12, 2, generator=rng).double()


def loss(x: Tensor, y: Tensor) -> Tensor:
    """Of this process's rows, against all processes' samples."""
    everyone = gather_with_gradient(x)
    within = mean_distances(x, everyone, own=rank() * len(x))
    return (mean_distances(x, gather_with_gradient(y)) - 0.5 * within).sum()


def one_of_two(folder: Path) -> None:
    """What each of two processes does with its half of the sample."""
    torch.distributed.init_process_group("gloo")
    half = slice(6 * rank(), 6 * rank() + 6)
    x, y = (leaf(v[half]) for v in shared_sample())
    loss(x, y).backward()
    torch.save((x.grad, y.grad), folder / f"{rank()}.pt")
    torch.distributed.destroy_process_group()


def two_processes(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for i in range(2):
        variables = {"WORLD_SIZE": "2", "RANK": str(i), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, str(folder)]
        yield subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True)


def test_two_processes_that_gather_have_the_gradient_of_one(tmp_path: Path) -> None:
    processes = list(two_processes(tmp_path))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    x, y = map(leaf, shared_sample())
    loss(x, y).backward()
    halves = [torch.load(tmp_path / f"{i}.pt") for i in range(2)]
    for k, v in enumerate((x, y)):
        torch.testing.assert_close(torch.cat([half[k] for half in halves]), v.grad, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("K", "d"), [(4, 2), (600, 2), (4, 16)])
def test_points_that_are_not_finite_have_no_distance(beta: float, K: int, d: int, rng: torch.Generator) -> None:
    """A student that blew up is not near."""
    x, y = torch.randn(2, K, d, generator=rng)
    x[1, 0] = math.nan
    for value in (mean_distances(x, y, beta), mean_distances(x, x, beta, own=0), paired_distances(x, y, beta)):
        assert value[1].isnan()
    assert paired_distances(x, y, beta)[0].isfinite()


def test_a_power_that_is_no_number() -> None:
    beta: Any = "1"
    with pytest.raises(UsageError, match=r"beta must be a number in \(0, 2\), but is of type str"):
        mean_distances(torch.zeros(2, 2), torch.zeros(2, 2), beta)
