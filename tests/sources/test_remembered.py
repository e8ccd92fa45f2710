"""Sources that are read several times: what a reader keeps, and that its elements are the right ones."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from sources.suite import Case, Disk, SourceSuite, draw
from streammerge.sources.base import Allocated, Needs, Reader, Room, Source, read_whole
from streammerge.sources.remembered import Remembered
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


class TestRemembered(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for shape in ((), (1,), (0, 3), (7, 5), (300, 256)):
            tensor = draw(shape, torch.float32)
            stored = disk.stored(tensor)
            yield Case(Remembered(stored.spec, stored), tensor)


class Counted(Source):
    """Elements 0, 1, 2 and so on. Counts how many were read."""

    def __init__(self, elems: int) -> None:
        self.spec = TensorSpec("t", DType.I64, (elems,))
        self.elems = 0

    @property
    def parts(self) -> tuple[Source, ...]:
        return ()

    @property
    def place(self) -> tuple[object, ...]:
        return (id(self),)

    def needs(self) -> Needs:
        return Needs()

    def open(self, room: Room) -> Reader:
        return _Counting(self)


class _Counting(Reader):
    def __init__(self, source: Counted) -> None:
        self._source = source

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        self._source.elems += stop - start
        out[:] = torch.arange(start, stop).numpy().tobytes()
        return out


def numbers(reader: Reader, start: int, stop: int) -> list[int]:
    made = reader.read(start, stop, memoryview(bytearray(8 * (stop - start))))
    return list(torch.frombuffer(bytearray(made), dtype=torch.int64))


@pytest.mark.parametrize("tile_elems", [0, 1, 10, 64, 99, 100, 1000])
def test_any_order_of_reading_gives_the_elements(tile_elems: int) -> None:
    source, draw_ = Counted(100), random.Random(tile_elems)
    room = Allocated(tile_bytes=8 * tile_elems)
    readers = [Remembered(source.spec, source).open(room) for _ in range(3)]
    for _ in range(300):
        start = draw_.randrange(100)
        stop = draw_.randint(start + 1, min(100, start + draw_.choice((1, 10, 100))))
        assert numbers(draw_.choice(readers), start, stop) == list(range(start, stop))


def test_a_tensor_that_fits_is_read_once_by_all_readers() -> None:
    source = Counted(100)
    room = Allocated(tile_bytes=800)
    for _ in range(3):
        read_whole(Remembered(source.spec, source), room)
    assert source.elems == 100


def test_readers_side_by_side_read_a_long_tensor_once() -> None:
    source = Counted(100)
    room = Allocated(tile_bytes=8 * 20)
    one, two = (Remembered(source.spec, source).open(room) for _ in range(2))
    for start in range(0, 100, 10):
        numbers(one, start, start + 10)
        for part in (start, start + 5):
            numbers(two, part, part + 5)
    assert source.elems == 100
