"""From what was typed to a list of checkpoints: globs in numeric order."""

from __future__ import annotations

import re

from streammerge.errors import RecipeError, printable
from streammerge.stores.locations import parse


def numeric_order(text: str) -> list[tuple[int, int, str]]:
    """A sort key by which checkpoint-200 comes before checkpoint-1000."""
    return [(1, int(p), "") if re.fullmatch("[0-9]+", p) else (0, 0, p) for p in re.split("([0-9]+)", text)]


def expand(paths: list[str]) -> list[str]:
    """Paths, each glob replaced by what it matches, in numeric order. Raises RecipeError for one that matches nothing."""
    found: list[str] = []
    for path in paths:
        if path.endswith((".yaml", ".yml")):
            raise RecipeError(f"{printable(path)}: a recipe stands alone, its models are named in it")
        place = parse(path)
        if place.exists() or not place.has_magic:
            found.append(path)
            continue
        matches = sorted(map(str, place.glob()), key=numeric_order)
        if not matches:
            raise RecipeError(f"nothing matches {printable(path)}")
        found += matches
    return found
