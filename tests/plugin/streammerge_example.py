"""What an installed package may bring: a merge method, a format, a store, an executor."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path

import streammerge as sm
from streammerge.errors import FormatError, printable
from streammerge.formats.base import Container, Match, flat_tensor
from streammerge.running.executors.base import Executor, Host, Result, Unit, Work
from streammerge.sources.stored import Stored
from streammerge.stores.base import Input, Status
from streammerge.tensors.dtypes import DType

_MAGIC = b"NUMBERS\n"


@sm.merge_method("midpoint", models=(2, 2), base="unused", passes=False, pointwise=True, buffers=2)
def midpoint(group: sm.TensorGroup, *, pull: float = 0.5) -> sm.Kernel:
    """The point between two models, ``pull`` of the way to the second."""
    return lambda chunk: chunk.models[0] + pull * (chunk.models[1] - chunk.models[0])


class Numbers:
    """One tensor named ``w`` of float32 numbers behind eight bytes."""

    def matches(self, head: bytes, size: int) -> Match:
        return head.startswith(_MAGIC)

    def read(self, path: sm.Location) -> Container:
        count, rest = divmod(path.size - len(_MAGIC), 4)
        if rest:
            raise FormatError(f"{printable(path)} ends within a number; it is truncated")
        entry = Stored(sm.TensorSpec("w", DType.F32, (count,)), path, len(_MAGIC))
        return Container(path, "numbers", {"w": flat_tensor(entry)}, {}, (path,))


class Opened(Input):
    """A file that was read whole."""

    def __init__(self, location: sm.Location, data: bytes) -> None:
        self.location, self.size, self._data = location, len(data), data

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if offset + len(buffer) > self.size:
            raise self.ended(offset, len(buffer))
        buffer[:] = self._data[offset : offset + len(buffer)]


class Hexed(sm.Store):
    """Files of this machine that hold hexadecimal digits: ``hexed://a.hex`` has the bytes that a.hex writes out."""

    scheme = "hexed"

    def status(self, location: sm.Location) -> Status:
        data = self._data(location)
        return Status((location.key,), len(data), hash(data))

    def is_folder(self, location: sm.Location) -> bool:
        return False

    def list_names(self, location: sm.Location) -> list[str]:
        return []

    def opened(self, location: sm.Location) -> Input:
        return Opened(location, self._data(location))

    def _data(self, location: sm.Location) -> bytes:
        try:
            return bytes.fromhex(Path(location.key).read_text())
        except (OSError, ValueError) as error:
            raise FormatError(f"{printable(location)} cannot be read ({printable(error)})") from error


class OneByOne(Executor):
    """Does the units on the calling thread, whatever the number of workers."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.stopping = False

    def run(self, work: Work[Unit, Result], units: Iterable[Unit], backlog: int = 64) -> Generator[Result, None, None]:
        self.stopping = False
        try:
            with closing(work.open(Host(lambda: self.stopping))) as worker:
                yield from map(worker.run, units)
        finally:
            self.stopping = True
