"""What a task reads more than once is remembered; what it reads once is not."""

from __future__ import annotations

from typing import Any

from streammerge.methods.registry import COPY, find_method
from streammerge.planning.repeated import apart, remembered
from streammerge.planning.tasks import MergeTask, Tasks
from streammerge.sources.base import Source
from streammerge.sources.merged import merged
from streammerge.sources.remembered import Remembered
from streammerge.sources.stored import Stored
from streammerge.sources.turned import turned
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

SPEC = TensorSpec("t", DType.F32, (8, 8))
A, B, C, D = (Stored(SPEC, parse(name), 0) for name in "abcd")
LINEAR, SLERP, TIES = map(find_method, ("linear", "slerp", "ties"))


def kept(method: Any, *sources: Source) -> set[tuple[object, ...]]:
    """The places of what the task remembers."""
    tasks = Tasks()
    tasks.add(MergeTask(SPEC, method, sources, 0, 0))
    (made,) = remembered(tasks)
    assert [each.place for each in made.sources] == [each.place for each in sources]

    def walk(source: Source) -> set[tuple[object, ...]]:
        own = {source.place} if isinstance(source, Remembered) else set()
        return own.union(*map(walk, source.parts))

    return set().union(*map(walk, made.sources))


def test_a_chain_of_pointwise_merges_remembers_nothing() -> None:
    inner = merged("t", LINEAR, [A, B])
    assert kept(LINEAR, inner, C) == set()
    assert kept(LINEAR, A, B) == set()


def test_what_two_merges_use_is_remembered_once() -> None:
    inner = merged("t", LINEAR, [A, B])
    outer = [merged("t", LINEAR, [inner, C]), merged("t", LINEAR, [inner, A], {"weight": [1.0, 2.0]})]
    assert kept(LINEAR, *outer) == {inner.place, A.place}


def test_what_passes_look_at_is_remembered() -> None:
    inner = merged("t", SLERP, [A, B], {"t": 0.5})
    assert kept(LINEAR, inner, C) == {A.place, B.place}
    assert kept(SLERP, merged("t", LINEAR, [A, B]), C) == {merged("t", LINEAR, [A, B]).place, C.place}
    assert kept(SLERP, A, C) == set()


def test_a_turned_merge_is_gone_through_many_times() -> None:
    inner = merged("t", LINEAR, [A, B])
    assert kept(LINEAR, turned(inner), C) == {inner.place}


def test_a_copy_of_a_stage_reads_it_once() -> None:
    assert kept(COPY, merged("t", LINEAR, [A, B])) == set()


def test_each_remembered_source_is_opened_once() -> None:
    tasks = Tasks()
    inner = merged("t", TIES, [A, B, C], based=True)
    outer = [merged("t", TIES, [inner, each, D], based=True) for each in (B, C)]
    tasks.add(MergeTask(SPEC, SLERP, tuple(outer), 0, 0))
    (made,) = remembered(tasks)
    assert len(list(apart(made.sources))) == 3 + 4
