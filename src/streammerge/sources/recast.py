"""A source whose numbers are given in another floating-point dtype."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.sources.base import Needs, Reader, Room, Source
from streammerge.sources.wide import Wide, put, wide_needs
from streammerge.tensors.spec import TensorSpec

_BLOCK_ELEMS = 1 << 13


@dataclass(frozen=True, slots=True)
class Recast(Source):
    """The numbers of ``source``, each rounded to the dtype of ``spec``."""

    spec: TensorSpec
    source: Source

    def needs(self) -> Needs:
        return wide_needs(self.source, _BLOCK_ELEMS)

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)


class _Reader(Reader):
    def __init__(self, source: Recast, room: Room) -> None:
        self._wide, self._room = Wide(source.source, room, _BLOCK_ELEMS), room
        self._dtype = source.spec.dtype

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        size = self._dtype.element_bytes
        for at in range(start, stop, _BLOCK_ELEMS):
            self._room.halt()
            end = min(at + _BLOCK_ELEMS, stop)
            put(self._wide.read(at, end), out[(at - start) * size : (end - start) * size], self._dtype)
        return out
