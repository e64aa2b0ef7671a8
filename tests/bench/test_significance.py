"""Student's t, Welch's test, Holm's procedure and the marked row, by closed forms and tabulated values."""

from __future__ import annotations

import math
import random

import pytest

from vardistill.bench.significance import holm, incomplete_beta, loss, significantly_best, two_sided_t, welch

A = [30.02, 29.99, 30.11, 29.97, 30.01, 29.99]
B = [29.89, 29.93, 29.72, 29.98, 30.02, 29.98]


@pytest.mark.parametrize("t", [1e-6, 0.1, 1.0, 3.0, 50.0, -2.0])
def test_t_has_closed_forms(t):
    u = abs(t)
    assert two_sided_t(t, 1) == pytest.approx(1 - 2 * math.atan(u) / math.pi, rel=1e-9)
    assert two_sided_t(t, 2) == pytest.approx(1 - u / math.sqrt(2 + u * u), rel=1e-9)
    assert two_sided_t(t, 1e6) == pytest.approx(math.erfc(u / math.sqrt(2)), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(
    ("nu", "t", "p"), [(3, 3.182446, 0.05), (5, 4.032143, 0.01), (10, 2.228139, 0.05), (30, 3.645959, 0.001)]
)
def test_t_agrees_with_tables(nu, t, p):
    assert two_sided_t(t, nu) == pytest.approx(p, rel=2e-6)


def test_t_with_broken_degrees_of_freedom_is_the_integral_of_its_density():
    nu, t, n = 3.7, 1.3, 20_000
    scale = math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2))
    midpoints = [t * (i + 0.5) / n for i in range(n)]
    inside = 2 * t / n * sum(scale * (1 + u * u / nu) ** (-(nu + 1) / 2) for u in midpoints)
    assert two_sided_t(t, nu) == pytest.approx(1 - inside, abs=1e-8)


@pytest.mark.parametrize("x", [0.0, 0.1, 0.4, 0.6, 0.99, 1.0])
def test_incomplete_beta_with_whole_parameters_is_a_binomial_tail(x):
    tail = sum(math.comb(6, k) * x**k * (1 - x) ** (6 - k) for k in range(2, 7))
    assert incomplete_beta(2, 5, x) == pytest.approx(tail, abs=1e-14)


def test_welch_agrees_with_a_published_example():
    assert welch(A, B) == pytest.approx(0.09077, abs=5e-6)  # t = 1.959, ν = 7.03
    assert welch(B, A) == welch(A, B)
    assert welch([3 * v - 1 for v in A], [3 * v - 1 for v in B]) == pytest.approx(welch(A, B), rel=1e-9)


def test_welch_says_nothing_where_it_is_not_defined():
    assert welch([1.0], [2.0, 3.0]) == 1.0
    assert welch([1.0, 1.0], [2.0, 2.0]) == 1.0
    assert welch([1.0, 1.0], [2.0, 2.1]) < 0.05


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([0.04, 0.01]) == [True, True]  # plain Bonferroni would keep the first
    assert holm([0.06]) == [False]


def test_directions():
    assert loss(-3.0, "lower") < loss(-2.0, "lower")
    assert loss(40, "higher") < loss(39, "higher")
    assert loss(-0.1, "zero") < loss(0.2, "zero")


def test_the_best_is_marked_only_if_it_beats_every_other():
    clear = {"a": [1.0, 1.1, 0.9], "b": [2.0, 2.1, 1.9], "c": [3.0, 3.2, 3.1]}
    assert significantly_best(clear) == "a"
    assert significantly_best({**clear, "d": [1.0, 1.2, 1.0]}) is None
    assert significantly_best({"a": [1.0], "b": [2.0]}) is None
    assert significantly_best({"a": [1.0, 1.1]}) is None


def test_equal_rows_are_seldom_marked():
    """At most 5 % of benches: 2,000 of them exceed 140 marks with probability < 1e-4 (binomial); the seed is 0."""
    rng = random.Random(0)
    benches = ({row: [rng.gauss(0, 1) for _ in range(4)] for row in range(3)} for _ in range(2000))
    assert sum(significantly_best(bench) is not None for bench in benches) <= 140
