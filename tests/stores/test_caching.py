"""Ranges of local files are read into the system's cache by threads that end when they are told."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until

from streammerge.errors import ChangedError
from streammerge.stores import system
from streammerge.stores.base import Input
from streammerge.stores.caching import CacheReader
from streammerge.stores.locations import parse

MIB = 1 << 20


class File(Input):
    """Notes the ranges that are read. Each waits until ``free`` is set."""

    def __init__(self) -> None:
        self.location, self.size = parse("memory://nowhere"), 1 << 40
        self.noted: list[tuple[int, int]] = []
        self.free = threading.Event()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        raise NotImplementedError

    def read_into_cache(self, offset: int, nbytes: int, sink: int) -> None:
        self.noted.append((offset, nbytes))
        assert self.free.wait(60)


def threads() -> list[Any]:
    return [each for each in threading.enumerate() if each.name == "streammerge-cache-reader"]


def test_ranges_are_read_in_parts_side_by_side_and_in_order() -> None:
    file = File()
    with closing(CacheReader(3)) as reader:
        reader.read(file, 5, 20 * MIB)
        reader.read(file, 100 * MIB, 7)
        wait_until(lambda: len(file.noted) == 3)
        file.free.set()
        wait_until(lambda: len(file.noted) == 4)
    assert sorted(file.noted) == [
        (5, 8 * MIB),
        (5 + 8 * MIB, 8 * MIB),
        (5 + 16 * MIB, 4 * MIB),
        (100 * MIB, 7),
    ]
    assert file.noted[3] == (100 * MIB, 7)
    assert not threads()


def test_what_waits_when_it_is_closed_is_not_read() -> None:
    file = File()
    reader = CacheReader(2)
    for number in range(10):
        reader.read(file, number, 1)
    wait_until(lambda: len(file.noted) == 2)
    closes = threading.Thread(target=reader.close)
    closes.start()
    wait_until(lambda: reader._closed)
    file.free.set()
    closes.join(60)
    assert len(file.noted) == 2
    assert not threads()


@pytest.mark.parametrize("allowed", [0, 1])
def test_where_fewer_threads_are_allowed_less_is_read_and_nothing_fails(
    allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `ulimit -u`, where Python raises RuntimeError."""
    start, started = threading.Thread.start, list[threading.Thread]()

    def limited(thread: threading.Thread) -> None:
        if len(started) == allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    file = File()
    file.free.set()
    with closing(CacheReader(4)) as reader:
        reader.read(file, 0, 7)
        wait_until(lambda: len(file.noted) == allowed)
    assert not threads()


def test_an_error_of_one_range_ends_no_thread() -> None:
    file = File()
    file.free.set()

    class Broken(File):
        def read_into_cache(self, offset: int, nbytes: int, sink: int) -> None:
            raise ChangedError("gone") if offset else OSError("broken")

    with closing(CacheReader(1)) as reader:
        for offset in (0, 1):
            reader.read(Broken(), offset, 1)
        reader.read(file, 7, 1)
        wait_until(lambda: file.noted)
    assert file.noted == [(7, 1)]


@pytest.mark.parametrize("size", [0, 1, 4096, 3 * MIB + 1])
def test_the_system_has_the_range_and_no_more_is_asked_of_a_shorter_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    before = sorted(os.listdir("/proc/self/fd"))
    file = parse(path).open()
    sink = os.open(os.devnull, os.O_WRONLY)
    with path.open("rb") as again:
        os.fsync(again.fileno())
        os.posix_fadvise(again.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.read_into_cache(0, size + 10 * MIB, sink)
        assert all(system.is_cached(again.fileno(), place) for place in range(0, size, 4096))
    os.close(sink)
    file.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
