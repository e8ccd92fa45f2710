"""The value of a parameter for one tensor: mergekit's filters and layer gradients, in its arithmetic.

A setting is a scalar, or a list, which is a gradient over the layers. Either may have a filter. A list of settings with
filters uses the first filter that matches. If none matches, the next level is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.errors import RecipeError
from streammerge.methods.contracts import Parameter
from streammerge.recipe.fields import Kind, MapOf, Path, Problems, Schema, is_misspelled, shown
from streammerge.units import plain_number

Scalar = bool | int | float | str
_MEANT = ("pattern", "match", "filters")
"""Keys that people write for ``filter``."""


@dataclass(frozen=True, slots=True)
class Case:
    """A scalar, or a gradient (a tuple), for tensors whose names contain ``filter``."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None


Setting = tuple[Case, ...]
Settings = Mapping[str, Setting]


def constant(value: Scalar) -> Setting:
    return (Case(value),)


def evaluate(setting: Setting, name: str, t: float, parse: Callable[[Any], Any]) -> Any:
    """Returns the value for a tensor of this name at depth ``t`` (0 the first layer, 1 the last); None if no filter
    matches.

    Numbers are interpolated linearly between the entries of a gradient. For truth values and words, one entry is
    chosen.
    """
    for case in setting:  # a plain loop, because it runs for every tensor of every model
        if case.filter is None or case.filter == "*" or case.filter in name:
            break
    else:
        return None
    if not isinstance(case.value, tuple):
        return parse(case.value)
    if not case.value:
        return None
    points = [parse(point) for point in case.value]
    scaled = t * (len(points) - 1)
    before = int(scaled)
    if not all(isinstance(point, int | float) and not isinstance(point, bool) for point in points):
        return points[before]
    after, way = min(before + 1, len(points) - 1), scaled - before
    return parse((1 - way) * points[before] + way * points[after])


class Chain:
    """The settings of a parameter, from the first level to the last."""

    def __init__(self, parameter: Parameter, levels: Iterable[Settings]) -> None:
        found = (level.get(parameter.name) for level in levels)
        self.settings = [setting for setting in found if setting]
        self.parse = parameter.parse_one
        self.fixed = not self.settings or is_same_for_all(self.settings[0])
        self.value = evaluate(self.settings[0], "", 0.0, self.parse) if self.settings and self.fixed else None

    def at(self, name: str, t: float) -> Any:
        """Returns the value of the first setting that has one for this tensor; None if no setting has one."""
        if self.fixed:
            return self.value
        for setting in self.settings:
            value = evaluate(setting, name, t, self.parse)
            if value is not None:
                return value
        return None


def is_same_for_all(setting: Setting) -> bool:
    """Whether the setting has the same value for all tensors."""
    return bool(setting) and setting[0].filter in (None, "*") and not isinstance(setting[0].value, tuple)


class SettingKind(Kind):
    """Reads and describes a setting. :func:`check_setting` checks its values once the method is known."""

    def read(self, value: Any, path: Path, problems: Problems) -> Any:
        if isinstance(value, Mapping):
            return tuple(self._case(value, path, problems))
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            cases: list[Case] = []
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    cases += self._case(item, (*path, number), problems)
                else:
                    problems.add((*path, number), f"{shown(item)} is not a filter; write it as value: {shown(item)}")
            return tuple(cases)
        read = self._value(value, path, problems)
        return None if read is None else (Case(read),)

    def _case(self, value: Mapping[Any, Any], path: Path, problems: Problems) -> list[Case]:
        for name in value:
            if name not in ("value", "filter") and name not in _MEANT and not is_misspelled(name, ("value", "filter")):
                problems.warn((*path, name), f"a filter has no key {shown(name)}, so it is ignored, as in mergekit")
            elif name not in ("value", "filter"):
                hint = (
                    "did you mean filter?"
                    if name in _MEANT or is_misspelled(name, ("filter",))
                    else "it knows value and filter"
                )
                problems.add((*path, name), f"unknown key {shown(name)}; {hint}")
        wanted = value.get("filter")
        if wanted is not None and not isinstance(wanted, str):
            problems.add((*path, "filter"), f"filter takes part of a tensor's name, not {shown(wanted)}")
            return []
        if "value" not in value:
            problems.add(path, "a filter needs a value")
            return []
        read = self._value(value["value"], (*path, "value"), problems)
        return [] if read is None else [Case(read, wanted)]

    def _value(self, value: Any, path: Path, problems: Problems) -> Any:
        value = plain_number(value)
        value = [*map(plain_number, value)] if isinstance(value, list | tuple) else value
        points = value if isinstance(value, list) else [value]
        for point in points:
            if point is None and str(path[-1]).isdecimal():
                problems.add(path, f"{path[-1]} has no value; a decimal number has a point, as in 0.5")
                return None
            if not isinstance(point, bool | int | float | str):
                problems.add(path, f"{shown(path[-1])} takes a number, a truth value or a word, not {shown(point)}")
                return None
        return tuple(points) if isinstance(value, list) else value

    def schema(self, forms: Schema) -> Schema:
        if "setting" not in forms:
            scalar = {"type": ["number", "boolean", "string"]}
            value = {"anyOf": [scalar, {"type": "array", "items": scalar}]}
            case = {
                "type": "object",
                "properties": {"value": value, "filter": {"type": ["string", "null"]}},
                "required": ["value"],
                "additionalProperties": False,
            }
            forms["setting"] = {"anyOf": [*value["anyOf"], case, {"type": "array", "items": case}]}
        return {"$ref": "#/$defs/setting"}

    def dump(self, value: Any) -> Any:
        cases = [({} if c.filter is None else {"filter": c.filter}) | {"value": _listed(c.value)} for c in value]
        return cases[0]["value"] if len(value) == 1 and value[0].filter is None else cases


class SettingsKind(MapOf):
    """Parameter names with their settings. ``names``: the parameters of all methods, with descriptions."""

    def __init__(self, names: Callable[[], Mapping[str, str]]) -> None:
        super().__init__(SettingKind())
        self.names = names

    def read(self, value: Any, path: Path, problems: Problems) -> Any:
        # lambda_, as in Python, means lambda
        return {name.rstrip("_"): setting for name, setting in super().read(value, path, problems).items()}

    def schema(self, forms: Schema) -> Schema:
        if "parameters" not in forms:
            setting = self.item.schema(forms)
            known = {name: {**setting, "description": doc} for name, doc in self.names().items()}
            forms["parameters"] = {**super().schema(forms), "properties": known}
        return {"$ref": "#/$defs/parameters"}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_setting(setting: Setting, parameter: Parameter) -> str | None:
    """Returns the mistake in a setting's values for this parameter, or None."""
    try:
        for case in setting:
            for point in case.value if isinstance(case.value, tuple) else (case.value,):
                parameter.parse_one(point)
    except RecipeError as error:
        return str(error)
    return None
