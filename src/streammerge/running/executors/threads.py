"""Workers that are threads of this process."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any

from streammerge.running.executors.base import Executor, Host, Result, Unit, Work
from streammerge.running.executors.registry import executor

_POLL_SECONDS = 0.2
_Outcome = tuple[Any, list[BaseException]]
"""A result, or a list of one error. The list is emptied before the error is raised: a frame that holds an error which holds
the frame would keep the files of the run open until the garbage collector runs."""
_NOTHING = object()


@executor("threads")
class ThreadExecutor(Executor):
    """``workers`` threads, started for each work, that take units from one iterable."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._stop = threading.Event()
        self._host = Host(self._stop.is_set)

    def run(self, work: Work[Unit, Result], units: Iterable[Unit], backlog: int = 64) -> Generator[Result, None, None]:
        source, lock, stop = iter(units), threading.Lock(), self._stop
        stop.clear()
        outcomes: queue.Queue[_Outcome] = queue.Queue(maxsize=backlog)

        def report(done: Any, failed: list[BaseException]) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    outcomes.put((done, failed), timeout=_POLL_SECONDS)
                    break

        def work_on() -> None:
            try:
                with contextlib.closing(work.open(self._host)) as worker:
                    while not stop.is_set():
                        with lock:
                            unit: Any = next(source, _NOTHING)
                        if unit is _NOTHING:
                            break
                        report(worker.run(unit), [])
                report(_NOTHING, [])
            except BaseException as error:  # noqa: BLE001 - carried to the caller, whatever it is
                report(None, [error])

        threads = [threading.Thread(target=work_on, name=f"streammerge-{i}", daemon=True) for i in range(self.workers)]
        try:
            for thread in threads:
                thread.start()
            running = len(threads)
            while running:
                done, failed = self._next(outcomes)
                if failed:
                    raise failed.pop()
                if done is _NOTHING:
                    running -= 1
                else:
                    yield done
        finally:
            stop.set()
            for thread in threads:
                if thread.ident is not None:  # Ctrl-C may come before all threads were started
                    thread.join()
            with contextlib.suppress(queue.Empty):
                while True:  # the errors of other workers hold this queue
                    outcomes.get_nowait()

    def close(self) -> None:
        self._host.close()

    @staticmethod
    def _next(outcomes: queue.Queue[_Outcome]) -> _Outcome:
        while True:  # a wait without a timeout does not notice Ctrl-C on every platform
            try:
                return outcomes.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
