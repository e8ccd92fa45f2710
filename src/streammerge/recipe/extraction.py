"""What the adapter holds that a recipe extracts from a model and its base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streammerge.options.base import options_of
from streammerge.options.converting import Extracting
from streammerge.recipe.fields import TRUTH, Kind, ListOf, Plain, option_key
from streammerge.recipe.patterns import Pattern
from streammerge.recipe.scalars import PATTERN

_OPTIONS = options_of(Extracting)


def _like(name: str, schema: dict[str, Any]) -> Kind:
    """Returns the kind of an option's value."""
    kind = _OPTIONS[name].kind
    if kind is None:
        raise ValueError(f"{name} has no kind of its own")
    return Plain(kind.words, kind.parse, schema)


@dataclass(frozen=True)
class Extraction:
    """Which part of a difference an extracted adapter holds, and how."""

    energy: float | None = option_key(
        _like("energy", {"type": ["number", "string"], "exclusiveMinimum": 0, "maximum": 1}), _OPTIONS["energy"]
    )
    target: tuple[Pattern, ...] = option_key(ListOf(PATTERN, or_one=True, least=0), _OPTIONS["target"], default=())
    exclude: tuple[Pattern, ...] = option_key(ListOf(PATTERN, or_one=True, least=0), _OPTIONS["exclude"], default=())
    save_modules: bool = option_key(TRUTH, _OPTIONS["save_modules"], default=False)
    alpha: float | None = option_key(_like("alpha", {"type": ["number", "string"]}), _OPTIONS["alpha"])
