"""Names of helpers, and the sizes of blocks."""

from __future__ import annotations

import pytest

from streammerge.quantised.stored import block_of, pair_of, stored_tensors
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


@pytest.mark.parametrize(
    ("size", "count", "stated", "block"),
    [
        (576, 5, None, 128),
        (576, 5, 128, 128),
        (576, 9, 64, 64),
        (576, 9, None, 64),
        (100, 4, None, 25),
        (100, 4, 30, 30),
        (100, 4, 20, None),
        (576, 5, 64, 128),
        (100, 3, None, None),
        (100, 0, None, None),
        (64, 1, None, 128),
        (64, 1, -5, 128),
    ],
)
def test_blocks_follow_from_the_number_of_scales(size: int, count: int, stated: int | None, block: int | None) -> None:
    assert block_of(size, count, stated) == block


def test_only_two_whole_numbers_are_a_block() -> None:
    assert pair_of([128, 64]) == (128, 64)
    assert pair_of([128]) == pair_of("128") == pair_of([True, 1]) == pair_of(None) == (None, None)


def test_helpers_are_found_by_the_end_of_their_names() -> None:
    names = ("a.weight", "a.weight_scale_inv", "b.weight_scale", "b.weight_scale_2", "c.scale_weight", "d.scale")
    specs = {name: TensorSpec(name, DType.F32, (1,)) for name in names}
    found = stored_tensors({}, specs, {}, {})
    assert found.without({"a.weight_scale_inv"}).by_end["_scale_inv"] == []
    assert "a.weight" not in found.without({"a.weight"}).specs
    assert found.by_end == {
        "_scale_inv": ["a.weight"],
        "_scale": ["b.weight"],
        "_scale_2": ["b.weight"],
        ".scale_weight": ["c"],
        ".scale": ["d"],
    }
