"""What the energy loss mean‖x − y‖ − ½ mean‖x − x′‖ and its gradient in x cost: `python benchmarks/energy.py`.

Ours against the plain expression, `torch.cdist` and geomloss (which also takes the mean within y). geomloss is for this
benchmark alone (`pip install geomloss`), and left out where it is missing. In a cell every method has a process of its
own; they take turns, so that what else slows the machine slows all, and on a CPU it is processor time that is told.
Cells that would need too much memory or time are not run; both are predicted.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import tyro
from measured import write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vardistill.objectives.energy import mean_distances

SIZES = (256, 1024, 4096, 16384, 65536)
DIMENSIONS = (2, 16, 64, 784, 3072)
FIGURES = ("forward", "forward and backward")


@dataclass(frozen=True)
class Arguments:
    """Energy loss: ours, plain, cdist, geomloss."""

    device: str = "cpu"
    threads: int = 1
    limit_gib: float = 8.0
    seconds: float = 25.0
    """The longest predicted evaluation that is made."""
    repeats: int = 9


def ours(x: Tensor, y: Tensor) -> Tensor:
    return mean_distances(x, y).mean() - 0.5 * mean_distances(x, x, own=0).mean()


def plain(x: Tensor, y: Tensor) -> Tensor:
    """The clamp keeps the gradient of the pairs i = i from being NaN."""

    def distances(a: Tensor, b: Tensor) -> Tensor:
        return ((a[:, None] - b[None]) ** 2).sum(-1).clamp_min(1e-30).sqrt()

    return distances(x, y).mean() - 0.5 * distances(x, x).sum() / (len(x) * (len(x) - 1))


def cdist(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).mean() - 0.5 * torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))


def geomloss(x: Tensor, y: Tensor) -> Tensor:
    from geomloss import SamplesLoss

    loss: Tensor = SamplesLoss("energy", backend="tensorized")(x, y)
    return loss


@dataclass(frozen=True)
class Method:
    """A loss, with rough figures of a forward and backward pass from which cells are left out."""

    loss: Callable[[Tensor, Tensor], Tensor]
    numbers: Callable[[int, int], float]
    """Single-precision numbers held at the peak."""
    nanoseconds: Callable[[int], float]
    """A pair, on one core, from the dimension."""


METHODS = {
    "ours": Method(ours, lambda K, d: 12 * K * (d + 2) + 2**21, lambda d: 4 + 0.1 * d),
    "plain": Method(plain, lambda K, d: 5 * K**2 * (d + 1), lambda d: 20 + 12 * d),
    "torch.cdist": Method(cdist, lambda K, d: 6 * K**2 + 8 * K * d, lambda d: 50 + 0.15 * d),
    "geomloss": Method(geomloss, lambda K, d: 8 * K**2 + 8 * K * d, lambda d: 90 + 0.25 * d),
}


def main(arguments: Arguments) -> None:
    """Run, print, and write results/energy.json."""
    names = [name for name in METHODS if name != "geomloss" or importlib.util.find_spec("geomloss")]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "geomloss"])
    rows: dict[str, dict[str, Any]] = {}
    table = Table("K", "d", *names, title=f"forward → forward and backward, memory; {arguments.device}")
    for d in DIMENSIONS:
        for K in SIZES:
            results = cell(names, K, d, arguments, context)
            rows[f"K={K}, d={d}"] = {"K": K, "d": d, "methods": results}
            table.add_row(str(K), str(d), *(entry(results[name]) for name in names))
            print(K, d, *(f"{name}: {entry(results[name])}" for name in names), sep="  ", flush=True)
    Console(width=160).print(table)
    name = "energy" if arguments.device == "cpu" else f"energy_{arguments.device}"
    facts = {"device": arguments.device, "limit, GiB": arguments.limit_gib, "longest evaluation, s": arguments.seconds}
    write_results(name, rows, arguments.threads, 1, **facts)


def cell(names: list[str], K: int, d: int, arguments: Arguments, context: Any) -> dict[str, dict[str, Any]]:
    """What each method took, or why it was left out."""
    found: dict[str, dict[str, Any]] = {name: left_out(METHODS[name], K, d, arguments) for name in names}
    pipes: dict[str, Connection] = {}
    for name in (name for name in names if not found[name]):
        pipes[name], end = context.Pipe()
        context.Process(target=work, args=(end, name, K, d, arguments), daemon=True).start()
        end.close()
    times: dict[str, dict[str, list[float]]] = {name: {figure: [] for figure in FIGURES} for name in pipes}
    for name, pipe in pipes.items():
        first, found[name]["memory, MiB"] = pipe.recv()
        found[name]["repeats"] = repeats = 1 if first > 2 else arguments.repeats
        if repeats == 1:
            times[name]["forward and backward"].append(first)
    for turn in range(arguments.repeats):
        for name, pipe in pipes.items():
            for figure in FIGURES:
                if len(times[name][figure]) < min(turn + 1, found[name]["repeats"]):
                    times[name][figure].append(ask(pipe, figure))
    for name, pipe in pipes.items():
        pipe.send(None)
        found[name] |= {f"{figure}, ms": statistics.median(times[name][figure]) * 1e3 for figure in FIGURES}
    return found


def left_out(method: Method, K: int, d: int, arguments: Arguments) -> dict[str, str]:
    """Empty for a method that is run."""
    if method.numbers(K, d) * 4 > arguments.limit_gib * 2**30:
        return {"left out": "does not fit"}
    accelerated = 1 if arguments.device == "cpu" else 50
    seconds = method.nanoseconds(d) * K**2 * 1e-9 / accelerated
    return {"left out": "too slow"} if seconds > arguments.seconds else {}


def ask(pipe: Connection, figure: str) -> float:
    pipe.send(figure)
    seconds: float = pipe.recv()
    return seconds


def work(pipe: Connection, name: str, K: int, d: int, arguments: Arguments) -> None:
    """A method's process: tells the time and memory of a first evaluation, then the time of those it is asked for."""
    torch.set_num_threads(arguments.threads)
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(K, d, generator=rng).to(arguments.device) for _ in range(2))
    x.requires_grad_()

    clock = time.process_time if arguments.device == "cpu" else time.perf_counter

    def seconds(figure: str, n: int = K) -> float:
        a = x.detach()[:n].requires_grad_()
        synchronise(arguments.device)
        start = clock()
        if figure == "forward":
            with torch.no_grad():
                METHODS[name].loss(a, y[:n])
        else:
            METHODS[name].loss(a, y[:n]).backward()
        synchronise(arguments.device)
        return clock() - start

    seconds("forward and backward", 16)  # loads libraries
    before = memory(arguments.device)
    first = seconds("forward and backward")
    pipe.send((first, (memory(arguments.device) - before) / 2**20))
    while (figure := pipe.recv()) is not None:
        pipe.send(seconds(figure))


def memory(device: str) -> float:
    """The most bytes that the process has held so far."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def entry(result: dict[str, Any]) -> str:
    """A cell of the table."""
    if "left out" in result:
        return str(result["left out"])
    forward, both = (result[f"{figure}, ms"] for figure in FIGURES)
    return f"{forward:.3g} → {both:.3g} ms, {result['memory, MiB']:.0f} MiB"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
