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
