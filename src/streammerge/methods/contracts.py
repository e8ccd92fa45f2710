"""Contracts of merge methods, checked before any method runs.

The signature is the schema: the keyword-only arguments of a method are its parameters, with their kinds and defaults.
Its docstring is its page. Importing a method does not import torch, so plans are made without torch.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from streammerge.errors import RecipeError, printable
from streammerge.kernels.chunk import Kernel
from streammerge.kernels.group import TensorGroup

PerModel = Sequence[float]
"""The kind of a parameter that has one number for each model."""
Values = dict[str, Any]
Function = TypeVar("Function", bound=Callable[..., Kernel])


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter. ``kind`` is float, int, bool or any; ``per_model``: each model has its own value."""

    name: str
    kind: str
    per_model: bool
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def parse(self, value: Any, models: int) -> Any:
        """Converts a value to the parameter's kind, one per model if ``per_model``. Raises RecipeError if it is not
        valid."""
        if not self.per_model:
            return self.parse_one(value)
        if isinstance(value, str) or not isinstance(value, Iterable):
            return [self.parse_one(value)] * models
        values = [self.parse_one(v) for v in value]
        if len(values) == 1:
            return values * models
        if len(values) != models:
            raise RecipeError(
                f"{len(values)} values of {self.name} for {models} models; give one for each, or a single one for all"
            )
        return values

    def parse_one(self, value: Any) -> Any:
        if value is None and self.default is None:
            return value
        if self.kind == "any":
            return _number_if_it_is(value)
        if self.kind == "bool":
            return _boolean(self.name, value)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise RecipeError(f"{self.name} takes a number, not {printable(value)}") from error
        if not math.isfinite(number):
            raise RecipeError(f"{self.name} takes a finite number, not {printable(value)}")
        if self.kind == "int":
            if number != int(number):
                raise RecipeError(f"{self.name} takes a whole number, not {printable(value)}")
            return int(number)
        return number


