"""How a run that trains ends, for a user of the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from vardistill.cli.main import named
from vardistill.launch import is_first
from vardistill.progress import phase

if TYPE_CHECKING:
    from vardistill.training.folder import RunFolder


def run_to_end(run: Callable[[], RunFolder], show: Callable[[RunFolder], None], resume: str) -> int:
    """Train and show the result, or say why there is none and that `resume` goes on; returns the exit code."""
    with phase("loading PyTorch", kept=False):
        import torch

        from vardistill.training.loop import Diverged, Interrupted

    torch.set_flush_denormal(True)  # dead units' moments decay into denormal numbers, which are slow
    try:
        folder = run()
    except Interrupted as stop:
        print(f"{stop}; go on with: {named(resume)}", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"vardistill: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_flush_denormal(False)
    if is_first():
        show(folder)
    return 0
