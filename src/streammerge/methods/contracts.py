"""Contracts of merge methods, checked before any method runs.

The signature is the schema: the keyword-only arguments of a method are its parameters, with their kinds and defaults.
Its docstring is its page. Importing a method does not import torch, so plans are made without torch.
"""

from __future__ import annotations

import inspect
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from streammerge.errors import RecipeError, printable
from streammerge.kernels.chunk import Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.spill import held_bytes
from streammerge.plugins import Registry, imported
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN
from streammerge.units import counted, plain_number

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.batch import Batch

PerModel = Sequence[float]
"""The kind of a parameter that has one number for each model."""
Values = dict[str, Any]
Function = TypeVar("Function", bound=Callable[..., Kernel])


class Parameter(NamedTuple):
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
        value = plain_number(value)
        if isinstance(value, str) or not isinstance(value, Iterable):
            return [self.parse_one(value)] * models
        values = [self.parse_one(v) for v in value]
        if len(values) == 1:
            return values * models
        if len(values) != models:
            raise RecipeError(
                f"{counted(len(values), 'value')} of {self.name} for {counted(models, 'model')}; "
                "give one for each, or a single one for all"
            )
        return values

    def parse_one(self, value: Any) -> Any:
        if value is None and self.default is None:
            return value
        value = plain_number(value)
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
    ``sums``: whether its kernel is a weighted sum of the models (:class:`~streammerge.methods.linear.Combination`).
    ``buffers``: how many chunk-long buffers the method holds at once, torch's temporaries included;
    ``buffers_per_model``: how many more for each model. ``searches``: how many ranks it searches at once, per model.
    ``row_buffers``: how many float64 rows its passes hold. ``kept_bits``: how many bits of each element it keeps for a
    model, in a tensor of up to a grain. ``whole(shape, models, values, turned)``: how many bytes its passes hold, if that
    is so much that one worker makes the whole tensor. ``turns(shape, values)``: whether a tensor is read and made with its
    first axis last. ``spills(shape, models, values, turned)``: how many bytes it looks at again beside memory
    (:meth:`TensorGroup.spill`). ``batch(batch, values)``: computes several small tensors at once, with the bytes that each
    has alone, in the same buffers; None where a number is not finite. ``compute``: the dtype of the arithmetic, unless the
    recipe gives one.
    ``check(values)`` raises RecipeError.

    A method is pickled as the place of its function, and is found there again.
    """

    name: str
    function: Callable[..., Kernel]
    models: tuple[int, int | None] = (1, None)
    base: str = "optional"
    row: Callable[[tuple[int, ...], Values], int] | None = None
    passes: bool = True
    pointwise: bool = False
    sums: bool = False
    buffers: int = 8
    buffers_per_model: int = 0
    searches: int = 0
    row_buffers: int = 0
    kept_bits: int = 0
    whole: Callable[[tuple[int, ...], int, Values, bool], int] | None = None
    turns: Callable[[tuple[int, ...], Values], bool] | None = None
    spills: Callable[[tuple[int, ...], int, Values, bool], int] | None = None
    batch: Callable[[Batch, Values], torch.Tensor | None] | None = None
    compute: str = "float32"
    check: Callable[[Values], None] | None = None
    listed: bool = field(default=True, repr=False)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Parameters by their names in recipes; ``lambda`` is ``lambda_`` in Python."""
        return {parameter.name: parameter for parameter in _parameters(self.function)}

    @property
    def place(self) -> str:
        """Where its function is: ``package.module:function``."""
        function = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        return f"{function.__module__}:{function.__qualname__}"

    @cached_property
    def identity(self) -> str:
        """A text that no other method of this process has: the place of its function, and the function's number in memory
        if that place does not lead to it, as for a lambda."""
        try:
            if imported(self.place) is self.function:
                return self.place
        except (ImportError, AttributeError):
            pass
        return f"{self.place} {id(self.function)}"

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            if contract_of(imported(self.place), self.name) == self:
                return _restored, (self.place, self.name)
        except (ImportError, AttributeError, TypeError, RecipeError):
            pass  # a function inside another, or an object that can be called
        if contract_of(self.function, self.name) == self:
            return contract_of, (self.function, self.name)
        raise pickle.PicklingError(
            f"the merge method {printable(self.name)} cannot be sent to another process: {printable(self.place)} does not "
            "name its function; define it at the top of a module"
        )

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

    def whole_bytes(self, shape: tuple[int, ...], models: int, values: Values, turned: bool) -> int:
        """Returns the bytes that its passes over the whole tensor hold beside the buffers."""
        held = held_bytes(self.spilled_bytes(shape, models, values, turned))
        return held + (self.whole(shape, models, values, turned) if self.whole else 0)

    def spilled_bytes(self, shape: tuple[int, ...], models: int, values: Values, turned: bool) -> int:
        """Returns the bytes that it spills for a tensor: into memory if they are few, else into a temporary file."""
        return self.spills(shape, models, values, turned) if self.spills else 0

    def buffers_for(self, dtypes: Sequence[DType], compute: str, based: bool) -> tuple[int, int]:
        """(bytes of an element, how many) of the buffers that it needs for inputs of these dtypes, a base included."""
        wide = self.passes or compute == "float64" or any(d.kind not in ("float", "complex") for d in dtypes)
        narrow = any(d not in (DType.BF16, DType.F32, DType.F64) for d in dtypes)  # widened by way of float32
        count = self.buffers + self.buffers_per_model * len(dtypes) + based + (wide and narrow)
        return 8 if wide else 4, count

    def held_bytes(self, row: int, models: int) -> int:
        """Bytes that it holds between its passes and the kernel, beside what searches hold."""
        return 8 * row * self.row_buffers + models * self.kept_bits * GRAIN // 8

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
        return f"{self.name} needs the parameter {name}; pass `parameters={{'{name}': ...}}`, or write it in the recipe"

    def hint(self, name: str) -> str:
        """Suggests a parameter in place of one that the method does not have."""
        import difflib

        near = difflib.get_close_matches(name, self.parameters, n=1)
        if near:
            return f"did you mean {near[0]}?"
        return f"it has {', '.join(self.parameters)}" if self.parameters else "it has none"

    def bind(self, group: TensorGroup, values: Values) -> Kernel:
        """Makes the kernel for a group of tensors. The passes run here."""
        return self.function(group, **{_IN_PYTHON.get(name, name): value for name, value in values.items()})


