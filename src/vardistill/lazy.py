"""Names that load when they are first used: reading a configuration, or a package's names, imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
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


def attach(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package.

    Args:
        package: its name.
        modules: public names, parted by spaces, by the place below the package that has them: a module that defines
            them, or a package whose modules they are.
    """
    homes = {name: place for place, names in modules.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in homes:
            try:
                return importlib.import_module(f"{package}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{package}.{name}":
                    raise
                raise AttributeError(f"module '{package}' has no attribute '{name}'") from None
        place = f"{package}.{homes[name]}"
        home = importlib.import_module(place)
        return getattr(home, name) if hasattr(home, name) else importlib.import_module(f"{place}.{name}")

    return load, sorted({*homes, *(place for place, names in modules.items() if not names)})
