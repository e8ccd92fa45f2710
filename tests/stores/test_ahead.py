"""Blocks that are fetched ahead: always the right bytes, never more memory than was given."""

from __future__ import annotations

import functools
import random
import threading
import time

import pytest

from stores.suite import noise
from streammerge.stores.ahead import LEAST_BLOCK_BYTES, Ahead

BLOCK = LEAST_BLOCK_BYTES


class File:
    """A file that counts what is fetched, and how many blocks are alive or under way."""

    def __init__(self, nbytes: int, seconds: float = 0.0, fails: int = -1) -> None:
        self.data, self.size, self.identity = noise(nbytes), nbytes, (id(self),)
        self.seconds, self.fails = seconds, fails
        self.fetched: list[int] = []
        self.running = self.most_running = 0
        self._lock = threading.Lock()

    def fetch(self, start: int, stop: int, buffers: object = None) -> memoryview:
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            self.fetched.append(start // BLOCK)
        time.sleep(self.seconds)
        with self._lock:
            self.running -= 1
        if start // BLOCK == self.fails:
            raise ConnectionError("gone")
        return memoryview(self.data)[start:stop]


def read(ahead: Ahead, file: File, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    ahead.read_into(file, memoryview(buffer), start)
    return bytes(buffer)


@pytest.mark.parametrize("blocks", [2, 3, 8, 40])
def test_many_readers_get_the_right_bytes(blocks: int) -> None:
    files, ahead, wrong = [File(BLOCK * 9 + 77), File(1), File(BLOCK)], Ahead(2 * blocks * BLOCK), list[int]()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            file = chance.choice(files)
            start, stop = sorted(chance.randint(0, file.size) for _ in range(2))
            if chance.random() < 0.5:
                ahead.announce(file, start, stop - start)
            if chance.random() < 0.8 and read(ahead, file, start, stop) != file.data[start:stop]:
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert len(ahead._blocks) <= blocks
    ahead.close()


def test_announced_blocks_are_fetched_at_once_and_in_order() -> None:
    file, ahead = File(BLOCK * 32, 0.2), Ahead(2 * 8 * BLOCK)
    began = time.monotonic()
    ahead.announce(file, 0, file.size)
    assert b"".join(read(ahead, file, at, at + BLOCK) for at in range(0, file.size, BLOCK)) == file.data
    assert time.monotonic() - began < 32 * 0.2 / 2
    assert sorted(file.fetched) == list(range(32))
    assert file.fetched[:2] == [0, 1]
    assert 4 <= file.most_running <= 8
    ahead.close()


def test_a_file_that_is_read_in_sequence_is_fetched_ahead() -> None:
    file, ahead = File(BLOCK * 16, 0.02), Ahead(2 * 16 * BLOCK)
    for at in range(0, file.size, BLOCK // 2):
        assert read(ahead, file, at, at + BLOCK // 2) == file.data[at : at + BLOCK // 2]
    assert sorted(file.fetched) == list(range(16))
    assert file.most_running > 1
    ahead.close()


def test_an_error_is_raised_by_the_reader_of_that_block() -> None:
    file, ahead = File(BLOCK * 4, fails=2), Ahead(2 * 8 * BLOCK)
    ahead.announce(file, 0, file.size)
    assert read(ahead, file, 0, BLOCK) == file.data[:BLOCK]
    for _ in range(2):
        with pytest.raises(ConnectionError):
            read(ahead, file, 2 * BLOCK, 3 * BLOCK)
    assert read(ahead, file, 3 * BLOCK, 4 * BLOCK) == file.data[3 * BLOCK :]
    ahead.close()


def test_a_reader_that_waits_is_stopped() -> None:
    file, ahead = File(BLOCK, 8.0), Ahead(2 * 4 * BLOCK)

    def halt() -> None:
        raise KeyboardInterrupt

    ahead.halt = halt
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        read(ahead, file, 0, 1)
    assert time.monotonic() - began < 6
    ahead.close()


@pytest.mark.parametrize("workers", [1, 4, 16])
@pytest.mark.parametrize("models", [3, 8])
@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.sampled(3)
def test_many_streams_side_by_side_fetch_each_block_once(workers: int, models: int, announced: bool) -> None:
    """With too few blocks each read dropped one that another worker still needed, and 20 times the bytes were fetched."""
    streams, piece = workers * models, 9 * BLOCK // 2
    files = [File(2 * workers * piece) for _ in range(models)]
    ahead, turns, wrong = Ahead(2 * 3 * streams * BLOCK, streams), iter(range(2 * workers)), list[int]()
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                turn = next(turns, None)
                if turn is None:
                    return
                if announced:
                    for file in files:
                        ahead.announce(file, turn * piece, piece)
            for at in range(turn * piece, (turn + 1) * piece, BLOCK // 4):
                for file in files:
                    if read(ahead, file, at, at + BLOCK // 4) != file.data[at : at + BLOCK // 4]:
                        wrong.append(at)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert len(ahead._blocks) <= max(3 * streams, 16)
    assert sum(len(file.fetched) for file in files) <= 1.2 * models * 2 * workers * 4.5
    ahead.close()


def test_what_is_due_first_is_fetched_first() -> None:
    """The begins of two ranges that are read side by side come before their ends."""
    first, second = File(BLOCK * 8), File(BLOCK * 8)
    order, lock = list[tuple[int, int]](), threading.Lock()

    def fetch(number: int, file: File, start: int, stop: int, buffers: object = None) -> memoryview:
        with lock:
            order.append((number, start // BLOCK))
        return memoryview(file.data)[start:stop]

    for number, file in enumerate((first, second)):
        file.fetch = functools.partial(fetch, number, file)  # type: ignore[method-assign]
    ahead = Ahead(2 * 2 * BLOCK, 2)
    for file in (first, second):
        ahead.announce(file, 0, file.size)
    for at in range(0, first.size, BLOCK):
        for file in (first, second):
            assert read(ahead, file, at, at + BLOCK) == file.data[at : at + BLOCK]
    places = {each: place for place, each in reversed([*enumerate(order)])}  # of a block that was fetched again, the first
    assert len(places) == 16
    assert len(order) <= 20
    assert all(places[0, index] < places[0, index + 1] for index in range(7))
    assert places[1, 0] < places[0, 7]
    ahead.close()


def test_the_blocks_that_another_stream_needs_last_are_dropped() -> None:
    """A block that was announced and not read comes back in its turn."""
    file, other = File(BLOCK * 4), File(BLOCK)
    ahead = Ahead(2 * 4 * BLOCK)
    ahead.announce(file, 0, file.size)
    while len([block for block in ahead._blocks.values() if block.done]) < 4:
        time.sleep(0.001)
    assert read(ahead, file, 0, 10) == file.data[:10]
    ahead.announce(other, 0, 1)
    ahead._blocks[file.identity, 3].due = 1 << 40
    assert read(ahead, other, 0, 1) == other.data[:1]
    assert read(ahead, file, 10, file.size) == file.data[10:]
    assert sorted(file.fetched) == [0, 1, 2, 3, 3]
    ahead.close()
