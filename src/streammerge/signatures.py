"""The common behaviour of the public functions: they document every option, and raise RecipeError for wrong keywords."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import cleandoc, signature
from typing import Any, ParamSpec, TypeVar

from streammerge.errors import RecipeError, StreammergeError, listed, printable
from streammerge.methods.registry import LINEAR, find_method, list_methods
from streammerge.options.base import Option, Options, options_of

P = ParamSpec("P")
R = TypeVar("R")


def takes(*groups: type[Options]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function with the options of these classes: adds them to its documentation, and checks its calls.

    A keyword that the function does not have raises RecipeError, which names the option or the parameter that was meant.
    """
    described = "\n".join(map(_described, options_of(*groups).values()))

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        form = signature(function)
        name = function.__name__

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for keyword in kwargs:
                if keyword not in form.parameters:
                    raise RecipeError(_unknown(name, keyword, list(form.parameters), kwargs))
            try:
                form.bind(*args, **kwargs)
            except TypeError as error:
                raise RecipeError(f"{name} cannot be called like this: {printable(error)}") from error
            return function(*args, **kwargs)

        checked.__doc__ = f"{cleandoc(function.__doc__ or '')}\n\n{described}"
        return checked

    return decorate


_ELSEWHERE = {
    **dict.fromkeys(
        ("verbose", "callback"), "pass `progress=True`, or `listener=`, a function that is called with each event"
    ),
    "device": "streammerge computes on CPUs, so there is no device to choose",
}
"""What people pass -> what to say about it."""


def _described(option: Option) -> str:
    default = option.otherwise or (repr(option.default) if option.default not in (None, ()) else "")
    choices = f" ({', '.join(option.choices)})" if option.choices else ""
    return f"``{option.name}``{choices}: {option.doc}{f' [default: {default}]' if default else ''}"


def _unknown(function: str, keyword: str, known: list[str], given: Mapping[str, Any]) -> str:
    """Returns the message for an unknown keyword, with the keyword or parameter that was probably meant."""
    import difflib

    value = given[keyword]
    said = f"{function} has no option {printable(keyword)}"
    shown = repr(value) if isinstance(value, bool | int | float | str | list) and len(repr(value)) < 40 else "..."
    own, others = _parameters(given.get("method")) if "parameters" in known else ({}, {})
    word = keyword.rstrip("_")
    whose = own.get(word) or others.get(word)
    if whose:
        return f"{word} is a parameter of {listed(whose)}; pass `parameters={{{word!r}: {shown}}}`"
    if word in _ELSEWHERE and "listener" in known:
        return f"{said}; {_ELSEWHERE[word]}"
    near = difflib.get_close_matches(keyword, [*known, *own], n=1)
    if near and near[0] not in known:
        return f"{said}; did you mean `parameters={{{near[0]!r}: {shown}}}`, a parameter of {listed(own[near[0]])}?"
    return f"{said}; did you mean {near[0]}?" if near else f"{said}; it has {', '.join(known)}"


def _parameters(method: Any) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Returns parameter -> names of the methods that have it, for the requested method and for all methods."""
    try:
        found = find_method(method or LINEAR)
    except StreammergeError:
        found = LINEAR
    every: dict[str, list[str]] = {}
    for each in list_methods().values():
        for name in each.parameters:
            every.setdefault(name, []).append(each.name)
    return {name: [found.name] for name in found.parameters}, every
