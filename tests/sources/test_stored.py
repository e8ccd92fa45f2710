"""Byte ranges in C order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sources.suite import DTYPES, SHAPES, Case, Disk, SourceSuite, draw
from streammerge.sources.stored import Stored
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


class TestStored(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for shape in SHAPES:
            for dtype in DTYPES:
                tensor = draw(shape, dtype)
                yield Case(disk.stored(tensor), tensor)


def test_place_is_the_same_tensor_whatever_its_name(tmp_path: Path) -> None:
    one = Stored(TensorSpec("a", DType.F32, (2, 3)), "file", 8)
    assert one.place == one.named("b").place
    others = [
        Stored(one.spec, "file", 12),
        Stored(one.spec, "other", 8),
        Stored(TensorSpec("a", DType.F32, (3, 2)), "file", 8),
    ]
    assert one.place not in [other.place for other in others]
