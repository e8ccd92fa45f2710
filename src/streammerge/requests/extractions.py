"""The arguments of an extraction, read and checked; and recipes of extractions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError
from streammerge.methods.factors import EXTRACT
from streammerge.options.base import picked
from streammerge.options.converting import Extracting
from streammerge.options.selecting import Selecting
from streammerge.recipe.extraction import Extraction
from streammerge.recipe.hub_names import with_hub_places
from streammerge.recipe.model import Model, Recipe
from streammerge.recipe.patterns import Pattern, parse_pattern
from streammerge.requests.adapters import float_dtype, refuse_keys, refuse_others
from streammerge.requests.inputs import Held, named, opened
from streammerge.running.process import collector_paused
from streammerge.tensors.dtypes import DType

if TYPE_CHECKING:
    from streammerge.factoring.making import Making

_RANK = 64
_FOLLOWED = ("state_dict", "ema")
"""Keys that an extraction follows, and a merge of adapters does not."""


def extracting(given: Mapping[str, Any]) -> Making:
    """Returns what :func:`streammerge.extract` makes of its arguments. Reads headers only. Raises its errors."""
    if given["base"] is None:
        raise RecipeError("an extraction needs the model that was trained; pass `base`")
    held = Held()
    names = named("tuned", given["tuned"], held), named("base", given["base"], held)
    asked, selection = picked(Extracting, {**given, "base": names[1]}), picked(Selecting, given)
    chosen = Extraction(
        None if asked.energy is None else float(asked.energy),
        _patterns("target", asked.target),
        _patterns("exclude", asked.exclude),
        asked.save_modules,
        None if asked.alpha is None else float(asked.alpha),
    )
    recipe = Recipe(
        EXTRACT,
        (Model(names[0]),),
        base_model=names[1],
        rank=asked.rank,
        extract=chosen,
        dtype=None if asked.dtype is None else float_dtype(asked.dtype),
        state_dict=selection.state_dict,
        ema=selection.ema or "ignore",
    )
    return extracted(with_hub_places(recipe), held)


def _patterns(option: str, texts: str | Any) -> tuple[Pattern, ...]:
    try:
        return tuple(map(parse_pattern, texts))
    except ValueError as error:
        raise RecipeError(f"`{option}` takes patterns of modules, like 'q_proj' or '*.mlp.*'") from error


def extracted(recipe: Recipe, held: Held | None = None) -> Making:
    """Returns what an adapter is made of by a recipe of the method extract. Reads headers only. Raises the errors of
    :func:`streammerge.extract`, and RecipeError for keys that an adapter cannot follow."""
    from streammerge.factoring.extraction import Asked, extraction
    from streammerge.factoring.recording import Record
    from streammerge.factoring.truncated import Wanted

    others = {name: getattr(recipe, name) for name in ("slices", "modules", "stages", "parameters")}
    refuse_others({name: bool(value) for name, value in others.items()}, "an extraction")
    refuse_keys(recipe, "an extraction", _FOLLOWED)
    asked, energy = recipe.extract, recipe.extract.energy or 0.0
    recipe = replace(recipe, rank=recipe.rank or (None if energy else _RANK))
    wanted = Wanted(recipe.rank or 0, energy, recipe.recast or DType.F32)
    (model,) = recipe.models
    with collector_paused():
        tuned = opened(model.model, model.state_dict or recipe.state_dict, recipe.ema, held or {})
        base = opened(str(recipe.base_model), recipe.state_dict, recipe.ema, held or {})
        record = Record.of_difference(recipe, {model.model: tuned, str(recipe.base_model): base})
        base_name = "" if base.in_memory else recipe.written.get(str(recipe.base_model), str(recipe.base_model))
        more = (asked.target, asked.exclude, asked.save_modules, asked.alpha or 0.0, base_name, record)
        return extraction(tuned, base, Asked(wanted, *more))
