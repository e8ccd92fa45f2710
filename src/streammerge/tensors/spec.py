"""Descriptions of tensors: dtype, shape, place of the bytes, and ranges of elements."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from streammerge.errors import RecipeError, printable
from streammerge.tensors.dtypes import DType, parse_dtype

GRAIN = 1 << 16
"""Number of elements per unit of reductions and random numbers. It is fixed, so chunk sizes cannot change a result."""
PIECE_ELEMS = 64 * GRAIN
"""Number of elements of the pieces into which a long tensor is cut."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor. ``dtype`` accepts torch and safetensors names; ``shape`` counts torch
    elements."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    numel: int = field(init=False, repr=False, compare=False)
    nbytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype.__class__ is not DType:
            object.__setattr__(self, "dtype", parse_dtype(self.dtype))
        if self.shape.__class__ is not tuple:
            object.__setattr__(self, "shape", tuple(self.shape))
        if self.shape and min(self.shape) < 0:
            raise RecipeError(f"{printable(self.name)} cannot have the shape {list(self.shape)}")
        object.__setattr__(self, "numel", math.prod(self.shape))
        object.__setattr__(self, "nbytes", self.numel * self.dtype.element_bytes)

    @property
    def component_shape(self) -> tuple[int, ...]:
        """The shape as arithmetic sees it: a complex number is two."""
        if self.dtype.kind != "complex":
            return self.shape
        return (*self.shape[:-1], self.shape[-1] * 2) if self.shape else (2,)

    @property
    def component_elems(self) -> int:
        """How many numbers arithmetic sees: a complex number is two."""
        return self.nbytes // self.dtype.component.element_bytes

    def named(self, name: str) -> TensorSpec:
        """The same by another name."""
        return self if name == self.name else TensorSpec(name, self.dtype, self.shape)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides, in elements, of a C-order tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie in C order without gaps. Dimensions of size 1 may have any stride."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return 0 in shape
        step *= size
    return True


def ranges(numel: int, step: int) -> Iterator[tuple[int, int]]:
    """Yields half-open ranges of at most ``step`` elements that cover ``numel``; none for an empty tensor."""
    for start in range(0, numel, step):
        yield start, min(start + step, numel)
