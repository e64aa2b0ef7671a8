"""Students that were saved in a folder."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TypeVar

from vardistill.errors import UsageError, first_line
from vardistill.students.hub import SafeHubMixin
from vardistill.students.student import Student

S = TypeVar("S", bound=Student)


def load_student(path: Path, kind: type[S]) -> S:
    """The student saved in the folder `path`, in evaluation mode.

    Args:
        path: with `model.safetensors` and `config.json`.
        kind: its class.

    Raises:
        UsageError: where it is truncated or foreign, or a link that leaves its folder.
    """
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise UsageError(f"{path} leads out of its run folder: refused")
    try:
        assert issubclass(kind, SafeHubMixin)
        with contextlib.redirect_stdout(io.StringIO()):  # the hub's mixin prints, and stdout may be JSON
            student: S = kind.from_pretrained(path)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"the generator in {path} is truncated or not one of vardistill's: {first_line(error)}"
        ) from error
    return student.eval()
