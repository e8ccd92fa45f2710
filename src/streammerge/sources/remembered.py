"""A source that is read several times: a reader keeps what it has read last."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.sources.base import Needs, Reader, Room, Source
from streammerge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Remembered(Source):
    """``source``. All readers of it in one worker share a tile: elements of the tensor that were read one after the other.

    Of a tensor that fits into the tile, elements that follow each other are read once. Of a longer one, the last ones are
    there for those who read it side by side. Without a tile it is read as often as it is asked for.
    """

    spec: TensorSpec
    source: Source

    def needs(self) -> Needs:
        return self.source.needs() + Needs(tiles=1)

    def open(self, room: Room) -> Reader:
        return room.common(self, lambda: _Reader(self, room))

    @property
    def place(self) -> tuple[object, ...]:
        return self.source.place


class _Reader(Reader):
    def __init__(self, source: Remembered, room: Room) -> None:
        self._inner = source.source.open(room)
        self._tile = room.tile()
        self._size = source.spec.dtype.element_bytes
        self._most = len(self._tile) // self._size
        self._elems = source.spec.numel
        self._begin = self._end = 0
        self._first = 0  # the element at the tile's begin

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        if self._most >= self._elems:
            if start < self._begin or self._end == self._begin:  # the same numbers come to the same places again
                self._begin = self._end = start
            if stop > self._end:
                self._add(stop)
            return self._part(start, stop)  # it stays, because every element has a place of its own in the tile
        if not self._begin <= start <= self._end or stop - self._begin > self._most:
            if stop - start > self._most:
                return self._inner.read(start, stop, out)
            self._first = self._begin = self._end = start
        if stop > self._end:
            self._add(stop)
        out[:] = self._part(start, stop)
        return out

    def _add(self, stop: int) -> None:
        """Reads the elements up to ``stop`` behind those that are there."""
        part = self._part(self._end, stop)
        made = self._inner.read(self._end, stop, part)
        if made is not part:
            part[:] = made
        self._end = stop

    def _part(self, start: int, stop: int) -> memoryview:
        return self._tile[(start - self._first) * self._size : (stop - self._first) * self._size]
