"""Locations of a recipe's models, and their names in a recipe that travels with an output."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from streammerge.errors import printable
from streammerge.recipe.fields import Path as Key
from streammerge.recipe.fields import Problems
from streammerge.recipe.model import Recipe
from streammerge.recipe.scalars import UNREAD
from streammerge.recipe.settings import Case, is_same_for_all
from streammerge.stores.local import broken_link


def located(recipe: Recipe, folders: list[Path], problems: Problems) -> Recipe:
    """Returns the recipe with the paths at which its models are found. Adds absent models to the problems.

    A path is relative to the first of these folders that contains it. Otherwise it is the name of a repository in the
    local cache of the Hugging Face hub. Nothing is downloaded.
    """
    names = {}
    for named in recipe.named_models:
        found = named if named == UNREAD else _find(named, folders)
        names[named] = found or (named if _is_path(named) else UNREAD)
        if found is None:
            problems.add(_place(recipe, named), _absent(named, folders))
    return replace(recipe.renamed(names), written={found: named for named, found in names.items()})


def _is_path(named: str) -> bool:
    """Whether the system accepts the text as a path."""
    return "\0" not in named and not any("\ud800" <= c <= "\udfff" for c in named)


def _find(named: str, folders: list[Path]) -> str | None:
    for folder in folders:
        path = os.path.join(folder, os.path.expanduser(named)) if folder != Path() else os.path.expanduser(named)  # noqa: PTH111, PTH118 - keeps a trailing slash
        if os.path.exists(path):  # noqa: PTH110 (Path.exists raises for a name that is too long)
            return path
    return _cached(named)


def _cached(name: str) -> str | None:
    """Returns the snapshot of a repository in the hub's cache, if there is one."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")  # noqa: PTH118
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()  # noqa: PTH118
    repository = cache / f"models--{name.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    snapshot = repository / "snapshots" / revision
    return str(snapshot) if re.fullmatch("[0-9a-f]{40}", revision) and snapshot.is_dir() else None


def _absent(named: str, folders: list[Path]) -> str:
    shown = printable(named)
    for folder in folders:
        if broken := broken_link(os.path.join(folder, os.path.expanduser(named))):  # noqa: PTH111, PTH118
            return broken
    if "+" in named:
        return f"{shown}: LoRA adapters are not supported yet; merge the adapter into its model and give that folder"
    if "@" in named:
        return f"{shown}: revisions are not supported yet; download that revision and give its folder"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        return f"{shown} does not exist; if it is on the hub, `hf download {shown}` fetches it"
    if folders != [Path()] and not Path(named).is_absolute():
        looked = " or ".join(dict.fromkeys(printable(folder) for folder in folders))
        return f"{shown} does not exist in {looked}; run this from the folder that holds it"
    return f"{shown} does not exist"


def _place(recipe: Recipe, named: str) -> Key:
    """Returns the path of the first key that names the model."""
    if recipe.base_model == named:
        return ("base_model",)
    for entry in recipe.entries:
        if entry.model == named:
            return (*entry.path, "model")
    return next(((*rule.path, "copy") for rule in recipe.rules if rule.copy == named), ())


def resolved(recipe: Recipe) -> Recipe:
    """Returns the recipe that travels with its output: with every parameter, and without paths of this machine.

    A parameter that a rule's method also has is left out, because the defaults of the two methods may differ.
    """
    settings = dict(recipe.parameters)
    for name, parameter in recipe.merge_method.parameters.items():
        default = parameter.default[0] if isinstance(parameter.default, tuple) else parameter.default
        known = settings.get(name, ())
        own = parameter.per_model and all(is_same_for_all(e.parameters.get(name, ())) for e in recipe.entries)
        others = any(name in rule.merge_method.parameters for rule in recipe.rules if rule.merge_method)
        said = own or others or any(case.filter in (None, "*") for case in known)
        if not said and not parameter.required and isinstance(default, bool | int | float | str):
            settings[name] = (*known, Case(default))
    return replace(recipe, parameters=settings).renamed(travelling_names(recipe))


def travelling_names(recipe: Recipe) -> dict[str, str]:
    """Returns a name for each model. Each keeps its name unless one has an absolute path; then all names are relative
    to their common folder."""
    written = {path: recipe.written.get(path, path) for path in recipe.named_models}
    places = {path: Path(os.path.abspath(path)) for path in written}  # noqa: PTH100 - does not resolve links
    spelled: dict[Path, str] = {}
    for path, name in written.items():  # a model with several names gets the first that is not absolute
        if not Path(name).is_absolute():
            spelled.setdefault(places[path], name)
    written = {path: spelled.get(places[path], name) for path, name in written.items()}
    apart = len(set(written.values())) == len(set(places.values()))
    if not apart or any(Path(name).is_absolute() for name in written.values()):
        common = Path(os.path.commonpath([place.parent for place in places.values()]))
        written = {path: place.relative_to(common).as_posix() for path, place in places.items()}
    return {path: f"./{name}" if name.startswith("~") else name for path, name in written.items()}
