"""Descriptions of tensors: dtype, shape, place of the bytes, and ranges of elements."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from streammerge.errors import RecipeError, printable
from streammerge.tensors.dtypes import DType, parse_dtype

GRAIN = 1 << 16
"""Number of elements per unit of reductions and random numbers. It is fixed, so chunk sizes cannot change a result."""


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


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The place of a tensor's bytes: little-endian at ``offset`` of the file at ``path``, in C order.

    Three forms cannot be mapped directly and are copied into a temporary file first. ``strides`` (in elements): the
    tensor is not contiguous, and ``offset`` is that of its first element. ``deflated``: the compressed record that
    holds the tensor; ``offset`` counts within the uncompressed bytes. ``lazy``: a conjugation or negation that torch
    had not carried out yet.
    """

    spec: TensorSpec
    path: str
    offset: int
    strides: tuple[int, ...] | None = None
    deflated: Deflated | None = None
    lazy: str = ""

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def span(self) -> tuple[int, int]:
        """(offset, bytes) in the file; for a compressed record, the span of the whole record."""
        return self.deflated.span if self.deflated else (self.offset, self.spec.nbytes)

    @property
    def mappable(self) -> bool:
        return self.strides is None and self.deflated is None and not self.lazy

    @property
    def place(self) -> tuple[object, ...]:
        """A key that is equal for two names exactly if they are one tensor: same bytes, dtype, shape and strides."""
        return (self.path, self.deflated, self.offset, self.spec.dtype, self.spec.shape, self.strides, self.lazy)


@dataclass(frozen=True, slots=True)
class Deflated:
    """A compressed record: the place of its deflate stream, and its size in bytes before and after compression."""

    offset: int
    compressed_bytes: int
    nbytes: int

    @property
    def span(self) -> tuple[int, int]:
        return self.offset, self.compressed_bytes


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
