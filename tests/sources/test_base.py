"""What all sources inherit: inner sources, blobs, places; and the arithmetic of regions, needs and blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from streammerge.sources.base import Allocated, Blob, Needs, Reader, Room, Source, boxes, read_whole, region_bytes
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Leaf(Source):
    spec: TensorSpec
    path: str
    offset: int = 0

    def needs(self) -> Needs:
        return Needs(scratch_bytes=10, shared_bytes=self.offset)

    def open(self, room: Room) -> Reader:
        raise ValueError(self.path)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return (Blob(self.path, self.offset, self.nbytes),)


@dataclass(frozen=True, slots=True)
class Both(Source):
    spec: TensorSpec
    first: Source
    rest: tuple[Source, ...]
    factor: float = 1.0

    needs = Leaf.needs
    open = Leaf.open


def spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, DType.F32, shape)


LEAVES = tuple(Leaf(spec(name, 3), f"{name}.bin", at) for at, name in enumerate("abc"))
BOTH = Both(spec("w", 9), LEAVES[0], LEAVES[1:])


def test_inner_sources_are_found_and_replaced_in_their_order() -> None:
    assert BOTH.parts == LEAVES
    turned = BOTH.with_parts(LEAVES[::-1])
    assert (turned.parts, turned.spec, type(turned)) == (LEAVES[::-1], BOTH.spec, Both)
    assert LEAVES[0].with_parts(()) is LEAVES[0]


def test_blobs_are_those_of_the_parts_and_a_path_is_named_once() -> None:
    assert BOTH.blobs == (Blob("a.bin", 0, 12), Blob("b.bin", 1, 12), Blob("c.bin", 2, 12))
    assert BOTH.begin == ("a.bin", 0)
    again = Both(BOTH.spec, LEAVES[0], (LEAVES[0], LEAVES[1]))
    assert again.paths == ("a.bin", "b.bin")
    nothing = Both(BOTH.spec, Both(BOTH.spec, LEAVES[0], ()), ()).with_parts((Both(BOTH.spec, BOTH, ()),))
    assert nothing.origin == "a.bin, b.bin, c.bin"
    many = Both(BOTH.spec, LEAVES[0], tuple(Leaf(spec("w"), f"{n}") for n in range(5)))
    assert many.origin == "a.bin, 0, 1, 2 and 2 more"


def test_a_place_tells_tensors_apart_but_not_their_names() -> None:
    assert BOTH.named("other").place == BOTH.place
    assert BOTH.named("other").spec.name == "other"
    assert BOTH.named("w") is BOTH
    others = [
        Both(spec("w", 3, 3), LEAVES[0], LEAVES[1:]),
        Both(BOTH.spec, LEAVES[0], LEAVES[1:], 2.0),
        BOTH.with_parts(LEAVES[::-1]),
    ]
    assert len({each.place for each in [BOTH, *others]}) == 4


def test_needs_add_up_except_for_the_shared_region() -> None:
    one, two = Needs(1, 20, 3, 4, False), Needs(10, 7, 30, 40, True)
    assert one + two == two + one == Needs(11, 20, 33, 44, True)
    assert one + Needs() == one


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 1000, 1 << 20])
def test_a_region_ends_aligned_and_wastes_less_than_a_line(nbytes: int) -> None:
    assert region_bytes(nbytes) % 64 == 0
    assert nbytes <= region_bytes(nbytes) < nbytes + 64


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7,), (5, 3), (3, 1, 4), (2, 3, 2, 2)])
def test_boxes_together_are_the_range_in_c_order(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    grid = np.arange(numel).reshape(shape)
    for start in range(numel + 1):
        for stop in range(start, numel + 1):
            found = [grid[tuple(slice(a, b) for a, b in box)].ravel() for box in boxes(shape, start, stop)]
            assert [n for part in found for n in part] == list(range(start, stop))
            assert len(found) <= 2 * len(shape) + 1


def test_a_room_keeps_what_is_made_once_and_opens_no_file_that_it_does_not_have() -> None:
    room, made = Allocated(), list[int]()
    assert [room.once(BOTH, lambda: made.append(1) or len(made)) for _ in range(3)] == [1, 1, 1]
    assert room.once(LEAVES[0], lambda: 7) == 7
    assert (len(room.take(0)), len(room.take(5)), len(Allocated(tile_bytes=9).tile())) == (0, 5, 9)
    with pytest.raises(ValueError, match="without files cannot open"):
        room.file("x")
    assert read_whole(Leaf(spec("e", 0), "x"), room) == b"", "an empty tensor is not opened"
