"""Threads: what every executor keeps, and that none of them is left."""

from __future__ import annotations

import threading

import pytest

from running.executors.suite import ExecutorSuite
from streammerge.running.executors.threads import ThreadExecutor


class TestThreadExecutor(ExecutorSuite):
    executor = ThreadExecutor

    def test_an_error_ends_the_taking_of_tasks(self) -> None:
        ran: list[int] = []

        def fail(number: int) -> int:
            ran.append(number)
            if number == 20:
                raise KeyError("twenty")
            return number

        with pytest.raises(KeyError):
            list(ThreadExecutor(2).run(range(100_000), fail))
        assert len(ran) < 1000

    def test_no_thread_is_left_when_the_listener_stops(self) -> None:
        before = threading.active_count()
        results = ThreadExecutor(4).run(range(10_000), lambda number: number)
        next(results)
        results.close()
        assert threading.active_count() == before
