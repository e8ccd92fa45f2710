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
    """Returns the text with other values at these paths. A key that its mapping lacks is added as the last one.

    ``text``: a JSON mapping as Python's json reads it, NaN and infinities included. Of a key that is given twice the last
    value counts. The outer mappings of each path must exist.
    """
    root = _span(text, _SPACE.match(text).end())  # type: ignore[union-attr]
    replacements = [_replacement(text, root, path, value) for path, value in edits.items()]
    for start, stop, new in sorted(replacements, key=lambda each: each[0], reverse=True):  # stable: keys stay in order
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


def _replacement(text: str, root: _Span, path: KeyPath, value: Any) -> tuple[int, int, str]:
    """Returns (start, stop, what stands there instead)."""
    span = root
    for key in path[:-1]:
        span = (span.members or {})[key]
    members = span.members or {}
    own = members.get(path[-1])
    if own is not None:
        one_line = "\n" not in text[own.start : own.stop] and text[own.start] in "[{"
        return own.start, own.stop, _dumped(value, "" if one_line else _margin(text, span.at[path[-1]]))
    if not members:
        return span.stop - 1, span.stop - 1, f"{json.dumps(path[-1])}: {_dumped(value, '')}"
    last = max(members, key=lambda key: members[key].stop)
    margin = _margin(text, span.at[last])
    before = f"\n{margin}" if margin or "\n" in text[span.start : span.at[last]] else " "
    place = members[last].stop
    return place, place, f",{before}{json.dumps(path[-1])}: {_dumped(value, margin)}"


def _margin(text: str, place: int) -> str:
    """Returns the white space that begins the line of a key, and nothing if other characters stand between."""
    line = text[text.rfind("\n", 0, place) + 1 : place]
    return line if "\n" in text[:place] and not line.strip() else ""


def _dumped(value: Any, margin: str) -> str:
    """Returns a value as JSON: in one line without a margin, else indented as transformers does it."""
    if not margin:
        return json.dumps(value)
    return json.dumps(value, indent=2).replace("\n", f"\n{margin}")
