"""The data that all works of one run share, and the open files and buffers of its workers in one process."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from streammerge.planning.budget import Budget
from streammerge.planning.tasks import MergeTask
from streammerge.running.workspace import Workspace, prepare_torch
from streammerge.stores import faults
from streammerge.stores.base import Location, Output, Status
from streammerge.stores.checksums import Checksum
from streammerge.stores.inputs import InputFiles

if TYPE_CHECKING:
    from streammerge.kernels.masks import MaskRoom
    from streammerge.stores.spilled import SpillFile, SpillPlace


class Target(Protocol):
    """Takes the bytes of one unit."""

    def write_full(self, data: Any, offset: int) -> None: ...

    def found(self) -> Any:
        """Returns the finding about these bytes as small, plain data. None if there is none."""
        ...


class Destination(Protocol):
    """The destination of the bytes of tasks, as plain data that can be pickled."""

    def open(self, bench: Bench, /) -> Target:
        """Returns the target of one unit."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class OutputPlace:
    """A file of the output. The file exists already."""

    location: Location
    size: int

    def opened(self) -> Output:
        """Opens the file in another process."""
        return self.location.reopen(self.size)

    def open(self, bench: Bench) -> Target:
        return _Written(*bench.output(self))


class _Written:
    """Writes to a file of the output. ``own``: whether this process has opened the file itself."""

    __slots__ = ("_file", "_own", "write_full")

    def __init__(self, file: Output, own: bool) -> None:
        self._file, self._own, self.write_full = file, own, file.write_full

    def found(self) -> None:
        if self._own:
            self._file.check()


class Job(NamedTuple):
    """The common data of all works of one run, as plain data that can be pickled.

    ``key``: a unique name of the run, see :func:`new_key`. ``inputs``: the expected status of each input file. ``polite``:
    see :class:`InputFiles`. ``mapped``: whether inputs are mapped or read. ``modules``: see :class:`Work`. ``measures``:
    whether workers measure how far a result lies from its inputs. ``home``: the folder in which methods spill, see
    :class:`SpillFile`.
    """

    key: str
    budget: Budget
    inputs: dict[Location, Status]
    polite: bool
    mapped: bool
    checksum: Checksum
    destinations: tuple[Destination, ...]
    modules: tuple[str, ...] = ()
    measures: bool = False
    home: Location | None = None


_runs = itertools.count()


def new_key() -> str:
    """Returns a key that no other run has, in any process."""
    return f"{os.getpid()}.{next(_runs)}"


_lent: dict[str, tuple[InputFiles, Sequence[Output]]] = {}


@contextmanager
def lent(job: Job, inputs: InputFiles, outputs: Sequence[Output] = ()) -> Iterator[None]:
    """Lends these open files to the job's workers in this process. Workers in other processes open the files again."""
    _lent[job.key] = inputs, outputs
    try:
        yield
    finally:
        del _lent[job.key]


def _never() -> None:
    """Never halts."""


class Bench:
    """The open files and free buffers of a job, for the workers of one process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        inputs, outputs = _lent.get(job.key, (None, ()))
        self._own_inputs = job.budget.opened(job.inputs, job.polite, job.budget.workers) if inputs is None else None
        self.inputs: InputFiles = inputs or self._own_inputs  # type: ignore[assignment]
        self._outputs = {file.location: file for file in outputs}
        self._own_outputs: dict[Location, Output] = {}
        self._last: tuple[int, MergeTask] | None = None
        self._free: list[Workspace] = []
        self._masks: tuple[SpillPlace, SpillFile | None] | None = None
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._open.enter_context(faults.survived())
        if "torch" in job.modules:
            prepare_torch()

    def halted_by(self, halt: Callable[[], object]) -> None:
        """``halt`` raises an exception when the run is stopping. Workers that wait for a network call it."""
        self.inputs.halted_by(halt)
        for file in self._outputs.values():
            file.halted_by(halt)

    @property
    def announces(self) -> bool:
        """Whether workers announce what they read. Nobody else does if they have opened the inputs themselves."""
        return self._own_inputs is not None and self.job.budget.ahead_bytes > 0

    def output(self, place: OutputPlace) -> tuple[Output, bool]:
        """Returns the open file of the output, and whether this process opened it itself."""
        file = self._outputs.get(place.location)
        if file is not None:
            return file, False
        with self._lock:
            file = self._own_outputs.get(place.location)
            if file is None:
                file = self._own_outputs[place.location] = place.opened()
            return file, True

    def spill(self, nbytes: int) -> SpillFile:
        """Returns a new temporary file of so many bytes."""
        from streammerge.stores.spilled import SpillFile  # here, because most runs spill nothing

        return SpillFile(nbytes, self.job.home)

    def masks_at(self, place: SpillPlace) -> MaskRoom | None:
        """Returns the room for masks at this place, None if it cannot be opened here."""
        from streammerge.kernels.masks import MaskRoom  # here, because most methods make no masks
        from streammerge.stores.spilled import SpillFile

        with self._lock:
            if self._masks is None or self._masks[0] != place:
                self._masks = place, SpillFile.at(place)
            file = self._masks[1]
        return None if file is None else MaskRoom(file, 1)

    def check_outputs(self) -> None:
        """Raises the error of a sync that failed when a file was closed between two uses. The kernel tells it only once, so
        no other process would learn of it."""
        with self._lock:
            opened = list(self._own_outputs.values())
        for file in opened:
            file.check()

    def same(self, number: int, task: MergeTask) -> MergeTask:
        """Returns the task object that came first under this number. Results of its sources are cached for that object."""
        last = self._last
        if last is not None and last[0] == number and last[1].out == task.out:
            return last[1]
        self._last = number, task
        return task

    def take(self) -> Workspace:
        """Returns a workspace that no other worker uses: a free one, or a new one."""
        with self._lock:
            return self._free.pop() if self._free else Workspace(self.job.budget)

    def give_back(self, workspace: Workspace) -> None:
        with self._lock:
            self._free.append(workspace)

    def close(self) -> None:
        self.halted_by(_never)
        self._free.clear()
        if self._masks is not None and self._masks[1] is not None:
            self._masks[1].close()
        self._masks = None
        for file in self._own_outputs.values():
            file.close()
        if self._own_inputs is not None:
            self._own_inputs.close()
        self._open.close()
