"""Locations of a recipe's models, and their names in a recipe that travels with an output."""

from __future__ import annotations

import posixpath
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, VerifyError, listed, printable
from streammerge.recipe.adapted import absent, parts_of, split, without_revisions
from streammerge.recipe.hub_names import on_the_hub
from streammerge.recipe.names import is_held
from streammerge.recipe.stage_names import stage_of, stage_text
from streammerge.stores.base import Location
from streammerge.stores.hub_places import on_hub
from streammerge.stores.locations import HERE, has_scheme, parse
from streammerge.stores.repositories import leading_repository, named_repository, snapshot

if TYPE_CHECKING:  # inspecting a checkpoint needs this module, and no recipe
    from streammerge.recipe.fields import Path as Key
    from streammerge.recipe.fields import Problems
    from streammerge.recipe.model import Recipe
    from streammerge.recipe.settings import Settings


def located(recipe: Recipe, folders: list[Location], problems: Problems, confined: bool = False) -> Recipe:
    """Returns the recipe with the paths at which its models are found. Adds absent models to the problems.

    A path is relative to the first of these folders that contains it. Otherwise it is the name of a repository of the
    Hugging Face hub, at the commit that its revision is now. ``confined``: looks at no place outside the folders and the
    hub's cache, because a stranger may have written the names. Then VerifyError for an absolute path.
    """
    from streammerge.recipe.scalars import UNREAD

    names, written = dict[str, str](), dict[str, str]()
    stages = recipe.stages
    for named in recipe.named_models:
        if named in stages:
            names[named] = stage_text(named)
            continue
        if confined and named != UNREAD and not lies_within(named, folders):
            shown = printable(named)
            where = " or ".join(dict.fromkeys(printable(folder) for folder in folders))
            problems.add(_place(recipe, named), f"{shown} leads out of {where}; give its folder as `inputs`")
            names[named] = UNREAD
            continue
        found = named if named == UNREAD else _find(named, folders, confined, written, stages)
        names[named] = found or (named if _is_path(named) else UNREAD)
        if found is None:
            said = _absent(named, folders, confined)
            problems.add(_place(recipe, named), f"{said}; the stages are {listed(list(stages))}" if stages else said)
    written |= {found: named for named, found in names.items()}
    return replace(recipe.renamed(names), written=written)


def lies_within(named: str, folders: list[Location]) -> bool:
    """Whether a name means a place below one of the folders. Asks no store, and imports none.

    VerifyError for an absolute path of this machine.
    """
    if not has_scheme(named):
        if named.startswith(("/", "~")):
            raise VerifyError("its receipt names inputs by absolute paths, which none of streammerge's does")
        return not _leads_up(named)
    scheme = named.partition("://")[0].lower()
    if scheme == HERE.store.scheme:
        raise VerifyError("its receipt names inputs by absolute paths, which none of streammerge's does")
    return any(
        folder.store.scheme == scheme and not _leads_up(posixpath.relpath(parse(named, folder).key, folder.key))
        for folder in folders
    )


def _leads_up(path: str) -> bool:
    return posixpath.normpath(path).split("/")[0] == ".."


def _is_path(named: str) -> bool:
    """Whether the system accepts the text as a path."""
    return "\0" not in named and not any("\ud800" <= c <= "\udfff" for c in named)


def _find(
    named: str, folders: list[Location], confined: bool, written: dict[str, str], stages: Collection[str] = ()
) -> str | None:
    """Returns the place of a model, or those of a model and its adapters. ``written`` gets each part with its name."""
    found = _find_one(named, folders, confined)
    if found is not None or "+" not in named:
        return found

    def exists(path: str) -> bool:
        return path in stages or (_may_stand(path, folders, confined) and _find_one(path, folders, confined) is not None)

    parts = split(named, exists)
    if parts is None:
        return None
    places = [_find_one(path, folders, confined) or path for path in parts.paths]
    if parts.base in stages:  # an adapter of this name is a path, as in mergekit
        places[0] = stage_text(parts.base)
    written |= dict(zip(places, parts.paths, strict=True))
    return str(parts.moved(places))


def _may_stand(path: str, folders: list[Location], confined: bool) -> bool:
    """Whether a path that a stranger may have written leads to no place outside the folders."""
    if not confined:
        return True
    try:
        return lies_within(path, folders)
    except VerifyError:
        return False


def _find_one(named: str, folders: list[Location], confined: bool) -> str | None:
    if is_held(named):
        return None
    repository = named_repository(named)
    if repository is not None and has_scheme(named):
        return on_hub(repository).place or None
    for folder in folders:
        try:
            place = parse(named, folder)
        except RecipeError:  # a scheme that no store has
            return None
        if place.exists():
            return str(place)
    if repository is None:
        return None
    if confined:  # a stranger's name asks nobody
        cached = snapshot(repository) if repository.is_pinned else None
        return None if cached is None else str(cached / repository.inner if repository.inner else cached)
    return on_hub(repository).place or None


def _absent(named: str, folders: list[Location], confined: bool = False) -> str:
    shown = printable(named)
    try:
        places = [parse(named, folder) for folder in folders]
    except RecipeError as error:
        return str(error)
    for place in places:
        if broken := place.broken_link():
            return broken
    if "+" in named:

        def exists(path: str) -> bool:
            return _may_stand(path, folders, confined) and _find_one(path, folders, confined) is not None

        return absent(named, exists) or f"{shown} does not exist"
    if said := without_revisions(
        named, lambda path: _may_stand(path, folders, confined) and bool(_find_one(path, folders, confined))
    ):
        return said
    repository = named_repository(named)
    if repository is not None and has_scheme(named):
        return f"{shown}: {on_hub(repository).error}"
    if repository is not None and not confined:
        return f"{shown} does not exist{on_the_hub(named)}"
    if folders != [HERE] and not parse(named).is_absolute:
        looked = " or ".join(dict.fromkeys(printable(folder) for folder in folders))
        return f"{shown} does not exist in {looked}; run this from the folder that holds it"
    return f"{shown} does not exist"


