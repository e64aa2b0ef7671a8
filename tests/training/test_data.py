"""Conditions and real samples: labels, stored sets, a teacher's own, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import small_runs
from vardistill.denoisers import GaussianMixture
from vardistill.diffusion.schedules import VE, VP, Schedule
from vardistill.errors import UsageError
from vardistill.objectives import VarFlow
from vardistill.runs.distill import distill
from vardistill.training.data import BLOCK, Labels, StoredSamples, check_samples, teacher_samples


class TestLabels:
    def test_they_have_their_frequencies(self, rng: torch.Generator) -> None:
        """χ² with two degrees of freedom exceeds 27.6 with probability exp(−13.8) = 1e-6; seed 0."""
        frequencies, n = torch.tensor([1.0, 0.0, 3.0, 6.0]), 20_000
        labels = Labels(frequencies)(n, rng)["labels"]
        assert (labels.shape, labels.dtype) == ((n,), torch.int64)
        counts = labels.bincount(minlength=4)
        assert counts[1] == 0
        expected = n * frequencies[[0, 2, 3]] / 10
        assert ((counts[[0, 2, 3]] - expected) ** 2 / expected).sum() < 27.6
        again = Labels(frequencies.double() / 10)(n, torch.Generator().manual_seed(0))["labels"]
        assert torch.equal(again, labels)

    @pytest.mark.parametrize(
        "frequencies",
        [[], [[1.0, 2.0]], [1.0, -0.1], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf], 1.0],
        ids=str,
    )
    def test_frequencies_that_are_none_are_refused(self, frequencies: Any) -> None:
        with pytest.raises(
            UsageError, match=r"frequencies must be \(K,\), finite, not negative and not all 0"
        ) as caught:
            Labels(torch.tensor(frequencies))
        assert "\n" not in str(caught.value)


class TestStoredSamplesWithLabels:
    LABELS = torch.tensor([2, 0, 2, 1, 2, 0, 2])

    @pytest.fixture
    def stored(self) -> StoredSamples:
        """Samples that tell their place and their label."""
        places = torch.arange(7.0)
        return StoredSamples(torch.stack([places, self.LABELS.float()], 1), self.LABELS)

    def test_each_draw_has_the_label_asked_for(self, stored: StoredSamples, rng: torch.Generator) -> None:
        """Every sample of a label is as frequent as the others: 7 counts within 4.9 standard deviations, seed 0."""
        asked = torch.arange(3).repeat(20_000)[torch.randperm(60_000, generator=rng)]
        drawn = stored(60_000, rng, labels=asked)
        assert torch.equal(drawn[:, 1].long(), asked)
        counts = drawn[:, 0].long().bincount(minlength=7)
        share = 1 / self.LABELS.bincount()[self.LABELS]
        assert ((counts - 20_000 * share).abs() <= 4.9 * (20_000 * share * (1 - share)).sqrt()).all()
        again = stored(5, torch.Generator().manual_seed(1), labels=asked[:5])
        assert torch.equal(again, stored(5, torch.Generator().manual_seed(1), labels=asked[:5]))

    def test_without_a_label_all_are_drawn_from(self, stored: StoredSamples, rng: torch.Generator) -> None:
        assert stored(500, rng)[:, 0].unique().tolist() == list(range(7))

    def test_its_copies_keep_the_labels(self, stored: StoredSamples, rng: torch.Generator) -> None:
        double = stored.to(torch.zeros((), dtype=torch.float64))
        assert (double.data.dtype, stored.data.dtype) == (torch.float64, torch.float32)
        asked = torch.tensor([1, 0, 2])
        assert torch.equal(double(3, rng, labels=asked)[:, 1].long(), asked)

    def test_a_set_without_labels_has_none_to_draw(self, rng: torch.Generator) -> None:
        with pytest.raises(UsageError, match="the data have no labels, but the generator is conditional"):
            StoredSamples(torch.zeros(3, 2))(2, rng, labels=torch.tensor([0, 1]))

    @pytest.mark.parametrize(
        ("labels", "match"),
        [
            (torch.tensor([0, 1]), r"labels must be 3 integers from 0, one a sample, but are \(2,\)"),
            (torch.zeros(3, 1, dtype=torch.int64), r"but are \(3, 1\)"),
            (torch.zeros(3), "labels must be 3 integers from 0"),
            (torch.tensor([0, -1, 1]), "labels must be 3 integers from 0"),
        ],
    )
    def test_labels_that_do_not_fit_are_refused(self, labels: Tensor, match: str) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            StoredSamples(torch.zeros(3, 2), labels)
        assert "\n" not in str(caught.value)


def test_a_label_without_samples_is_refused_where_it_is_drawn(rng: torch.Generator) -> None:
    stored = StoredSamples(torch.arange(6.0).view(3, 2), torch.tensor([0, 3, 2]))
    assert stored(2, rng, labels=torch.tensor([3, 0])).tolist() == [[2, 3], [0, 1]]
    for labels, match in (([0, 1], "label '1' has no samples"), ([5, 0], "labels must be 0 to 4, but hold 5")):
        with pytest.raises(UsageError, match=match):
            stored(2, rng, labels=torch.tensor(labels))


def test_a_stored_set_is_drawn_from_evenly_with_replacement(rng: torch.Generator) -> None:
    """Seed 0; each of 5 counts of 20,000 is within 4.9 standard deviations but for 1e-6."""
    data = torch.arange(10.0).view(5, 2)
    drawn = StoredSamples(data)(20_000, rng)
    rows, counts = drawn.unique(dim=0, return_counts=True)
    assert torch.equal(rows, data)
    assert ((counts - 4000).abs() < 4.9 * math.sqrt(20_000 * 0.2 * 0.8)).all()
    again = StoredSamples(data)(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (torch.zeros(0, 2), r"must be \(n, \*data\) with n at least 1, but has shape \(0, 2\)"),
        (torch.zeros(3, 0), r"but has shape \(3, 0\)"),
        (torch.zeros(4), r"but has shape \(4,\)"),
        (torch.tensor([[1.0, math.nan], [1.0, 2.0], [math.inf, 0.0]]), "2 of 3 samples hold NaN or infinity"),
    ],
)
def test_sets_that_are_none_are_refused(data: Tensor, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        StoredSamples(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", [VE(), VP()], ids=lambda s: type(s).__name__)
def test_a_teachers_samples_have_its_moments(schedule: Schedule, rng: torch.Generator) -> None:
    """Within what the sampler's 40 steps leave, 0.02, and 4.5 standard errors of 20,000: failure rate 4e-5, seed 0."""
    mean, n = torch.tensor([[0.5, -0.3, 0.2]], dtype=torch.float64), 20_000
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
    covariance = factor @ factor.T
    teacher = GaussianMixture(mean, covariances=covariance[None], schedule=schedule)
    assert n > 2 * BLOCK

    class Double:
        """A denoiser that is fed in double precision."""

        def __init__(self) -> None:
            self.schedule = schedule

        def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
            return teacher(x_t.double(), t.double()).to(x_t)

    x = teacher_samples(Double(), (3,), n, rng, steps=40).data.double()
    assert x.shape == (n, 3)
    spread = covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean[0]).abs() < 0.02 + 4.5 * spread / math.sqrt(n)).all()
    of_pairs = (spread[:, None] ** 2 * spread**2 + covariance**2).sqrt()
    assert ((x.T.cov() - covariance).abs() < 0.02 + 4.5 * of_pairs / math.sqrt(n)).all()


