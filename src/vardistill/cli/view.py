"""`vardistill view RUN`."""

from __future__ import annotations

import contextlib
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vardistill.cli.arguments import parse, take_positional
from vardistill.errors import UsageError, require
from vardistill.progress import phase

if TYPE_CHECKING:
    from vardistill.diffusion import Denoiser
    from vardistill.reports.view import Pair
    from vardistill.runs.config import Config
    from vardistill.students import NetworkStudent, Student
    from vardistill.training.folder import RunFolder

ABOUT = "Look at a student of pictures beside its teacher in the browser, from the same noise."


@dataclass(frozen=True)
class Arguments:
    """Look at a student of pictures beside its teacher in the browser.

    Raises:
        UsageError: for a port out of range.
    """

    port: int = 8000
    """Where the page is served, on this machine only; 0 for any port that is free."""
    open: bool = True
    """Open the page in the browser."""

    def __post_init__(self) -> None:
        require("port", self.port, self.port == 0 or 1024 <= self.port <= 65535, "0 or from 1024 to 65535")


def main(arguments: list[str]) -> int:
    """Serve the page until Ctrl-C."""
    run, rest = take_positional(arguments)
    parsed = parse(Arguments, rest, "view RUN", ABOUT)
    if run is None:
        raise UsageError("view needs a run folder before its flags: vardistill view RUN")

    with phase("loading student and teacher", kept=False):
        from vardistill.reports.view import Server

        pair = load_pair(Path(run))
    with Server(pair, parsed.port) as server:
        print(f"{run} is shown at {server.url} until Ctrl-C", flush=True)
        if parsed.open:
            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def load_pair(run: Path) -> Pair:
    """The student of a finished run on pictures and, where it still can be loaded, its teacher.

    Raises:
        UsageError: where the folder is not such a run.
    """
    from vardistill.domains.points.config import PointsConfig
    from vardistill.domains.text.config import TextConfig
    from vardistill.reports.view import Pair, Wish
    from vardistill.runs.experiment import load_run
    from vardistill.students import NetworkStudent

    folder, config, student = load_run(run)
    domain = None if config is None else config.domain
    if isinstance(domain, PointsConfig) or not isinstance(student, NetworkStudent):
        raise UsageError(f"{run} is a run on points: `vardistill view` shows pictures")
    if isinstance(domain, TextConfig):
        assert config is not None
        pair = text_pair(config, folder, student)
        pair.pictures(Wish(count=1, steps=1))
        return pair
    name, numbers = folder.path.resolve().name, tuple(map(str, range(student.classes)))
    source = str(folder.teacher) if domain is None else domain.teacher or str(folder.teacher)
    try:
        if config is None:
            raise UsageError("of a run in Python: its own code alone has it")
        teacher, names = load_teacher(config, run, student)
        pair = Pair(name, student, teacher, source, names or numbers)
    except UsageError as error:
        pair = Pair(name, student, None, str(error), numbers)
    pair.pictures(Wish(count=1, steps=1))  # a network's first evaluation is slow
    return pair


def text_pair(config: Config, folder: RunFolder, student: NetworkStudent) -> Pair:
    """The same of a run on text to image, by prompts."""
    from vardistill.domains.text.parts import Text
    from vardistill.reports.view import Pair, Words
    from vardistill.runs.experiment import load_domain

    domain = load_domain(config, folder)
    assert isinstance(domain, Text)
    student.to(domain.device)

    def under(prompt: str, guidance: float) -> Denoiser:
        return domain.under(student, prompt, guidance)

    words = Words(under, domain.pictures, domain.prompts.texts, domain.config.guidance)
    return Pair(folder.path.resolve().name, student, domain.guided, domain.config.teacher, (), words)


def load_teacher(config: Config, run: Path, student: Student) -> tuple[Denoiser, tuple[str, ...]]:
    """The teacher with its guidance, and the names of the classes, () where no data tell them."""
    from vardistill.domains.pictures.parts import Pictures
    from vardistill.runs.experiment import load_domain
    from vardistill.training.folder import RunFolder

    domain = load_domain(config, RunFolder(run))
    assert isinstance(domain, Pictures)
    student.to(domain.device)
    ours, theirs = (student.data_shape, student.classes), (domain.student.data_shape, domain.classes)
    if ours != theirs:
        raise UsageError(f"the teacher has other shapes or classes than the student: {theirs}, not {ours}")
    names = domain.data.class_names if domain.data is not None else ()
    return domain.guided, names if len(names) == student.classes else ()
