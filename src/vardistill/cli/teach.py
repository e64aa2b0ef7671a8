"""`vardistill teach PRESET [--flags]`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vardistill.cli.arguments import parse, take_positional
from vardistill.cli.train import free_folder
from vardistill.config import TeachConfig
from vardistill.errors import UsageError, unknown
from vardistill.presets import TEACHERS

USAGE = "\n".join(
    [
        "usage: vardistill teach PRESET [--flags]        `vardistill teach PRESET --help` lists the flags",
        "",
        "presets:",
        *(f"  {name:<24}{preset.about}" for name, preset in TEACHERS.items()),
    ]
)


@dataclass(frozen=True)
class Arguments:
    """Fit a teacher denoiser."""

    out: Path | None = None
    """Run folder, new or empty; default: the first free runs/teacher-PRESET-NUMBER."""
    run: TeachConfig = field(default_factory=TeachConfig)


def main(arguments: list[str]) -> int:
    """Fit the teacher, and say where it is and how far its score is from the exact one."""
    if not arguments or arguments in (["--help"], ["-h"]):
        print(USAGE)
        return 0 if arguments else 2
    name, rest = take_positional(arguments)
    if name is None:
        raise UsageError("teach needs a preset before its flags; `vardistill teach --help` lists them")
    if name not in TEACHERS:
        raise unknown("preset", name, TEACHERS)
    about = "Fit a teacher denoiser by denoising score matching."
    parsed = parse(Arguments, rest, f"teach {name}", about, Arguments(run=TEACHERS[name].config))
    out = parsed.out or free_folder(f"teacher-{name}")

    from vardistill.cli.tables import print_teacher
    from vardistill.teach import teach

    teach(parsed.run, out)
    print_teacher(out)
    return 0
