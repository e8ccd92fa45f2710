"""What workers read next is announced before they begin."""

from __future__ import annotations

from streammerge.methods.linear import linear
from streammerge.methods.registry import find_method
from streammerge.planning.tasks import MergeTask, Piece
from streammerge.running.announcing import announce, announced
from streammerge.sources.stored import Stored
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


class Told:
    """Notes what is announced."""

    def __init__(self, ahead_bytes: int) -> None:
        self.ahead_bytes = ahead_bytes
        self.ranges: list[tuple[str, int, int]] = []

    def announce(self, path: object, offset: int, nbytes: int) -> None:
        self.ranges.append((str(path), offset, nbytes))


def task(elems: int) -> MergeTask:
    assert linear is not None
    spec = TensorSpec("w", DType.F32, (elems,))
    sources = (Stored(spec, parse("a"), 100), Stored(spec, parse("b"), 7))
    return MergeTask(spec, find_method("linear"), sources, 0, 0)


def test_the_bytes_of_a_piece_are_announced() -> None:
    told = Told(0)
    assert announce(told, task(1000), 10, 30) == 160  # type: ignore[arg-type]
    assert told.ranges == [("a", 140, 80), ("b", 47, 80)]


def test_units_are_announced_as_far_as_there_is_room() -> None:
    told, whole = Told(4 * 1600), task(1000)
    units = [[Piece(whole, 0, start, start + 100)] for start in range(0, 1000, 100)]  # of 800 bytes each
    found = announced(iter(units), told)  # type: ignore[arg-type]
    assert next(found) == units[0]
    assert len(told.ranges) == 2 * 3
    assert [*found] == units[1:]
    assert len(told.ranges) == 2 * 10
