"""Runs tasks on threads of this process. It knows nothing about the work."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any

from streammerge.running.executors.registry import executor

_POLL_SECONDS = 0.2
_Result = tuple[Any, BaseException | None]


@executor("threads")
class ThreadExecutor:
    """``workers`` threads that take tasks from one iterable; results come in the order in which they finish.

    The first error stops the rest and is raised; so does leaving the iteration, by Ctrl-C or otherwise. Either way no
    thread is left when the iterator is closed, and ``stopping`` tells those still at work to hurry. One run at a time.
    """

    def __init__(self, workers: int) -> None:
        self.workers, self.stopping = workers, threading.Event()

    def run(self, tasks: Iterable[Any], run_one: Callable[[Any], Any], backlog: int = 64) -> Generator[Any, None, None]:
        source, lock, stop = iter(tasks), threading.Lock(), self.stopping
        stop.clear()
        results: queue.Queue[_Result] = queue.Queue(maxsize=backlog)

        def report(done: Any, error: BaseException | None) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    results.put((done, error), timeout=_POLL_SECONDS)
                    break

        def work() -> None:
            try:
                while not stop.is_set():
                    with lock:
                        task = next(source, _NOTHING)
                    if task is _NOTHING:
                        break
                    report(run_one(task), None)
                report(_NOTHING, None)
            except BaseException as error:  # noqa: BLE001 - carried to the caller, whatever it is
                report(None, error)

        threads = [threading.Thread(target=work, name=f"streammerge-{i}", daemon=True) for i in range(self.workers)]
        try:
            for thread in threads:
                thread.start()
            running = len(threads)
            while running:
                done, error = self._next(results)
                if error is not None:
                    raise error
                if done is _NOTHING:
                    running -= 1
                else:
                    yield done
        finally:
            stop.set()
            for thread in threads:
                if thread.ident is not None:  # Ctrl-C may come before all were started
                    thread.join()

    @staticmethod
    def _next(results: queue.Queue[_Result]) -> _Result:
        while True:  # a wait without a timeout would not notice Ctrl-C on every platform
            try:
                return results.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue


_NOTHING = object()
