"""Work as plain data, workers that do it, and executors that give units of it to workers.

A merge describes its work as a :class:`Work`, which can be pickled, and cuts it into small *units*. An executor
opens the work once for each of its workers and gives the units to them::

    worker = work.open(host)
    results = [worker.run(unit) for unit in units]
    worker.close()

Threads, processes, or the machines of a cluster are different ways to call the same functions.
"""

from __future__ import annotations

import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterable
from typing import Any, ClassVar, Protocol, TypeVar

Unit_contra = TypeVar("Unit_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)
Unit = TypeVar("Unit")
Result = TypeVar("Result")
Kept = TypeVar("Kept", bound="Closable")


class Halted(BaseException):
    """Raised inside a worker to abandon its unit because the run is stopping."""


class Closable(Protocol):
    def close(self) -> None: ...


class Host:
    """The shared state of the workers of one process: whether the run is stopping, and objects kept between works."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self.stopping = stopping
        self._lock = threading.Lock()
        self._key: Hashable = None
        self._kept: Any = None

    def check(self) -> None:
        """Raises Halted when the run is stopping. A unit that takes long calls this often."""
        if self.stopping():
            raise Halted

    def kept(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """Returns the object kept under this key, such as open files and buffers. Calls ``make`` if there is none yet.

        Keeps one object at a time. Another key, or the end of the executor, closes it.
        """
        with self._lock:
            if self._kept is None or self._key != key:
                self._drop()
                self._key, self._kept = key, make()
            made: Kept = self._kept
            return made

    def close(self) -> None:
        """Closes the kept object."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()


class Worker(Protocol[Unit_contra, Result_co]):
    """Does units of one work, one after the other, on one thread."""

    def run(self, unit: Unit_contra, /) -> Result_co:
        """Does a unit. The result is plain data that can be pickled, and small."""
        ...

    def close(self) -> None:
        """Called once, after the last unit, also after an error."""
        ...


class Work(Protocol[Unit_contra, Result_co]):
    """A description of work, as frozen plain data that can be pickled.

    ``modules``: names of modules that the work needs. An executor with processes imports them once, before it forks, so
    that all processes share their memory.
    """

    @property
    def modules(self) -> tuple[str, ...]: ...

    def open(self, host: Host, /) -> Worker[Unit_contra, Result_co]:
        """Returns a worker for this work. It runs on the thread that opened it."""
        ...


class Executor(ABC):
    """Runs works on ``workers`` workers, one work at a time. ``elsewhere``: whether they are in other processes, and so
    open the inputs themselves."""

    elsewhere: ClassVar[bool] = False

    def __init__(self, workers: int) -> None:
        self.workers = workers

    @abstractmethod
    def run(self, work: Work[Unit, Result], units: Iterable[Unit], backlog: int = 64) -> Generator[Result, None, None]:
        """Yields the result of each unit, in the order in which they finish.

        ``units`` may be many. Each is taken from the iterable when a worker is ready for it, on any thread. At most about
        ``backlog`` results wait to be taken. The first error stops the run and is raised. Closing the generator stops it
        too. ``Host.stopping`` is true from then on. No unit is running any more when the generator is closed.
        """

    def close(self) -> None:  # noqa: B027 - executors whose workers keep nothing need none
        """Ends the workers and closes their kept objects. The executor is not used afterwards."""

    @property
    def startup_bytes(self) -> int:
        """Memory of other processes that was resident before the first unit. Complete after :meth:`close`."""
        return 0

    @property
    def peak_bytes(self) -> int:
        """The most resident memory of other processes above ``startup_bytes``. Complete after :meth:`close`."""
        return 0


Executors = Callable[[int], Executor]
"""Makes an executor with the given number of workers."""


def processes_supported() -> bool:
    """Whether this system supports worker processes: Linux and other systems with fork.

    On macOS a process that has loaded system frameworks may not fork. Windows has no fork. In a frozen program
    ``sys.executable`` is the program, and starting it would run the program again instead of Python.
    """
    interpreter = bool(sys.executable) and not getattr(sys, "frozen", False)
    return hasattr(os, "fork") and sys.platform != "darwin" and interpreter
