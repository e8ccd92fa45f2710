"""Weighted sums by compiled functions, with the bytes of the method's kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from streammerge.compiled.numbers import known
from streammerge.compiled.sums import MOST_SOURCES, CompiledSums, address_of
from streammerge.methods.linear import Combination
from streammerge.planning.tasks import MergeTask
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import numpy as np

    from streammerge.running.computing import KernelMaker
    from streammerge.running.measuring import Taking
    from streammerge.running.workspace import Inputs, Outgoing

    _Array = np.ndarray[Any, np.dtype[Any]]

_READ_AT_ONCE = 2
"""What is read of so many sources stays valid, also of those that are not mapped."""


class Octets(Protocol):
    """The bytes of a task's sources, as :class:`~streammerge.running.workspace.Inputs` has them."""

    def raw(self, source: int, start: int, stop: int, /) -> memoryview: ...
    def stays(self, source: int, /) -> bool: ...


class TaskSums:
    """The sums of a task. ``totals``: a float64 for each element that is asked for at once, if sources are many."""

    def __init__(self, task: MergeTask, kernel: Combination, totals: _Array) -> None:
        first = int(task.based)
        self._numbers = [*range(first, first + len(kernel.weights)), *([0] if kernel.of_base else [])]
        weights = (*kernel.weights, kernel.of_base) if kernel.of_base else kernel.weights
        dtypes = [task.sources[number].spec.dtype for number in self._numbers]
        self._sums = CompiledSums([weights], [kernel.quotient], dtypes, [task.out.dtype])
        self._totals = totals

    def put(self, source: Octets, start: int, stop: int, into: memoryview) -> bool:
        """Writes the sums of elements ``start`` to ``stop``. Returns whether all are finite; some may be wrong else."""
        numbers, elems, out = self._numbers, stop - start, address_of(into)
        most = MOST_SOURCES if all(map(source.stays, numbers)) else _READ_AT_ONCE
        finite = True
        for first, last in ranges(len(numbers), most):
            rows = [source.raw(number, start, stop) for number in numbers[first:last]]
            places = [address_of(row) for row in rows]
            if last - first == len(numbers):
                return self._sums.put(places, [out], elems)[0]
            finite = self._sums.add(first, places, out if last == len(numbers) else None, self._totals[:elems])
        return finite


def sums_of(task: MergeTask, kernel: object, totals: memoryview) -> TaskSums | None:
    """Returns the sums of a task in this memory. None if its kernel is no sum, or cannot be made by compiled functions.

    They are the kernel's if that computes in float64.
    """
    dtypes = [task.out.dtype, *(source.spec.dtype for source in task.sources)]
    if not isinstance(kernel, Combination) or not known(dtypes):
        return None
    import numpy as np

    return TaskSums(task, kernel, np.frombuffer(totals, np.float64) if totals else np.empty(0))


class CompiledMaker:
    """Makes sums by compiled functions. What is not finite is settled by the kernel's maker."""

    def __init__(self, sums: TaskSums, kernel: KernelMaker, source: Inputs, taking: Taking | None) -> None:
        self._sums, self._kernel, self._source, self._taking = sums, kernel, source, taking
        self.nonfinite, self.spans = kernel.nonfinite, kernel.spans

    def put(self, start: int, stop: int, outgoing: Outgoing) -> memoryview:
        chunk = self._kernel.chunk(start, stop)
        part = outgoing.room((stop - start) * self._kernel.task.out.dtype.element_bytes)
        if not self._sums.put(self._source, start, stop, part):
            outgoing.take_back(len(part))
            return self._kernel.put_chunk(chunk, outgoing)
        if self._taking is not None:
            self._taking.made(part)
        return part
