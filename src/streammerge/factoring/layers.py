"""What is made for each module of an adapter, and what came out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from streammerge.factoring.truncated import Rows, Wanted, decomposing_bytes, held_bytes, product_bytes
from streammerge.kernels.spectral import sides
from streammerge.sources.base import Source
from streammerge.sources.wide import wide_needs
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec

Shape = tuple[int, ...]
LINEAR, TRANSPOSED, EMBEDDING = "linear", "transposed", "embedding"
DECOMPOSE, RECOMPRESS, STACK, COMPARE = "decompose", "recompress", "stack", "compare"


class Keys(NamedTuple):
    """The names of a module's factors in an adapter that is one file, and its alpha, "" and 0 if the file has none: then
    loaders take the rank."""

    down: str
    up: str
    alpha: str = ""
    value: float = 0.0
    dtype: DType = DType.F32


@dataclass(frozen=True, slots=True)
class Layer:
    """A tensor of the base, and what is made for it.

    ``name``: of the tensor, ``shape``: its shape. ``way``: "decompose" takes a difference, and maybe the tensor whose
    rounding errors count as zero; "recompress" and "stack" take the left factor [n, k] and the right one [k, m], and make
    factors of a lower rank, or leave them; "compare" takes two tensors, and makes no factors. ``form``: how the tensor is
    stored: "linear" [out, in, ...], "transposed" [in, out], or "embedding" [rows, columns]. ``alpha``: 0 is the rank.
    ``keys``: None for the names of PEFT.
    """

    name: str
    shape: Shape
    way: str
    sources: tuple[Source, ...]
    wanted: Wanted
    form: str = LINEAR
    alpha: float = 0.0
    keys: Keys | None = None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns as a matrix."""
        return sides(self.shape)

    @property
    def rows(self) -> Rows:
        return Rows(self.sources[0], self.sides, self.sources[1] if len(self.sources) > 1 else None)

    def needed_bytes(self) -> int:
        """Returns the memory that one worker needs for it."""
        if self.way == COMPARE:
            return sum(held_bytes(wide_needs(each, min(GRAIN, each.spec.numel))) for each in self.sources) + 8 * GRAIN
        if self.way == DECOMPOSE:
            return decomposing_bytes(self.rows, self.wanted) + self._turned_bytes(self.wanted.most(self.sides))
        left, right = self.sources
        read = sum(held_bytes(wide_needs(each, min(GRAIN, each.spec.numel))) for each in self.sources)
        rank = right.spec.shape[0]
        if self.way == STACK:
            return read + left.nbytes + right.nbytes
        return read + product_bytes(self.sides, rank) + self._turned_bytes(rank)

    def _turned_bytes(self, rank: int) -> int:
        return self.wanted.dtype.element_bytes * rank * sum(self.sides)

    def most_bytes(self) -> int:
        """Returns the most bytes that its factors have."""
        if self.way == COMPARE:
            return 0
        rank = self.sources[1].spec.shape[0] if self.way == STACK else self.wanted.most(self.sides)
        return self._turned_bytes(rank)

    def specs(self, rank: int) -> tuple[TensorSpec, TensorSpec]:
        """Returns the tensors of A and of B."""
        (rows, columns), dtype = self.sides, self.wanted.dtype
        down, up = self._names()
        if self.form != LINEAR:
            return TensorSpec(down, dtype, (rank, rows)), TensorSpec(up, dtype, (columns, rank))
        wide = TensorSpec(down, dtype, (rank, *self.shape[1:]))
        return wide, TensorSpec(up, dtype, (rows, rank, *(1 for _ in self.shape[2:])))

    def _names(self) -> tuple[str, str]:
        if self.keys is not None:
            return self.keys.down, self.keys.up
        start = f"base_model.model.{self.module}"
        if self.form == EMBEDDING:
            return f"{start}.lora_embedding_A", f"{start}.lora_embedding_B"
        return f"{start}.lora_A.weight", f"{start}.lora_B.weight"

    def stored_alpha(self) -> tuple[TensorSpec, float] | None:
        """Returns the tensor of the alpha and its value; None in a file without alphas."""
        if self.keys is None or not self.keys.alpha:
            return None
        value = self.keys.value
        return TensorSpec(self.keys.alpha, _holding(value, self.keys.dtype), ()), value


def _holding(value: float, dtype: DType) -> DType:
    """Returns a dtype that holds a number as it is: the given one, or float32, which every loader reads."""
    bits, least = _DIGITS.get(dtype, (0, 0.0))
    mantissa, _ = math.frexp(value)
    exact = least <= abs(value) <= _LARGEST and math.ldexp(mantissa, bits).is_integer()
    return dtype if exact else DType.F32


_DIGITS = {DType.F64: (53, 0.0), DType.F32: (24, 0.0), DType.F16: (11, 2.0**-14), DType.BF16: (8, 2.0**-126)}
"""Binary digits of a dtype, and the least number that has so many."""
_LARGEST = 65504.0


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How well the factors of one tensor represent it.

    ``norm``: of the whole update, the root of its sum of squares; 0 for stacked factors, whose product is not made.
    ``error``: the norm of what the factors lack, as a share of it. ``stored``: how it is in the adapter: "factors",
    "whole", "equal" if there is no update, or "absent" if the adapter lacks it.
    """

    name: str
    shape: Shape
    stored: str
    rank: int
    norm: float
    error: float

    def record(self) -> dict[str, Any]:
        """Returns what the receipt says of it. Numbers have six digits."""
        numbers = {"norm": float(f"{self.norm:.6g}"), "error": float(f"{self.error:.6g}")}
        return {"tensor": self.name, "stored": self.stored, "rank": self.rank, **numbers}


def share(rest: float, total: float) -> float:
    """Returns the root of a share of squares."""
    return math.sqrt(rest / total) if total else 0.0
