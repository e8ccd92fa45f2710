"""Directions of sums of rows: one for each list of row numbers. Routers of experts are made so from embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.sources.base import Needs, Reader, Room, Source
from streammerge.sources.wide import Wide, put, wide_needs
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

_LEAST_NORM = 1e-8


@dataclass(frozen=True, slots=True)
class Directions(Source):
    """Row i is ``unit(unit(sum of wanted[i]) - unit(sum of against[i]))``, where ``unit`` gives a vector the length 1.

    ``wanted`` and ``against`` are numbers of rows of ``source``, a matrix; an empty ``against[i]`` subtracts nothing. Only
    these rows are read. Computed in float64, rounded once.
    """

    spec: TensorSpec
    source: Source
    wanted: tuple[tuple[int, ...], ...]
    against: tuple[tuple[int, ...], ...]

    def needs(self) -> Needs:
        width = self.spec.shape[1]
        return wide_needs(self.source, width) + Needs(held_bytes=24 * self.spec.numel, computes=True)

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)


def directions(
    name: str,
    source: Source,
    rows: tuple[tuple[int, ...], ...],
    against: tuple[tuple[int, ...], ...],
    dtype: DType,
) -> Source:
    """Returns a matrix with a direction in each row. Raises IndexError for a row that the source lacks."""
    count, width = source.spec.shape
    for number in (each for lists in (rows, against) for each_list in lists for each in each_list):
        if not 0 <= number < count:
            raise IndexError(number)
    return Directions(TensorSpec(name, dtype, (len(rows), width)), source, rows, against)


class _Reader(Reader):
    def __init__(self, source: Directions, room: Room) -> None:
        self._source, self._room = source, room
        self._width = source.spec.shape[1]
        self._wide = Wide(source.source, room, self._width)

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        whole: bytes = self._room.once(self._source, self._whole)
        size = self._source.spec.dtype.element_bytes
        out[:] = whole[start * size : stop * size]
        return out

    def _whole(self) -> bytes:
        import torch

        made = torch.zeros(self._source.spec.shape, dtype=torch.float64)
        for row, (ours, theirs) in enumerate(zip(self._source.wanted, self._source.against, strict=True)):
            for sign, numbers in ((1, ours), (-1, theirs)):
                if numbers:
                    total = torch.zeros(self._width, dtype=torch.float64)
                    for number in numbers:
                        total += self._wide.read(number * self._width, (number + 1) * self._width)
                    made[row].add_(total / total.norm().clamp(min=_LEAST_NORM), alpha=sign)
            made[row] /= made[row].norm().clamp(min=_LEAST_NORM)
        out = bytearray(self._source.spec.nbytes)
        put(made.view(-1), memoryview(out), self._source.spec.dtype)
        return bytes(out)
