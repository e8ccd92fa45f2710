"""The conversions that a merge makes first."""

from __future__ import annotations

from dataclasses import replace

from streammerge.checkpoints.conversions import converted_path, is_conversion
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


def convert_first(recipe: Recipe, folder: Location, resources: Resources, running: RunOptions) -> bool:
    """Converts each checkpoint to a safetensors file in this folder, unless a current one is there.

    Returns whether any file was made. Raises the errors of :func:`streammerge.convert`.
    """
    made = False
    folder.make_folder()
    models = {each: None for one in (recipe, *recipe.stages.values()) for each in one.checkpoints}
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
