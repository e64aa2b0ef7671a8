"""Devices by name, and what `auto` is."""

from __future__ import annotations

import pytest
import torch

from vardistill import devices
from vardistill.devices import find_device
from vardistill.errors import UsageError


def test_auto_is_the_accelerator_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert find_device("auto") == torch.device("meta")
    assert find_device("auto", torch.device("cuda:1")) == torch.device("cuda:1")
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # torch was built for one, but none is here
    assert find_device("auto") == torch.device("cpu")


def test_devices_without_double_precision_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics, and distances of near points, are computed in double precision on the run's device."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert find_device("auto") == find_device("auto", torch.device("mps:0")) == torch.device("cpu")
    monkeypatch.setattr(devices, "WITHOUT_DOUBLES", ("meta",))
    with pytest.raises(UsageError, match="'meta' has no double precision, which metrics need: choose auto or one of c"):
        find_device("meta")


def test_other_names_are_refused() -> None:
    with pytest.raises(UsageError, match="there is no device 'cuda:99' here: choose auto or one of cpu"):
        find_device("cuda:99")


@pytest.mark.parametrize("name", ["meta", "cpu:1"])
def test_what_tensors_may_be_on_without_being_a_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"there is no device '{name}' here: choose auto or one of cpu"):
        find_device(name)
    assert find_device("cpu:0").type == "cpu"
