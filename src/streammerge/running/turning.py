"""Makes tensors that a method wants turned, with their first axis last, in one temporary file beside the output.

The output's tensor is then a copy of it. So a method that works by rows reads and makes a wide matrix by columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from streammerge.planning.tasks import (
    MergeTask,
    Piece,
    PieceDone,
    copy_of_turned,
    measured_bytes,
    pieces,
    replaced,
    turned_places,
    turned_task,
    where,
)
from streammerge.running.engine import run_all
from streammerge.running.executors.base import Executor
from streammerge.running.job import Job, OutputPlace, lent, new_key
from streammerge.sources.stored import Stored
from streammerge.stores.base import Output
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import ranges


class Turning:
    """The turned tensors of those ``tasks`` that have a wanted piece.

    ``job``: that of the tasks. ``create`` makes a file of the given size in bytes. :attr:`tasks` are all tasks; after
    :meth:`make` those that are to be turned only copy.
    """

    def __init__(
        self, job: Job, tasks: Sequence[MergeTask], wanted: Callable[[Piece], bool], create: Callable[[int], Output]
    ) -> None:
        self.tasks, self._job, self._create = tasks, job, create
        self.measured: dict[int, bytes] = {}
        """What was measured of each task, in the end."""
        turned = where(tasks, lambda task: task.to_turn)
        self._numbers = [n for n in turned if any(map(wanted, pieces(tasks[n], n)))]

    def make(self, executor: Executor, inputs: InputFiles) -> Iterator[tuple[int, PieceDone]]:
        """Makes the turned tensors. Yields the number of each task that is done, and what was found."""
        if not self._numbers:
            return
        offsets, size = turned_places([self.tasks[number] for number in self._numbers])
        target = self._create(size)
        made = [turned_task(self.tasks[n], 0, offset) for n, offset in zip(self._numbers, offsets, strict=True)]
        job = self._job._replace(key=new_key(), destinations=(OutputPlace(target.location, size),))
        with lent(job, inputs, [target]), closing(run_all(job, executor, made, lambda piece: True)) as results:
            for done in results:
                each = measured_bytes(len(made[done.number].sources))
                for turn, (begin, end) in enumerate(ranges(len(done.measured), each)):
                    self.measured[self._numbers[done.number + turn]] = done.measured[begin:end]
                yield self._numbers[done.number], done
        copies: dict[int, MergeTask] = {}
        for number, task in zip(self._numbers, made, strict=True):
            source = Stored(task.out, target.location, task.offset)
            copies[number] = copy_of_turned(self.tasks[number], source)
        self.tasks = replaced(self.tasks, copies)
