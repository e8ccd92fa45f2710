"""What runs tasks, and knows nothing about them. ``local`` has threads; a merge takes any other by ``executor=``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol


class Stopping(Protocol):
    def is_set(self) -> bool: ...


class Executor(Protocol):
    """Runs ``run_one`` on each task, on so many workers, and yields what comes of them, in any order.

    ``tasks`` may be many, and are made as they are asked for. About ``backlog`` results wait to be taken, not more. The
    first error stops the rest and is raised; leaving the iteration stops them too. Either way no worker is left when the
    iterator is closed, and ``stopping`` is set as soon as what still runs is not wanted any more.
    Tasks and ``run_one`` cannot be pickled; results can, and a merge relies on nothing else that a worker has in memory.
    """

    workers: int

    @property
    def stopping(self) -> Stopping: ...

    def run(
        self, tasks: Iterable[Any], run_one: Callable[[Any], Any], backlog: int = ...
    ) -> Generator[Any, None, None]: ...


Executors = Callable[[int], Executor]
"""Makes an executor of so many workers."""
