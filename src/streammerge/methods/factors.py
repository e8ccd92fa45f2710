"""Ways to make an adapter: of adapters alone, or of the difference of two models. No kernel of theirs is ever made."""

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


def extract(group: TensorGroup) -> NoReturn:
    """Decomposes the difference of a model and its base into the factors of an adapter."""
    raise RecipeError(without_adapters("extract"))


def without_adapters(name: str) -> str:
    """Returns what is wrong with such a method for models."""
    if name == EXTRACT.name:
        return (
            "extract makes an adapter of one model and its base; `streammerge extract` does that, and a recipe with "
            "merge_method: extract, base_model and one model"
        )
    return f"{name} makes an adapter of adapters alone; give adapters, and no `base`"


EXTRACT = MergeMethod("extract", extract, models=(1, 1), base="required", listed=False)
FACTORS = {each.__name__: MergeMethod(each.__name__, each, base="unused", listed=False) for each in (cat, svd)} | {
    EXTRACT.name: EXTRACT
}
"""The methods that make adapters, by name."""
for _method in FACTORS.values():
    _method.function.contract = _method  # type: ignore[attr-defined]
