"""The parameters of a method for each tensor: from rule, model, slice, module and recipe, the first that says something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from streammerge.errors import RecipeError, printable
from streammerge.methods.contracts import MergeMethod, Parameter
from streammerge.parts import Part
from streammerge.recipe import Recipe, Rule
from streammerge.recipe.settings import Setting, Settings, lookup
from streammerge.tensors import TensorEntry

_Models = list[tuple[Settings, TensorEntry | None]]


class ParameterValues:
    """The values of one part's tensors, resolved once for each that is different."""

    def __init__(self, recipe: Recipe, part: Part) -> None:
        self.recipe, self.part = recipe, part
        self.resolved: dict[Any, dict[str, Any]] = {}

    def of(
        self, method: MergeMethod, based: bool, name: str, sources: Sequence[TensorEntry | None], rule: Rule | None
    ) -> dict[str, Any]:
        """All parameters for the models that have the tensor. A model's own are looked up by the name it has there.

        Raises RecipeError for values that cannot be.
        """
        t = self.part.position(name)
        owned = [view.own for view in self.part.views[based:]]
        models = list(zip(owned, sources[based:], strict=True))
        given: dict[str, Any] = {}
        for parameter in method.parameters.values():
            ruled = rule.parameters.get(parameter.name) if rule else None
            if parameter.per_model:
                value = self._of_models(parameter, models, ruled, t, rule)
            else:
                levels = self.part.levels if ruled is None else ({parameter.name: ruled}, *self.part.levels)
                value = lookup(parameter, levels, name, t)
            if value is not None:
                given[parameter.name] = value
        count = sum(source is not None for _, source in models)
        known = (method.name, count, *given.items())
        if known not in self.resolved:
            self.resolved[known] = self._resolve(method, given, count, name, rule, count == len(models))
        return self.resolved[known]

    def _of_models(
        self, parameter: Parameter, models: _Models, ruled: Setting | None, t: float, rule: Rule | None
    ) -> tuple[Any, ...] | None:
        """One value for each model that has the tensor; None where none is said anywhere."""
        of_rule = self._of_rule(parameter, ruled, len(models), rule)
        values = []
        for number, (own, source) in enumerate(models):
            if source is not None:
                levels = (own, *self.part.levels)
                if of_rule is not None:
                    levels = ({parameter.name: of_rule[number]}, *levels)
                values.append(lookup(parameter, levels, source.spec.name, t))
        if all(value is None for value in values):
            return None
        default = parameter.default[0] if isinstance(parameter.default, tuple) else parameter.default
        return tuple(default if value is None else value for value in values)

    def _of_rule(self, parameter: Parameter, ruled: Setting | None, models: int, rule: Rule | None) -> list[Setting] | None:
        """A rule's setting for each model: a list is not a gradient there, but one value for each."""
        if ruled is None:
            return None
        values = ruled[0].value
        if len(ruled) > 1 or ruled[0].filter is not None or not isinstance(values, tuple):
            return [ruled] * models
        if len(values) != models:
            where = self.recipe.at((*rule.path, "parameters", parameter.name)) if rule else ""
            raise RecipeError(f"{where}{len(values)} values of {parameter.name} for {models} models; give one for each")
        return [(replace(ruled[0], value=value),) for value in values]

    def _resolve(
        self, method: MergeMethod, given: dict[str, Any], count: int, name: str, rule: Rule | None, whole: bool
    ) -> dict[str, Any]:
        try:
            return method.resolve(given, count)
        except RecipeError as error:
            where = "" if whole else f"for the inputs that have {printable(name)}: "
            path = rule.path if rule else ("parameters",) if self.recipe.parameters else ("models",)
            raise RecipeError(f"{self.recipe.at(path)}{where}{error}") from error


def shares(part: Part) -> list[tuple[Any, float]]:
    """Each checkpoint's tree, and its weight where plain numbers are averaged; a base that is no model has none."""
    weight = part.method.parameters.get("weight")
    found: list[tuple[Any, float]] = []
    for number, view in enumerate(part.views):
        value = lookup(weight, (view.own, *part.levels), "", 0.0) if weight else None
        found.append((view.index.extras, 0.0 if part.based and number == 0 else 1.0 if value is None else value))
    return found
