"""What the user asked for: frozen, checked as far as it can be without looking at a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from streammerge.dtypes import DType, parse_dtype
from streammerge.errors import RecipeError, printable
from streammerge.methods.contracts import find_method
from streammerge.statedict import EMA_CHOICES
from streammerge.units import parse_bytes

ON_MISSING = ("error", "base", "average-present", "drop")
INTEGERS = ("first", "last", "max", "error")
IO = ("mmap", "pread")


@dataclass(frozen=True)
class Recipe:
    """One merge or conversion. ``weights`` has one number per input; None is equal weights.

    ``drop`` and ``keep`` are glob patterns on tensor names; ``strip_prefix`` is removed from names that begin with it.
    Raises RecipeError for values that cannot be.
    """

    inputs: tuple[str, ...]
    method: str = "linear"
    weights: tuple[float, ...] | None = None
    normalize: bool = True
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
        if self.method != "copy":
            find_method(self.method)
        _one_of("--ema", self.ema, EMA_CHOICES)
        _one_of("--on-missing", self.on_missing, ON_MISSING)
        if self.integers is not None:
            _one_of("--integers", self.integers, INTEGERS)
        if self.weights is not None:
            self._check_weights(self.weights)
        for name, dtype in (("--out-dtype", self.out_dtype), ("--compute-dtype", self.compute_dtype)):
            if dtype is not None and dtype.kind != "float":
                raise RecipeError(f"{name} takes a floating-point dtype, not {dtype.torch_name}")
        if self.compute_dtype not in (None, DType.F32, DType.F64):
            raise RecipeError("--compute-dtype takes float32 or float64")
        if self.max_shard_bytes is not None and self.max_shard_bytes < 1:
            raise RecipeError("--max-shard-size must be positive")

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        if len(weights) != len(self.inputs):
            raise RecipeError(
                f"{len(weights)} weights for {len(self.inputs)} inputs; give one weight per input, like 0.6,0.4"
            )
        if not all(map(math.isfinite, weights)):
            raise RecipeError("weights must be finite numbers")
        if self.normalize and not sums_to_something(weights):
            raise RecipeError(
                "the weights sum to zero, so they cannot be normalised; pass --no-normalize to use them as given"
            )

    @property
    def weight_of_each(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.inputs)

    def takes(self, name: str) -> bool:
        """Whether ``keep`` and ``drop`` let a tensor name through."""
        kept = not self.keep or any(fnmatchcase(name, pattern) for pattern in self.keep)
        return kept and not any(fnmatchcase(name, pattern) for pattern in self.drop)

    def output_name(self, name: str) -> str:
        return name[len(self.strip_prefix) :] if self.strip_prefix and name.startswith(self.strip_prefix) else name


def sums_to_something(weights: Sequence[float]) -> bool:
    """Whether weights can be divided by their sum: it is finite, and not just the rounding error of its terms."""
    total = sum(weights)
    return math.isfinite(total) and abs(total) > 1e-12 * max(map(abs, weights))


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"{option} takes {', '.join(choices)}, not {printable(value)}")


def optional_dtype(name: object) -> DType | None:
    return None if name is None else parse_dtype(name)


def optional_bytes(size: str | int | None) -> int | None:
    return None if size is None else parse_bytes(size)
