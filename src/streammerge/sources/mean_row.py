"""The mean of all rows of a source, as one row or several equal ones: rows that pad a vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.tensors.spec import TensorSpec

_BLOCK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class MeanRow(Source):
    """Rows that each are the mean of the rows of ``source``, rounded once to its dtype. :func:`mean_rows` makes it.

    The sum is a float64 sum of fixed blocks of rows in their order, so it does not depend on who reads what.
    """

    spec: TensorSpec
    source: Source

    def needs(self) -> Needs:
        row = self.row_elems * self.spec.dtype.element_bytes
        block = self.block_rows * self.row_elems
        needed = Needs(scratch_bytes=region_bytes(self.block_rows * row), held_bytes=8 * block + 24 * self.row_elems + row)
        return self.source.needs() + needed + Needs(computes=True)

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def row_elems(self) -> int:
        return math.prod(self.spec.shape[1:])

    @property
    def block_rows(self) -> int:
        """How many rows are read at once."""
        return max(_BLOCK_BYTES // max(self.row_elems * self.spec.dtype.element_bytes, 1), 1)


def mean_rows(source: Source, count: int) -> MeanRow:
    """Returns ``count`` rows that each are the mean of the rows of a source of floating-point numbers."""
    spec = source.spec
    return MeanRow(TensorSpec(spec.name, spec.dtype, (count, *spec.shape[1:])), source)


class _Reader(Reader):
    def __init__(self, source: MeanRow, room: Room) -> None:
        self._source, self._room = source, room
        self._reader = source.source.open(room)
        self._size = source.spec.dtype.element_bytes
        self._block = room.take(source.block_rows * source.row_elems * self._size)

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        row: bytes = self._room.once(self._source, self._mean)
        at, done = start * self._size % len(row), 0
        while done < len(out):
            part = row[at : at + len(out) - done]
            out[done : done + len(part)] = part
            done, at = done + len(part), 0
        return out

    def _mean(self) -> bytes:
        import torch

        inner, width = self._source.source.spec, self._source.row_elems
        total = torch.zeros(width, dtype=torch.float64)
        for first in range(0, inner.shape[0], self._source.block_rows):
            self._room.halt()
            last = min(first + self._source.block_rows, inner.shape[0])
            part = self._block[: (last - first) * width * self._size]
            made = self._reader.read(first * width, last * width, part)
            rows = torch.frombuffer(made, dtype=inner.dtype.torch).view(last - first, width)
            total += rows.sum(0, dtype=torch.float64) if inner.dtype.bits > 8 else rows.double().sum(0)
        mean = (total / inner.shape[0]).to(inner.dtype.torch).contiguous()
        return mean.view(torch.uint8).numpy().tobytes()
