"""A recipe with other parameters, as if its author had written them: what a sweep varies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from streammerge.errors import RecipeError, printable
from streammerge.methods.contracts import MergeMethod, Parameter
from streammerge.recipe.adapted import resolved
from streammerge.recipe.model import Model, Recipe, Slice, SliceSource
from streammerge.recipe.settings import Settings, constant
from streammerge.units import counted, plain_number

_WEIGHT = "weight"
Entry = TypeVar("Entry", Model, SliceSource)


def varied(recipe: Recipe, weights: Sequence[float] | None, parameters: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with these parameters under its own ``parameters``, in place of what stood there.

    So rules, models, slices and modules that give one themselves keep theirs. ``weights`` and lists of values go to the
    models, one each, in each list of models. Raises RecipeError for a parameter that no method of the recipe has, for one
    that would change nothing, and for a wrong number of values.
    """
    if weights is not None:
        if _WEIGHT in parameters:
            raise RecipeError("weights and the parameter weight mean the same; give only one")
        recipe = _with_each(recipe, _parameter(recipe, _WEIGHT), list(map(float, weights)))
    for given, value in parameters.items():
        name, value = given.rstrip("_"), plain_number(value)
        parameter = _parameter(recipe, name)
        if value is None:
            continue
        if isinstance(value, Sequence) and not isinstance(value, str):
            if not parameter.per_model:
                raise RecipeError(f"{name} has one value for all models, not {printable(value, 60)}")
            recipe = _with_each(recipe, parameter, [parameter.parse_one(each) for each in value])
            continue
        _refuse_without_effect(recipe, parameter)
        recipe = replace(recipe, parameters={**recipe.parameters, name: constant(parameter.parse_one(value))})
    return recipe


def varied_models(recipe: Recipe) -> list[str]:
    """Returns the models that ``weights`` have one number for: those of the first list."""
    for entries, _ in _lists(recipe):
        return [each.model for each in entries if not _is_base(recipe, each)]
    return []


def _parameter(recipe: Recipe, name: str) -> Parameter:
    methods: list[MergeMethod] = [recipe.merge_method, *(rule.merge_method for rule in recipe.rules if rule.merge_method)]
    for method in methods:
        if name in method.parameters:
            return method.parameters[name]
    raise RecipeError(f"{recipe.merge_method.name} has no parameter {printable(name)}; {recipe.merge_method.hint(name)}")


def _lists(recipe: Recipe) -> Iterator[tuple[Sequence[Model | SliceSource], list[Settings]]]:
    """Yields each list of models, with the settings between it and the recipe's own."""
    parts = [(recipe.models, recipe.slices, list[Settings]())]
    parts += [(each.models, each.slices, [each.parameters]) for each in recipe.modules.values()]
    for models, slices, above in parts:
        if models:
            yield models, above
        for each in slices:
            yield each.sources, [each.parameters, *above]


def _is_base(recipe: Recipe, entry: Model | SliceSource) -> bool:
    base = recipe.base_model
    return base is not None and recipe.based and resolved(entry.model) == resolved(base)


def _refuse_without_effect(recipe: Recipe, parameter: Parameter) -> None:
    """Raises RecipeError if every list of models has the parameter on a level that wins over the recipe's own."""
    name, whose = parameter.name, ""
    for entries, above in _lists(recipe):
        if any(_is_for_all(level, name) for level in above):
            whose = whose or "slice or module"
        elif parameter.per_model and all(_is_for_all(e.parameters, name) or _is_base(recipe, e) for e in entries):
            whose = whose or "model"
        else:
            return
    if whose:
        hint = "pass `weights`, one number per model, or change it there" if name == _WEIGHT else "change it there"
        raise RecipeError(
            f"each {whose} of the recipe gives {name} itself, and that wins over one for the whole recipe; {hint}"
        )


def _is_for_all(settings: Settings, name: str) -> bool:
    """Whether the settings have a value of the parameter for every tensor."""
    return any(case.filter in (None, "*") for case in settings.get(name, ()))


def _with_each(recipe: Recipe, parameter: Parameter, values: Sequence[Any]) -> Recipe:
    """Returns the recipe with one value for each model, in each list of models."""

    def own(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        return _each_with(recipe, parameter, entries, values)

    def parts(slices: tuple[Slice, ...]) -> tuple[Slice, ...]:
        return tuple(replace(each, sources=own(each.sources)) for each in slices)

    modules = {
        name: replace(each, models=own(each.models), slices=parts(each.slices)) for name, each in recipe.modules.items()
    }
    return replace(recipe, models=own(recipe.models), slices=parts(recipe.slices), modules=modules)


def _each_with(
    recipe: Recipe, parameter: Parameter, entries: tuple[Entry, ...], values: Sequence[Any]
) -> tuple[Entry, ...]:
    chosen = [not _is_base(recipe, each) for each in entries] if len(values) < len(entries) else [True] * len(entries)
    if entries and len(values) != sum(chosen):
        models = [each.model for each, taken in zip(entries, chosen, strict=True) if taken]
        raise RecipeError(
            f"{counted(len(values), 'value')} of {parameter.name} for {counted(len(models), 'model')} of the recipe; "
            "give one number for each"
        )
    rest = iter(values)
    return tuple(
        replace(each, parameters={**each.parameters, parameter.name: constant(next(rest))}) if taken else each
        for each, taken in zip(entries, chosen, strict=True)
    )
