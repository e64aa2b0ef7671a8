"""What the repository's files say of each other."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vardistill

ROOT = Path(__file__).parents[1]
INTERNAL = {"cli", "files", "hub", "launch"}  # modules without a Python interface


def test_files_agree_on_the_version():
    version = metadata.version("vardistill")
    assert vardistill.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    releases = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == version


def requirements(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """Names of all distributions that `name[extras]` needs on this machine, as far as they are installed."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            child = canonicalize_name(requirement.name)
            yield child
            yield from requirements(child, frozenset(requirement.extras), seen)


@pytest.mark.parametrize("extra", ["", "test", "docs", "dev"])
def test_constraints_pin_all_that_is_installed(extra):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")}
    torchs_own = re.compile(r"nvidia-|cuda-|triton")
    needed = set(requirements("vardistill", frozenset({extra}), set())) - {"vardistill"}
    assert {name for name in needed if not torchs_own.match(name)} <= pinned


def test_the_reference_lists_every_public_module():
    page = (ROOT / "docs" / "api.md").read_text()
    modules = {name for _, name, _ in pkgutil.iter_modules(vardistill.__path__) if not name.startswith("_")}
    listed = set(re.findall(r"\bvardistill\.(\w+)", page))
    assert modules - listed == INTERNAL


@pytest.mark.parametrize("name", ["data.Labels", "problems.MoG40", "levels.LogNormal"])
def test_names_of_modules_load_when_they_are_first_used(name):
    subprocess.run([sys.executable, "-c", f"import vardistill as vd; vd.{name}"], check=True)