def merge_method(name: str, *, replace: bool = False, **contract: Any) -> Callable[[Function], Function]:
    """Makes a function a merge method: from a :class:`TensorGroup` and keyword-only parameters to a kernel.

    The keywords are the fields of :class:`MergeMethod`; without them a method takes any number of models and maybe a
    base. From now on ``method=name`` finds it in this process. A name that is built in is refused when it is asked for,
    unless ``replace``.

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
        made = MergeMethod(name, function, **contract)
        function.contract = made  # type: ignore[attr-defined]
        METHODS.register(name, made, getattr(function, "__module__", ""), replace)
        return function

    return mark


def contract_of(function: Any, name: str) -> MergeMethod:
    """The contract of a function, made for one that has none. Raises RecipeError for what cannot be a merge method."""
    contract = getattr(function, "contract", None)
    if isinstance(contract, MergeMethod):
        return contract
    if not callable(function):
        raise RecipeError(f"the merge method {printable(name)} is no function")
    # Nothing is known of the function. It gets room for a copy of each model and as much again.
    method = MergeMethod(name, function, buffers=8, buffers_per_model=2)
    try:
        _ = method.parameters
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{printable(name)} cannot be a merge method: {printable(error)}") from error
    return method


def _restored(place: str, name: str) -> MergeMethod:
    return contract_of(imported(place), name)


def _of_module(module: ModuleType) -> dict[str, MergeMethod]:
    contracts = (getattr(value, "contract", None) for value in vars(module).values())
    return {each.name: each for each in contracts if isinstance(each, MergeMethod) and each.listed}


METHODS = Registry("merge method", "streammerge.methods", _of_module, lambda name, found: contract_of(found, name))


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
