"""The arguments of an extraction, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError
from streammerge.options import Extracting, Selecting, picked
from streammerge.recipe.locations import hub_place
from streammerge.requests.adapters import float_dtype
from streammerge.requests.inputs import Held, named, opened
from streammerge.running.process import collector_paused
from streammerge.tensors.dtypes import DType

if TYPE_CHECKING:
    from streammerge.factoring.making import Making

_RANK = 64


def extracting(given: Mapping[str, Any]) -> Making:
    """Returns what :func:`streammerge.extract` makes of its arguments. Reads headers only. Raises its errors."""
    from streammerge.factoring.extraction import Asked, extraction
    from streammerge.factoring.truncated import Wanted

    if given["base"] is None:
        raise RecipeError("an extraction needs the model that was trained; pass `base`")
    held = Held()
    names = named("tuned", given["tuned"], held), named("base", given["base"], held)
    asked, selection = picked(Extracting, {**given, "base": names[1]}), picked(Selecting, given)
    places = [name if name in held else hub_place(name) for name in names]
    dtype = DType.F32 if asked.dtype is None else float_dtype(asked.dtype)
    energy = float(asked.energy or 0.0)
    wanted = Wanted(asked.rank or (0 if energy else _RANK), energy, dtype)
    with collector_paused():
        tuned, base = (opened(place, selection.state_dict, selection.ema or "ignore", held) for place in places)
        base_name = "" if names[1] in held else names[1]
        more = (tuple(asked.target), tuple(asked.exclude), asked.save_modules, float(asked.alpha or 0.0), base_name)
        return extraction(tuned, base, Asked(wanted, *more))
