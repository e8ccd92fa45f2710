"""Pictures of the page and of the README, as SVG."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.history import Night
from benchmarks.runner import OURS, REFERENCE, SYNCED, TORCH, Result

mpl.use("svg")
mpl.rcParams |= {
    "svg.hashsalt": "streammerge",  # makes the bytes of a picture reproducible
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.figsize": (7.2, 4.0),
    "figure.constrained_layout.use": True,
}
_COLOURS = ["#d1495b", "#edae49", "#66a182", "#8d6a9f", "#7a7a7a"]
_OWN_COLOUR = "#00798c"
_SIZE = re.compile(r"linear of ([\d.]+) GB")
GIB = 1 << 30


def memory_by_size(results: Iterable[Result], path: Path) -> bool:
    """Draws peak resident memory against the size of the checkpoints, one line per tool. Returns whether it drew."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in results:
        size = _SIZE.fullmatch(each["case"])
        if size and each["tool"] not in (REFERENCE, SYNCED, TORCH) and not each["exit_code"]:
            lines.setdefault(each["tool"], []).append((float(size[1]), each["resident_bytes"] / GIB))
    if len(lines.get(OURS, ())) < 2:
        return False
    figure, axes = plt.subplots()
    others = iter(_COLOURS)
    for tool, points in sorted(lines.items(), key=lambda item: -max(y for _, y in item[1])):
        sizes, peaks = zip(*sorted(points), strict=True)
        own = tool == OURS
        colour, width = (_OWN_COLOUR, 3) if own else (next(others), 1.6)
        axes.plot(sizes, peaks, "o-", color=colour, linewidth=width, label=tool, clip_on=False)
    axes.set(xlabel="size of each of two checkpoints (GB)", ylabel="peak resident memory (GiB)", xlim=(0, None))
    axes.set_ylim(0, None)
    axes.set_title("Memory of a weighted mean of two checkpoints", loc="left")
    _legend(figure)
    _save(figure, path)
    return True


def nights(history: list[Night], path: Path) -> bool:
    """Draws the time ratio and memory of the cases over the nights. Returns whether it drew."""
    series: dict[str, list[tuple[int, Result]]] = {}
    for number, one in enumerate(history):
        for each in one["results"]:
            if each["tool"] == OURS and each.get("gb_per_second") and not each["exit_code"]:
                series.setdefault(each["case"], []).append((number, each))
    if not series:
        return False
    figure, (speed, memory) = plt.subplots(2, 1, figsize=(7.2, 6.4), sharex=True)
    for case, points in series.items():
        numbers = [number for number, _ in points]
        speed.plot(numbers, [each["ratio"] for _, each in points], "o-", label=case, clip_on=False)
        memory.plot(numbers, [each["resident_bytes"] / (1 << 20) for _, each in points], "o-", clip_on=False)
    speed.set(ylabel="time / reference", ylim=(0, None))
    memory.set(ylabel="peak resident (MiB)", ylim=(0, None), xlabel="night")
    labels = [f"{one['time'][5:10]}\n{one['commit']}" for one in history]
    step = max(len(labels) // 8, 1)
    memory.set_xticks(range(0, len(labels), step), labels[::step])
    speed.set_title("Over the nights", loc="left")
    _legend(figure, fontsize=7, ncols=2)
    _save(figure, path)
    return True


def memory_over_time(result: dict[str, Any], path: Path) -> bool:
    """Draws memory within one merge, against its budget. Returns whether it drew."""
    if not result.get("samples"):
        return False
    seconds, own, resident = zip(*result["samples"], strict=True)
    figure, axes = plt.subplots()
    axes.plot(seconds, [n / (1 << 20) for n in resident], color=_OWN_COLOUR, linewidth=2, label="resident")
    axes.plot(seconds, [n / (1 << 20) for n in own], color="#66a182", linewidth=2, label="of its own (anonymous)")
    startup = result["startup_bytes"] / (1 << 20)
    budget = startup + result["memory_bytes"] / (1 << 20)
    axes.axhline(startup, color="#7a7a7a", linestyle=":", label="start-up (Python, torch)")
    axes.axhline(budget, color="#d1495b", linestyle="--", label="start-up and budget")
    axes.set(xlabel="seconds", ylabel="MiB", ylim=(0, budget * 1.15), xlim=(0, None))
    axes.set_title(f"Memory within one merge ({result['case']})", loc="left")
    _legend(figure)
    _save(figure, path)
    return True


def _legend(figure: Any, fontsize: int = 9, ncols: int = 2) -> None:
    """Puts the legend below the axes, where it covers no line."""
    figure.legend(frameon=False, fontsize=fontsize, ncols=ncols, loc="outside lower center")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
