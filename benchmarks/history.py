"""The history of nights: one line of JSON per run of the benchmarks, and regressions between nights."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.runner import OURS, Result

Night = dict[str, Any]
_MEMORY_WORSE = 1.03
_TIME_WORSE = 1.25
_NIGHTS_KEPT = 3
_NIGHTS_BEFORE = 10
_MEMORY = ("anonymous_bytes", "resident_bytes")


def fingerprint() -> dict[str, Any]:
    """Returns the properties besides the code that a number depends on. None identifies a machine or a person."""
    cpu = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    memory = next((line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0 0")
    return {
        "cpu": cpu.rpartition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[1]) / (1 << 20)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "safetensors")},
    }


def night(results: list[Result]) -> Night:
    """Returns the results with time, commit, version and machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "version": _version("streammerge"),
        "machine": fingerprint(),
        "results": results,
    }


def append(path: Path, new: Night) -> None:
    """Adds a night to the history. Memory samples are left out to keep the file small in git."""
    results = [{key: value for key, value in each.items() if key != "samples"} for each in new["results"]]
    with path.open("a") as file:
        file.write(json.dumps(new | {"results": results}) + "\n")


def read(path: Path) -> list[Night]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def regressions(nights: list[Night]) -> list[str]:
    """Returns one sentence for each regression in the last night.

    Memory hardly varies, so more than 3 % above the median of earlier nights is a regression. Time is compared by the
    ratio to the reference. It is a regression if three nights in a row are a quarter above the median of those before.
    Above a bar of its own, a case is always one.
    Only nights on machines with the same fingerprint are compared.
    """
    if not nights:
        return []
    alike = [each for each in nights if each["machine"] == nights[-1]["machine"]]
    worse = [
        f"{each['case']}: it failed with exit code {each['exit_code']}" for each in _ours(alike[-1]) if each["exit_code"]
    ]
    for each in _ours(alike[-1]):
        if each["cpu_seconds"] > each.get("most_cpu_seconds", math.inf):
            worse.append(f"{each['case']}: {each['cpu_seconds']:.2f} CPU s, above the bar of {each['most_cpu_seconds']:g}")
        if each["resident_bytes"] > each.get("most_bytes", math.inf):
            held, bar = each["resident_bytes"] >> 20, each["most_bytes"] >> 20
            worse.append(f"{each['case']}: {held} MiB resident, above the bar of {bar}")
    for name in (each["case"] for each in _ours(alike[-1])):
        history = [each for one in alike for each in _ours(one) if each["case"] == name and not each["exit_code"]]
        for kind in _MEMORY:
            before = [each[kind] for each in history[:-1]][-_NIGHTS_BEFORE:]
            if before and history[-1][kind] > _MEMORY_WORSE * statistics.median(before):
                was, now = statistics.median(before) / 1e6, history[-1][kind] / 1e6
                worse.append(f"{name}: {kind.partition('_')[0]} memory rose from {was:.1f} to {now:.1f} MB")
        ratios = [each["ratio"] for each in history]
        before = ratios[:-_NIGHTS_KEPT][-_NIGHTS_BEFORE:]
        if before and min(ratios[-_NIGHTS_KEPT:]) > _TIME_WORSE * statistics.median(before):
            was, now = statistics.median(before), statistics.median(ratios[-_NIGHTS_KEPT:])
            worse.append(f"{name}: {now:.2f} times the reference for {_NIGHTS_KEPT} nights, {was:.2f} before")
    return worse


def _ours(one: Night) -> Iterable[Result]:
    return (each for each in one["results"] if each["tool"] == OURS and "ratio" in each)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
