"""Devices by name."""

from __future__ import annotations

import torch

from vardistill.errors import UsageError


def find_device(name: str) -> torch.device | None:
    """The device of this name, None for `auto`; raises UsageError where it does not exist."""
    if name == "auto":
        return None
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UsageError(f"there is no device '{name}' here: choose auto or one of {', '.join(available)}") from error
    return device


def best_device(name: str) -> torch.device:
    """The device of this name, for `auto` the accelerator or, where there is none, the CPU.

    Raises:
        UsageError: where it does not exist.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return find_device(name) or accelerator or torch.device("cpu")
