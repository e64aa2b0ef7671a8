"""What two processes share, by gloo; `test_processes.py` itself is the script that each of them runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from vardistill import processes

PATIENCE = timedelta(seconds=2)
"""The group's own, which what one process does alone may exceed."""


def together() -> None:
    dist.init_process_group("gloo", timeout=PATIENCE)
    rank = processes.rank()
    waits_for_the_first(rank)
    hears_of_its_end(rank)
    is_alone_within(rank)
    has_the_mean(rank)
    gathers_with_the_gradient_of_all_losses(rank)
    dist.barrier()
    dist.destroy_process_group()


def waits_for_the_first(rank: int) -> None:
    began = time.monotonic()

    def work() -> str:
        time.sleep(2 * PATIENCE.total_seconds())
        return "done"

    assert processes.on_main(work) == ("done" if rank == 0 else None)
    assert time.monotonic() - began > PATIENCE.total_seconds()


def hears_of_its_end(rank: int) -> None:
    def work() -> None:
        raise ValueError("no such thing")

    try:
        processes.on_main(work)
    except (ValueError, RuntimeError) as error:
        told = f"{type(error).__name__}: {error}"
    expected = (
        "ValueError: no such thing",
        "RuntimeError: the first process failed at what it did alone: see what it said",
    )
    assert told == expected[rank]
    assert processes.on_main(lambda: 3) == (3 if rank == 0 else None)  # both go on together


def is_alone_within(rank: int) -> None:
    """What gathers in training does not wait there."""
    v = torch.ones(2)
    seen = processes.on_main(lambda: (len(processes.gather(v)), processes.rank()))
    assert seen == ((2, 0) if rank == 0 else None)
    assert len(processes.gather(v)) == 4


def has_the_mean(rank: int) -> None:
    """Of tensors of several types, in place."""
    half, double = torch.full((3, 2), 1.0 + rank), torch.full((4,), 2.0 * rank, dtype=torch.float64)
    processes.synchronise([half, double], "mean")
    assert torch.equal(half, torch.full((3, 2), 1.5))
    assert torch.equal(double, torch.ones(4, dtype=torch.float64))
    first = torch.full((2,), float(rank))
    processes.synchronise([first], "first")
    assert torch.equal(first, torch.zeros(2))


def gathers_with_the_gradient_of_all_losses(rank: int) -> None:
    """L_p = (p + 1) Σ_i c_i x_i of all processes' x: the gradient in an own x_i is (1 + 2) c_i."""
    own = torch.tensor([[1.0 + rank], [3.0 + rank]], requires_grad=True)
    x = processes.gather_with_gradient(own)
    assert x.flatten().tolist() == [1, 3, 2, 4]
    c = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    ((rank + 1) * (c * x).sum()).backward()
    assert own.grad is not None
    assert torch.equal(own.grad, 3 * c[2 * rank : 2 * rank + 2])


def test_what_two_processes_share() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-W", "error::FutureWarning", __file__]
    started = [
        subprocess.Popen(command, env=common | {"RANK": str(i)}, stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()


def test_one_process_is_alone() -> None:
    assert processes.on_main(lambda: 7) == 7
    v = torch.ones(2, requires_grad=True)
    assert processes.gather_with_gradient(v) is v
    assert not processes.gather(v).requires_grad


if __name__ == "__main__":
    together()
