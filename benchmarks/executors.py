"""python -m benchmarks.executors: from how many workers on processes are faster than threads, on this machine.

Each round merges the same files with threads and with processes, one after the other, for 1, 2, 4, ... workers up to the
number of CPUs. The smallest number of workers at which processes win is the line that `running/choosing.py` should have.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import Model

_METHODS: dict[str, list[str]] = {"linear": [], "ties": ["--method", "ties", "-p", "density=0.5"]}
_SECONDS = re.compile(r" in ([\d.]+) s \(")
Key = tuple[str, int, str]


def main() -> int:
    arguments = _arguments()
    models = [Model(arguments.gigabytes, number).made(arguments.files) for number in range(3)]
    seconds: dict[Key, list[float]] = {}
    for _ in range(arguments.rounds):
        for method, workers, executor in _runs(arguments.workers):
            taken = _merged(models, method, workers, executor, arguments.files / "executors.safetensors")
            seconds.setdefault((method, workers, executor), []).append(taken)
    print("\n".join(table(seconds)))
    return 0


def _runs(most: int) -> Iterator[Key]:
    workers = 1
    while workers <= most:
        for method in _METHODS:
            for executor in ("threads", "processes"):
                yield method, workers, executor
        workers *= 2


def _merged(models: list[Path], method: str, workers: int, executor: str, out: Path) -> float:
    """Returns the seconds of one merge as it tells them: without its start, and without the import of torch."""
    base = ["--base", str(models[0])] if method != "linear" else []
    command = [
        sys.executable,
        "-m",
        "streammerge",
        "merge",
        *map(str, models[1:]),
        *base,
        *_METHODS[method],
        "-o",
        str(out),
    ]
    command += ["--workers", str(workers), "--executor", executor, "--memory", f"{256 * max(workers, 2)}MiB", "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = _SECONDS.search(done.stdout)
    if found is None:
        raise ValueError(f"no seconds in {done.stdout!r}")
    return float(found[1])


def table(seconds: dict[Key, list[float]]) -> list[str]:
    """Returns the lines of the report: medians in seconds, their ratio, and the line for each method."""
    lines = ["method  workers  threads  processes  threads/processes"]
    lead: dict[str, int] = {}
    for method, workers in dict.fromkeys((method, workers) for method, workers, _ in seconds):
        threads, processes = (statistics.median(seconds[method, workers, each]) for each in ("threads", "processes"))
        lines.append(f"{method:<6}  {workers:>7}  {threads:7.2f}  {processes:9.2f}  {threads / processes:17.2f}")
        if threads > processes:
            lead.setdefault(method, workers)
    for method in dict.fromkeys(method for method, _, _ in seconds):
        said = f"from {lead[method]} workers on" if method in lead else "at no number of workers here"
        lines.append(f"{method}: processes are faster {said}")
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, default=Path(__file__).parent / "files", help="where files are made")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of each model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="the most workers")
    arguments = parser.parse_args()
    arguments.files.mkdir(parents=True, exist_ok=True)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
