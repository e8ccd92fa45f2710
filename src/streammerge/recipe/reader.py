"""Reading of recipes: a file, plain data or arguments -> one frozen :class:`Recipe`, and back to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from streammerge.errors import RecipeError, printable
from streammerge.formats.records import RECIPE_FILE
from streammerge.methods.registry import LINEAR, find_method
from streammerge.recipe.checks import Adapters, check, check_experts, ignored, no_adapters, raise_all
from streammerge.recipe.document import Document, parse_documents, to_json, to_yaml
from streammerge.recipe.fields import FormOf, Positions, Problems
from streammerge.recipe.locations import located, travelling
from streammerge.recipe.model import Model, OutputRequest, Recipe, Reference, Rule, Slice, SliceSource
from streammerge.stores.base import Location
from streammerge.stores.locations import HERE, PathLike, parse

__all__ = [
    "Model",
    "OutputRequest",
    "Recipe",
    "Reference",
    "Rule",
    "Slice",
    "SliceSource",
    "checked",
    "json_schema",
    "read_recipe",
    "recipe_of_receipt",
    "to_json",
    "to_yaml",
    "travelling",
]

_MOST_BYTES = 16 << 20


def checked(recipe: Recipe) -> Recipe:
    """Returns the recipe if it has no mistakes. Raises RecipeError with all of them."""
    problems = Problems()
    check(recipe, problems)
    raise_all(problems, recipe.positions)
    return recipe


def recipe_of_receipt(
    data: Mapping[str, Any], own_methods: bool, folders: list[Location], adapters: Adapters = no_adapters
) -> Recipe:
    """Reads the recipe in a receipt, which may come from a stranger. Finds its models in the folders, and nowhere else.
    ``adapters``: tells whether models are adapters.

    Raises VerifyError for an absolute path, which no receipt of ours holds, and RecipeError for any other mistake.
    """
    return _read([Document(data, {}, [])], "the recipe", folders, own_methods, True, adapters)


def read_recipe(
    source: PathLike | Mapping[str, Any],
    own_methods: bool = False,
    folder: Location | None = None,
    adapters: Adapters = no_adapters,
    vary: Callable[[Recipe], Recipe] | None = None,
) -> Recipe:
    """Reads a recipe from a YAML file, or from a dict with the same keys, and finds its models.

    Paths in a file are relative to the current folder or the file's folder; those in a dict, to ``folder`` if it is
    given. ``own_methods``: whether it may name methods that are the user's own code. ``adapters``: tells whether models
    are adapters. ``vary``: makes another recipe of what was read, before that is checked. Raises RecipeError with every
    mistake and its line.
    """
    if isinstance(source, Mapping):
        return _read([Document(source, {}, [])], "the recipe", [folder or HERE], own_methods, adapters=adapters, vary=vary)
    path = parse(source)
    name = printable(source)
    if not path.is_file():
        what = "is not a file; a recipe is a YAML file" if path.exists() else "does not exist"
        raise RecipeError(path.broken_link() or f"{name} {what}")
    try:
        size = path.size
        if size > _MOST_BYTES:
            raise RecipeError(f"{name} has {size} bytes, beyond the limit of {_MOST_BYTES} for a recipe")
        text = path.read(0, size).decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{name} cannot be read ({printable(error.strerror or error)})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not UTF-8 text; save the recipe as UTF-8") from error
    documents = parse_documents(text, str(source))
    folders = [HERE, path.parent] + ([path.parent.parent] if path.name == RECIPE_FILE else [])
    return _read(documents, name, folders, own_methods, adapters=adapters, vary=vary)


def _read(
    documents: list[Document],
    name: str,
    folders: list[Location],
    own_methods: bool,
    confined: bool = False,
    adapters: Adapters = no_adapters,
    vary: Callable[[Recipe], Recipe] | None = None,
) -> Recipe:
    from streammerge.recipe.stages import check_stages, gathered

    problems = Problems()
    for each in documents:
        _refuse_others(each.data, name)
    try:
        whole = gathered(documents, problems)
    except RecursionError:
        raise RecipeError(f"{name} is nested too deeply") from None
    data, positions = whole.data, whole.positions
    for key in whole.doubled:
        problems.add(key, f"the key {printable(key[-1])} is given twice")
    recipe = FormOf(Recipe).read(_with_own_methods(data, problems) if own_methods else data, (), problems)
    if recipe is not None:
        recipe = located(
            replace(recipe, positions=positions, stages=_placed(recipe.stages, positions)), folders, problems, confined
        )
        if vary is not None:
            recipe = vary(recipe)
        if recipe.experts:
            problems.add(("experts",), "a recipe with experts has no merge_method; leave that out")
        else:
            check(recipe, problems, as_mergekit=True, adapters=adapters)
        for stage in recipe.stages:
            _check_stage(stage, recipe.stages[stage], problems)
        check_stages(recipe, problems)
        recipe = replace(recipe, ignored=ignored(problems, positions), is_read=True)
    raise_all(problems, positions, name)
    return recipe  # type: ignore[no-any-return]


def _placed(stages: Mapping[str, Recipe], positions: Positions) -> dict[str, Recipe]:
    """Returns the stages with the places of their keys, also as the keys would be called in a recipe of their own."""
    made = {}
    for name, stage in stages.items():
        own = {path[2:]: place for path, place in positions.items() if path[:2] == ("stages", name)}
        made[name] = replace(stage, positions={**positions, **own}, is_read=True)
    return made


def _check_stage(name: str, stage: Recipe, problems: Problems) -> None:
    """Adds every mistake of a stage to the problems, under its place in the whole recipe."""
    above = ("stages", name)
    own = Problems((path[2:] if path[:2] == above and len(path) == 3 else path, said) for path, said in problems)
    count = len(own)
    if stage.experts:
        check_experts(stage, own)
    else:
        check(stage, own, as_mergekit=True)
    for target, found in ((problems, own[count:]), (problems.warnings, own.warnings)):
        target += [(path if path[:2] == above else (*above, *path), said) for path, said in found]


def _refuse_others(data: Any, name: str) -> None:
    """Raises RecipeError for a configuration of another command of mergekit."""
    if not isinstance(data, Mapping) or "merge_method" in data:
        return
    for key, (command, what) in _OTHERS.items():
        if key in data:
            raise RecipeError(f"{name} is a configuration of {command}, {what}")


_OTHERS = {
    "genome": ("mergekit-evolve", "which searches for parameters; merge with the configuration that it finds"),
    "layer_slices": ("bakllama", "an early form; write slices with sources, and merge_method: passthrough"),
}
"""What tells the configurations of mergekit's other commands: a key -> the command, and what to do."""


def _with_own_methods(data: Any, problems: Problems) -> Any:
    """Returns the data with methods in place of names like package.module:function. Imports the methods."""
    if not isinstance(data, Mapping):
        return data
    made = {**data}
    if isinstance(made.get("stages"), Mapping):
        made["stages"] = {name: _with_own_methods(stage, problems) for name, stage in made["stages"].items()}
    if isinstance(made.get("rules"), list):
        made["rules"] = [{**rule} if isinstance(rule, Mapping) else rule for rule in made["rules"]]
    holders = [((), made), *((("rules", n), rule) for n, rule in enumerate(made.get("rules") or ()))]
    for path, each in holders:
        if isinstance(each, dict) and ":" in str(each.get("merge_method")):
            try:
                each["merge_method"] = find_method(str(each["merge_method"]))
            except RecipeError as error:
                problems.add((*path, "merge_method"), str(error))
                each["merge_method"] = LINEAR
    return made


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe, for editors."""
    forms: dict[str, Any] = {}
    reference = FormOf(Recipe).schema(forms)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "streammerge recipe",
        **reference,
        "$defs": forms,
    }
