"""What follows from a source's fields, and the blocks of a range."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.sources.base import Allocated, Needs, boxes, read_whole, region_bytes
from streammerge.sources.constant import Constant
from streammerge.sources.joined import joined
from streammerge.sources.rows import gathered
from streammerge.sources.stored import Stored
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_blocks_are_the_range_in_order(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    places = numpy.arange(numel).reshape(shape)
    found = [places[tuple(slice(a, b) for a, b in box)].reshape(-1) for box in boxes(tuple(shape), start, stop)]
    assert [int(n) for part in found for n in part] == list(range(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


def test_inner_sources_are_found_in_the_fields_and_can_be_replaced() -> None:
    one, two = (Stored(TensorSpec("w", DType.F32, (4, 2)), path, 8) for path in ("a", "b"))
    both = gathered(joined("w", [one, two]), [7, 0])
    (inner,) = both.parts
    assert inner.parts == (one, two)
    assert both.blobs == (("a", 8, 32), ("b", 8, 32))
    assert (both.begin, both.paths, both.origin) == (("a", 8), ("a", "b"), "a, b")
    other = both.with_parts((inner.with_parts((two, one)),))
    assert other.paths == ("b", "a")
    assert other.place != both.place
    assert both.named("v").place == both.place
    nothing = Constant(TensorSpec("c", DType.F32, (3,)))
    assert (nothing.begin, nothing.blobs, nothing.origin) == ((None, 0), (), "a constant")


def test_needs_add_up_and_what_is_shared_does_not() -> None:
    one, two = Needs(1, 20, 3, 4), Needs(10, 2, 30, 40, True)
    assert one + two == Needs(11, 20, 33, 44, True)


def test_a_place_tells_tensors_apart() -> None:
    one = Stored(TensorSpec("w", DType.F32, (4, 2)), "a", 8)
    spec = one.spec
    others = [replace(one, path="b"), replace(one, offset=9), replace(one, spec=TensorSpec("w", DType.F32, (2, 4)))]
    others += [replace(one, spec=TensorSpec("w", DType.I32, (4, 2)))]
    assert len({each.place for each in [one, *others]}) == 5
    assert len({hash(each.place) for each in (one, one.named("v"))}) == 1
    assert (one.named("w") is one, one.named("v").spec) == (True, TensorSpec("v", spec.dtype, spec.shape))


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 1000, 1 << 20])
def test_a_region_ends_aligned_and_wastes_less_than_a_line(nbytes: int) -> None:
    assert region_bytes(nbytes) % 64 == 0
    assert nbytes <= region_bytes(nbytes) < nbytes + 64


def test_a_room_keeps_what_is_made_once_and_opens_no_file_that_it_does_not_have() -> None:
    one, two = (Stored(TensorSpec("w", DType.F32, (0,)), path, 0) for path in "ab")
    room, made = Allocated(), list[int]()
    assert [room.once(one, lambda: made.append(1) or len(made)) for _ in range(3)] == [1, 1, 1]
    assert room.once(two, lambda: 7) == 7
    assert (len(room.take(0)), len(room.take(5)), len(Allocated(tile_bytes=9).tile())) == (0, 5, 9)
    with pytest.raises(ValueError, match="without files cannot open"):
        room.file("x")
    assert read_whole(one, room) == b"", "an empty tensor is not opened"
