"""What a sweep has made: a table for people, a CSV, and a record by which the same command goes on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from streammerge.errors import printable
from streammerge.stores.base import Location
from streammerge.strict_json import load_json
from streammerge.units import binary_bytes, counted, decimal_bytes

RECORD, TABLE = "sweep.json", "sweep.csv"
_MOST_SHOWN = 50
State = Literal["made", "there", "removed"]


@dataclass(slots=True)
class Made:
    """One output of a sweep. ``state``: made now, there already, or removed since others are better. ``identity``: of
    recipe and inputs. ``score``: what the user's program says; None without one."""

    name: str
    settings: dict[str, str]
    out: str
    identity: str = ""
    state: State = "made"
    score: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class SweepResult:
    """The report of a sweep.

    ``outputs``: every merge in its order. ``kept``: those that are there now, the best first if they have scores.
    ``reads``: how often the run went over the inputs. In each round all outputs of a tensor are made before the next one
    is read. A method with passes reads it again for each output, which ``read_bytes`` counts. Memory is as in
    :class:`Result`.
    """

    folder: Location
    outputs: tuple[Made, ...]
    kept: tuple[Made, ...]
    reads: int
    read_bytes: int
    written_bytes: int
    seconds: float
    peak_bytes: int
    startup_bytes: int
    memory_bytes: int
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    lowest: bool = field(default=False)

    def _repr_html_(self) -> str:
        from streammerge.notebook import table

        heads, *rows = _cells(self.outputs, self.lowest)
        facts = [
            ("outputs", f"{counted(len(self.kept), 'output')} of {counted(len(self.outputs), 'merge')}"),
            ("read", f"{decimal_bytes(self.read_bytes)} in {counted(self.reads, 'round')} over the inputs"),
            ("written", f"{decimal_bytes(self.written_bytes)} in {self.seconds:.1f} s"),
            ("memory", f"{binary_bytes(self.peak_bytes)} of {binary_bytes(self.memory_bytes)}, above start-up"),
            *(("note", note) for note in self.notes),
            *(("warning", warning) for warning in self.warnings),
        ]
        more = f"the first {_MOST_SHOWN} of {len(rows)}; print(result) shows all" if len(rows) > _MOST_SHOWN else ""
        return table(printable(self.folder), facts, heads, rows[:_MOST_SHOWN], more)

    @property
    def best(self) -> Made | None:
        """The output with the best score, None without scores."""
        scored = ranked(self.outputs, self.lowest)
        return scored[0] if scored else None

    def __repr__(self) -> str:
        return f"<SweepResult {printable(self.folder)}: {counted(len(self.outputs), 'merge')}, {len(self.kept)} kept>"

    def __str__(self) -> str:
        lines = [*table_lines(self.outputs, self.lowest), ""]
        grid = epoch_table(self.outputs)
        lines += [*grid, ""] if grid else []
        speed = (self.read_bytes + self.written_bytes) / max(self.seconds, 1e-9)
        reads = f", {counted(self.reads, 'round')} over the inputs" if self.reads else ""
        lines.append(f"{counted(len(self.kept), 'output')} in {printable(self.folder)}{reads}")
        lines.append(
            f"read {decimal_bytes(self.read_bytes)}, wrote {decimal_bytes(self.written_bytes)} in {self.seconds:.1f} s "
            f"({decimal_bytes(speed)}/s)"
        )
        lines.append(
            f"peak memory {binary_bytes(self.peak_bytes)} of {binary_bytes(self.memory_bytes)} (above the "
            f"{binary_bytes(self.startup_bytes)} start-up footprint; "
            f"{binary_bytes(self.startup_bytes + self.peak_bytes)} resident in all)"
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as data for JSON."""
        best = self.best
        return {
            "folder": str(self.folder),
            "outputs": [asdict(each) for each in self.outputs],
            "kept": [each.out for each in self.kept],
            "best": None if best is None else best.out,
            "reads": self.reads,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
            "startup_bytes": self.startup_bytes,
            "memory_bytes": self.memory_bytes,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def ranked(outputs: Sequence[Made], lowest: bool) -> list[Made]:
    """Returns the outputs that have a score, the best first; of equal ones the first."""
    scored = [each for each in outputs if each.score is not None]
    return sorted(scored, key=lambda each: (each.score or 0.0) * (1 if lowest else -1))


def columns_of(outputs: Sequence[Made]) -> list[str]:
    """Returns the names of the settings, in the order in which they come first."""
    return list(dict.fromkeys(name for each in outputs for name in each.settings))


def table_lines(outputs: Sequence[Made], lowest: bool) -> list[str]:
    """Returns the outputs as a table, the best first if they have scores."""
    cells = _cells(outputs, lowest)
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cells(outputs: Sequence[Made], lowest: bool) -> list[list[str]]:
    """Returns the heads, and a row for each output, the best first if they have scores."""
    scored = ranked(outputs, lowest)
    shown = [*scored, *(each for each in outputs if each.score is None)]
    columns, with_score = columns_of(outputs), bool(scored)
    heads = [*columns, *(["score"] if with_score else []), "state", "output"]
    rows = [
        [
            *(each.settings.get(name, "") for name in columns),
            *([("" if each.score is None else f"{each.score:.6g}")] if with_score else []),
            each.state,
            printable(each.out if each.state != "removed" else each.name),
        ]
        for each in shown
    ]
    return [heads, *rows]


def epoch_table(outputs: Sequence[Made]) -> list[str]:
    """Returns the scores by epoch and number of averaged checkpoints; nothing for other sweeps."""
    found = {
        (int(each.settings["epoch"]), int(each.settings["avg"])): each.score
        for each in outputs
        if each.settings.keys() == {"epoch", "avg"} and each.score is not None
    }
    if not found:
        return []
    epochs, averages = (sorted({key[n] for key in found}) for n in (0, 1))
    rows = [["epoch \\ avg", *map(str, averages)]]
    for epoch in epochs:
        scores = [found.get((epoch, average)) for average in averages]
        rows.append([str(epoch), *("" if score is None else f"{score:.6g}" for score in scores)])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def csv_text(outputs: Sequence[Made]) -> str:
    """Returns the outputs as CSV: their names, settings, scores, states and places."""
    columns = columns_of(outputs)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *columns, "score", "state", "output"])
    for each in outputs:
        score = "" if each.score is None else repr(each.score)
        writer.writerow([each.name, *(each.settings.get(name, "") for name in columns), score, each.state, each.out])
    return text.getvalue()


def write_record(folder: Location, outputs: Sequence[Made]) -> None:
    """Writes the record and the CSV into the folder of a sweep."""
    record = json.dumps({"form": 1, "outputs": [asdict(each) for each in outputs]}, indent=1) + "\n"
    (folder / RECORD).write_whole(record.encode(), overwrite=True)
    (folder / TABLE).write_whole(csv_text(outputs).encode(), overwrite=True)


def read_record(folder: Location) -> dict[str, Made]:
    """Returns the outputs of an earlier run by their names; none if there is no record that can be read."""
    place = folder / RECORD
    if not place.is_file():
        return {}
    try:
        data = load_json(place.read(0, place.size).decode())
        return {each["name"]: Made(**each) for each in data["outputs"]}
    except (ValueError, TypeError, KeyError):
        return {}