@dataclass(frozen=True)
class MergeMethod:
    """A method and its contract.

    ``models``: the least and the most models, without the base. ``base``: "required", "optional", "model" (a base is
    one more model), or "unused". ``row(shape, values)``: how many elements belong together. ``passes``: whether the
    method reads the group before it makes its kernel. ``pointwise``: whether each number depends only on the models'
    numbers at the same place, not on the name, the shape or other numbers; short tensors may then be computed together.
    ``buffers``: how many chunk-long buffers the method holds at once, torch's temporaries included;
    ``buffers_per_model``: how many more for each model. ``searches``: how many ranks it searches at once, per model.
    ``row_buffers``: how many float64 rows its passes hold. ``compute``: the dtype of the arithmetic, unless the recipe
    gives one. ``check(values)`` raises RecipeError.
    """

    name: str
    function: Callable[..., Kernel]
    models: tuple[int, int | None] = (1, None)
    base: str = "optional"
    row: Callable[[tuple[int, ...], Values], int] | None = None
    passes: bool = True
    pointwise: bool = False
    buffers: int = 8
    buffers_per_model: int = 0
    searches: int = 0
    row_buffers: int = 0
    compute: str = "float32"
    check: Callable[[Values], None] | None = None
    listed: bool = field(default=True, repr=False)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Parameters by their names in recipes; ``lambda`` is ``lambda_`` in Python."""
        return {parameter.name: parameter for parameter in _parameters(self.function)}

    @property
    def takes_base(self) -> bool:
        """Whether the method gets the base separately from the models."""
        return self.base in ("required", "optional")

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        return self.doc.partition("\n")[0].rstrip(".")

    @property
    def granularity(self) -> str:
        return "row" if self.row else "element"

    def rows(self, shape: tuple[int, ...], values: Values) -> int:
        return max(self.row(shape, values), 1) if self.row else 1

    def resolve(self, given: Mapping[str, Any], models: int) -> Values:
        """Returns all parameters for this many models, with defaults filled in. Raises RecipeError."""
        self.check_models(models)
        for name in given:
            if name.rstrip("_") not in self.parameters:
                raise RecipeError(f"{self.name} has no parameter {printable(name)}; {self.hint(name)}")
        wished = {name.rstrip("_"): value for name, value in given.items()}
        if len(wished) < len(given):
            raise RecipeError(f"a parameter of {self.name} is given twice: {', '.join(map(printable, given))}")
        values = {}
        for name, parameter in self.parameters.items():
            if name not in wished and parameter.required:
                raise RecipeError(self.lack(name))
            values[name] = parameter.parse(wished.get(name, parameter.default), models)
        if self.check:
            self.check(values)
        return values

    def check_models(self, models: int) -> None:
        """Raises RecipeError if the method does not take this many models, without the base."""
        least, most = self.models
        if models < least or (most is not None and models > most):
            count = f"exactly {least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
            beside = " beside the base" if self.base == "required" else ""
            raise RecipeError(
                f"{self.name} merges {count} {'model' if count == 'exactly 1' else 'models'}{beside}, not {models}"
            )

    def lack(self, name: str) -> str:
        return f"{self.name} needs the parameter {name}; give it with -p {name}=VALUE, or under parameters in a recipe"

    def hint(self, name: str) -> str:
        """Suggests a parameter in place of one that the method does not have."""
        near = difflib.get_close_matches(name, self.parameters, n=1)
        if near:
            return f"did you mean {near[0]}?"
        return f"it has {', '.join(self.parameters)}" if self.parameters else "it has none"

    def bind(self, group: TensorGroup, values: Values) -> Kernel:
        """Makes the kernel for a group of tensors. The passes run here."""
        return self.function(group, **{_IN_PYTHON.get(name, name): value for name, value in values.items()})


def merge_method(name: str, **contract: Any) -> Callable[[Function], Function]:
    """Makes a function a merge method. It takes a :class:`TensorGroup` and keyword-only parameters, and returns a
    kernel.

    The keywords are the fields of :class:`MergeMethod`. Without them a method takes any number of models, and
    optionally a base.

    >>> @merge_method("midrange", models=(2, None), passes=False)
    ... def midrange(group, *, pull: float = 0.5):
    ...     def kernel(chunk):
    ...         low, high = chunk.models[0], chunk.models[0]
    ...         for values in chunk.models[1:]:
    ...             low, high = low.minimum(values), high.maximum(values)
    ...         return low + pull * (high - low)
    ...     return kernel
    """

    def mark(function: Function) -> Function:
        function.contract = MergeMethod(name, function, **contract)  # type: ignore[attr-defined]
        return function

    return mark


_IN_PYTHON = {"lambda": "lambda_"}


def _parameters(function: Callable[..., Kernel]) -> list[Parameter]:
    made = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        text = parameter.annotation if isinstance(parameter.annotation, str) else str(parameter.annotation)
        if parameter.annotation is parameter.empty:  # a user's function without types: the kind of the default
            text = type(parameter.default).__name__
        words = re.findall(r"\w+", re.sub(r"'[^']*'|\"[^\"]*\"", "", text))
        per_model = not {"PerModel", "Sequence", "list", "tuple"}.isdisjoint(words) and "str" not in words
        kind = "float" if per_model else next((kind for kind in ("bool", "int", "float") if kind in words), "any")
        made.append(Parameter(parameter.name.rstrip("_"), kind, per_model, parameter.default))
    return made


def _number_if_it_is(value: Any) -> Any:
    """Converts text from the command line to a number where possible."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_TRUE = ("true", "1", "1.0", "yes", "on", "t", "y")
FALSE = ("false", "0", "0.0", "no", "off", "f", "n")


def _boolean(name: str, value: Any) -> bool:
    word = str(value).lower()
    if word not in _TRUE and word not in FALSE:
        raise RecipeError(f"{name} takes true or false, not {printable(value)}")
    return word in _TRUE


def sums_to_something(numbers: Sequence[float]) -> bool:
    """Whether numbers can be divided by their sum: it is finite, and larger than the rounding error of its terms."""
    total = sum(numbers)
    return math.isfinite(total) and abs(total) > 1e-12 * max(map(abs, numbers), default=0.0)
