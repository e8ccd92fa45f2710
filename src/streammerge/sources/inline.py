"""A small tensor whose numbers stand in a header, and were read with it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

from streammerge.sources.base import NO_NEEDS, BlobPath, Needs, Reader, Room, Source
from streammerge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Inline(Source):
    """Little-endian bytes in C order, in memory. ``path`` and ``offset``: where the header has them.

    They are part of the header, so no blob is read for them. ``in_memory``: the header is in no file, but in the caller's
    memory.
    """

    spec: TensorSpec
    path: BlobPath
    offset: int
    data: bytes
    in_memory: bool = False

    def needs(self) -> Needs:
        return NO_NEEDS

    def open(self, room: Room) -> Reader:
        return _Reader(self)

    @property
    def held(self) -> bool:
        return self.in_memory

    @property
    def begin(self) -> tuple[BlobPath, int]:
        return self.path, self.offset

    @property
    def paths(self) -> tuple[BlobPath, ...]:
        return (self.path,)

    @property
    def place(self) -> tuple[object, ...]:
        return ("Inline", self.path, self.offset, zlib.crc32(self.data), self.spec.dtype, self.spec.shape)

    def rows(self, start: int, stop: int) -> Source:
        spec = self.spec
        row_bytes = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
        cut = self.data[start * row_bytes : stop * row_bytes]
        made = TensorSpec(spec.name, spec.dtype, (stop - start, *spec.shape[1:]))
        return replace(self, spec=made, data=cut, offset=self.offset + start * row_bytes)


class _Reader(Reader):
    def __init__(self, source: Inline) -> None:
        self._data, self._size = source.data, source.spec.dtype.element_bytes

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        out[:] = self._data[start * self._size : stop * self._size]
        return out
