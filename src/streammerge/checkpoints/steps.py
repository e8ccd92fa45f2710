"""The checkpoints of a run: folders and files that differ in their numbers only, below the folder that a trainer wrote."""

from __future__ import annotations

import re
from collections import defaultdict
from contextlib import suppress

from streammerge.errors import RecipeError, listed, printable
from streammerge.formats.distributed import holds_parts
from streammerge.formats.file_names import grouped, is_shard, is_weights
from streammerge.recipe.adapted import split
from streammerge.stores.base import Location
from streammerge.stores.locations import parse

_MOST_LEVELS, _MOST_FOLDERS = 3, 100
"""How deep, and in how many folders, the checkpoints of a run are looked for."""
_NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?")


def with_steps(paths: list[str]) -> list[str]:
    """Returns the inputs among which one chooses: those of a run, in their order, if the only input is its folder.

    A folder that is a checkpoint itself stays one, unless it has steps beside its weights, as a trainer leaves them that
    saves the last model above its checkpoints. Raises RecipeError if a folder has several series of steps.
    """
    if len(paths) != 1 or split(paths[0]) is not None:
        return paths
    from streammerge.checkpoints.numbers import in_order  # here, because a plain merge has no steps

    folder = parse(paths[0])
    if not folder.is_folder() or holds_parts(folder):
        return paths
    found = _series(folder)
    if not found and not _is_checkpoint(folder):
        found = _deeper(folder)
    if len(found) > 1:
        patterns = listed([str(place) for place in sorted(found)])
        raise RecipeError(
            f"{printable(folder)} holds the checkpoints of several series: {patterns}; give one of these patterns"
        )
    return in_order([str(path) for own in found.values() for path in own]) or paths


def _series(folder: Location) -> dict[Location, list[Location]]:
    """Returns the checkpoints in a folder that differ in their numbers only, by the pattern of their names."""
    series = defaultdict[tuple[str, bool], list[Location]](list)
    for child in folder.children():
        name = child.name
        inner = child.is_folder()
        if not name.startswith(".") and _NUMBER.search(name) and (inner or (is_weights(name) and not is_shard(name))):
            series[_NUMBER.sub("*", name), inner].append(child)
    return {folder / name: own for (name, _), own in series.items() if len(own) > 1 and any(map(_is_checkpoint, own))}


def _deeper(folder: Location) -> dict[Location, list[Location]]:
    """Returns the series in the folders below one that holds none, such as ``lightning_logs/version_0/checkpoints``."""
    level = [folder]
    for _ in range(_MOST_LEVELS):
        level = [each for above in level for each in _folders_in(above)][:_MOST_FOLDERS]
        found = {pattern: own for each in level for pattern, own in _series(each).items()}
        if found:
            return found
    return {}


def _folders_in(folder: Location) -> list[Location]:
    """Returns the folders in a folder. Those that are one step by their names hold files of ranks, and no steps."""
    from streammerge.checkpoints.numbers import numbers_in  # here, because a plain merge has no steps

    inner = list[Location]()
    with suppress(OSError):
        inner = [each for each in folder.children() if not each.name.startswith(".") and each.is_folder()]
    names = {each: numbers_in(each.name) for each in inner}
    return [each for each, found in names.items() if found.step is None and found.epoch is None]


def _is_checkpoint(path: Location) -> bool:
    """Whether a step looks like a checkpoint, by the names of its files."""
    if not path.is_folder() or holds_parts(path):
        return True
    inner = path.children()
    return bool(grouped([each.name for each in inner])) or any(each.is_folder() and holds_parts(each) for each in inner)
