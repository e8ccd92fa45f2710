"""What a report shows, as plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

from streammerge.tensors.layers import layer_of

OUTSIDE = "outside"
LOST, NOT_COMPARED, NOTHING = "not used", "not compared", "nothing"
"""The labels of what is lost, in a merge and in a comparison, and how their texts begin if that is nothing."""
MARKS = {"N": "NaN or infinity", "m": "some inputs lack it", "c": "copied", "i": "integers, which have no distance"}
"""The letters on a map. A cell of several tensors has the first that any of them has, the last two if all have it."""
_MOST_KINDS, _MOST_OUTSIDE = 14, 8
_NUMBER, _TAIL = r"\.\d+(?=\.|$)", r"\.(weight|bias)$"
"""Patterns are texts, because statistics are gathered without them, and compiling takes long."""


class Row(NamedTuple):
    """One tensor of the output. ``distances``: to each input, relative to the input's norm; None if it is not known.
    ``elems``: its number of elements. ``mark``: one of ``MARKS``, "" for a tensor that was merged from all inputs."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    how: str
    distances: tuple[float | None, ...] = ()
    elems: int = 1
    mark: str = ""


class Grid(NamedTuple):
    """Distances by layer and kind of tensor. ``values[row][column]`` is None where there is no such tensor, or no distance.
    ``marks`` has the letter of each cell."""

    title: str
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    marks: tuple[tuple[str, ...], ...] = ()


class Sample(NamedTuple):
    """A moment of a run: seconds since its begin, bytes held above start-up, bytes read and written so far."""

    seconds: float
    memory_bytes: int
    done_bytes: int


@dataclass(slots=True)
class Facts:
    """All that a page shows.

    ``summary``, ``made``, ``verification``: (label, text). ``inputs``: rows of the table of inputs. ``measured``: how the
    distances were measured. ``accounts``: (checkpoint, fate, count, names, why) of what is not merged under its name.
    ``said``: (kind, text) of notes and warnings. ``compared``: whether this is a comparison, and no merge.
    """

    title: str
    subtitle: str
    summary: list[tuple[str, str]] = field(default_factory=list)
    made: list[tuple[str, str]] = field(default_factory=list)
    recipe: str = ""
    inputs: list[tuple[str, ...]] = field(default_factory=list)
    input_names: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    measured: str = ""
    accounts: list[tuple[str, str, int, str, str]] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    memory_bytes: int = 0
    verification: list[tuple[str, str]] = field(default_factory=list)
    compared: bool = False

    def grids(self) -> list[Grid]:
        """Returns a grid for each input that distances are known to."""
        return [grid_of(name, self.rows, n) for n, name in enumerate(self.input_names) if any(_known(self.rows, n))]

    def moved(self, number: int = 0) -> list[tuple[str, float]]:
        """Returns (layer or module outside of layers, distance to an input), the farthest first."""
        layers: dict[str, list[Row]] = {}
        for row in self.rows:
            if number < len(row.distances) and row.distances[number] is not None:
                layer, kind = place_of(row.name)
                layers.setdefault(kind if layer == OUTSIDE else layer, []).append(row)
        found = [(layer, joined((row.distances[number] or 0.0, row.elems) for row in own)) for layer, own in layers.items()]
        return sorted(found, key=lambda each: -each[1])


def _known(rows: Iterable[Row], number: int) -> Iterable[bool]:
    return (number < len(row.distances) and row.distances[number] is not None for row in rows)


def joined(distances: Iterable[tuple[float, int]]) -> float:
    """Returns the distance of several tensors together: the root of the mean of squares, by elements."""
    total = count = 0.0
    for distance, elems in distances:
        total, count = total + distance * distance * elems, count + elems
    return sqrt(total / count) if count else 0.0


def place_of(name: str) -> tuple[str, str]:
    """Returns the layer of a tensor, and its kind: its name in the layer without numbers."""
    layer = layer_of(name)
    if layer is None:
        head, _, last = name.rpartition(".")
        return OUTSIDE, re.sub(_TAIL, "", name) if head else last
    return f"{layer.stack}.{layer.number}", re.sub(
        _TAIL, lambda found: "" if found[1] == "weight" else ".bias", _kind(layer.rest)
    )


