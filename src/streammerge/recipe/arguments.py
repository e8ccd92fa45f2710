"""Recipes from the arguments of merge() and of the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from streammerge.errors import RecipeError, printable
from streammerge.kernels.chunk import Kernel
from streammerge.methods.contracts import MergeMethod, Parameter
from streammerge.methods.registry import COPY, find_method
from streammerge.recipe.model import Model, OutputRequest, Recipe, Reference, Rule
from streammerge.recipe.patterns import parse_pattern
from streammerge.recipe.reader import checked
from streammerge.recipe.settings import Setting, constant
from streammerge.units import counted, plain_number

Overrides = Mapping[str, Any]
_OF_THE_OUTPUT = ("dtype", "out_dtype", "tokenizer_source", "chat_template", "quantise")
"""Options that say what is written. All others hold for the stages of a recipe too, as in mergekit-multi."""


def recipe_of(
    inputs: Sequence[str],
    method: str | Callable[..., Kernel] | MergeMethod,
    base: str | None,
    weights: Sequence[float] | None,
    parameters: Mapping[str, Any],
    overrides: Overrides,
) -> Recipe:
    """Returns the recipe of these arguments. Raises RecipeError with all mistakes."""
    return checked(unchecked(inputs, method, base, weights, parameters, overrides))


def unchecked(
    inputs: Sequence[str],
    method: str | Callable[..., Kernel] | MergeMethod,
    base: str | None,
    weights: Sequence[float] | None,
    parameters: Mapping[str, Any],
    overrides: Overrides,
) -> Recipe:
    """Returns the recipe of these arguments, whose values are right, but which may lack a base, or have too few models."""
    found = find_method(method)
    if weights is not None:
        if "weight" in parameters:
            raise RecipeError("weights and the parameter weight mean the same; give only one")
        parameters = {**parameters, "weight": _weights(weights, len(inputs))}
    own: list[dict[str, Setting]] = [{} for _ in inputs]
    shared: dict[str, Setting] = {}
    for name, given in parameters.items():
        known, value = name.rstrip("_"), plain_number(given)
        parameter = found.parameters.get(known)
        if known in shared or any(known in each for each in own):
            raise RecipeError(f"the parameter {known} is given twice")
        if parameter is not None and parameter.per_model and _is_list(value):
            for each, one in zip(own, _one_each(parameter, list(value), inputs, base), strict=True):
                if one is not None:
                    each[known] = constant(one)
        elif value is not None:
            shared[known] = constant(parameter.parse_one(value) if parameter else str(value))
    models = tuple(Model(path, parameters=settings) for path, settings in zip(inputs, own, strict=True))
    output = OutputRequest() if base is None else OutputRequest(container="first")
    recipe = Recipe(found, models, base_model=base, parameters=shared, output=output)
    return overridden(recipe, overrides)


def overridden(recipe: Recipe, overrides: Overrides) -> Recipe:
    """Returns the recipe with the given options in place of its keys. An option that was not given is None."""
    given = {name: value for name, value in overrides.items() if value is not None}
    if "dtype" in given:
        recipe = replace(recipe, out_dtype=None)
    output = {name: given.pop(name) for name in list(given) if name in OutputRequest.__dataclass_fields__}
    if recipe.stages:
        shared = {name: value for name, value in given.items() if name not in _OF_THE_OUTPUT}
        recipe = replace(recipe, stages={name: overridden(stage, shared) for name, stage in recipe.stages.items()})
    written = replace(recipe.output, **_parsed(OutputRequest, output))
    return replace(recipe, output=written, **_parsed(Recipe, given))


def _parsed(form: type[Any], given: Overrides) -> dict[str, Any]:
    """Converts options to the values of a form's keys. Raises RecipeError."""
    made = {}
    for name, value in given.items():
        kind = form.__dataclass_fields__[name].metadata["kind"]
        try:
            made[name] = kind.parse(value)
        except RecipeError as error:
            raise RecipeError(f"`{name}`: {error}") from error
        except (ValueError, TypeError) as error:
            raise RecipeError(f"`{name}` takes {kind.words}, not {printable(value)}") from error
    return made


def conversion(
    path: str, drop: Sequence[str], keep: Sequence[str], overrides: Overrides, like: str | None = None
) -> Recipe:
    """Returns a recipe that copies one input. Patterns to drop and to keep become rules. Raises RecipeError.

    ``like``: a checkpoint that gives everything but the tensors. Then ``state_dict`` and the patterns are about it, and
    ``rename`` is about the input.
    """
    if "" in (*drop, *keep):
        raise RecipeError("`drop` and `keep` take a pattern, like 'dvae.*'")
    recipe = overridden(Recipe(COPY, (Model(path),), output=OutputRequest()), overrides)
    if like is None and not drop and not keep:
        return checked(recipe)  # most conversions need no pattern, nor the library for them
    everything = (parse_pattern("*"),)
    rules = [Rule((parse_pattern(pattern),), drop=True) for pattern in drop]
    if like is None:
        rules += [Rule((parse_pattern(pattern),)) for pattern in keep]
    else:
        kept = [(parse_pattern(pattern),) for pattern in keep] or [everything]
        rules += [Rule(patterns, copy=path, rename=recipe.rename) for patterns in kept]
        model = Model(like, state_dict=recipe.state_dict)
        recipe = replace(recipe, models=(model,), state_dict=None, rename=())
    rules += [Rule(everything, drop=True)] if keep else []
    return checked(replace(recipe, rules=tuple(rules)))


def _weights(weights: Sequence[float], inputs: int) -> list[float]:
    if len(weights) != inputs:
        whole = len(weights) == 2 * inputs and all(float(each).is_integer() for each in weights)
        advice = "give one weight per input, like 0.6,0.4" + "; a decimal number has a point, not a comma" * whole
        raise RecipeError(f"{counted(len(weights), 'weight')} for {counted(inputs, 'input')}; {advice}")
    if not all(map(math.isfinite, weights)):
        raise RecipeError("weights must be finite numbers")
    return list(map(float, weights))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _one_each(parameter: Parameter, values: list[Any], inputs: Sequence[str], base: str | None) -> list[Any]:
    """Returns one value per input. The values are as many as the inputs, one fewer (none for the base), or a single
    one."""
    parsed = [parameter.parse_one(value) for value in values]
    is_base = [base is not None and Reference(path).same(Reference(base)) for path in inputs]
    if len(parsed) == 1:
        return parsed * len(inputs)
    if len(parsed) == len(inputs):
        return parsed
    if any(is_base) and len(parsed) == len(inputs) - 1:
        rest = iter(parsed)
        return [None if base_too else next(rest) for base_too in is_base]
    raise RecipeError(
        f"{counted(len(values), 'value')} of {parameter.name} for {counted(len(inputs), 'model')}; give one for each, "
        "or a single one for all"
    )
