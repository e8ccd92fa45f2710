"""From what was typed to the arguments of the Python API."""

from __future__ import annotations

from typing import Any

from streammerge.errors import RecipeError, printable


def plan_arguments(wishes: dict[str, Any]) -> dict[str, Any]:
    """What was typed, as the arguments of :func:`api.plan`; a method's parameters are arguments beside the others."""
    from inspect import signature

    from streammerge import api

    taken = ({*signature(api.plan).parameters} | {*signature(api.merge).parameters}) - {"normalize"}
    made = {key: value for key, value in wishes.items() if key not in ("weights", "no_normalize", "parameters")}
    made["weights"] = None if wishes["weights"] is None else _numbers("--weights", wishes["weights"])
    if wishes["no_normalize"]:
        made["normalize"] = False
    given: set[str] = set()
    for parameter in wishes["parameters"]:
        name, equals, value = parameter.partition("=")
        if not equals:
            raise RecipeError(f"-p {printable(parameter)}: write it as NAME=VALUE")
        if name in given or (name == "weight" and made["weights"] is not None):
            raise RecipeError(f"-p {printable(name)} is given twice")
        given.add(name)
        if name == "weight" and "," in value:
            made["weights"] = _numbers("-p weight", value)
        elif name in taken:
            raise RecipeError(f"-p {printable(name)}: that is an option of the command, not a parameter of a method")
        else:
            made[name] = value.split(",") if "," in value else value
    return made


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"{option} takes numbers joined by commas, like 0.6,0.4, not {printable(text)}") from error
