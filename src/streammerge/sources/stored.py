"""A tensor whose bytes lie in C order in one place. Most tensors are of this kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from streammerge.sources.base import NO_NEEDS, Blob, BlobPath, Needs, Reader, Room, Source
from streammerge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Stored(Source):
    """Little-endian bytes in C order at ``offset`` of ``path``. Workers map them if the store supports it."""

    spec: TensorSpec
    path: BlobPath
    offset: int

    def needs(self) -> Needs:
        return NO_NEEDS

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def parts(self) -> tuple[Source, ...]:
        return ()

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return (Blob(self.path, self.offset, self.spec.nbytes),)

    @property
    def ranged(self) -> bool:
        return True

    def blobs_of(self, start: int, stop: int) -> Iterator[Blob]:
        size = self.spec.dtype.element_bytes
        yield Blob(self.path, self.offset + start * size, (stop - start) * size)

    @property
    def begin(self) -> tuple[BlobPath, int]:
        return self.path, self.offset

    @property
    def origin(self) -> str:
        return str(self.path)

    @property
    def held(self) -> bool:
        return False

    @property
    def dequantises(self) -> bool:
        return False

    @property
    def place(self) -> tuple[object, ...]:
        return (self.path, self.offset, self.spec.dtype, self.spec.shape)

    def rows(self, start: int, stop: int) -> Source:
        spec = self.spec
        shape = (stop - start, *spec.shape[1:])
        row_bytes = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
        return replace(self, spec=TensorSpec(spec.name, spec.dtype, shape), offset=self.offset + start * row_bytes)


class _Reader(Reader):
    def __init__(self, source: Stored, room: Room) -> None:
        self._source, self._room = source, room
        self._file = room.file(source.path)
        self._size = source.spec.dtype.element_bytes

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        begin = self._source.offset + start * self._size
        self._file.read_into(out, begin)
        self._room.touched(self._source.path, begin, len(out))
        return out

    def place(self, start: int, stop: int) -> tuple[BlobPath, int]:
        return self._source.path, self._source.offset + start * self._size
