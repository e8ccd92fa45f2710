"""A tensor whose first axis comes last: a matrix with its rows and columns swapped.

A view of bytes or of memory stays one (:mod:`streammerge.sources.box`). Other sources are read in parts of their rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streammerge.sources.base import Needs, Reader, Room, Source, boxes, region_bytes
from streammerge.sources.box import box
from streammerge.tensors.spec import TensorSpec

_PART_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Turned(Source):
    """The elements of ``whole``, seen as a matrix of ``columns`` columns, column by column."""

    spec: TensorSpec
    whole: Source
    columns: int

    def needs(self) -> Needs:
        return self.whole.needs() + Needs(scratch_bytes=region_bytes(_PART_BYTES), computes=True)

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)


def turned_spec(spec: TensorSpec) -> TensorSpec:
    """Returns the spec of a tensor whose first axis comes last."""
    return TensorSpec(spec.name, spec.dtype, (*spec.shape[1:], spec.shape[0]))


def turned(source: Source) -> Source:
    """Returns a source of two axes or more with its first axis last."""
    spec = turned_spec(source.spec)
    axes = [*range(1, len(spec.shape)), 0]
    viewed = box(source, spec.name, [0] * len(axes), spec.shape, axes)
    return viewed or Turned(spec, source, math.prod(source.spec.shape[1:]))


def turned_back(source: Source, spec: TensorSpec) -> Source:
    """Returns the tensor ``spec`` whose turned form ``source`` is."""
    axes = [len(spec.shape) - 1, *range(len(spec.shape) - 1)]
    viewed = box(source, spec.name, [0] * len(axes), spec.shape, axes)
    return viewed or Turned(spec, source, spec.shape[0])


class _Reader(Reader):
    """Reads a part of each row of the inner source, and puts it into a column."""

    def __init__(self, source: Turned, room: Room) -> None:
        self._source, self._room = source, room
        self._reader, self._part = source.whole.open(room), room.take(_PART_BYTES)
        self._size = source.spec.dtype.element_bytes

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        columns, size, done = self._source.columns, self._size, 0
        rows, most = self._source.spec.numel // columns, _PART_BYTES // size
        for (first, last), (begin, end) in boxes((columns, rows), start, stop):
            width, height = last - first, end - begin
            into = torch.frombuffer(out[done * size : (done + width * height) * size], dtype=torch.uint8)
            into = into.view(width, height, size)
            for row in range(begin, end):
                self._room.halt()
                for at in range(first, last, most):
                    stretch = min(last - at, most)
                    begin_elem = row * columns + at
                    made = self._reader.read(begin_elem, begin_elem + stretch, self._part[: stretch * size])
                    part = torch.frombuffer(made, dtype=torch.uint8).view(stretch, size)
                    into[at - first : at - first + stretch, row - begin] = part
            done += width * height
        return out
