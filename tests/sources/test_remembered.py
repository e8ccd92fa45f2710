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


class Some(Allocated):
    """A room with memory for some first elements, and for some that were read last."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first_bytes, self.last_bytes = 8 * first, 8 * last

    def remembered(self, source: Source) -> tuple[memoryview, memoryview]:
        return memoryview(bytearray(self.first_bytes)), memoryview(bytearray(self.last_bytes))


def test_first_elements_stay_and_others_pass() -> None:
    source = Counted(100)
    reader = Remembered(source.spec, source).open(Some(30, 20))
    for sweep in range(1, 4):
        for start in range(0, 100, 8):
            stop = min(start + 8, 100)
            assert numbers(reader, start, stop) == list(range(start, stop))
        assert source.elems == 30 + 70 * sweep


def test_readers_at_a_distance_read_once() -> None:
    """Their spans end in different places, and one goes ahead of the other."""
    source = Counted(1000)
    room = Some(0, 60)
    one, two = (Remembered(source.spec, source).open(room) for _ in range(2))
    at = 0
    for start in range(0, 1000, 20):
        numbers(one, start, start + 20)
        while at + 13 <= start + 20:
            assert numbers(two, at, at + 13) == list(range(at, at + 13))
            at += 13
    assert source.elems == 1000


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 7), (10, 0), (33, 21), (99, 1), (100, 0)])
def test_any_memory_gives_the_elements(first: int, last: int) -> None:
    source, draw_ = Counted(100), random.Random(first)
    reader = Remembered(source.spec, source).open(Some(first, last))
    for _ in range(300):
        start = draw_.randrange(100)
        stop = draw_.randint(start + 1, min(100, start + draw_.choice((1, 10, 100))))
        assert numbers(reader, start, stop) == list(range(start, stop))
