"""The memory for what is read again goes to the tensors that spare the most reading."""

from __future__ import annotations

from typing import Any

from streammerge.methods.registry import find_method
from streammerge.planning.repeated import remembered
from streammerge.planning.staying import Graph, graph, largest, moved_bytes, shares, stages_bytes
from streammerge.planning.tasks import MergeTask, Tasks
from streammerge.sources.base import Source
from streammerge.sources.merged import merged
from streammerge.sources.stored import Stored
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

SPEC = TensorSpec("t", DType.F32, (8, 8))
A, B, C, D = (Stored(SPEC, parse(name), 0) for name in "abcd")
LINEAR, SLERP = find_method("linear"), find_method("slerp")


def ties(*sources: Source, density: float = 0.5) -> Source:
    return merged("t", find_method("ties"), list(sources), {"density": density}, based=True)


def graph_of(method: Any, *sources: Source) -> Graph:
    tasks = Tasks()
    tasks.add(MergeTask(SPEC, method, sources, 0, 0))
    (made,) = remembered(tasks)
    return graph(made.sources)[0]


def given(of: Graph, nbytes: int) -> list[int]:
    """The bytes of each tensor that stay, with so much memory beside what readers need that go side by side."""
    return [share.first for share in shares(of, nbytes + rounding(of), 1)]


def rounding(of: Graph) -> int:
    return largest(of) - sum(node.nbytes for node in of.nodes if node.remembered)


def test_all_is_held_where_there_is_memory() -> None:
    of = graph_of(SLERP, ties(A, B, C), D)
    assert [share.last for share in shares(of, largest(of), 1)] == [0] * 5
    assert given(of, 5 * 256) == [256] * 5
    read, _ = moved_bytes(of, largest(of), 1)
    assert read == 4 * 256


def test_what_spares_the_most_reading_is_held() -> None:
    """Each byte of the inner merge stands for three bytes of inputs, in one sweep more than inputs are read again."""
    spec = TensorSpec("t", DType.F32, (4096, 4096))
    a, b, c, d, e = (Stored(spec, parse(name), 0) for name in "abcde")
    tasks = Tasks()
    inner = merged("t", SLERP, [a, b], {"t": 0.5})
    tasks.add(MergeTask(spec, SLERP, (merged("t", SLERP, [inner, c], {"t": 0.5}), merged("t", LINEAR, [d, e])), 0, 0))
    of, numbers = graph(remembered(tasks)[0].sources)
    beside = sum(share.last for share in shares(of, 1 << 30, 1 << 16)) + rounding(of)
    assert beside == rounding(of)
    room = spec.nbytes + sum(share.last for share in shares(of, 64 << 20, 1 << 16)) + rounding(of)
    held = {place: shares(of, room, 1 << 16)[number].first for place, number in numbers.items()}
    assert max(held, key=lambda place: held[place]) == inner.place
    assert moved_bytes(of, room, 1 << 16)[0] < moved_bytes(of, 64 << 20, 1 << 16)[0]


def test_more_memory_never_reads_more() -> None:
    of = graph_of(SLERP, ties(A, ties(A, B, C), D), ties(B, C, D), A)
    read = [moved_bytes(of, room, 1)[0] for room in range(0, largest(of) + 256, 64)]
    assert read == sorted(read, reverse=True)
    assert read[-1] == 4 * 256


def test_one_sweep_needs_nothing_to_stay() -> None:
    inner = merged("t", LINEAR, [A, B])
    of = graph_of(LINEAR, merged("t", LINEAR, [inner, C]), merged("t", LINEAR, [inner, A], {"weight": [1.0, 2.0]}))
    assert given(of, 1 << 20) == [0] * len(of.nodes)


def test_stages_read_and_write_each_by_itself() -> None:
    of = graph_of(SLERP, ties(A, B, C), D)
    assert stages_bytes(of, 256) == (3 * 3 + 1) * 256 + (2 * 2 + 1) * 256
