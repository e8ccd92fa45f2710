"""What a name tells by itself: whether it is a recipe's, or that of a checkpoint in the caller's memory."""

from __future__ import annotations

import re


def is_recipe_name(path: str) -> bool:
    """Whether an input's name says that it is a recipe: a YAML or JSON file, but not an index of shards."""
    name = path.lower()
    return name.endswith((".yaml", ".yml")) or (name.endswith(".json") and not name.endswith(".index.json"))


def held_name(number: int) -> str:
    """Returns the name in a recipe of a checkpoint that the caller holds in memory. ``number``: counts them."""
    return f"<in memory {number}>"


def is_held(named: str) -> bool:
    """Whether a name in a recipe means a checkpoint in the caller's memory."""
    return re.fullmatch(r"<in memory \d+>", named) is not None
