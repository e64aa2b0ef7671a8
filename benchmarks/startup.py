"""How long the command line takes to answer: `python benchmarks/startup.py`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from measured import write_results


def main() -> None:
    """Run, print, and write results/startup.json."""
    rows = {}
    for words in (["--help"], ["train", "--help"], ["list"], ["train", "mog40-vardiu", "--help"]):
        command = [sys.executable, "-m", "vardistill", *words]
        times = []
        for _ in range(10):
            start = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            times.append(time.perf_counter() - start)
        name = "vardistill " + " ".join(words)
        rows[name] = {"median, s": statistics.median(times), "slowest, s": max(times)}
        print(f"{name:<36} median {statistics.median(times):.3f} s, slowest of 10 {max(times):.3f} s")
    write_results("startup", rows, threads=1, jobs=1)


if __name__ == "__main__":
    main()
