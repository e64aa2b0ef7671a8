"""Devices by name, and what `auto` is without Accelerate."""

from __future__ import annotations

import pytest
import torch

from vardistill.devices import best_device, find_device
from vardistill.errors import UsageError


def test_auto_is_the_accelerator_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert best_device("auto") == torch.device("meta")
    assert best_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # torch was built for one, but none is here
    assert best_device("auto") == torch.device("cpu")


def test_other_names_are_refused() -> None:
    assert find_device("auto") is None
    with pytest.raises(UsageError, match="there is no device 'cuda:99' here: choose auto or one of cpu"):
        best_device("cuda:99")
