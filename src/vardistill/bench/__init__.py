"""Benches: objectives × teachers × problems × seeds, run side by side under one budget, tabled and plotted."""

from vardistill.bench.cells import Bench, Budget, Cell, grid
from vardistill.bench.named import BENCHES
from vardistill.bench.results import Results, collect, write
from vardistill.bench.running import run_bench, run_cells

__all__ = ["BENCHES", "Bench", "Budget", "Cell", "Results", "collect", "grid", "run_bench", "run_cells", "write"]
