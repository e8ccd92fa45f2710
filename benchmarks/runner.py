"""Runs of cases, each beside its reference and other tools, in the same state of the page cache."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.measure import Measured, measure
from benchmarks.peers import PEERS

OURS, REFERENCE, SYNCED, TORCH = "streammerge", "reference", "reference, synced", "import torch"
_STREAMMERGE = Path(sys.executable).with_name("streammerge")
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Contestant:
    """``commands(folder)``: the commands to run in order, for an output in an empty folder."""

    name: str
    commands: Callable[[Path], list[list[str]]]


def run_case(case: Case, files: Path, work: Path, rounds: int, peers: bool, say: Callable[[str], None]) -> list[Result]:
    """Returns the results of all contestants, ours and the reference first. ``work``: a folder on the measured disk."""
    inputs = [model.made(files) for model in case.models]
    runs: dict[str, list[list[Measured]]] = defaultdict(list)
    contestants = _contestants(case, inputs, peers)
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else contestants[::-1]:
            runs[contestant.name].append(_run_once(contestant, inputs, work, case.cold))
            last = runs[contestant.name][-1]
            say(f"  {contestant.name}: {sum(m.seconds for m in last):.2f} s, {sum(m.cpu_seconds for m in last):.2f} CPU s")
    reference = [sum(m.seconds for m in commands) for commands in runs[REFERENCE]]
    in_bytes, out_bytes = sum(path.stat().st_size for path in inputs), inputs[0].stat().st_size if inputs else 0
    return [_result(case, name, taken, reference, in_bytes, out_bytes) for name, taken in runs.items()]


def run_capped(case: Case, files: Path, work: Path, limit_bytes: int) -> list[Result]:
    """Reports how each tool ends in a memory cgroup of this limit, without swap."""
    inputs = [model.made(files) for model in case.models]
    results = []
    for contestant in _contestants(case, inputs, peers=True):
        if contestant.name not in (REFERENCE, SYNCED, TORCH):
            last = _run_once(contestant, inputs, work, case.cold, limit_bytes)[-1]
            results.append(
                {
                    "case": f"{case.name}, limited",
                    "tool": contestant.name,
                    "limit_bytes": limit_bytes,
                    "exit_code": last.exit_code,
                    "seconds": round(last.seconds, 3),
                }
            )
    return results


def _contestants(case: Case, inputs: Sequence[Path], peers: bool) -> list[Contestant]:
    def ours(folder: Path) -> list[list[str]]:
        places = {str(number): path for number, path in enumerate(inputs)} | {"out": folder / case.out}
        return [[str(_STREAMMERGE), *(_placed(argument, places) for argument in case.arguments)]]

    def reference(folder: Path) -> list[list[str]]:
        if case.reference == "pass":
            return [[sys.executable, "-c", "pass"]]
        copy = ["cp", str(inputs[0]), str(folder / "copy")]
        return [["sh", "-c", 'cat "$@" >/dev/null', "cat", *map(str, inputs)], copy] if case.merges else [copy]

    def synced(folder: Path) -> list[list[str]]:
        return [*reference(folder), ["sync", str(folder / "copy")]]

    made = [Contestant(REFERENCE, reference), Contestant(OURS, ours)]
    if case.reference != "pass":
        made.append(Contestant(SYNCED, synced))
    if case.merges:
        made.append(Contestant(TORCH, lambda folder: [[sys.executable, "-c", "import torch"]]))
    for peer in PEERS if peers else ():
        if case.peers in peer.methods and peer.installed.exists():
            made.append(Contestant(peer.name, lambda folder, peer=peer: [peer.command(case, inputs, folder)]))  # type: ignore[misc]
    return made


def _placed(argument: str, places: dict[str, Path]) -> str:
    return str(places[argument[1:-1]]) if argument[:1] == "{" else argument


def _run_once(
    contestant: Contestant, inputs: Iterable[Path], work: Path, cold: bool, limit_bytes: int | None = None
) -> list[Measured]:
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in inputs:
        _drop_from_cache(path) if cold else _read_into_cache(path)
    os.sync()  # do not count writes that the previous run left to the kernel
    try:
        return [measure(command, limit_bytes) for command in contestant.commands(folder)]
    finally:
        shutil.rmtree(folder)


def _read_into_cache(path: Path) -> None:
    if path.is_dir():  # of a sparse model only headers are read
        return
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _result(
    case: Case, tool: str, runs: list[list[Measured]], reference: list[float], in_bytes: int, out_bytes: int
) -> Result:
    """Returns medians over the rounds. The ratio to the reference is taken within each round."""
    seconds = [sum(m.seconds for m in commands) for commands in runs]
    ratios = [own / other for own, other in zip(seconds, reference, strict=True)]
    last = runs[-1][-1]
    result: Result = {
        "case": case.name,
        "tool": tool,
        "rounds": len(runs),
        "exit_code": max((abs(m.exit_code) for commands in runs for m in commands), default=0),
        "seconds": round(statistics.median(seconds), 3),
        "cpu_seconds": round(statistics.median(sum(m.cpu_seconds for m in commands) for commands in runs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "anonymous_bytes": max(m.anonymous for commands in runs for m in commands),
        "resident_bytes": max(m.resident for commands in runs for m in commands),
        "cgroup_bytes": max(m.cgroup or 0 for commands in runs for m in commands) or None,
        "disk_read_bytes": int(statistics.median(sum(m.disk_read for m in commands) for commands in runs)),
        "disk_written_bytes": int(statistics.median(sum(m.disk_written for m in commands) for commands in runs)),
    }
    if case.reference != "pass" and tool != TORCH:
        result |= {"input_bytes": in_bytes, "output_bytes": out_bytes}
        result["gb_per_second"] = round((in_bytes + out_bytes) / result["seconds"] / 1e9, 3)
    if tool == OURS and case.bar is not None:
        result["bar"] = case.bar
    if tool == OURS and case.most_cpu_seconds is not None:
        result["most_cpu_seconds"] = case.most_cpu_seconds
    if tool == OURS and case.most_bytes is not None:
        result["most_bytes"] = case.most_bytes
    if tool == OURS and case.reference != "pass" and last.exit_code == 0:
        told = [_told(commands[-1].output) for commands in runs]
        own = [each["seconds"] / other for each, other in zip(told, reference, strict=True)]
        result["own_seconds"] = round(statistics.median(each["seconds"] for each in told), 3)
        result["own_ratio"] = round(statistics.median(own), 3)
        result |= {key: told[-1][key] for key in ("peak_bytes", "startup_bytes", "memory_bytes")}
        result["samples"] = last.samples
    if last.exit_code:
        result["output"] = last.output[-2000:]
    return result


def _told(output: str) -> dict[str, Any]:
    """Parses the last line of --format json output. Warnings may come before it."""
    told: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return told
