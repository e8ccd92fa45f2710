"""What follows from a source's fields, and the blocks of a range."""

from __future__ import annotations

import math

import numpy
from hypothesis import given
from hypothesis import strategies as st

from streammerge.sources.base import Needs, boxes
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
