"""The digits and their fixed split."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch

from vardistill.domains.points.problems import Digits
from vardistill.domains.points.problems.digits import pictures
from vardistill.errors import UsageError
from vardistill.metrics import energy_distance, precision_recall
from vardistill.metrics.mmd import gaussian_kernel


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(((x + 1) * 8).to(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def test_the_split_never_changes(digits: Digits) -> None:
    assert (tuple(digits.data.shape), tuple(digits.held_out.shape)) == ((1500, 64), (297, 64))
    assert (digest(digits.data), digest(digits.held_out)) == ("cca9c3c0c6f234e7", "160e2c14493b96e9")


def test_the_split_is_disjoint_and_complete(digits: Digits) -> None:
    """No two of the 1,797 pictures are equal, so sets of rows tell."""
    data, held_out, whole = ({tuple(x) for x in part.tolist()} for part in (digits.data, digits.held_out, pictures()))
    assert len(data) + len(held_out) == len(whole) == 1797
    assert not data & held_out
    assert data | held_out == whole


def test_values_are_grey_levels_in_minus_one_to_one(digits: Digits) -> None:
    assert (float(digits.data.min()), float(digits.data.max())) == (-1, 1)
    assert ((digits.data + 1) * 8 % 1 == 0).all()
    torch.testing.assert_close(digits.data_mean, digits.data.mean(0))
    variance = (digits.data - digits.data_mean).square().mean()
    assert digits.data_std == pytest.approx(float(variance.sqrt()), rel=1e-5)


def test_samples_are_training_pictures_with_replacement(digits: Digits) -> None:
    x = digits.sample(4000, torch.Generator().manual_seed(0))
    training = {tuple(row) for row in digits.data.tolist()}
    drawn = [tuple(row) for row in x.tolist()]
    assert set(drawn) <= training
    assert len(set(drawn)) < len(drawn)
    assert torch.equal(x, digits.sample(4000, torch.Generator().manual_seed(0)))


def test_there_is_no_density(digits: Digits) -> None:
    assert digits.denoiser is None
    assert digits.modes is None
    assert digits.image_shape == (8, 8)


def test_floor_of_log_mmd_is_the_closed_form(digits: Digits) -> None:
    """E k over draws with replacement is the mean over all pairs, i = j included."""
    k = gaussian_kernel(digits.bandwidths)(torch.cdist(digits.data, digits.data).double().square())
    r = digits.reference
    closed = float((2 / r.samples * (1 - k.mean())).log()) - 0.5 * r.log_mmd_std**2
    assert r.log_mmd == pytest.approx(closed, abs=4.5 * 0.0096)


def test_energy_distance_to_the_held_out_pictures_is_the_closed_form(digits: Digits) -> None:
    """2 E‖x − y‖ − E‖x − x′‖ − the held-out pairs', x and x′ drawn with replacement."""
    x, y, m = digits.data.double(), digits.held_out.double(), len(digits.held_out)
    within = torch.cdist(y, y).sum() / (m * (m - 1))
    exact = float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - within)
    h = digits.reference.held_out
    assert h is not None
    assert h.energy_distance == pytest.approx(exact, abs=1e-6)
    draws = digits.sample(3000, torch.Generator().manual_seed(2)).double()
    assert energy_distance(draws, y) == pytest.approx(exact, abs=4.5 * h.energy_distance_std * (10_000 / 3000) ** 0.5)


def test_precision_and_recall_of_training_pictures(digits: Digits) -> None:
    """The mean over the 5 disjoint sets of 297 of a permutation, seed 3: 4.5 standard errors of such a mean."""
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(3))
    sets = digits.data[order].split(297)[:5]
    precision, recall = torch.tensor([precision_recall(x, digits.held_out) for x in sets]).mean(0).tolist()
    h = digits.reference.held_out
    assert h is not None
    assert precision == pytest.approx(h.precision, abs=4.5 * h.precision_std * (33 / 5) ** 0.5)
    assert recall == pytest.approx(h.recall, abs=4.5 * h.recall_std * (33 / 5) ** 0.5)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    pictures.cache_clear()
    with pytest.raises(UsageError, match=r"^the digits come with scikit-learn: pip install 'vardistill\[digits\]'$"):
        Digits()
