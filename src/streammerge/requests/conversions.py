"""The conversions that a merge makes first."""

from __future__ import annotations

from dataclasses import replace

from streammerge.checkpoints.conversions import converted_path, is_conversion
from streammerge.errors import RecipeError, printable
from streammerge.options.resources import Resources
from streammerge.recipe.adapted import parts_of
from streammerge.recipe.arguments import conversion
from streammerge.recipe.model import Recipe
from streammerge.recipe.stage_names import stage_of
from streammerge.requests.inputs import opened
from streammerge.requests.plans import planned
from streammerge.running.execution import execute
from streammerge.running.process import resident_bytes
from streammerge.running.session import RunOptions
from streammerge.stores.base import Location
from streammerge.stores.locations import parse


def convert_first(recipe: Recipe, folder: Location, resources: Resources, running: RunOptions) -> bool:
    """Converts each checkpoint to a safetensors file in this folder, unless a current one is there.

    Returns whether any file was made. Raises the errors of :func:`streammerge.convert`.
    """
    made = False
    models = {each: None for one in (recipe, *recipe.stages.values()) for each in one.checkpoints}
    places = [parse(part) for each in models for part in parts_of(each.path) if not stage_of(part)]
    inputs = {place.resolve() for place in places if place.local_path is not None and place.is_folder()}
    if inputs & {folder.resolve(), *folder.resolve().parents}:
        raise RecipeError(
            f"`convert_first` {printable(folder)} is, or lies in, the folder of an input; inputs are never written, choose "
            "another folder"
        )
    folder.make_folder()
    for each in models:
        if any(map(stage_of, parts_of(each.path))):
            continue
        index = opened(each.path, each.state_dict, recipe.ema, {})
        target = converted_path(index, folder)
        if not is_conversion(target, index):
            target.sweep()
            target.check_writable(overwrite=True)
            before = resident_bytes()
            overrides = {"state_dict": each.state_dict, "ema": recipe.ema, "allow_nonfinite": True}
            plan = planned(conversion(each.path, (), (), overrides), target, resources, running.executor)
            execute(plan, replace(running, overwrite=True), before)
            made = True
    return made
