"""Worker threads: the rules for every executor, and that no thread is left."""

from __future__ import annotations

import threading
from contextlib import closing

from running.executors.suite import ExecutorSuite
from running.executors.toys import Square
from streammerge.running.executors.threads import ThreadExecutor


class TestThreadExecutor(ExecutorSuite):
    executor = ThreadExecutor

    def test_no_thread_is_left_when_the_generator_is_closed(self) -> None:
        before = threading.active_count()
        with closing(ThreadExecutor(4)) as executor:
            results = executor.run(Square(), range(10_000))
            next(results)
            results.close()
            assert threading.active_count() == before
