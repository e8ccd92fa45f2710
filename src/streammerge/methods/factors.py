"""Methods that make an adapter of adapters alone. Models have no factors, so no kernel of theirs is ever made."""

from __future__ import annotations

from typing import NoReturn

from streammerge.errors import RecipeError
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import MergeMethod, PerModel


def cat(group: TensorGroup, *, weight: PerModel = (1.0,)) -> NoReturn:
    """Stacks the factors of adapters, which is exactly the weighted sum of their updates."""
    raise RecipeError(without_adapters("cat"))


def svd(group: TensorGroup, *, weight: PerModel = (1.0,), rank: int | None = None) -> NoReturn:
    """Cuts the weighted sum of the updates of adapters to a rank, by default the highest of a module's adapters."""
    raise RecipeError(without_adapters("svd"))


def without_adapters(name: str) -> str:
    """Returns what is wrong with such a method for models."""
    return f"{name} makes an adapter of adapters alone; give adapters, and no `base`"


FACTORS = {each.__name__: MergeMethod(each.__name__, each, base="unused", listed=False) for each in (cat, svd)}
"""The methods for adapters alone, by name."""
for _method in FACTORS.values():
    _method.function.contract = _method  # type: ignore[attr-defined]
