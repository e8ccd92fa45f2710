"""A small tensor that stands in a header."""

from __future__ import annotations

from collections.abc import Iterator

from conftest import octets

from sources.suite import DTYPES, SHAPES, Case, Disk, SourceSuite, draw
from streammerge.sources.inline import Inline
from streammerge.sources.rows import rows_of
from streammerge.tensors.dtypes import BY_TORCH_NAME
from streammerge.tensors.spec import TensorSpec


class TestInline(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        path, _ = disk.write(b"a header of some bytes")
        for number, (dtype, shape) in enumerate((dtype, shape) for dtype in DTYPES for shape in SHAPES):
            tensor = draw(shape, dtype, number)
            yield Case(Inline(TensorSpec("w", BY_TORCH_NAME[str(dtype)[6:]], shape), path, number, octets(tensor)), tensor)
        tensor = draw((9, 4), DTYPES[0])
        yield Case(
            rows_of(Inline(TensorSpec("w", BY_TORCH_NAME["float32"], (9, 4)), path, 0, octets(tensor)), 2, 5), tensor[2:5]
        )


def test_two_tensors_of_a_header_are_not_one() -> None:
    spec = TensorSpec("w", BY_TORCH_NAME["uint8"], (2,))
    one, other = Inline(spec, "f", 7, b"ab"), Inline(spec, "f", 9, b"ab")
    assert one.place == Inline(spec.named("v"), "f", 7, b"ab").place != other.place
    assert (one.blobs, one.paths, one.begin, one.held) == ((), ("f",), ("f", 7), False)
    assert Inline(spec, "f", 7, b"ab", in_memory=True).held
