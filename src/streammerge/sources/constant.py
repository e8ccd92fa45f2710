"""One number everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.sources.base import NO_NEEDS, Needs, Reader, Room, Source
from streammerge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Constant(Source):
    """The same element everywhere. ``element``: its bytes in the dtype of ``spec``, little-endian; zeros if empty."""

    spec: TensorSpec
    element: bytes = b""

    def needs(self) -> Needs:
        return NO_NEEDS

    def open(self, room: Room) -> Reader:
        return _Reader(self.element or bytes(self.spec.dtype.element_bytes))

    def rows(self, start: int, stop: int) -> Source:
        spec = self.spec
        return Constant(TensorSpec(spec.name, spec.dtype, (stop - start, *spec.shape[1:])), self.element)


class _Reader(Reader):
    def __init__(self, element: bytes) -> None:
        self._element = element

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        done = len(self._element)
        out[:done] = self._element
        while done < len(out):  # doubles the filled part each time
            more = min(done, len(out) - done)
            out[done : done + more] = out[:more]
            done += more
        return out
