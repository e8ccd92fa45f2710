"""Edits a JSON text in place: the values that change are replaced, all other characters stay."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

KeyPath = tuple[str, ...]
"""The keys that lead to a value, from the outermost mapping."""

REMOVED: Any = object()
"""Stands for the value of a key that is taken out."""
_SPACE = re.compile(r"[ \t\n\r]*")
_raw_decode = json.JSONDecoder().raw_decode


@dataclass(slots=True)
class _Span:
    """The place of a value: ``text[start:stop]``. ``members``: the values of a mapping. ``at``: where their keys begin."""

    start: int
    stop: int
    members: dict[str, _Span] | None = None
    at: dict[str, int] = field(default_factory=dict)


def edited(text: str, edits: Mapping[KeyPath, Any]) -> str:
    """Returns the text with other values at these paths. A key that its mapping lacks is added as the last one, and one
    whose value is :data:`REMOVED` is taken out.

    ``text``: a JSON mapping as Python's json reads it, NaN and infinities included. If a key is given twice, its last
    value counts. The outer mappings of each path must exist.
    """
    root = _span(text, _SPACE.match(text).end())  # type: ignore[union-attr]
    replacements: list[tuple[int, int, str]] = []
    added: dict[KeyPath, dict[str, Any]] = {}
    for path, value in edits.items():
        holder = _holder(root, path)
        own = (holder.members or {}).get(path[-1])
        if value is REMOVED:
            replacements += [_removal(text, holder, path[-1])] if own is not None else []
        elif own is None:
            added.setdefault(path[:-1], {})[path[-1]] = value
        else:
            one_line = "\n" not in text[own.start : own.stop] and text[own.start] in "[{"
            margin = "" if one_line else _margin(text, holder.at[path[-1]])
            replacements.append((own.start, own.stop, _dumped(value, margin)))
    replacements += [_addition(text, _holder(root, (*path, "")), values) for path, values in added.items()]
    for start, stop, new in sorted(replacements, reverse=True):
        text = text[:start] + new + text[stop:]
    return text


def _span(text: str, start: int) -> _Span:
    """Returns the span of the value that begins at ``start``."""
    if text[start] != "{":
        return _Span(start, _raw_decode(text, start)[1])
    found = _Span(start, start, {})
    place = _after(text, start + 1)
    while text[place] != "}":
        if text[place] == ",":
            place = _after(text, place + 1)
        key, end = scanstring(text, place + 1)
        value = _span(text, _after(text, _after(text, end) + 1))
        found.members[key], found.at[key] = value, place  # type: ignore[index]
        place = _after(text, value.stop)
    found.stop = place + 1
    return found


def _after(text: str, place: int) -> int:
    """Returns the place of the next character that is no white space."""
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]


def _holder(root: _Span, path: KeyPath) -> _Span:
    """Returns the mapping that holds the last key of a path."""
    for key in path[:-1]:
        root = (root.members or {})[key]
    return root


def _addition(text: str, holder: _Span, values: Mapping[str, Any]) -> tuple[int, int, str]:
    """Returns where the keys that a mapping lacks are put in: (start, stop, text)."""
    members = holder.members or {}
    margin, before, place = "", " ", holder.stop - 1
    if members:
        last = max(members, key=lambda key: members[key].stop)
        margin, place = _margin(text, holder.at[last]), members[last].stop
        if margin or "\n" in text[holder.start : holder.at[last]]:
            before = f"\n{margin}"
    said = f",{before}".join(f"{json.dumps(key)}: {_dumped(value, margin)}" for key, value in values.items())
    return place, place, f",{before}{said}" if members else said


def _removal(text: str, holder: _Span, key: str) -> tuple[int, int, str]:
    """Returns where a key and its value are taken out, with the comma behind them, or before them if they are the last."""
    start, stop = holder.at[key], holder.members[key].stop  # type: ignore[index]
    after = _after(text, stop)
    if text[after] == ",":
        return start, _after(text, after + 1), ""
    before = len(text[:start].rstrip(" \t\n\r"))
    return (before - 1 if text[before - 1] == "," else start), stop, ""


def _margin(text: str, place: int) -> str:
    """Returns the white space that begins the line of a key, and nothing if other characters stand between."""
    line = text[text.rfind("\n", 0, place) + 1 : place]
    return line if "\n" in text[:place] and not line.strip() else ""


def _dumped(value: Any, margin: str) -> str:
    """Returns a value as JSON: in one line without a margin, else indented as transformers does it."""
    if not margin:
        return json.dumps(value)
    return json.dumps(value, indent=2).replace("\n", f"\n{margin}")
