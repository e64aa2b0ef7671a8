"""What the environment tells of processes that were launched together. Importing this module imports no torch."""

from __future__ import annotations

import os

from vardistill.errors import UsageError


def launched() -> int:
    """How many processes were launched together, as torchrun and `accelerate launch` tell.

    Raises:
        UsageError: where several are told of, but not which of them this is, or where they meet.
    """
    told = os.environ.get("WORLD_SIZE", "1")
    several = _number("WORLD_SIZE")
    places = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if several is None or several < 1 or (several > 1 and (places or _number("RANK") not in range(several))):
        lacks = f"no {places[0]}" if places else f"with RANK={os.environ['RANK']}"
        raise UsageError(
            f"WORLD_SIZE={told} is in the environment, but {lacks}: unset it for one process, or start several by "
            "torchrun"
        )
    return several


def is_first() -> bool:
    """Whether this process is the first of them, or alone: then a RANK is left over and tells nothing."""
    return (_number("WORLD_SIZE") or 1) == 1 or _number("RANK") == 0


def _number(name: str) -> int | None:
    """What a variable holds, 1 or rank 0 where it is not set; None for no number."""
    text = os.environ.get(name, "1" if name == "WORLD_SIZE" else "0")
    return int(text) if text.isdecimal() else None
