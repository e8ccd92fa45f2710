"""A static page of the nights: pictures, the table of the last night, regressions. No script, no service."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.history import Night, regressions
from benchmarks.runner import OURS, REFERENCE, TORCH, Result
from streammerge.units import counted

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>streammerge benchmarks</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; white-space: normal }
tr.ours td { background: #eef7f8; font-weight: 600 } tr.failed td { color: #b00020 } .wide { overflow-x: auto }
img { width: 100%; max-width: 46rem } .worse { color: #b00020 } small { color: #666 }
@media (prefers-color-scheme: dark) { body { background: #fff } }
</style></head><body>
"""
_COLUMNS = ("case", "tool", "seconds", "CPU s", "of the reference", "GB/s", "own MiB", "resident MiB", "cgroup MiB")


def write(folder: Path, history: list[Night]) -> Path:
    """Writes the page of these nights and returns its path. The last night must have memory samples."""
    folder.mkdir(parents=True, exist_ok=True)
    last = history[-1]
    shown = [
        ("memory-by-size.svg", pictures.memory_by_size(_newest(history), folder / "memory-by-size.svg")),
        ("memory-over-time.svg", pictures.memory_over_time(_sampled(last), folder / "memory-over-time.svg")),
        ("nights.svg", pictures.nights(history, folder / "nights.svg")),
    ]
    machine = ", ".join(f"{key} {value}" for key, value in last["machine"].items())
    worse = regressions(history)
    parts = [
        _HEAD,
        "<h1>streammerge benchmarks</h1>",
        f"<p>{counted(len(history), 'night')}; the last: {_text(last['time'])}, commit {_text(last['commit'])}, "
        f"version {_text(last['version'])}.<br><small>{_text(machine)}</small></p>",
        "<p>Times are medians; each is also a ratio to a <b>reference</b> measured beside it, which only moves the bytes: "
        "<code>cat</code> of the inputs and <code>cp</code> of one output (for conversions <code>cp</code> alone, for the "
        "start-up <code>python -c pass</code>). In brackets the least and the greatest ratio.</p>",
        "<h2>What got worse</h2>",
        "<ul class=worse>" + "".join(f"<li>{_text(each)}" for each in worse) + "</ul>" if worse else "<p>Nothing.</p>",
        *(f'<p><img src="{name}" alt="{name}"></p>' for name, there in shown if there),
        "<h2>The last night</h2>",
        _table(last["results"]),
        *_limited(last["results"]),
        "</body></html>\n",
    ]
    path = folder / "index.html"
    path.write_text("\n".join(parts))
    return path


def _newest(history: list[Night]) -> Iterable[Result]:
    """Returns the newest result of each case and tool, because other tools are not run every night."""
    found = {(each["case"], each["tool"]): each for one in history for each in one["results"]}
    return found.values()


def _sampled(night: Night) -> dict[str, Any]:
    return next((each for each in night["results"] if each["tool"] == OURS and each.get("samples")), {})


def _table(results: Iterable[Result]) -> str:
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in _COLUMNS) + "</tr>"]
    for each in results:
        if "ratio" not in each or each["tool"] == TORCH:
            continue
        ratio = f"{each['ratio']:.2f} ({each['ratio_low']:.2f} to {each['ratio_high']:.2f})"
        cells = (
            each["case"],
            each["tool"] + (f", exit {each['exit_code']}" if each["exit_code"] else ""),
            f"{each['seconds']:.2f}",
            f"{each['cpu_seconds']:.2f}",
            "" if each["tool"] == REFERENCE else ratio,
            f"{each['gb_per_second']:.2f}" if "gb_per_second" in each else "",
            *(_mib(each[key]) for key in ("anonymous_bytes", "resident_bytes", "cgroup_bytes")),
        )
        kind = "failed" if each["exit_code"] else "ours" if each["tool"] == OURS else ""
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return "<div class=wide><table>" + "\n".join(rows) + "</table></div>"


def _limited(results: Iterable[Result]) -> list[str]:
    """Lists how each tool ended under a memory limit of the kernel."""
    found = [each for each in results if "limit_bytes" in each]
    if not found:
        return []
    rows = [
        f"<li>{_text(each['tool'])}: {'finished' if not each['exit_code'] else _ending(each['exit_code'])}"
        for each in found
    ]
    limit = _mib(found[0]["limit_bytes"])
    return [f"<h2>In a memory cgroup of {limit} MiB, without swap</h2><ul>", *rows, "</ul>"]


def _ending(exit_code: int) -> str:
    return "killed by the kernel" if exit_code == -9 else f"failed with exit code {exit_code}"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / (1 << 20):.0f}"


def _text(value: object) -> str:
    return html.escape(str(value))
