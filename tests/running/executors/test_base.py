"""The shared state of the workers of one process."""

from __future__ import annotations

import threading

import pytest

from streammerge.running.executors.base import Halted, Host


class Kept:
    def __init__(self, closed: list[object]) -> None:
        self._closed = closed

    def close(self) -> None:
        self._closed.append(self)


def test_one_thing_is_kept_at_a_time() -> None:
    host, closed = Host(lambda: False), list[object]()
    first = host.kept("a", lambda: Kept(closed))
    assert host.kept("a", lambda: Kept(closed)) is first
    assert not closed
    second = host.kept("b", lambda: Kept(closed))
    assert closed == [first]
    host.close()
    host.close()
    assert closed == [first, second]
    assert host.kept("b", lambda: Kept(closed)) is not second, "what was closed is not given out again"


def test_what_fails_to_be_made_is_made_by_the_next_one() -> None:
    host = Host(lambda: False)
    with pytest.raises(ZeroDivisionError):
        host.kept("a", lambda: Kept([1 // 0]))
    assert isinstance(host.kept("a", lambda: Kept([])), Kept)


def test_threads_make_it_once() -> None:
    host, made = Host(lambda: False), list[Kept]()
    together = threading.Barrier(8)

    def use() -> None:
        together.wait()
        made.append(host.kept("a", lambda: Kept([])))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(map(id, made))) == 1


def test_a_unit_is_abandoned_when_the_run_stops() -> None:
    stopping = [False]
    host = Host(lambda: stopping[0])
    host.check()
    stopping[0] = True
    with pytest.raises(Halted):
        host.check()
