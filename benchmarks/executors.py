"""python -m benchmarks.executors: from how many workers on processes are faster than threads, on this machine.

Each round merges the same files with threads and with processes, one after the other, for 1, 2, 4, ... workers up to the
number of CPUs. The smallest number of workers at which processes win is the line that `running/choosing.py` should have.

With --emulated, two CPUs are enough for any number of workers: see `emulation.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.files import Model

_METHODS: dict[str, list[str]] = {"linear": [], "ties": ["--method", "ties", "-p", "density=0.5"]}
_SECONDS = re.compile(r" in ([\d.]+) s \(")
Key = tuple[str, int, str]


def main() -> int:
    arguments = _arguments()
    if arguments.emulated:
        print("\n".join(emulated(arguments.files, arguments.seconds, arguments.counts, arguments.rounds)))
        return 0
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


_CALIBRATED = {"linear large": 0.5, "linear small": 0.5, "ties large": 0.5, "ties small": 0.05}
"""Gigabytes of each model whose real merge tells how long the work without the lock takes."""


def emulated(files: Path, seconds: float, counts: str, rounds: int) -> list[str]:
    """Returns the lines of the report of emulated merges, whose size is such that one worker takes ``seconds``."""
    lines = ["method  tensors  workers  threads GB/s  processes GB/s  threads/processes  start s  pays from GB read"]
    for name, gigabytes in _CALIBRATED.items():
        method, shape = name.split()
        same = [str(files), "--method", method, "--shape", shape]
        whole, small = (
            _median(_emulation([*same, "--gigabytes", str(gigabytes), "--rounds", "2", *more]))["1 threads"]
            for more in (["--whole"], [])
        )
        wait = (whole["seconds"] - small["seconds"]) / whole["elems"] * 1e9
        size = gigabytes * seconds / whole["seconds"]
        more = ["--gigabytes", f"{size:.3g}", "--rounds", str(rounds), "--nanoseconds", f"{wait:.4f}"]
        found = _median(_emulation([*same, *more, "--workers", counts, "--executors", "threads,processes"]))
        share = small["seconds"] / whole["seconds"]
        lines.append(f"{name}: {share:.0%} of a worker's time is Python; with {wait:.2f} ns to wait for each element")
        lines += _rows(method, shape, found, float(f"{size:.3g}") * (2 if method == "linear" else 3), share)
    lines.append("(cpu): the workers' Python needs more than 1.6 CPUs, so processes would be faster on more CPUs than two")
    return lines


def _emulation(arguments: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.emulation", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _median(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the medians of each number of workers and executor. ``start``: by how much the first merge took longer."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(f"{run['workers']} {run['executor']}", []).append(run)
    made = {}
    for name, (first, *later) in groups.items():
        made[name] = {key: statistics.median(run[key] for run in later) for key in ("seconds", "elems")}
        made[name]["start"] = first["seconds"] - made[name]["seconds"]
    return made


def _rows(method: str, shape: str, found: dict[str, dict[str, float]], read: float, share: float) -> Iterator[str]:
    """Yields a line for each number of workers. ``read``: gigabytes that a merge reads. ``share``: of Python in a worker's
    time."""
    for workers in dict.fromkeys(name.split()[0] for name in found):
        threads, processes = (found[f"{workers} {each}"] for each in ("threads", "processes"))
        saved = (threads["seconds"] - processes["seconds"]) / read
        start = processes["start"] - threads["start"]
        pays = f"{start / saved:.1f}" if saved > 0 else "never"
        yield (
            f"{method:<6}  {shape:<7}  {workers:>7}  {read / threads['seconds']:12.2f}  {read / processes['seconds']:14.2f}"
            f"  {threads['seconds'] / processes['seconds']:17.2f}  {start:7.1f}  {pays:>17}"
            + "  (cpu)"
            * (int(workers) * share > 1.6)
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, default=Path(__file__).parent / "files", help="where files are made")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of each model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--emulated", action="store_true", help="waits in place of kernels, reads and writes")
    parser.add_argument("--seconds", type=float, default=3.0, help="of an emulated merge with one worker")
    parser.add_argument("--counts", default="1,2,4,6,8,12,16", help="numbers of emulated workers")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="the most workers")
    arguments = parser.parse_args()
    arguments.files.mkdir(parents=True, exist_ok=True)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
