"""Collects the Python examples of the documentation: each page is one script, run in a folder of its own."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def enter_scratch(namespace: dict[str, Any]) -> None:
    namespace["__scratch__"] = tempfile.TemporaryDirectory(), os.getcwd()
    os.chdir(namespace["__scratch__"][0].name)


def leave_scratch(namespace: dict[str, Any]) -> None:
    scratch, before = namespace["__scratch__"]
    os.chdir(before)
    scratch.cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md"],
    setup=enter_scratch,
    teardown=leave_scratch,
).pytest()
