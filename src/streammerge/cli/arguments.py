"""Turns the typed options into arguments of the Python API."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from streammerge.cli.advice import check_inputs
from streammerge.errors import RecipeError, StreammergeError, printable
from streammerge.options.base import options_of
from streammerge.options.functions import CONVERT, MERGE, REPORT, VERIFY
from streammerge.options.values import number_or_percent

_NEGATED = {f"no_{name}": name for name, each in options_of(*MERGE, *CONVERT, *VERIFY, *REPORT).items() if each.negated}


def as_arguments(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the typed options as arguments of the Python function with the command's name."""
    made = dict(typed)
    for flag, name in _NEGATED.items():
        if made.pop(flag, False):
            made[name] = False
    if made.get("weights") is not None:
        made["weights"] = _numbers("`weights`", made["weights"])
    if "parameters" in made:
        made["parameters"] = _parameters(made["parameters"], made["weights"] is not None)
        weight = made["parameters"].get("weight")
        if isinstance(weight, list):
            made["weights"] = _numbers("-p weight", ",".join(made["parameters"].pop("weight")))
    return made


def inputs_and_recipe(inputs: Sequence[str], weights: str | None) -> tuple[Sequence[str], Mapping[str, Any] | None]:
    """Returns the inputs, or in their place the recipe that is read from stdin for the input ``-``.

    Raises UsageError for a number among the inputs.
    """
    if list(inputs) == ["-"]:
        from streammerge.recipe.document import parse_yaml

        made = parse_yaml(sys.stdin.read(), "stdin").data
        if not isinstance(made, Mapping):
            raise RecipeError("stdin holds no recipe; write keys like merge_method and models with their values")
        return (), made
    check_inputs(inputs, weights)
    return inputs, None


def output_name(
    out: str,
    inputs: Sequence[str],
    recipe: Mapping[str, Any] | None,
    tell: Callable[[str], object],
    own_methods: bool = False,
) -> str:
    """Returns the output's name: without a suffix, the kind of the first input decides.

    Says so by ``tell``. A name that ends in ``/``, or an existing folder, stays a folder. If the first
    input has no suffix either, the output is a file of that name, which the same loader opens.
    """
    from streammerge.planning.outputs.container import ending_like, ending_of
    from streammerge.requests.inputs import is_special
    from streammerge.stores.locations import parse

    place = parse(out)
    if out == "-" or ending_of(place.name) or place.ends_in_slash or place.is_folder() or is_special(place):
        return out
    first = _first_input(inputs, recipe, own_methods)
    if first is None or not parse(first).is_file():
        return out
    ending, why = ending_like(parse(first)), "like the first input"
    if parse(first).suffix.lower() == ".gguf":
        why = "since GGUF is not written"
    if ending:
        shown = printable(out)
        tell(f"note: {shown} is written as {shown}{ending}, {why}; {shown}/ would be a folder")
    return out + ending


def _first_input(inputs: Sequence[str], recipe: Mapping[str, Any] | None, own_methods: bool) -> str | None:
    """Returns the path of the first model, None if it cannot be told yet."""
    from streammerge.checkpoints.globs import expand
    from streammerge.recipe.names import is_recipe_name
    from streammerge.recipe.reader import read_recipe
    from streammerge.stores.locations import parse

    try:
        if recipe is not None or (len(inputs) == 1 and is_recipe_name(inputs[0])):
            found = read_recipe(inputs[0] if recipe is None else recipe, own_methods)
            return found.inputs[0] if found.inputs else None
        name = inputs[0]
        weighted = re.fullmatch(r"(.+):[-+.\d]+%?", name)
        return expand([weighted[1] if weighted and not parse(name).lexists() else name])[0]
    except (StreammergeError, OSError, IndexError):
        return None  # the merge itself tells what is wrong


def _parameters(typed: Iterable[str], weighted: bool) -> dict[str, Any]:
    """Returns ``NAME=VALUE`` pairs as a dict. ``VALUE,VALUE`` becomes a list."""
    made: dict[str, Any] = {}
    for each in typed:
        name, equals, value = each.partition("=")
        if not equals:
            raise RecipeError(f"-p {printable(each)}: write it as NAME=VALUE")
        if name in made or (name == "weight" and weighted):
            raise RecipeError(f"-p {printable(name)} is given twice")
        made[name] = value.split(",") if "," in value else value
    return made


def values_of_parameters(typed: Iterable[str]) -> dict[str, Any]:
    """Returns ``NAME=VALUE`` pairs of a sweep as a dict. A name that is given several times has a list of alternatives."""
    made: dict[str, list[str]] = {}
    for each in typed:
        name, equals, value = each.partition("=")
        if not equals:
            raise RecipeError(f"-p {printable(each)}: write it as NAME=VALUE")
        made.setdefault(name, []).append(value)
    return {
        name: [each.split(",") if "," in each and name != "weight" else each for each in values]
        if len(values) > 1 or name == "weight" or "," in values[0]
        else values[0]
        for name, values in made.items()
    }


def lists_of_numbers(typed: Iterable[str]) -> list[list[float]]:
    """Returns texts like ``0.6,0.4`` as lists of numbers."""
    return [_numbers("`weights`", each) for each in typed]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [number_or_percent(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"{option} takes numbers joined by commas, like 0.6,0.4, not {printable(text)}") from error
