"""The arguments of a merge or a plan, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.choosing import advice_on_newest, choose
from streammerge.errors import FormatError, RecipeError, listed, printable
from streammerge.methods.factors import EXTRACT
from streammerge.methods.registry import LINEAR, find_method
from streammerge.options.base import picked
from streammerge.options.merging import Choosing, Merging, Naming, Policies
from streammerge.options.resources import Executing, Resources
from streammerge.options.selecting import Selecting
from streammerge.options.values import energy
from streammerge.options.writing import Writing
from streammerge.planning.conservation import refuse_unused
from streammerge.planning.plan import Plan
from streammerge.recipe.arguments import overridden, recipe_of, unchecked
from streammerge.recipe.extraction import Extraction
from streammerge.recipe.hub_names import with_hub_places
from streammerge.recipe.model import Recipe
from streammerge.recipe.names import is_recipe_name
from streammerge.recipe.reader import read_recipe
from streammerge.requests.adapters import (
    adapters_alone,
    are_adapters,
    begins_with_adapter,
    combined,
    float_dtype,
    on_base,
    refuse_others,
)
from streammerge.requests.inputs import Held, named, names_and_weights, path_of
from streammerge.requests.plans import OnOpened, planned, unheard
from streammerge.stores.base import Location
from streammerge.stores.locations import parse, resolved

if TYPE_CHECKING:
    from streammerge.factoring.making import Making


_RANKS = ("rank", "svd_rank")
"""What people call the rank of an adapter among the parameters of a method that has none."""


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of a merge or a plan, read and checked. ``own_weights``: those that the inputs brought along.
    ``vary``: makes another recipe of the one that was read."""

    inputs: list[str]
    own_weights: list[float] | None
    held: Held
    out: Location | None
    recipe: str | Mapping[str, Any] | None
    merging: Merging
    choosing: Choosing
    naming: Naming
    policies: Policies
    selection: Selecting
    resources: Resources
    executing: Executing
    output: Writing
    vary: Callable[[Recipe], Recipe] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Request:
        """Reads the arguments of :func:`plan` or :func:`merge`. Raises RecipeError for an invalid value."""
        held = Held()
        inputs, own_weights = names_and_weights(given["inputs"], held)
        out, recipe = given["out"], given["recipe"]
        if isinstance(given["base"], Mapping):
            given = {**given, "base": named("base", given["base"], held)}
        merging = picked(Merging, given)
        if own_weights is not None and merging.weights is not None:
            raise RecipeError("the inputs come with their weights; leave `weights` out")
        if recipe is None and len(inputs) == 1 and is_recipe_name(inputs[0]):
            recipe, inputs = inputs[0], []
        return cls(
            inputs,
            own_weights,
            held,
            None if out is None else parse(path_of("out", out)),
            recipe if recipe is None or isinstance(recipe, Mapping) else path_of("recipe", recipe),
            merging,
            *(picked(group, given) for group in (Choosing, Naming, Policies, Selecting, Resources, Executing, Writing)),  # type: ignore[arg-type]
        )

    def refuse_input_as_output(self) -> None:
        """Raises FormatError if the output is an input by its name."""
        base = self.merging.base
        typed = {path for path in (*self.inputs, *([base] if isinstance(base, str) else [])) if path not in self.held}
        if self.out is not None and resolved(str(self.out)) in {resolved(path) for path in typed}:
            from streammerge.running.execution import input_as_output  # here, because most outputs are new

            raise input_as_output(self.out, "is")

    def plan(self, on_opened: OnOpened = unheard) -> Plan:
        """Returns the plan of what was asked for. Raises the errors of :func:`streammerge.plan`."""
        try:
            return self._plan(on_opened)
        except FormatError as error:
            chooses = any((self.choosing.last, self.choosing.best, self.choosing.range, self.schedule))
            advice = advice_on_newest(self.inputs) if chooses and self.recipe is None else ""
            if advice:
                raise FormatError(f"{error}{advice}") from error
            raise

    def _plan(self, on_opened: OnOpened) -> Plan:
        asked = self.merging
        notes: list[str] = []
        overrides = asked.overrides | self.naming.overrides | self.policies.overrides
        overrides |= self.selection.overrides | self.output.overrides
        choice = {name: getattr(self.choosing, name) or None for name in ("last", "range", "best", "by", "highest")}
        parameters = dict(asked.parameters or {})
        if asked.normalize is not None:
            if "normalize" in parameters:
                raise RecipeError("`normalize` and the parameter normalize are the same; give one of them")
            parameters["normalize"] = asked.normalize
        if self.recipe is None:
            chosen, notes = choose(self.inputs, **choice, oldest_first=self.schedule is not None)
            if len(chosen) == 1 and asked.base is None:
                notes.append(f"{printable(chosen[0])} is the only input, so nothing is merged with it")
            given = asked.weights if self.own_weights is None else _following(chosen, self.inputs, self.own_weights)
            weights = self._weights(given, chosen, notes)
            base = None if asked.base is None else str(asked.base)
            method = LINEAR if asked.method is None else asked.method
            on_it = on_base(chosen, base, self.held)
            if on_it != chosen and find_method(method).base in ("model", "unused"):
                base = None  # it is there for the adapters only
            recipe = recipe_of(on_it, method, base, weights, parameters, overrides)
            recipe = with_hub_places(recipe)
        else:
            recipe = self._asked_recipe
        folder = None if asked.convert_first is None else parse(asked.convert_first)
        made = planned(
            recipe,
            self.out,
            self.resources,
            self.executing.executor,
            folder,
            self.output.hash,
            self.held,
            on_opened=on_opened,
        )
        made.notes[:0] = notes
        if self.policies.strict:
            refuse_unused(made.accounts, made.disagreements)
        return made

    def combination(self) -> Making | None:
        """Returns what an adapter is made of, if all inputs are adapters and no base is given; None for all other merges.
        Raises the errors of :func:`streammerge.plan`."""
        asked = self.merging
        if self.recipe is not None:
            recipe = self._asked_recipe
            if recipe.merge_method is EXTRACT:
                from streammerge.requests.extractions import extracted  # here, because most recipes are merges

                self._refuse_for_adapters("an extraction")
                return extracted(recipe, self.held)
            if not adapters_alone(recipe):
                return None
            self._refuse_for_adapters()
            return combined(recipe, self.out)
        choice = {name: getattr(self.choosing, name) or None for name in ("last", "range", "best", "by", "highest")}
        inputs = self.inputs
        if self.schedule is not None or any(choice.values()):
            from streammerge.checkpoints.steps import with_steps

            inputs = with_steps(inputs)
        if asked.base is not None or not begins_with_adapter(inputs, self.held):
            return None
        chosen, notes = choose(self.inputs, **choice, oldest_first=self.schedule is not None)
        if not are_adapters(chosen, self.held):
            return None
        self._refuse_for_adapters()
        refuse_others(
            {
                "compute_dtype": asked.compute_dtype,
                **self.naming.overrides,
                **self.policies.overrides,
                **self.selection.overrides,
                **self.output.overrides,
            }
        )
        parameters = dict(asked.parameters or {})
        if asked.normalize is not None:
            parameters["normalize"] = asked.normalize
        method = find_method(LINEAR if asked.method is None else asked.method)
        given = asked.weights if self.own_weights is None else _following(chosen, self.inputs, self.own_weights)
        weights = self._weights(given, chosen, notes)
        wanted = asked.dtype if asked.out_dtype is None else asked.out_dtype
        overrides: dict[str, Any] = {"dtype": None if wanted is None else float_dtype(wanted), "seed": asked.seed}
        overrides["card"] = asked.card
        from streammerge.factoring.combination import whole_rank  # here, because most merges are of models

        for name in _RANKS:
            if name in parameters and name not in method.parameters:
                overrides["rank"] = whole_rank(parameters.pop(name))
        share = Extraction(energy=_energy(parameters.pop("energy"))) if "energy" in parameters else Extraction()
        unknown = [name for name in parameters if name.rstrip("_") not in method.parameters]
        if unknown:
            raise RecipeError(f"{method.name} has no parameter {printable(unknown[0])}; {method.hint(unknown[0])}")
        recipe = replace(unchecked(chosen, method, None, weights, parameters, overrides), extract=share)
        made = combined(with_hub_places(recipe), self.out)
        made.notes[:0] = notes
        return made

    def _refuse_for_adapters(self, what: str = "adapters alone") -> None:
        """Raises RecipeError for options beside a recipe that an adapter which is made cannot follow."""
        given = {
            "convert_first": self.merging.convert_first,
            "strict": self.policies.strict,
            "hash": self.output.hash,
        }
        refuse_others(given, what)
        if self.executing.executor not in ("auto", "threads"):
            raise RecipeError("an adapter is made by threads on one machine; leave `executor` out")

    @cached_property
    def _asked_recipe(self) -> Recipe:
        """Returns the recipe that was given, with the options in place of its keys. Raises RecipeError."""
        asked = self.merging
        if self.recipe is None:
            raise ValueError("there is no recipe")
        theirs = {"inputs": self.inputs or None, "weights": asked.weights, "method": asked.method, "base": asked.base}
        schedules = {"schedule": self.choosing.schedule, "ema_decay": self.choosing.ema_decay}
        choice = {name: getattr(self.choosing, name) or None for name in ("last", "range", "best", "by", "highest")}
        normalize = {} if asked.normalize is None else {"normalize": asked.normalize}
        _refuse_beside_recipe({**theirs, **schedules, **choice, **(asked.parameters or {}), **normalize})
        overrides = asked.overrides | self.naming.overrides | self.policies.overrides
        overrides |= self.selection.overrides | self.output.overrides
        return overridden(read_recipe(self.recipe, asked.own_methods, adapters=are_adapters, vary=self.vary), overrides)

    @property
    def schedule(self) -> str | None:
        """The schedule that gives the weights. Raises RecipeError if two are given."""
        asked = self.choosing
        if asked.schedule is not None and asked.ema_decay is not None:
            raise RecipeError("`schedule` and `ema_decay` both give the weights; leave one of them out")
        return asked.schedule if asked.ema_decay is None else f"ema:{asked.ema_decay!r}"

    def _weights(self, given: Sequence[float] | None, chosen: Sequence[str], notes: list[str]) -> Sequence[float] | None:
        """Returns the weights of the chosen inputs, and notes those of a schedule. Raises RecipeError."""
        if self.schedule is None:
            return given
        if given is not None:
            option = "schedule" if self.choosing.ema_decay is None else "ema_decay"
            raise RecipeError(f"`{option}` gives the weights; leave `weights` out")
        from streammerge.checkpoints.schedules import schedule_weights  # here, because most merges have no schedule

        weights = schedule_weights(self.schedule, len(chosen))
        shown = [f"{printable(path)} {weight:.6g}" for path, weight in zip(chosen, weights, strict=True)]
        notes.append(f"weights of the schedule {self.schedule}: {listed(shown, 25)}")
        return weights


def _energy(value: Any) -> float:
    try:
        return energy(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"energy takes a share above 0, up to 1, not {printable(value, 60)}") from error


def _following(chosen: Sequence[str], inputs: Sequence[str], weights: Sequence[float]) -> list[float]:
    """Returns the weights of the chosen inputs. These may stand in another order."""
    left: dict[str, list[float]] = {}
    for path, weight in zip(inputs, weights, strict=True):
        left.setdefault(path, []).append(weight)
    return [left[path].pop(0) for path in chosen]


def _refuse_beside_recipe(said: Mapping[str, Any]) -> None:
    """Raises RecipeError for arguments that contradict a recipe instead of replacing one of its keys."""
    given = [name for name, value in said.items() if value is not None]
    if given:
        raise RecipeError(
            f"{listed(given)} beside a recipe: it names its models, method and parameters itself; change them there"
        )