def _kind(rest: str) -> str:
    return re.sub(_NUMBER, "", f".{rest}")[1:]


def grid_of(title: str, rows: Sequence[Row], number: int) -> Grid:
    """Returns the distances to one input. Layers stand in their order, and below them the modules outside that are the
    farthest. The kinds of most elements have columns, and the rest shares one."""
    cells: dict[tuple[str, str], list[Row]] = {}
    outside: dict[str, list[Row]] = {}
    sizes: dict[str, int] = {}
    for row in rows:
        if _distance(row, number) is None and not row.mark:
            continue
        layer, kind = place_of(row.name)
        if layer == OUTSIDE:
            outside.setdefault(kind, []).append(row)
            continue
        cells.setdefault((layer, kind), []).append(row)
        sizes[kind] = sizes.get(kind, 0) + row.elems
    if not cells:  # a model without layers has a row for each tensor
        return _by_name(title, rows, number)
    ranked = sorted(sizes, key=lambda kind: -sizes[kind])
    kept = set(ranked[:_MOST_KINDS] if len(ranked) <= _MOST_KINDS else ranked[: _MOST_KINDS - 1])
    order = dict.fromkeys(kind for _, kind in cells if kind in kept)
    kinds = [*order, *(["other"] if len(ranked) > len(kept) else [])]
    layers = sorted(dict.fromkeys(layer for layer, _ in cells), key=_in_order)
    lines = list[list[list[Row]]]()
    for layer in layers:
        own = {kind: found for (where, kind), found in cells.items() if where == layer}
        rest = [row for kind, each in own.items() if kind not in kept for row in each]
        lines.append([own.get(kind, []) if kind in kept else rest for kind in kinds])
    far = sorted(outside, key=lambda kind: -(_cell(outside[kind], number) or 0.0))[:_MOST_OUTSIDE]
    apart = [kind for kind in outside if kind in far]
    if apart:
        lines = [[*line, []] for line in lines] + [[*([[]] * len(kinds)), outside[kind]] for kind in apart]
        kinds.append("outside layers")
    values = tuple(tuple(_cell(cell, number) for cell in line) for line in lines)
    marks = tuple(tuple(_mark(cell) for cell in line) for line in lines)
    return Grid(title, (*layers, *apart), tuple(kinds), values, marks)


def _distance(row: Row, number: int) -> float | None:
    return row.distances[number] if number < len(row.distances) else None


def _cell(rows: Sequence[Row], number: int) -> float | None:
    known = [(distance, row.elems) for row in rows if (distance := _distance(row, number)) is not None]
    return joined(known) if known else None


def _mark(rows: Sequence[Row]) -> str:
    own = {row.mark for row in rows}
    for mark in MARKS:
        if mark in own and (mark in "Nm" or own == {mark}):
            return mark
    return ""


def _in_order(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(".")
    return stack, int(number)


def _by_name(title: str, rows: Sequence[Row], number: int) -> Grid:
    known = [row for row in rows if _distance(row, number) is not None or row.mark]
    known = sorted(known, key=lambda row: -row.elems)[:40]
    values = tuple((_distance(row, number),) for row in known)
    return Grid(title, tuple(row.name for row in known), ("distance",), values, tuple((row.mark,) for row in known))


def shortened(layers: Sequence[str]) -> list[str]:
    """Returns the names of layers without what the stack begins with, if there is one: their numbers, if nothing else
    stands beside them."""
    stacks = {stack for stack, _, last in (layer.rpartition(".") for layer in layers) if last.isdigit()}
    if len(stacks) == 1:
        stack = next(iter(stacks))
        alone = all(layer.startswith(f"{stack}.") for layer in layers)
        begin = len(stack) + 1 if alone else len(stack.rpartition(".")[0]) + ("." in stack)
        layers = [layer[begin:] if layer.startswith(f"{stack}.") else layer for layer in layers]
    return [layer if len(layer) < 26 else f"…{layer[-24:]}" for layer in layers]
