"""Devices by name."""

from __future__ import annotations

import torch

from vardistill.errors import UsageError

WITHOUT_DOUBLES = ("mps",)
"""Kinds of devices without double precision, in which metrics and the distances of near points are computed."""


def find_device(name: str, automatic: torch.device | None = None) -> torch.device:
    """The device of this name, for `auto` the `automatic` one.

    Args:
        name: of a device, or `auto`.
        automatic: by default the accelerator or, where there is none, the CPU; which is also taken in the place of a
            device without double precision.

    Raises:
        UsageError: for a device that does not exist, is neither the CPU nor an accelerator, or has no double precision.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        device = automatic or accelerator or torch.device("cpu")
        return torch.device("cpu") if device.type in WITHOUT_DOUBLES else device
    available = ", ".join(["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())])
    missing = UsageError(f"there is no device '{name}' here: choose auto or one of {available}")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise missing from error
    if device.type in WITHOUT_DOUBLES:
        raise UsageError(f"'{name}' has no double precision, which metrics need: choose auto or one of {available}")
    accelerated = accelerator is not None and device.type == accelerator.type
    if not accelerated and device not in (torch.device("cpu"), torch.device("cpu:0")):  # meta, cpu:1
        raise missing
    return device


def computes_in_bf16(precision: str, device: torch.device) -> bool:
    """Whether networks compute in bfloat16: where it is asked for, or with `auto` where the device is faster so.

    Processors without instructions for it emulate it, several times slower than single precision.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and bool(native)
