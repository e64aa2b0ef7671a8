"""`vardistill COMMAND`: finds the command, and tells a user's mistakes in one line."""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from vardistill._version import __version__
from vardistill.errors import UsageError, first_line, is_out_of_memory, unknown
from vardistill.files import reason
from vardistill.progress import columns

COMMANDS = {
    "demo": "distil MoG-40 with VarDiU in minutes; ends with a table and report.html",
    "train": "train a preset, a configuration file, or a run that was interrupted",
    "teach": "fit a teacher denoiser to data",
    "sample": "draw samples of a run's generator as .npz or .png",
    "evaluate": "measure a run's generator against its problem",
    "export": "write a run's generator for diffusers or as an ONNX file",
    "view": "look at a student of pictures beside its teacher in the browser",
    "bench": "compare objectives, teachers and posteriors side by side, over seeds, under one budget",
    "report": "write a run's or a bench's report.html anew",
    "list": "presets, benches, objectives, problems, teachers, posteriors, ...",
}

FULL = (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))
"""Of a disk or a quota that is full, read-only or broken."""


def entries(rows: Mapping[str, str]) -> list[str]:
    """Lines of names and what they are, within the terminal."""
    lines, width = [], max(map(len, rows)) + 4
    for name, about in rows.items():
        first, *others = textwrap.wrap(about, max(columns() - width, 20))
        lines += [f"  {name:<{width - 2}}{first}", *(" " * width + other for other in others)]
    return lines


HELP = "\n".join(
    [
        "usage: vardistill COMMAND ...",
        "",
        "Distil diffusion models into generators of one or a few steps.",
        "",
        *entries(COMMANDS),
        "",
        "`vardistill COMMAND --help` tells a command's flags, `vardistill --version` the",
        "version.",
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 diverged, 2 a user's mistake, 130 interrupted."""
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere  # None where they are closed
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # what an encoding other than UTF-8 lacks becomes a question mark
                stream.reconfigure(errors="replace")
        os.environ["MPLBACKEND"] = "agg"  # figures are files, whatever windows a notebook or a shell wants
        code = run(list(sys.argv[1:] if argv is None else argv))
        try:
            sys.stdout.flush()
        except OSError as error:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # else Python tries again, and tells of it
            if not isinstance(error, BrokenPipeError):
                print(f"vardistill: cannot write the output: {reason(error)}", file=sys.stderr)
                code = 2
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run a command and return its exit code."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(HELP)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(__version__)
            return 0
        check_here()
        return _run_command(argv[0], argv[1:])
    except SystemExit as stop:  # after a help
        return int(stop.code or 0)
    except UsageError as error:
        print(named(f"vardistill: {error}"), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "take a smaller batch, smaller networks or fewer samples"
        print(f"vardistill: there is not enough memory, {remedy}: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vardistill: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"vardistill: cannot write: {reason(error)}", file=sys.stderr)
        return 2


def check_here() -> None:
    """Raise UsageError where the folder that the user is in was removed: no path means anything there."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the folder that this is started in is gone: change to another") from error


def named(text: str) -> str:
    """The text, with commands as this user has to type them."""
    return re.sub(rf"\bvardistill (?=(?:{'|'.join(COMMANDS)})\b)", f"{program()} ", text)


def program() -> str:
    """What starts this program: its name where the shell finds it, else the path that was typed."""
    typed = Path(sys.argv[0])
    if typed.name == "__main__.py":
        return f"{_short(sys.executable)} -m vardistill"
    found = shutil.which("vardistill")
    if typed.name != "vardistill" or (found is not None and Path(found).resolve() == typed.resolve()):
        return "vardistill"
    return _short(str(typed))


def _short(path: str) -> str:
    try:
        return min(path, os.path.relpath(path), key=len)
    except (OSError, ValueError):  # of a folder that is gone, of another drive
        return path


def _run_command(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    return int(importlib.import_module(f"vardistill.cli.{name}").main(arguments))
