"""Weighted sums that are made without torch too, to the bit, so that a merge need not load it.

Loading torch takes longer than merging a gigabyte, and 200 MiB. A sum is made of products, sums and quotients in float64,
which are the same everywhere, and is rounded once. Compiled functions always make them faster than torch. Where the package
has none, numpy does: torch computes those of 16-bit numbers faster then, but its loading takes one CPU and no other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from streammerge.compiled.library import library
from streammerge.methods.registry import COPY, INTEGERS
from streammerge.planning.summed import is_summed
from streammerge.planning.tasks import MergeTask, alike
from streammerge.sources.stored import Stored
from streammerge.tensors.dtypes import DType

_SLOWER = {DType.F64: 0.7e-9, DType.F32: 0.2e-9, DType.BF16: 1.3e-9, DType.F16: 1.9e-9}
"""CPU seconds that numpy takes longer than torch for one number that is read or written, where loading torch takes one. Of
float32 it took no longer with 2, 8 and 25 inputs. What stands here is for more workers than two, since each waits for
Python's lock more often with numpy."""
_MOST_SECONDS = 1.0


def needs_no_torch(tasks: Sequence[MergeTask]) -> bool:
    """Whether all of these tasks are made without torch, and in less time than with torch and its loading.

    Not if torch is loaded already.
    """
    if "torch" in sys.modules:
        return False
    seconds = 0.0
    for task, count in alike(tasks):
        if _is_settled(task) or (task.verbatim and _reads_plainly(task)):
            continue
        if not _is_summed(task):
            return False
        if library() is not None:
            continue
        dtypes = [task.out.dtype, *(source.spec.dtype for source in task.sources)]
        seconds += count * task.elems * sum(_SLOWER[dtype] for dtype in dtypes)
    return seconds < _MOST_SECONDS and _there_is_numpy()


def _there_is_numpy() -> bool:
    """Whether numpy can be imported. It is imported here, because the memory that it takes belongs to no run."""
    try:
        import numpy  # noqa: F401
    except ImportError:
        return False
    return True


def _is_settled(task: MergeTask) -> bool:
    """Whether a task settles integers or other values of one dtype that are not averaged."""
    dtypes = {task.out.dtype, *(source.spec.dtype for source in task.sources)}
    return task.method is INTEGERS and not task.based and len(dtypes) == 1 and _reads_plainly(task)


def _is_summed(task: MergeTask) -> bool:
    """Whether a task is a weighted sum of models in dtypes that numpy computes with, or converts one."""
    if not (task.method is COPY or (task.method.sums and task.compute == "float64" and not is_summed(task))):
        return False
    if task.based or task.out.dtype not in _SLOWER or any(source.spec.dtype not in _SLOWER for source in task.sources):
        return False
    return _reads_plainly(task)


def _reads_plainly(task: MergeTask) -> bool:
    return not any(source.__class__ is not Stored and source.needs().computes for source in task.sources)
