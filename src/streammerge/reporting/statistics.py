"""What was gathered while merging, in a small file beside the output: a later report needs no input.

The file is no part of the output, whose bytes do not depend on it. It names the output by the digest of its receipt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.reporting.facts import MARKS, Facts, Row, Sample
from streammerge.stores.base import Location
from streammerge.strict_json import load_json

_ENDING = ".statistics.json"
_FORM = 1
_DIGITS, _MOST_SAMPLES = 4, 100


@dataclass(frozen=True, slots=True)
class Statistics:
    """``inputs``: names of inputs. ``tensors``: name -> its distance to each input, its mark and how it was made.
    ``samples``: moments of the run. ``made`` and ``said``: as of :class:`Facts`."""

    inputs: tuple[str, ...]
    tensors: Mapping[str, tuple[tuple[float | None, ...], str, str]]
    samples: tuple[Sample, ...]
    memory_bytes: int
    measured: str
    made: tuple[tuple[str, str], ...]
    said: tuple[tuple[str, str], ...]


def place_of(out: Location) -> Location:
    """Returns the file for the statistics of an output."""
    return out.absolute().parent / f"{out.name}{_ENDING}"


def write(facts: Facts, digest: str, out: Location) -> None:
    """Writes the statistics of a merge, over those of an earlier one. ``digest``: of the output's receipt."""
    hows = list(dict.fromkeys(row.how for row in facts.rows))
    step = max(-(-len(facts.samples) // _MOST_SAMPLES), 1)
    tree = {
        "form": _FORM,
        "output": digest,
        "inputs": facts.input_names,
        "measured": facts.measured,
        "names": [row.name for row in facts.rows],
        "marks": "".join(row.mark or "-" for row in facts.rows),
        "methods": hows,
        "method": list(map({how: number for number, how in enumerate(hows)}.__getitem__, (row.how for row in facts.rows))),
        "samples": [[round(s.seconds, 3), s.memory_bytes, s.done_bytes] for s in facts.samples[::step]],
        "memory": facts.memory_bytes,
        "made": facts.made,
        "said": facts.said,
    }
    text = json.dumps(tree, separators=(",", ":"))
    text = f'{text[:-1]},"distances":[{",".join(_distances(facts.rows))}]}}'
    place_of(out).write_whole(text.encode(), overwrite=True)


def _distances(rows: Sequence[Row]) -> list[str]:
    """Returns the distances of each row as a list in JSON. The form is that of all rows with as many known distances."""
    most = max((len(row.distances) for row in rows), default=0)
    forms = [f"[{','.join([f'%.{_DIGITS}g'] * count)}]" for count in range(most + 1)]
    return [
        json.dumps([_short(each) for each in row.distances])
        if None in row.distances
        else forms[len(row.distances)] % row.distances
        for row in rows
    ]


def read(out: Location, digest: str) -> Statistics | str:
    """Returns the statistics of the output with this receipt, or why there are none."""
    place = place_of(out)
    if not place.exists():
        return "no statistics were gathered while merging"
    try:
        with place.stream() as stream:
            tree = load_json(stream.read())
        if not isinstance(tree, dict) or tree.get("form") != _FORM:
            return f"{place.name} is not of this version"
        if tree["output"] != digest:
            return f"{place.name} belongs to an output that was here before"
        return _statistics(tree)
    except (KeyError, IndexError, TypeError, ValueError):
        return f"{place.name} cannot be read"


def _statistics(tree: Mapping[str, Any]) -> Statistics:
    inputs, hows = tuple(map(str, tree["inputs"])), list(map(str, tree["methods"]))
    tensors = {}
    rows = zip(tree["names"], tree["distances"], tree["marks"], tree["method"], strict=True)
    for name, distances, mark, how in rows:
        numbers = tuple(None if each is None else float(each) for each in distances)
        if len(numbers) != len(inputs):
            raise ValueError("a tensor has other inputs")
        tensors[str(name)] = numbers, mark if mark in MARKS else "", hows[how]
    samples = tuple(Sample(float(a), int(b), int(c)) for a, b, c in tree["samples"])
    made, said = _pairs(tree["made"]), _pairs(tree["said"])
    return Statistics(inputs, tensors, samples, int(tree["memory"]), str(tree["measured"]), made, said)


def _pairs(found: Sequence[Sequence[Any]]) -> tuple[tuple[str, str], ...]:
    return tuple((str(a), str(b)) for a, b in found)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def rows_of(known: Statistics, rows: Sequence[Row]) -> list[Row] | None:
    """Returns the rows of an output with what was gathered, None if the statistics have other tensors."""
    if {row.name for row in rows} != known.tensors.keys():
        return None
    found = list[Row]()
    for row in rows:
        distances, mark, how = known.tensors[row.name]
        found.append(Row(row.name, row.shape, row.dtype, how, distances, row.elems, mark))
    return found
