"""Benches: objectives × teachers × problems × seeds, run side by side under one budget, tabled and plotted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.bench.cells import Bench as Bench, Budget as Budget, Cell as Cell, grid as grid
    from vardistill.bench.named import BENCHES as BENCHES
    from vardistill.bench.page import write as write
    from vardistill.bench.results import Results as Results, collect as collect
    from vardistill.bench.running import run_bench as run_bench, run_cells as run_cells

__getattr__, __all__ = attach(__name__)
