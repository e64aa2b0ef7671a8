"""Which operators a piece of code calls."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCounter(TorchDispatchMode):
    """Counts the calls of an operator, `aten.amax` for example, in its `with` block.

    Attributes:
        count: of the calls.
        names: of all operators called, in order.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.names: list[str] = []

    @property
    def count(self) -> int:
        return sum(name == self.name or name.startswith(f"{self.name}.") for name in self.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
