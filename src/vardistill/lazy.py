"""Names that load when they are first used: reading a configuration, or a package's names, imports no torch."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Later:
    """A module that is imported when something of it is first used.

    An objective's configuration stands in one file with its loss; so this file names torch without loading it.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._name), name)
        setattr(self, name, value)
        return value


def attach(package: str) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package whose `__init__.py` imports its public names for type checkers alone.

    That block, under `if TYPE_CHECKING:`, is read from the source: names stand there once. Modules that it does not
    name load when they are asked for, too.
    """
    source = Path(str(sys.modules[package].__file__)).read_text("utf-8")
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in imports for alias in node.names}

    def load(name: str) -> Any:
        home = homes.get(name, package)
        if home != package and hasattr(module := importlib.import_module(home), name):
            return getattr(module, name)
        try:
            return importlib.import_module(f"{home}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{home}.{name}":
                raise
            raise AttributeError(f"module '{package}' has no attribute '{name}'") from None

    return load, sorted(homes)