def _place(recipe: Recipe, named: str) -> Key:
    """Returns the path of the first key that names the model."""
    if named not in recipe.own_models:
        holder = next((name for name, stage in recipe.stages.items() if named in stage.own_models), None)
        if holder is not None:
            path = _place(recipe.stages[holder], named)
            return path if path[:1] == ("stages",) else ("stages", holder, *path)
    if recipe.base_model == named:
        return ("base_model",)
    for entry in recipe.entries:
        if entry.model == named:
            return (*entry.path, "model")
    if recipe.tokens is not None and named in recipe.tokens.models:
        return ("tokenizer_source",) if recipe.tokenizer_source else ("tokenizer",)
    return next(((*rule.path, "copy") for rule in recipe.rules if rule.copy == named), ())


def travelling(recipe: Recipe) -> Recipe:
    """Returns the recipe that travels with its output: with every parameter, and without paths of this machine.

    A parameter that a rule's method also has is left out, because the defaults of the two methods may differ.
    """
    stages = {name: replace(stage, parameters=_all_parameters(stage)) for name, stage in recipe.stages.items()}
    return replace(recipe, parameters=_all_parameters(recipe), stages=stages).renamed(travelling_names(recipe))


def _all_parameters(recipe: Recipe) -> Settings:
    """Returns the parameters of a recipe with the defaults of those that it does not give."""
    from streammerge.recipe.settings import Case, is_same_for_all

    settings = dict(recipe.parameters)
    for name, parameter in recipe.merge_method.parameters.items():
        default = parameter.default[0] if isinstance(parameter.default, tuple) else parameter.default
        known = settings.get(name, ())
        own = parameter.per_model and all(is_same_for_all(e.parameters.get(name, ())) for e in recipe.entries)
        others = any(name in rule.merge_method.parameters for rule in recipe.rules if rule.merge_method)
        said = own or others or any(case.filter in (None, "*") for case in known)
        if not said and not parameter.required and isinstance(default, bool | int | float | str):
            settings[name] = (*known, Case(default))
    return settings


def travelling_names(recipe: Recipe) -> dict[str, str]:
    """Returns a name for each model. Each keeps its name unless one is absolute or leads out of the current folder; then
    all names are relative to their common folder.

    This holds for paths inside names with a scheme too, such as those of archives, unless the store says that its names
    mean the same on every machine. The parts of a model with adapters have names of their own, and the model that of its
    parts.
    """
    composed = {named: parts for named in recipe.named_models if (parts := split(named)) is not None}
    paths = list(dict.fromkeys(path for named in recipe.named_models for path in parts_of(named)))
    held = {path: path for path in paths if is_held(path)}
    held |= {path: name for path in paths if (name := stage_of(path)) is not None}
    written = {path: recipe.written.get(path, path) for path in paths if path not in held}
    places = {path: parse(path).absolute() for path in written}
    far = {path: path for path, place in places.items() if place.store.always_absolute}
    far |= {path: str(found) for path, place in places.items() if (found := leading_repository(place)) is not None}
    far |= _below_common_folders({path: place for path, place in places.items() if place.store.private})
    places = {path: place for path, place in places.items() if path not in far}
    local = {path: name for path, name in written.items() if path in places}
    spelled: dict[Location, str] = {}
    for path, name in local.items():  # of one that was named twice, the first that stays inside
        if not _leads_out(name):
            spelled.setdefault(places[path], name)
    local = {path: spelled.get(places[path], name) for path, name in local.items()}
    apart = len(set(local.values())) == len(set(places.values()))
    if local and (not apart or any(map(_leads_out, local.values()))):
        common = posixpath.commonpath([place.parent.key for place in places.values()])
        local = {
            path: place.store.spelled(posixpath.relpath(place.key, common)) + "/" * path.endswith("/")
            for path, place in places.items()
        }
    normal = {path: _normal(name) for path, name in local.items()}
    made = held | far | {path: f"./{name}" if name.startswith("~") else name for path, name in normal.items()}
    return made | {named: str(parts.moved([made[path] for path in parts.paths])) for named, parts in composed.items()}


def _below_common_folders(places: dict[str, Location]) -> dict[str, str]:
    """Returns a name for each place in a private store: its path below the common folder of all places in that store.

    Returns the full names if two places would have one name.
    """
    made: dict[str, str] = {}
    for store in {place.store for place in places.values()}:
        keys = {path: place.key for path, place in places.items() if place.store == store}
        common = posixpath.commonpath([posixpath.dirname(key) for key in keys.values()])
        made |= {path: posixpath.relpath(key, common) + "/" * path.endswith("/") for path, key in keys.items()}
    return made if len(set(made.values())) == len({*places.values()}) else {path: path for path in places}


def _normal(name: str) -> str:
    """Returns the name with its path in the shortest spelling."""
    scheme, colon, path = name.rpartition("://")
    return scheme + colon + posixpath.normpath(path) + "/" * path.endswith("/")


def _leads_out(name: str) -> bool:
    """Whether a name is absolute, or leads out of the folder in which it is written."""
    return name.startswith(("/", "~")) or name[:5].lower() == "file:" or ":///" in name or _leads_up(name)
