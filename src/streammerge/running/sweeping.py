"""The work of a worker: steps of a pass over a long tensor, which a method makes before it has its kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from streammerge.kernels.chunk import Look, Step
from streammerge.kernels.pass_results import PassResults
from streammerge.planning.tasks import MergeTask
from streammerge.running.computing import OTHER_PASSES, bind, failures
from streammerge.running.executors.base import Host
from streammerge.running.job import Job
from streammerge.running.worker import Worker

if TYPE_CHECKING:
    from streammerge.stores.spilled import SpillPlace

T = TypeVar("T")
Span = tuple[int, int, int]
"""A number that comes back with the answer, the first element, and the element after the last one."""


@dataclass(frozen=True, slots=True)
class SweepWork:
    """Takes one step of a pass over spans of a long tensor.

    ``passes``: the results of the previous passes. The worker binds the method with them, and so gets the look of the
    next pass. ``masks``: where the masks are kept that a pass makes.
    """

    job: Job
    number: int
    task: MergeTask
    passes: tuple[bytes, ...]
    step: Step[Any]
    sparse: int
    masks: SpillPlace | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        return self.job.modules

    def open(self, host: Host) -> SweepWorker:
        return SweepWorker(self, host)


class _Reached(BaseException):
    """Raised to abandon the binding of a method at the requested pass."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.look = look


class SweepWorker(Worker):
    def __init__(self, work: SweepWork, host: Host) -> None:
        super().__init__(work.job, host)
        self._task, self._work = self.bench.same(work.number, work.task), work
        self.one_torch_thread()
        with failures(work.task, 0, work.task.elems):
            try:
                bind(work.task, _reach, PassResults(work.passes), masks=self.masks_at(work.masks))
            except _Reached as reached:
                self._look = reached.look
            else:
                raise ValueError(OTHER_PASSES)

    def run(self, span: Span) -> tuple[int, Any, int]:
        """Returns the number of the span, the answer of the step, and the bytes that were asked of stores."""
        number, start, stop = span
        asked = self.workspace.asked_bytes
        task, step = self._task, self._work.step
        with failures(task, start, stop):
            source = self.source(task, keep=False)
            answer = step(self._look, self.chunks(task, source, start, stop, self._work.sparse))
        self.bench.inputs.check_whole()
        return number, answer, self.workspace.asked_bytes - asked


def _reach(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
    raise _Reached(look)
