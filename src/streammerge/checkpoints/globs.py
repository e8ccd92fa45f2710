"""From what was typed to a list of checkpoints: globs in the order of the checkpoints' numbers."""

from __future__ import annotations

from itertools import product

from streammerge.errors import RecipeError, printable
from streammerge.recipe.names import is_recipe_name
from streammerge.stores.locations import parse


def expand(paths: list[str]) -> list[str]:
    """Paths, each glob replaced by what it matches, in the order of their numbers.

    A base with a glob of adapters is a model for each of them.

    Raises RecipeError for a glob that matches nothing.
    """
    found: list[str] = []
    for path in paths:
        if path.endswith(".json") and is_recipe_name(path):
            folder = printable(parse(path).parent)
            raise RecipeError(f"{printable(path)} holds no tensors; give the folder that holds the model, like {folder}")
        if is_recipe_name(path):
            raise RecipeError(f"{printable(path)}: a recipe stands alone, its models are named in it")
        if "+" in path and (adapted := _with_adapters(path)):
            found += adapted
            continue
        place = parse(path)
        if place.exists() or not place.has_magic:
            found.append(path)
            continue
        from streammerge.checkpoints.numbers import in_order

        matches = in_order([str(each) for each in place.glob()])
        if not matches:
            raise RecipeError(f"nothing matches {printable(path)}")
        found += matches
    return found


def _with_adapters(text: str) -> list[str]:
    """Returns the models that a text with adapters names, each glob in it replaced by what it matches; none for a path."""
    from streammerge.recipe.adapted import split

    parts = split(text)
    if parts is None:
        return []
    several = [expand([each]) if not parse(each).exists() else [each] for each in parts.paths]
    return [str(parts.moved(each)) for each in product(*several)]
