"""A source that is read several times: a reader keeps what it has read."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.sources.base import Needs, Reader, Room, Source
from streammerge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Remembered(Source):
    """``source``. All readers of it in one worker share what was read, as far as the room has memory for it.

    The first elements of the tensor stay: what follows each other among them is read once. Of the others, those read last
    are there for those who read it side by side. Without memory it is read as often as it is asked for.
    """

    spec: TensorSpec
    source: Source

    def needs(self) -> Needs:
        return self.source.needs()

    def open(self, room: Room) -> Reader:
        return room.common(self, lambda: _Reader(self, room))

    @property
    def place(self) -> tuple[object, ...]:
        return self.source.place


class _Reader(Reader):
    def __init__(self, source: Remembered, room: Room) -> None:
        self._inner = source.source.open(room)
        first, last = room.remembered(source)
        self._size = source.spec.dtype.element_bytes
        self._first = _Stretch(self._inner, first, self._size)
        self._last = _Stretch(self._inner, last, self._size)
        self._staying = self._first.most

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        staying = self._staying
        if stop <= staying:
            return self._staying_part(start, stop)
        if start >= staying:
            return self._passing(start, stop, out)
        middle = (staying - start) * self._size
        out[:middle] = self._staying_part(start, staying)
        rest = out[middle:]
        made = self._passing(staying, stop, rest)
        if made is not rest:
            rest[:] = made
        return out

    def _staying_part(self, start: int, stop: int) -> memoryview:
        """Returns elements that have a place of their own, and so stay where they are."""
        known = self._first
        if start < known.begin or known.end == known.begin:  # the same numbers come to the same places again
            known.begin = known.end = start
        if stop > known.end:
            known.add(stop)
        return known.part(start, stop)

    def _passing(self, start: int, stop: int, out: memoryview) -> memoryview:
        """Returns elements of which only the last are there. The earlier half of them goes when there is no more room."""
        known = self._last
        if stop - start > known.most:
            return self._inner.read(start, stop, out)
        if not known.begin <= start <= known.end:
            known.first = known.begin = known.end = start
        if stop - known.first > known.most:
            known.drop(max(min(start, known.end - known.most // 2), known.begin), stop)
        if stop > known.end:
            known.add(stop)
        out[:] = known.part(start, stop)
        return out


class _Stretch:
    """Elements ``begin`` to ``end``, in memory that begins with element ``first``."""

    def __init__(self, inner: Reader, memory: memoryview, size: int) -> None:
        self._inner, self._memory, self._size = inner, memory, size
        self.most = len(memory) // size
        self.first = self.begin = self.end = 0

    def add(self, stop: int) -> None:
        """Reads the elements up to ``stop`` behind those that are there."""
        part = self.part(self.end, stop)
        made = self._inner.read(self.end, stop, part)
        if made is not part:
            part[:] = made
        self.end = stop

    def part(self, start: int, stop: int) -> memoryview:
        return self._memory[(start - self.first) * self._size : (stop - self.first) * self._size]

    def drop(self, begin: int, stop: int) -> None:
        """Drops the elements before ``begin``, and as many more as make room up to ``stop``. Moves the rest."""
        begin = max(begin, stop - self.most)
        kept = self.part(begin, self.end)
        self._memory[: len(kept)] = kept
        self.first = self.begin = begin
