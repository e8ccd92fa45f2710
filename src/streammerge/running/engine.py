"""Gives all tensors of a run to workers. One worker makes a short tensor alone; all workers share a long one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from streammerge.kernels.chunk import Look, Step, Sweep
from streammerge.kernels.pass_results import PassResults
from streammerge.planning.tasks import MergeTask, Piece, PieceDone, alike, batches, pieces, where
from streammerge.running.computing import bind, failures
from streammerge.running.executors.base import Executor
from streammerge.running.head_start import LEAST_PREFETCHED_BYTES
from streammerge.running.job import Job
from streammerge.running.prefetching import Prefetching, pays
from streammerge.running.worker import MergeWork
from streammerge.stores.checksums import CRC32C, Checksum
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    from streammerge.running.masking import SharedMasks

T = TypeVar("T")


class SharedPasses(Protocol):
    """Passes over a long tensor that other machines make too."""

    def record(self) -> PassResults:
        """Returns what is known of the results."""
        ...

    def over(self, sweep: Sweep) -> Sweep:
        """Returns a sweep of all machines. ``sweep`` is that of this one."""
        ...


def run_all(
    job: Job,
    executor: Executor,
    tasks: Sequence[MergeTask],
    wanted: Callable[[Piece], bool],
    inputs: InputFiles | None = None,
    in_order: bool = False,
    shared: SharedPasses | None = None,
) -> Generator[PieceDone, None, None]:
    """Makes all pieces that ``wanted`` accepts, with the same bytes on any executor. Yields the result of each.

    Makes the tensors first that one worker can make alone, then the long tensors one by one. The method of a long tensor is
    bound here, and all workers run its passes. Each worker then makes the same kernel from their results. ``inputs``: the
    open inputs of workers in this process, which remote files are fetched into ahead. ``in_order``: makes all tensors in
    the order of the tasks instead, since the output is sent in parts. ``shared``: the passes of the only task, if other
    machines make them too.

    A long tensor with passes that read merges, or are made below one, is one worker's (:attr:`MergeTask.of_one`).
    """
    ahead = inputs if job.budget.ahead_bytes and not executor.elsewhere else None
    # Many processes give a disk enough to do. Who is polite keeps no pages, and none before they are needed.
    local = None if job.budget.ahead_bytes or executor.elsewhere or job.polite else inputs
    making = _Making(job, executor, tasks, wanted, ahead, shared, local)
    of_one = where(tasks, lambda task: task.of_one)
    taken = set(of_one)
    long = [number for number in where(tasks, lambda task: task.spread) if number not in taken]
    apart = taken | set(long)
    if in_order:
        begin = 0
        for number in (*sorted(apart), len(tasks)):
            if begin < number:
                yield from making.short(range(begin, number))
            if number < len(tasks):
                yield from making.of_one([number]) if number in taken else making.together(number)
            begin = number + 1
        return
    yield from making.short(number for number in range(len(tasks)) if number not in apart)
    if of_one:
        yield from making.of_one(of_one)
    for number in long:
        yield from making.together(number)


def run_long(
    job: Job,
    executor: Executor,
    tasks: Sequence[MergeTask],
    number: int,
    wanted: Callable[[Piece], bool],
    inputs: InputFiles,
) -> Generator[PieceDone, None, None]:
    """Makes the wanted pieces of one long tensor (:attr:`MergeTask.spread`) by all workers, as :func:`run_all` does."""
    yield from _Making(job, executor, tasks, wanted, inputs if job.budget.ahead_bytes else None, None).together(number)


class _Making:
    """The ways to make the wanted pieces of some tasks. ``ahead``: remote inputs, fetched before they are read. ``local``:
    inputs that the system is asked for before they are read."""

    def __init__(
        self,
        job: Job,
        executor: Executor,
        tasks: Sequence[MergeTask],
        wanted: Callable[[Piece], bool],
        ahead: InputFiles | None,
        shared: SharedPasses | None,
        local: InputFiles | None = None,
    ) -> None:
        self.local = local
        self.job, self.executor, self.tasks, self.ahead, self.shared = job, executor, tasks, ahead, shared
        self.wanted = wanted

    def short(self, numbers: Iterable[int]) -> Generator[PieceDone, None, None]:
        """Makes tensors of which one worker makes each, neighbours together."""
        independent = (piece for number in numbers for piece in self._missing(number))
        units = batches(independent, self.job.budget.out_bytes)
        ahead = self._prefetching()
        if ahead is None:
            yield from self._results(MergeWork(self.job), units)
            return
        with closing(ahead):
            for done in self._results(MergeWork(self.job), ahead.units(units)):
                ahead.made(done)
                yield done

    def _prefetching(self) -> Prefetching | None:
        """Returns what asks for local inputs ahead of the workers, None where that does not pay."""
        if self.local is None or sum(count * task.read_bytes for task, count in alike(self.tasks)) < LEAST_PREFETCHED_BYTES:
            return None
        return Prefetching(self.local, self.executor.workers) if pays(self.local, self.tasks) else None

    def of_one(self, numbers: Sequence[int]) -> Generator[PieceDone, None, None]:
        """Makes long tensors of which one worker makes each, so that their passes are made once."""
        missing = (list(self._missing(number)) for number in numbers)
        yield from self._results(MergeWork(self.job, alone=True), filter(None, missing))

    def together(self, number: int) -> Generator[PieceDone, None, None]:
        """Makes a long tensor by all workers. Its method is bound here, and its passes run on all of them."""
        task, shared = self.tasks[number], self.shared
        if not any(map(self.wanted, pieces(task, number))):
            return
        from streammerge.running.masking import SharedMasks  # here, because most tensors are one worker's

        record = PassResults() if shared is None else shared.record()
        asked: list[int] = []
        with closing(SharedMasks(self.job)) as masks:
            sweep: Sweep = sweep_on_all(self.job, self.executor, number, task, record, self.ahead, asked.append, masks)
            with failures(task, 0, task.elems):
                bind(task, sweep if shared is None else shared.over(sweep), record, masks=masks.make_room)
            spread = ([piece] for piece in self._missing(number))
            for done in self._results(MergeWork(self.job, tuple(record.results), masks=masks.place), spread):
                yield done._replace(read_bytes=done.read_bytes + sum(asked)) if asked else done
                asked.clear()

    def _missing(self, number: int) -> Iterator[Piece]:
        return filter(self.wanted, pieces(self.tasks[number], number))

    def _results(self, work: MergeWork, units: Iterator[list[Piece]]) -> Generator[PieceDone, None, None]:
        if self.ahead is not None:
            from streammerge.running.announcing import announced  # here, because most inputs are local

            units = announced(units, self.ahead)
        with closing(self.executor.run(work, units)) as results:
            for done in results:
                yield from done


def sweep_on_all(
    job: Job,
    executor: Executor,
    number: int,
    task: MergeTask,
    record: PassResults,
    ahead: InputFiles | None = None,
    asked: Callable[[int], object] = lambda nbytes: None,
    masks: SharedMasks | None = None,
) -> Callable[..., Iterator[Any]]:
    """Returns a sweep over the pieces of a long tensor by all workers. ``record``: the results of the previous passes.
    ``asked`` is called with the bytes that each answer took to read. ``masks``: of this tensor."""
    from streammerge.running.sweeping import SweepWork

    def sweep(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
        work = SweepWork(job, number, task, tuple(record.results), step, sparse, masks.place if masks else None)
        spans: Iterator[tuple[int, int, int]] = (
            (turn, start + a, start + b) for turn, (a, b) in enumerate(ranges(stop - start, task.piece_elems))
        )
        if ahead is not None:
            from streammerge.running.announcing import announced

            spans = announced(spans, ahead, lambda span: [Piece(task, number, span[1], span[2])])
        early: dict[int, T] = {}
        turn = 0
        with closing(executor.run(work, spans, backlog=executor.workers)) as results:
            for at, result, nbytes in results:
                asked(nbytes)
                early[at] = result
                while turn in early:
                    yield early.pop(turn)
                    turn += 1

    return sweep


def modules_of(tasks: Sequence[MergeTask], checksum: Checksum, torch_needed: bool) -> tuple[str, ...]:
    """Returns the modules that workers need for these tasks. Each worker imports the modules of a user's own methods."""
    own = {method.function.__module__ for method in {id(task.method): task.method for task, _ in alike(tasks)}.values()}
    found = [__name__, *sorted(name for name in own if name.startswith("streammerge."))]
    sums = ["streammerge.stores.crc32c"] if checksum.name == CRC32C.name else []
    return (*found, *sums, *(["torch"] if torch_needed else []))
