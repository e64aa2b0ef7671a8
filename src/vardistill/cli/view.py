"""`vardistill view RUN`."""

from __future__ import annotations

import contextlib
import webbrowser
from dataclasses import dataclass
from pathlib import Path

from vardistill.cli.arguments import parse, take_positional
from vardistill.errors import UsageError, require

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

    from vardistill.reports.view import Server, load_pair

    with Server(load_pair(Path(run)), parsed.port) as server:
        print(f"{run} is shown at {server.url} until Ctrl-C", flush=True)
        if parsed.open:
            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0
