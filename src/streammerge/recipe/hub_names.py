"""Names of models that are no paths here, but repositories of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.errors import printable
from streammerge.recipe.adapted import is_there, split
from streammerge.recipe.names import is_held
from streammerge.stores.hub_places import on_hub
from streammerge.stores.locations import has_scheme, parse
from streammerge.stores.repositories import named_repository

if TYPE_CHECKING:  # inspecting a checkpoint needs this module, and no recipe
    from streammerge.recipe.model import Recipe


def with_hub_places(recipe: Recipe) -> Recipe:
    """Returns the recipe with the places of models that are no paths here, but repositories of the Hugging Face hub."""
    written: dict[str, str] = {}
    names = {named: named if is_held(named) else hub_place(named, written) for named in recipe.named_models}
    written |= {found: named for named, found in names.items() if found != named}
    return replace(recipe.renamed(names), written=written) if written else recipe


def hub_place(name: str, written: dict[str, str] | None = None) -> str:
    """Returns the place of a repository of the hub that is no path here, at its commit; any other name as it is.

    In a model with adapters, each part is looked for. ``written`` gets the places of parts with their names. Raises
    RecipeError for a name with ``hf://`` that the hub does not have, StoreError if the hub cannot be asked for it.
    """
    if "+" in name and (parts := split(name, _is_there)) is not None:
        found = [hub_place(path) for path in parts.paths]
        if written is not None:
            written |= {place: path for place, path in zip(found, parts.paths, strict=True) if place != path}
        return str(parts.moved(found))
    repository = named_repository(name)
    if repository is None:
        return name
    if not has_scheme(name):
        return name if parse(name).lexists() else on_hub(repository).place or name
    found_there = on_hub(repository)
    if found_there.error is not None:
        raise type(found_there.error)(f"{printable(name)}: {found_there.error}") from found_there.error
    return found_there.place


def on_the_hub(name: str) -> str:
    """Returns why an absent file that is called like a repository is not on the hub either; "" for other names."""
    repository = named_repository(name)
    if repository is None or has_scheme(name):
        return ""
    return f", and {on_hub(repository).error}"


def _is_there(path: str) -> bool:
    repository = named_repository(path)
    if repository is not None and has_scheme(path):
        return on_hub(repository).error is None
    return is_there(path) or (repository is not None and on_hub(repository).error is None)