class OfLabels:
    """A denoiser whose answer is a point for every label."""

    schedule = VE()
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.points[labels]


def test_a_teachers_samples_keep_their_labels(rng: torch.Generator) -> None:
    """In every block."""
    n, labels = BLOCK + 100, Labels(torch.tensor([1.0, 2.0, 1.0]))
    stored = teacher_samples(OfLabels(), (2,), n, rng, steps=2, conditions=labels)
    assert stored.labels is not None
    assert stored.labels.shape == (n,)
    torch.testing.assert_close(stored.data, OfLabels.points[stored.labels])
    assert stored.labels.unique().tolist() == stored.labels[BLOCK:].unique().tolist() == [0, 1, 2]
    asked = torch.tensor([2, 0, 1, 1])
    torch.testing.assert_close(stored(4, rng, labels=asked), OfLabels.points[asked])


class Counting:
    """A denoiser that keeps how many rows it is given."""

    schedule = VE()

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        self.rows.append(len(x_t))
        return torch.zeros_like(x_t)


@pytest.mark.parametrize(("shape", "block"), [((2,), 8192), ((64,), 8192), ((3, 32, 32), 170), ((4, 512, 512), 1)])
def test_large_samples_are_drawn_few_at_once(shape: tuple[int, ...], block: int, rng: torch.Generator) -> None:
    """At most 2¹⁹ values."""
    teacher = Counting()
    assert len(teacher_samples(teacher, shape, block + 1, rng, steps=1).data) == block + 1
    assert set(teacher.rows) == {block, 1}


def test_too_few_samples_for_their_labels_are_refused_before_they_are_drawn(rng: torch.Generator) -> None:
    teacher, labels = Counting(), Labels(torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(
        UsageError, match="none of the teacher's 2 samples has the label .: raise real_samples"
    ) as caught:
        teacher_samples(teacher, (2,), 2, rng, conditions=labels)
    assert "\n" not in str(caught.value)
    assert teacher.rows == []
    assert len(teacher_samples(teacher, (2,), 100, rng, steps=1, conditions=labels).data) == 100


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        (lambda n, rng: torch.zeros(n, 3), r"data have shape \(3,\), samples \(2,\)"),
        (lambda n, rng: torch.zeros(1, 2), "as many samples as they are asked for, but of 2 gave 1"),
        (lambda n, rng: torch.full((n, 2), math.nan), "the data hold NaN or infinity"),
    ],
)
def test_samples_that_do_not_fit_the_generator_are_refused(samples: Callable[..., Tensor], match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        check_samples(samples, (2,), torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_functions_that_do_not_take_the_conditions_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the data are no function of \(n, rng, labels\): .*labels") as caught:
        check_samples(lambda n, rng: torch.zeros(n, 2), (2,), torch.device("cpu"), Labels(torch.ones(2)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [torch.zeros(5, 3), torch.full((5, 2), math.inf), None])
def test_runs_are_refused_before_a_step(data: Any) -> None:
    with pytest.raises(UsageError, match="data"):
        distill(small_runs.generator(), objective=VarFlow(), data=data, training=small_runs.config(steps=1))


def test_data_for_an_objective_that_needs_none_are_left_alone() -> None:
    """The run is the same, whatever they are."""
    runs = [
        distill(
            small_runs.generator(), objective=small_runs.objective(), training=small_runs.config(steps=2), data=data
        )
        for data in (None, torch.zeros(5, 9))
    ]
    for p, q in zip(*(run.generator.parameters() for run in runs), strict=True):
        assert torch.equal(p, q)
