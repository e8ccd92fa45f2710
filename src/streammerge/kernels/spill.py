"""What a method looks at again and memory has no room for, and symmetric matrices by their lower halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from streammerge.kernels.compact import STRIP_COLUMNS
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

HELD_BYTES = 8 << 20
"""As much is held in memory instead of a temporary file."""


class Spill(Protocol):
    """Bytes beside memory: those of a temporary file."""

    def write(self, data: memoryview, offset: int, /) -> None: ...
    def read_into(self, data: memoryview, offset: int, /) -> None: ...


class _Held:
    def __init__(self, nbytes: int) -> None:
        self._data = memoryview(bytearray(nbytes))

    def write(self, data: memoryview, offset: int) -> None:
        self._data[offset : offset + data.nbytes] = data.cast("B")

    def read_into(self, data: memoryview, offset: int) -> None:
        data.cast("B")[:] = self._data[offset : offset + data.nbytes]


def spilled(nbytes: int, spills: Callable[[int], Spill] | None) -> Spill:
    """Returns room for so many bytes: of ``spills``, which makes a file, unless there is none or the bytes are few."""
    return _Held(nbytes) if spills is None or nbytes <= HELD_BYTES else spills(nbytes)


def held_bytes(nbytes: int) -> int:
    """Returns the memory that a spill of so many bytes takes."""
    return nbytes if nbytes <= HELD_BYTES else 0


class SpilledRows:
    """The first rows of a spill as a float64 matrix of so many columns."""

    def __init__(self, spill: Spill, columns: int) -> None:
        self._spill, self.columns = spill, columns

    def put(self, start: int, rows: torch.Tensor) -> None:
        """Writes rows from ``start`` on. They are contiguous."""
        self._spill.write(rows.numpy().data, 8 * self.columns * start)

    def get(self, start: int, rows: torch.Tensor) -> torch.Tensor:
        """Reads rows from ``start`` on into a contiguous matrix, and returns it."""
        self._spill.read_into(rows.numpy().data, 8 * self.columns * start)
        return rows


class Half:
    """The lower half of a symmetric float64 matrix: strips of its rows up to the diagonal."""

    def __init__(self, size: int) -> None:
        import torch

        self.size = size
        self.strips = [torch.zeros(b - a, b, dtype=torch.float64) for a, b in ranges(size, STRIP_COLUMNS)]

    def diagonal(self) -> torch.Tensor:
        import torch

        spans = ranges(self.size, STRIP_COLUMNS)
        return torch.cat([strip[:, a:].diagonal() for strip, (a, _) in zip(self.strips, spans, strict=True)])

    def add_(self, other: Half) -> Half:
        for strip, more in zip(self.strips, other.strips, strict=True):
            strip.add_(more)
        return self

    def add_gram(self, x: torch.Tensor, scale: float = 1.0) -> None:
        """Adds the product of a transposed matrix and itself, times ``scale``."""
        for strip, (a, b) in zip(self.strips, ranges(self.size, STRIP_COLUMNS), strict=True):
            strip.addmm_(x[:, a:b].T, x[:, :b], alpha=scale)

    def save(self, spill: Spill, offset: int) -> None:
        for strip in self.strips:
            spill.write(strip.numpy().data, offset)
            offset += strip.nbytes

    def square(self) -> torch.Tensor:
        """Returns the whole matrix. Takes the strips out, so that their memory is free as soon as it can be."""
        import torch

        made = torch.empty(self.size, self.size, dtype=torch.float64)
        for a, b in ranges(self.size, STRIP_COLUMNS):
            made[a:b, :b] = self.strips.pop(0)
        return mirrored(made)


def half_bytes(size: int) -> int:
    return 8 * sum((b - a) * b for a, b in ranges(size, STRIP_COLUMNS))


def square_of(spill: Spill, offset: int, size: int) -> torch.Tensor:
    """Returns the whole matrix whose half was saved."""
    import torch

    made = torch.empty(size, size, dtype=torch.float64)
    for a, b in ranges(size, STRIP_COLUMNS):
        strip = torch.empty(b - a, b, dtype=torch.float64)
        spill.read_into(strip.numpy().data, offset)
        offset += strip.nbytes
        made[a:b, :b] = strip
    return mirrored(made)


def mirrored(matrix: torch.Tensor) -> torch.Tensor:
    """Makes a matrix symmetric from its part below the diagonal, in place.

    Not every processor's product of a matrix and its own transpose is symmetric to the last bit.
    """
    for a, b in ranges(len(matrix), STRIP_COLUMNS):
        matrix[:a, a:b] = matrix[a:b, :a].T
        below = matrix[a:b, a:b].tril()
        matrix[a:b, a:b] = below + below.tril(-1).T
    return matrix
