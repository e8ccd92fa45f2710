"""What the user asked for: frozen, checked as far as it can be without looking at a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from streammerge.dtypes import DType, parse_dtype
from streammerge.errors import RecipeError, printable
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.registry import find_method
from streammerge.statedict import EMA_CHOICES
from streammerge.units import parse_bytes

ON_MISSING = ("error", "base", "average-present", "drop")
INTEGERS = ("first", "last", "max", "error")
IO = ("mmap", "pread")


@dataclass(frozen=True)
class Recipe:
    """One merge or conversion.

    ``inputs`` are the checkpoints as they were named; ``base`` the common ancestor of the methods that need one,
    which may be among them. ``parameters`` are the method's, as they were given: one value, or one per model or
    input. ``weights`` is the parameter ``weight`` with exactly one number per input. ``drop`` and ``keep`` are glob
    patterns on tensor names; ``strip_prefix`` is removed from names that begin with it. Raises RecipeError for values
    that cannot be.
    """

    inputs: tuple[str, ...]
    method: MergeMethod = field(default_factory=lambda: find_method("linear"))
    base: str | None = None
    weights: tuple[float, ...] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    out_dtype: DType | None = None
    compute_dtype: DType | None = None
    state_dict: str | None = None
    ema: str = "ignore"
    on_missing: str = "error"
    integers: str | None = None
    allow_nonfinite: bool = False
    keep_optimizer: bool = False
    max_shard_bytes: int | None = None
    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    strip_prefix: str = ""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise RecipeError("there is nothing to merge: give at least one checkpoint")
        _one_of("--ema", self.ema, EMA_CHOICES)
        _one_of("--on-missing", self.on_missing, ON_MISSING)
        if self.integers is not None:
            _one_of("--integers", self.integers, INTEGERS)
        if self.weights is not None:
            self._check_weights(self.weights)
            if "weight" in self.parameters:
                raise RecipeError("weights and the parameter weight are the same; give one of them")
        for name, dtype in (("--out-dtype", self.out_dtype), ("--compute-dtype", self.compute_dtype)):
            if dtype is not None and dtype.kind != "float":
                raise RecipeError(f"{name} takes a floating-point dtype, not {dtype.torch_name}")
        if self.compute_dtype not in (None, DType.F32, DType.F64):
            raise RecipeError("--compute-dtype takes float32 or float64")
        if self.max_shard_bytes is not None and self.max_shard_bytes < 1:
            raise RecipeError("--max-shard-size must be positive")
        self._check_base()
        _ = self.values  # resolved once, here, so that what is wrong with them is told first

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        if len(weights) != len(self.inputs):
            raise RecipeError(
                f"{len(weights)} weights for {len(self.inputs)} inputs; give one weight per input, like 0.6,0.4"
            )
        if not all(map(math.isfinite, weights)):
            raise RecipeError("weights must be finite numbers")

    def _check_base(self) -> None:
        if self.base is None and self.method.base == "required":
            raise RecipeError(f"{self.method.name} needs the models' common ancestor; name it with --base")
        if self.base is not None and self.method.base == "unused" and self._base_place is None:
            raise RecipeError(
                f"{self.method.name} takes no base; leave --base out, or give {printable(self.base)} as an input too"
            )

    @property
    def _base_place(self) -> int | None:
        """Which of the inputs the base is, if any."""
        if self.base is None:
            return None
        base = os.path.realpath(self.base)
        return next((i for i, path in enumerate(self.inputs) if os.path.realpath(path) == base), None)

    @property
    def based(self) -> bool:
        """Whether the method takes the base apart from the models."""
        return self.base is not None and self.method.base in ("required", "optional")

    @cached_property
    def checkpoints(self) -> tuple[str, ...]:
        """What is read: the base first, where one is named, then the other inputs."""
        if self.base is None:
            return self.inputs
        return (self.base, *(path for i, path in enumerate(self.inputs) if i != self._base_place))

    @property
    def models(self) -> tuple[str, ...]:
        """The checkpoints that the method takes as models."""
        return self.checkpoints[1:] if self.based else self.checkpoints

    @cached_property
    def values(self) -> dict[str, Any]:
        """All parameters of the method, those that each model has as lists in the order of ``models``."""
        given = {name: self._in_model_order(value) for name, value in self.parameters.items()}
        if self.weights is not None:
            given["weight"] = self._in_model_order(self.weights)
        return self.method.resolve(given, len(self.models))

    def _in_model_order(self, value: Any) -> Any:
        """One value per input, as one per model: that of the base first, or left out."""
        place = self._base_place
        if place is None or not isinstance(value, list | tuple) or len(value) != len(self.inputs):
            return value
        rest = [v for i, v in enumerate(value) if i != place]
        return rest if self.based else [value[place], *rest]

    @property
    def weight_of_each(self) -> tuple[float, ...]:
        """How much each checkpoint counts where plain numbers are averaged; a base that is no model does not."""
        models = tuple(self.values.get("weight") or (1.0,) * len(self.models))
        return (0.0, *models) if self.based else models

    def takes(self, name: str) -> bool:
        """Whether ``keep`` and ``drop`` let a tensor name through."""
        kept = not self.keep or any(fnmatchcase(name, pattern) for pattern in self.keep)
        return kept and not any(fnmatchcase(name, pattern) for pattern in self.drop)

    def output_name(self, name: str) -> str:
        return name[len(self.strip_prefix) :] if self.strip_prefix and name.startswith(self.strip_prefix) else name


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"{option} takes {', '.join(choices)}, not {printable(value)}")


def optional_dtype(name: object) -> DType | None:
    return None if name is None else parse_dtype(name)


def optional_bytes(size: str | int | None) -> int | None:
    return None if size is None else parse_bytes(size)
