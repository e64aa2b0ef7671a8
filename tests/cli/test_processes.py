"""Commands under several processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def in_two_processes(words: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """The command in two gloo processes that know each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "vardistill", *words]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        told = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, *outputs)
        for process, outputs in zip(processes, told, strict=True)
    ]


def test_a_teacher_is_fitted_once(tmp_path: Path) -> None:
    """In one folder, with one line of metrics for each hundred steps and one checkpoint."""
    out = tmp_path / "teacher"
    small = ["--samples", "50", "--batch", "8", "--width", "8", "--device", "cpu"]
    main, other = in_two_processes(["teach", "mog40", "--steps", "300", *small, "--out", str(out)])
    assert (main.returncode, other.returncode) == (0, 0), main.stderr + other.stderr
    assert "relative score error" in main.stdout
    assert other.stdout == ""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 200, 300]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000300"]
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_folder_that_is_not_told_is_refused(tmp_path: Path) -> None:
    """The processes could not agree on the first that is free."""
    for told in in_two_processes(["teach", "mog40", "--steps", "3"]):
        assert told.returncode == 2
        assert told.stderr.strip() == (
            "vardistill: several processes need to be told their common run folder: give --out"
        )
