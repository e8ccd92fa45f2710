"""A strict JSON parser: it refuses texts that two parsers could read differently."""

from __future__ import annotations

import json
from typing import Any

from streammerge.errors import printable


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {printable(twice)} is given twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def load_json(data: bytes | str) -> Any:
    """Parses JSON. Raises ValueError for duplicate keys, NaN, infinities and excessive nesting."""
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
