"""Phases: a line where they are kept, one that goes away where not, and nothing of work that failed."""

from __future__ import annotations

import io
import sys

import pytest

from vardistill.progress import bar, clock, phase


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("stderr", [Terminal, io.StringIO])
def test_a_phase_leaves_its_line_where_it_is_kept_and_succeeds(
    stderr: type[io.StringIO], fails: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr())
    try:
        with phase("measuring", kept):
            during = sys.stderr.getvalue()  # type: ignore[attr-defined]
            if fails:
                raise ValueError
    except ValueError:
        pass
    left = sys.stderr.getvalue().split("\033[K")[-1]  # type: ignore[attr-defined]
    assert during == ("measuring ..." if stderr is Terminal else "")
    assert left == ("measuring: 0.0 s\n" if kept and not fails else "")


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with phase("measuring"):
        assert list(bar(range(3), unit="steps")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0:00"), (59.7, "1:00"), (247, "4:07"), (3765, "1:02:45"), (float("inf"), "?")]
)
def test_a_clock(seconds: float, told: str) -> None:
    assert clock(seconds) == told
