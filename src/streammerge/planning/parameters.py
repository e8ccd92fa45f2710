"""Finds the parameters of a method for each tensor. Rule, model, slice, module and recipe are asked in this order, and the
first that sets a parameter decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError, printable
from streammerge.methods.contracts import MergeMethod, Parameter
from streammerge.planning.views import Part
from streammerge.recipe.model import Recipe, Rule
from streammerge.recipe.settings import Chain, Setting, Settings
from streammerge.sources.base import Source
from streammerge.units import counted

if TYPE_CHECKING:
    from streammerge.checkpoints.index import CheckpointIndex


@dataclass(slots=True, eq=False)
class _Asked:
    """The settings to look a method's parameters up in.

    ``chains``: each parameter with one chain per model, or with a single chain. ``values``: the resolved parameters when
    they are the same for all tensors.
    """

    chains: list[tuple[Parameter, list[Chain]]]
    values: dict[str, Any] | None = None

    @property
    def fixed(self) -> bool:
        return all(chain.fixed for _, chains in self.chains for chain in chains)


class ParameterValues:
    """The parameter values of one part's tensors. Equal values are resolved only once.

    Methods are told apart by identity, because two methods of a user may have the same name.
    """

    def __init__(self, recipe: Recipe, part: Part) -> None:
        self.recipe, self.part = recipe, part
        self.asked: dict[tuple[int, tuple[int, ...], int | None], _Asked] = {}
        self.resolved: dict[Any, dict[str, Any]] = {}

    def of(
        self,
        method: MergeMethod,
        numbers: tuple[int, ...],
        name: str,
        sources: Sequence[Source | None],
        rule: Rule | None,
    ) -> dict[str, Any]:
        """Returns all parameters of a method for one tensor.

        ``numbers``: the views of the models, in the order of the method. Only the models that have the tensor get values.
        A model's own settings are looked up by the tensor's name in that model. Raises RecipeError for invalid values.
        """
        models = [sources[number] for number in numbers]
        asked, whole = self._asked(method, numbers, rule), all(models)
        if whole and asked.values is not None:
            return asked.values
        t = 0.0 if asked.fixed else self.part.position(name)
        given: dict[str, Any] = {}
        for parameter, chains in asked.chains:
            try:
                if parameter.per_model:
                    found = [c.at(s.spec.name, t) for c, s in zip(chains, models, strict=True) if s is not None]
                    value: Any = filled(parameter, found)
                else:
                    value = chains[0].at(name, t)
            except RecipeError as error:  # both ends of a gradient are valid, but the value between them is not
                raise RecipeError(f"{self.recipe.at(('parameters', parameter.name))}{printable(name)}: {error}") from error
            if value is not None:
                given[parameter.name] = value
        known = (id(method), len(models) - models.count(None), *given.items())
        if known not in self.resolved:
            self.resolved[known] = self._resolve(method, given, models, name, rule)
        if whole and asked.fixed:
            asked.values = self.resolved[known]
        return self.resolved[known]

    def fixed(self, method: MergeMethod, numbers: tuple[int, ...], rule: Rule | None) -> bool:
        """Whether the parameters are the same for all tensors that all these models have."""
        return self._asked(method, numbers, rule).fixed

    def _asked(self, method: MergeMethod, numbers: tuple[int, ...], rule: Rule | None) -> _Asked:
        known = id(method), numbers, id(rule) if rule and rule.parameters else None
        if known not in self.asked:
            views = [self.part.views[number] for number in numbers]
            made = []
            for parameter in method.parameters.values():
                ruled = self._of_rule(parameter, rule, len(views))
                owned = [view.own for view in views] if parameter.per_model else [{}]
                levels = [(first, own, *self.part.levels) for first, own in zip(ruled, owned, strict=False)]
                made.append((parameter, [Chain(parameter, each) for each in levels]))
            self.asked[known] = _Asked(made)
        return self.asked[known]

    def _of_rule(self, parameter: Parameter, rule: Rule | None, models: int) -> list[Settings]:
        """Returns a rule's setting for each model. A list in a rule is one value per model, not a gradient."""
        ruled = rule.parameters.get(parameter.name) if rule else None
        if rule is None or ruled is None:
            return [{}] * max(models, 1)
        each: list[Setting] = [ruled] * max(models, 1)
        values = ruled[0].value
        if parameter.per_model and len(ruled) == 1 and ruled[0].filter is None and isinstance(values, tuple):
            if len(values) != models:
                where = self.recipe.at((*rule.path, "parameters", parameter.name))
                raise RecipeError(
                    f"{where}{counted(len(values), 'value')} of {parameter.name} for {counted(models, 'model')}; "
                    "give one for each"
                )
            each = [(replace(ruled[0], value=value),) for value in values]
        return [{parameter.name: setting} for setting in each]

    def _resolve(
        self,
        method: MergeMethod,
        given: dict[str, Any],
        models: Sequence[Source | None],
        name: str,
        rule: Rule | None,
    ) -> dict[str, Any]:
        absent = models.count(None)
        try:
            return method.resolve(given, len(models) - absent)
        except RecipeError as error:
            where = f"for the inputs that have {printable(name)}: " if absent else ""
            path = rule.path if rule else ("parameters",) if self.recipe.parameters else ("models",)
            raise RecipeError(f"{self.recipe.at(path)}{where}{error}") from error


def filled(parameter: Parameter, values: list[Any]) -> tuple[Any, ...] | None:
    """Returns the values, with the default for each model that has none. Returns None if no model has a value."""
    if None not in values:
        return tuple(values)
    if values.count(None) == len(values):
        return None
    default = parameter.default[0] if isinstance(parameter.default, tuple) else parameter.default
    return tuple(default if value is None else value for value in values)


def shares(part: Part) -> list[tuple[CheckpointIndex, float]]:
    """Returns each checkpoint and its weight in averages of plain numbers. A base that is not a model weighs 0."""
    weight = part.method.parameters.get("weight")
    found: list[tuple[CheckpointIndex, float]] = []
    for number, view in enumerate(part.views):
        value = Chain(weight, (view.own, *part.levels)).at("", 0.0) if weight else None
        found.append((view.index, 0.0 if number not in part.models else 1.0 if value is None else value))
    return found
