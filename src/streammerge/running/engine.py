"""Gives all tensors of a run to workers. One worker makes a short tensor alone; all workers share a long one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol, TypeVar

from streammerge.kernels.chunk import Look, Step, Sweep
from streammerge.kernels.pass_results import PassResults
from streammerge.planning.budget import BEST_TILE_BYTES
from streammerge.planning.tasks import MergeTask, Piece, PieceDone, alike, batches, pieces, where
from streammerge.running.executors.base import Executor
from streammerge.running.job import Job
from streammerge.running.worker import MergeWork, bind, failures
from streammerge.stores.checksums import Checksum
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import ranges

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

    A long tensor that merges of merges read several times is one worker's if its tiles hold it.
    """
    ahead = inputs if job.budget.ahead_bytes else None

    def ahead_of(units: Iterator[list[Piece]]) -> Iterator[list[Piece]]:
        if ahead is None:
            return units
        from streammerge.running.announcing import announced  # here, because most inputs are local

        return announced(units, ahead)

    def alone(numbers: Iterable[int]) -> Generator[PieceDone, None, None]:
        independent = (piece for number in numbers for piece in pieces(tasks[number], number) if wanted(piece))
        with closing(executor.run(MergeWork(job), ahead_of(batches(independent, job.budget.out_bytes)))) as results:
            for done in results:
                yield from done

    def together(number: int) -> Generator[PieceDone, None, None]:
        task = tasks[number]
        if any(map(wanted, pieces(task, number))):
            record = PassResults() if shared is None else shared.record()
            sweep: Sweep = sweep_on_all(job, executor, number, task, record, ahead)
            with failures(task, 0, task.elems):
                bind(task, sweep if shared is None else shared.over(sweep), record)
            spread = ([piece] for piece in pieces(task, number) if wanted(piece))
            with closing(executor.run(MergeWork(job, tuple(record.results)), ahead_of(spread))) as results:
                for done in results:
                    yield from done

    def whole(numbers: Sequence[int]) -> Generator[PieceDone, None, None]:
        missing = ([piece for piece in pieces(tasks[number], number) if wanted(piece)] for number in numbers)
        with closing(executor.run(MergeWork(job, alone=True), ahead_of(filter(None, missing)))) as results:
            for done in results:
                yield from done

    of_one: list[int] = []
    if job.budget.tile_bytes > BEST_TILE_BYTES:
        from streammerge.planning.repeated import is_alone  # here, because most merges have no stages

        of_one = where(tasks, lambda task: is_alone(task, job.budget.tile_bytes))
    taken = set(of_one)
    long = [number for number in where(tasks, lambda task: task.spread) if number not in taken]
    apart = taken | set(long)
    if in_order:
        begin = 0
        for number in (*sorted(apart), len(tasks)):
            if begin < number:
                yield from alone(range(begin, number))
            if number < len(tasks):
                yield from whole([number]) if number in taken else together(number)
            begin = number + 1
        return
    yield from alone(number for number in range(len(tasks)) if number not in apart)
    if of_one:
        yield from whole(of_one)
    for number in long:
        yield from together(number)


def sweep_on_all(
    job: Job,
    executor: Executor,
    number: int,
    task: MergeTask,
    record: PassResults,
    ahead: InputFiles | None = None,
) -> Callable[..., Iterator[Any]]:
    """Returns a sweep over the pieces of a long tensor by all workers. ``record``: the results of the previous passes."""
    from streammerge.running.sweeping import SweepWork

    def sweep(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
        work = SweepWork(job, number, task, tuple(record.results), step, sparse)
        spans: Iterator[tuple[int, int, int]] = (
            (turn, start + a, start + b) for turn, (a, b) in enumerate(ranges(stop - start, task.piece_elems))
        )
        if ahead is not None:
            from streammerge.running.announcing import announced

            spans = announced(spans, ahead, lambda span: [Piece(task, number, span[1], span[2])])
        early: dict[int, T] = {}
        turn = 0
        with closing(executor.run(work, spans, backlog=executor.workers)) as results:
            for at, result in results:
                early[at] = result
                while turn in early:
                    yield early.pop(turn)
                    turn += 1

    return sweep


def modules_of(tasks: Sequence[MergeTask], checksum: Checksum, torch_needed: bool) -> tuple[str, ...]:
    """Returns the modules that workers need for these tasks. Each worker imports the modules of a user's own methods."""
    own = {method.function.__module__ for method in {id(task.method): task.method for task, _ in alike(tasks)}.values()}
    found = [__name__, *sorted(name for name in own if name.startswith("streammerge."))]
    return (*found, *(["crc32c"] if checksum.name == "crc32c" else []), *(["torch"] if torch_needed else []))
