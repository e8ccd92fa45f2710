"""From what was typed to a list of checkpoints: globs in the order of the checkpoints' numbers."""

from __future__ import annotations

import glob
import os

from streammerge.checkpoints.numbers import in_order
from streammerge.errors import RecipeError, printable


def expand(paths: list[str]) -> list[str]:
    """Paths, each glob replaced by what it matches, in the order of their numbers.

    Raises RecipeError for a glob that matches nothing.
    """
    found: list[str] = []
    for path in paths:
        if path.endswith((".yaml", ".yml")):
            raise RecipeError(f"{printable(path)}: a recipe stands alone, its models are named in it")
        if os.path.exists(path) or not glob.has_magic(path):  # noqa: PTH110 (Path.exists raises for a long name)
            found.append(path)
            continue
        matches = in_order(glob.glob(path))  # noqa: PTH207 - a pattern may be absolute
        if not matches:
            raise RecipeError(f"nothing matches {printable(path)}")
        found += matches
    return found
