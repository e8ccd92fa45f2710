"""What runs tasks, and knows nothing about them. ``local`` has threads; a merge takes any other by ``executor=``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol


class Stopping(Protocol):
    def is_set(self) -> bool: ...


class Executor(Protocol):
    """Runs ``run_one`` on each task, on so many workers, and yields what comes of them, in any order.

    Tasks are taken as they are needed, for there may be many; at most ``backlog`` results wait to be taken. The first
    error stops the rest and is raised, and so does leaving the iteration; either way no worker is left when the
    iterator is closed. ``stopping`` is set when what still runs is not wanted any more. Tasks and ``run_one`` cannot be
    pickled; results can, and what else a worker changes in memory nobody sees.
    """

    workers: int

    @property
    def stopping(self) -> Stopping: ...

    def run(
        self, tasks: Iterable[Any], run_one: Callable[[Any], Any], backlog: int = ...
    ) -> Generator[Any, None, None]: ...


Executors = Callable[[int], Executor]
"""Makes an executor of so many workers."""
