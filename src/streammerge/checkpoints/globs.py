"""From what was typed to a list of checkpoints: globs in the order of the checkpoints' numbers."""

from __future__ import annotations

from streammerge.checkpoints.numbers import in_order
from streammerge.errors import RecipeError, printable
from streammerge.recipe.locations import is_recipe_name
from streammerge.stores.locations import parse


def expand(paths: list[str]) -> list[str]:
    """Paths, each glob replaced by what it matches, in the order of their numbers.

    Raises RecipeError for a glob that matches nothing.
    """
    found: list[str] = []
    for path in paths:
        if is_recipe_name(path):
            raise RecipeError(f"{printable(path)}: a recipe stands alone, its models are named in it")
        place = parse(path)
        if place.exists() or not place.has_magic:
            found.append(path)
            continue
        matches = in_order([str(each) for each in place.glob()])
        if not matches:
            raise RecipeError(f"nothing matches {printable(path)}")
        found += matches
    return found
