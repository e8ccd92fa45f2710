"""What a tensor is, where its bytes are, and how a long one is walked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from streammerge.errors import RecipeError, printable
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import DType, parse_dtype

GRAIN = 1 << 16
"""Elements on which reductions and random numbers are defined, so that no chunk size can change a result."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is. ``dtype`` may be given under its torch or its safetensors name; ``shape`` counts torch elements."""

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
    """Where a tensor's bytes are: little-endian at ``offset`` of the file ``path``, in C order.

    Three forms cannot be mapped as they stand and are staged into a temporary file before they are read: ``strides``
    (in elements) of a tensor that is not contiguous, ``offset`` then being that of its first element; ``deflated``,
    the compressed record that holds it, ``offset`` then counting within the uncompressed bytes; and ``lazy``, a
    conjugation or negation that torch had not carried out yet.
    """

    spec: TensorSpec
    path: Location
    offset: int
    strides: tuple[int, ...] | None = None
    deflated: Deflated | None = None
    lazy: str = ""

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def span(self) -> tuple[int, int]:
        """(offset, bytes) in the file; of a compressed record all that holds it."""
        return self.deflated.span if self.deflated else (self.offset, self.spec.nbytes)

    @property
    def mappable(self) -> bool:
        return self.strides is None and self.deflated is None and not self.lazy

    @property
    def place(self) -> tuple[object, ...]:
        """Equal for two names exactly when they are one tensor: same bytes, dtype, shape and strides."""
        return (self.path, self.deflated, self.offset, self.spec.dtype, self.spec.shape, self.strides, self.lazy)


@dataclass(frozen=True, slots=True)
class Deflated:
    """A compressed record: where its deflate stream lies, and how long it is before and after."""

    offset: int
    compressed_bytes: int
    nbytes: int

    @property
    def span(self) -> tuple[int, int]:
        return self.offset, self.compressed_bytes


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-order tensor of that shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie in C order without gaps; dimensions of size 1 may have any stride."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return 0 in shape
        step *= size
    return True


def ranges(numel: int, step: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of at most ``step`` elements that cover ``numel``; an empty tensor has none."""
    for start in range(0, numel, step):
        yield start, min(start + step, numel)
